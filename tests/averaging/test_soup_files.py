"""Averages of files: every kind of tensor, in every format that is written, and what is said."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from dldr_ext.averaging import soup_files
from dldr_ext.averaging.soup_files import write_greedy_soup, write_mean
from dldr_ext.checkpoints import CheckpointError, Series
from dldr_ext.checkpoints.formats import read_contents

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, on rare dtypes
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
CODES = [d for name, d in vars(torch).items() if name.startswith("float8_")]
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
            torch.uint16, torch.uint32, torch.uint64)  # fmt: skip
SAFETENSORS_LACK = {"complex32", "complex128", "float8_e8m0fnu", "float4_e2m1fn_x2", "bits8"}


def state(i: int) -> dict[str, torch.Tensor]:
    """Numbers that are i times others, and constants."""
    x, z = torch.arange(1.0, 7).view(2, 3) * i, torch.full((2, 2), complex(i, -2 * i))
    found = {str(dtype)[6:]: x.to(dtype) for dtype in FLOATS}
    found |= {str(dtype)[6:]: z.to(dtype) for dtype in COMPLEX}
    found |= {str(dtype)[6:]: torch.tensor([3, i]).to(dtype) for dtype in INTEGERS}
    found |= {str(dtype)[6:]: torch.tensor([1.0, 2.0]).to(dtype) for dtype in CODES}
    return found | {
        "imaginary": z.clone().conj().imag,
        "conjugate": z.clone().conj(),
        "transposed": x.clone().T,
        "expanded": x[:, :1].expand(2, 4),
        "overlapping": x.as_strided((3, 2), (1, 1)),
        "number": torch.tensor(float(i)),
        "empty": torch.empty(0, 3),
        "mask": torch.full((3, 3), float("-inf")).triu(1),
        "placeholder": torch.tensor([float("nan"), float("inf"), 1.0]),
        "partly": torch.tensor([float(i), float("-inf")]),
        "constant": torch.tensor([7, 8]),
        "float4_e2m1fn_x2": torch.tensor([3], dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "bits8": torch.tensor([3], dtype=torch.uint8).view(torch.bits8),
    }


def run(folder, count: int = 3, make=state) -> Series:
    folder.mkdir(exist_ok=True)
    for i in range(1, count + 1):
        torch.save(make(i), folder / f"{i}.pt")
    return Series(folder, rows=False)


def check(found: dict[str, torch.Tensor], last: int = 3) -> None:
    expected = state(2)  # the mean of 1, 2 and 3
    for dtype in INTEGERS:
        expected[str(dtype)[6:]] = state(last)[str(dtype)[6:]]
    for name, tensor in found.items():
        plain = expected[name].resolve_conj().resolve_neg().contiguous()
        assert (tensor.dtype, tensor.shape) == (plain.dtype, plain.shape), name
        ours, theirs = (t.reshape(-1).view(torch.uint8) for t in (tensor, plain))
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("window", [1, 4, 1 << 20])
@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.bin", "x.ckpt", "x.pth.tar"])
def test_a_file_of_torch_save_has_every_kind(tmp_path, monkeypatch, window, name):
    monkeypatch.setattr(soup_files, "_WINDOW", window)
    notes = write_mean(run(tmp_path / "run"), tmp_path / name)
    for options in ({}, {"mmap": True}):
        found = torch.load(tmp_path / name, **options)
        assert list(found) == list(state(1))
        check(found)
    with zipfile.ZipFile(tmp_path / name) as archive:
        assert archive.testzip() is None
    contents = read_contents(tmp_path / name)
    assert contents.kind == "soup" and {
        entry.offset % 64 for entry in contents.entries.values()
    } == {0}
    said = " ".join(notes)
    assert "not averaged, but as in the last one: uint8, int8, int16, int32, int64 and 3" in said
    assert "same in every checkpoint, which are kept: mask, placeholder, partly" in said
    assert "bool" not in said and "constant" not in said


def test_a_safetensors_file_has_what_the_format_can_hold(tmp_path):
    series = run(tmp_path / "run")
    with pytest.raises(
        TypeError, match=r"complex32: a safetensors file cannot hold complex32: .*.pt"
    ):
        write_mean(series, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    series = Series(tmp_path / "run", rows=False, exclude=sorted(SAFETENSORS_LACK))
    for name in ("x.safetensors", "x.st", "X.SAFETENSORS"):
        notes = write_mean(series, tmp_path / name)
        found = load_file(tmp_path / name)
        assert set(found) == set(state(1)) - SAFETENSORS_LACK
        check(found)
        assert "left out (by the patterns): complex32, complex128, float8_e8m0fnu" in notes[0]


def test_a_greedy_soup_of_every_kind(tmp_path):
    series = run(tmp_path / "run")
    soup = write_greedy_soup(series, tmp_path / "x.pt", lambda state: 0.0)
    assert soup.members == [0, 1, 2]
    check(torch.load(tmp_path / "x.pt"))


def test_formats_of_one_run_may_differ(tmp_path):
    """A safetensors file, an old, a compressed and a plain one, in other dtypes."""
    x = torch.randn(4, 3, dtype=torch.float64)
    save_file({"w": x.float()}, tmp_path / "0.safetensors")
    torch.save({"w": x.T.contiguous().T}, tmp_path / "1.pt", _use_new_zipfile_serialization=False)
    torch.save({"w": (x * 4).half()}, tmp_path / "2.pt")
    paths = [tmp_path / name for name in ("0.safetensors", "1.pt", "2.pt")]
    write_mean(Series(paths, rows=False), tmp_path / "x.pt")
    found = torch.load(tmp_path / "x.pt")["w"]
    assert torch.equal(found, ((x.float().double() + x + (x * 4).half().double()) / 3).float())


@pytest.mark.parametrize("legacy", [False, True])
def test_ties_stay_ties(tmp_path, legacy):
    """In a .pt file tied weights are one tensor, where they are tied in every checkpoint."""
    for i in range(2):
        w, v = torch.randn(4, 3), torch.randn(2)
        made = {"emb": w, "head": w, "a": v, "b": v if i else v.clone(), "turned": w.T}
        torch.save(made, tmp_path / f"{i}.pt", _use_new_zipfile_serialization=not legacy)
    write_mean(Series(tmp_path, rows=False), tmp_path / "x.pt")
    found = torch.load(tmp_path / "x.pt")
    assert found["emb"].data_ptr() == found["head"].data_ptr()
    assert found["a"].data_ptr() != found["b"].data_ptr()
    assert torch.equal(found["a"], found["b"]) and torch.equal(found["turned"], found["emb"].T)
    write_mean(
        Series([tmp_path / f"{i}.pt" for i in range(2)], rows=False), tmp_path / "x.safetensors"
    )
    assert load_file(tmp_path / "x.safetensors").keys() == found.keys()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_tied_name_that_some_files_lack(tmp_path, order):
    """As safetensors has it: the tensor is averaged under the names of the first file."""
    w, v = torch.randn(3, 3), torch.randn(3, 3)
    save_file({"emb": v}, tmp_path / "v.safetensors")
    torch.save({"emb": w, "head": w, "turned": w.T}, tmp_path / "w.pt")
    paths = [tmp_path / ("w.pt", "v.safetensors")[i] for i in order]
    if order == (0, 1):
        with pytest.raises(CheckpointError, match="differs in turned"):
            write_mean(Series(paths, rows=False), tmp_path / "x.pt")
    expected = ((w.double() + v) / 2).float()
    for write in (write_mean, lambda *a: write_greedy_soup(*a, lambda _: 0.0)):
        write(Series(paths, rows=False, exclude="turned"), tmp_path / "x.pt")
        found = torch.load(tmp_path / "x.pt")
        assert list(found) == [["emb", "head"], ["emb"]][order[0]]
        assert all(torch.equal(tensor, expected) for tensor in found.values())
    notes = write_mean(Series(paths, rows=False, exclude="turned"), tmp_path / "x.pt")
    said = "left out (tied to another tensor, which is averaged): head" in notes
    assert said == (order == (1, 0))


def differing(make):
    return lambda i: {"w": torch.ones(2) * i, "x": make(i)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda i: torch.tensor([1.0 * i]).to(torch.float8_e4m3fn), r"float8_e4m3fn .*no mean"),
        (lambda i: torch.tensor([1.0 * i]).to(torch.float8_e5m2fnuz), r"float8_e5m2fnuz .*no mean"),
        (lambda i: torch.eye(2).to_sparse(), r"numbers, found a sparse tensor"),
        (lambda i: torch.eye(2).to_sparse_csr(), r"numbers, found a sparse tensor"),
        (lambda i: torch.quantize_per_tensor(torch.ones(2), i, 0, torch.qint8), "a quantized tens"),
        (lambda i: torch.empty(2, device="meta"), "found on the meta device"),
        (lambda i: torch.ones(i), r"expected shape \(1,\), as in the first, got \(2,\)"),
        (lambda i: torch.ones(1).to((torch.int64, torch.float32)[i - 1]), "expected int64, as in"),
        (lambda i: torch.ones(1).to((torch.float32, torch.complex64)[i - 1]), "got complex64"),
        (lambda i: torch.ones(1).to((torch.float32, torch.float8_e5m2)[i - 1]), "got float8_e5m2"),
        (lambda i: torch.tensor([1.0, float("inf")][i - 1]), "or the same in all checkpoints, got"),
        (lambda i: torch.tensor([[1.0, 1j], [1.0, float("nan") * 1j]][i - 1]), "got NaN or Inf"),
        (lambda i: torch.full((2,), 3e38 * i, dtype=torch.float64).to(
            (torch.float16, torch.float64)[i - 1]) if i > 1 else torch.ones(2).half(), "overflows"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_what_has_no_mean_is_refused_and_can_be_left_out(tmp_path, make, message, name):
    folder = tmp_path / "run"
    series = run(folder, 2, differing(make))
    with pytest.raises(CheckpointError, match=rf"x: .*{message}"):
        write_mean(series, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    notes = write_mean(Series(folder, rows=False, exclude="x"), tmp_path / name)
    assert notes == ["left out (by the patterns): x"]
    assert [t.name for t in read_contents(tmp_path / name).entries.values()] == ["w"]


def test_a_model_of_complex_numbers_or_integers_alone(tmp_path):
    for name, make in (
        ("complex", lambda i: {"spectral": torch.full((2,), complex(i, -i))}),
        ("integers", lambda i: {"count": torch.tensor(i)}),
    ):
        write_mean(run(tmp_path / name, 3, make), tmp_path / f"{name}.pt")
    assert torch.load(tmp_path / "complex.pt")["spectral"].tolist() == [2 - 2j] * 2
    assert torch.load(tmp_path / "integers.pt")["count"].item() == 3


def test_packed_weights_that_differ_are_pointed_out(tmp_path):
    def make(i):
        packed = torch.tensor([[i, 2], [3, 4]], dtype=torch.int32)
        return {"q.qweight": packed, "q.scales": torch.ones(2) * i}

    notes = write_mean(run(tmp_path / "run", 2, make), tmp_path / "x.pt")
    assert notes[0] == "not averaged, but as in the last one: q.qweight"
    assert notes[1].startswith("if integers such as q.qweight are packed weights, the average is")


def test_patterns_and_what_is_said(tmp_path):
    def make(i):
        made = {f"{name}.weight": torch.ones(2) * i for name in ("a", "b", "c")}
        return made | {"a.mask": torch.ones(2), "epoch": i, "norm.running_mean": torch.ones(1)}

    folder = tmp_path / "run"
    run(folder, 2, make)
    series = Series(folder, rows=False, include=["a.*", "b.*", "norm.*"], exclude="*.mask")
    notes = write_mean(series, tmp_path / "x.pt")
    assert list(torch.load(tmp_path / "x.pt")) == ["a.weight", "b.weight", "norm.running_mean"]
    assert notes[:2] == [
        "left out (by the patterns): c.weight, a.mask",
        "left out (not tensors): epoch",
    ]
    assert notes[2].startswith("batch-norm statistics were averaged")
    again = Series(folder, rows=False, exclude=["b.*", "d.*"], include=["*"])
    assert "no tensor has a name as d.*" in write_mean(again, tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match=r"expected patterns that let a tensor through: a.weight, b"
    ):
        write_mean(Series(folder, rows=False, include="no"), tmp_path / "y.pt")


def test_a_bad_one_is_left_out(tmp_path):
    folder = tmp_path / "run"
    run(folder, 3, lambda i: {"w": torch.ones(2 + (i == 2)) * i})
    series = Series(folder, rows=False, skip_bad=True)
    write_mean(series, tmp_path / "x.pt", weights=[1, 5, 3])
    assert torch.load(tmp_path / "x.pt")["w"].tolist() == [2.5, 2.5]
    assert [error.index for error in series.skipped] == [1]


def test_an_unknown_type_of_safetensors(tmp_path):
    """Of the format's newer types: named, not dropped."""
    for i in range(2):
        header = {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                  "q": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [4, 7]}}  # fmt: skip
        text = json.dumps(header).encode()
        data = torch.ones(1).numpy().tobytes() + b"abc"
        (tmp_path / f"{i}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    try:
        series = Series(tmp_path, rows=False)
    except CheckpointError as error:  # the installed library does not know it
        assert "not a whole safetensors file" in str(error)
        return
    with pytest.raises(CheckpointError, match="q: expected numbers, found of the type F6_E2M3"):
        write_mean(series, tmp_path / "x.safetensors")
