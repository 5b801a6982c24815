"""Every kind of tensor in a file of torch.save is read to the bit, or named and left out."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import NamedTuple

import pytest
import torch
from torch import nn

from dldr_ext.checkpoints import CheckpointError, Series
from dldr_ext.checkpoints.formats import read_contents
from dldr_ext.checkpoints.reader import CheckpointReader

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch: complex32, nested, CSR

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOAT8 = [dtype for name, dtype in vars(torch).items() if name.startswith("float8_")]
INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)


class Marked(torch.Tensor):
    """A subclass that is only a name."""


def number_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    values, z = torch.randn(6, 4) * 3, torch.randn(5, 2, dtype=torch.complex64)
    found = {str(dtype): values.to(dtype) for dtype in (*FLOATS, *FLOAT8)}
    found |= {str(dtype): (values.abs() * 9).to(dtype) for dtype in (*INTEGERS, torch.bool)}
    found |= {str(dtype): z.to(dtype) for dtype in COMPLEX}
    attribute = torch.randn(3)
    attribute.note = "kept with it"
    parameter = nn.Parameter(torch.randn(3))
    parameter.note = "kept with it"
    return found | {
        "conj": z.conj(),
        "conj of a transposed": z.clone().T.conj(),
        "imag of conj": z.clone().conj().imag,
        "neg of a slice": torch._neg_view(values.clone())[1::2, ::3],
        "conj and neg": torch._neg_view(z.clone()).conj(),
        "transposed": values.clone().T,
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.randn(3, 1).expand(3, 7),
        "expanded from one": torch.randn(1).expand(4, 2),
        "overlapping": torch.randn(12).as_strided((4, 3), (2, 1), 1),
        "steps": torch.randn(20)[3::4],
        "number": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "ones": torch.randn(1, 5, 1).transpose(0, 2),
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "parameter with an attribute": parameter,
        "attribute": attribute,
        "buffer": nn.Buffer(torch.randn(2)),
        "subclass": torch.randn(3).as_subclass(Marked),
    }


def save_zip(state, path):
    torch.save(state, path)


def save_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def rewritten(state, path, changed=lambda name, data: data, **options):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", **options) as target:
        for name in source.namelist():
            target.writestr(name, changed(name, source.read(name)))


def save_compressed(state, path):
    rewritten(state, path, compression=zipfile.ZIP_DEFLATED)


def save_big_endian(state, path):
    """What a big-endian machine writes: one file for each tensor has one width of number."""
    (tensor,) = state.values()
    width = tensor.element_size() // (2 if tensor.is_complex() else 1)

    def swapped(name, data):
        if name.endswith("byteorder"):
            return b"big"
        if "/data/" not in name:
            return data
        return b"".join(data[at : at + width][::-1] for at in range(0, len(data), width))

    rewritten(state, path, swapped)


def read_all(path):
    with CheckpointReader() as reader:
        for name, entry in read_contents(path).entries.items():
            flat = torch.empty(entry.nbytes() // entry.dtype.itemsize, dtype=entry.dtype)
            for begin in range(0, len(flat), 5):  # pieces that begin anywhere
                reader.read(entry, begin, flat[begin : begin + 5])
            yield name, flat.view(entry.shape)


def same(found, expected):
    expected = expected.detach().resolve_conj().resolve_neg().contiguous()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    flat = [t.as_subclass(torch.Tensor).reshape(-1).view(torch.uint8) for t in (found, expected)]
    assert torch.equal(*flat)


def save_bzip2(state, path):
    rewritten(state, path, compression=zipfile.ZIP_BZIP2)


def save_lzma(state, path):
    rewritten(state, path, compression=zipfile.ZIP_LZMA)


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_compressed, save_bzip2, save_lzma])
def test_each_is_read_to_the_bit(tmp_path, save):
    tensors = number_tensors()
    save(tensors, tmp_path / "x.pt")
    found = dict(read_all(tmp_path / "x.pt"))
    assert list(found) == list(tensors)
    for name, tensor in found.items():
        same(tensor, tensors[name])


def test_each_of_a_big_endian_machine(tmp_path):
    for tensor in number_tensors().values():
        save_big_endian({"x": tensor}, tmp_path / "x.pt")
        ((_, found),) = read_all(tmp_path / "x.pt")
        same(found, tensor)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_every_protocol_of_pickle(tmp_path, protocol):
    state = {"w": torch.randn(300), "b": torch.randn(2).to(torch.float8_e5m2), "é\ud800": None}
    for i in range(300):
        state[f"layer.{i}"] = torch.full((1,), float(i))
    torch.save(state, tmp_path / "x.pt", pickle_protocol=protocol)
    found = dict(read_all(tmp_path / "x.pt"))
    del state["é\ud800"]
    assert list(found) == list(state)
    for name, tensor in found.items():
        same(tensor, state[name])


@pytest.mark.parametrize("encrypted", [False, True])
def test_an_archive_that_python_cannot_unpack_is_no_corrupt_one(tmp_path, encrypted):
    save_compressed({"w": torch.ones(3)}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    at = data.rindex(b"PK\1\2")  # of the last record in the directory
    data[at + (8 if encrypted else 10)] = 1 if encrypted else 93  # Zstandard
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"expected a zip archive that Python reads .* pack"):
        read_contents(tmp_path / "x.pt")


def unusual():
    w = torch.eye(3)
    return {
        "meta": (torch.empty(2, device="meta"), "on the meta device: it has no values"),
        "quantized": (torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "a quantized tensor"),
        "channels": (
            torch.quantize_per_channel(w, torch.ones(3), torch.zeros(3), 0, torch.quint8),
            "a quantized tensor",
        ),
        "coo": (w.to_sparse(), "a sparse tensor (torch.sparse_coo)"),
        "csr": (w.to_sparse_csr(), "a sparse tensor (torch.sparse_csr)"),
        "bsc": (torch.eye(4).to_sparse_bsc((2, 2)), "a sparse tensor (torch.sparse_bsc)"),
        "nested": (torch.nested.nested_tensor([w[0, :1], w[0]]), "a nested tensor"),
        "bits": (torch.zeros(3, dtype=torch.uint8).view(torch.bits8), "not floating-point"),
        "jagged": (
            torch.nested.nested_tensor([w[0, :1], w[0]], layout=torch.jagged),
            "a torch.nested._internal.nested_tensor.NestedTensor",
        ),
        "lazy": (nn.LazyLinear(3).weight, "a parameter of a lazy module that has not run yet"),
        "float4": (torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "of dtype"),
    }


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_compressed])
def test_others_are_named_and_left_out(tmp_path, save):
    for name, (tensor, what) in unusual().items():
        path = tmp_path / "0.pt"
        save({"w": torch.ones(3), name: tensor}, path)
        series = Series(path)
        assert series.names == ["w"], name
        assert any(what in note and name in note for note in series.notes), (name, series.notes)
        row = torch.empty(3)
        with CheckpointReader() as reader:
            series.read(reader, 0, 0, row)
        assert row.tolist() == [1, 1, 1]


def test_a_parameter_that_has_no_numbers_is_refused(tmp_path):
    model = nn.Linear(2, 3, bias=False)
    torch.save({"weight": model.weight.detach().to_sparse()}, tmp_path / "0.pt")
    with pytest.raises(CheckpointError, match=r"weight: expected a tensor of numbers, found a spa"):
        Series(tmp_path / "0.pt", model)


class Packed(torch.Tensor):
    """A wrapper subclass, as torchao's: its values are in tensors inside."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(str(function))


def test_a_subclass_with_values_of_its_own(tmp_path):
    state = {"w": torch.ones(3), "q": Packed(torch.ones(2, 2, dtype=torch.int8))}
    torch.save(state, tmp_path / "0.pt")
    series = Series(tmp_path / "0.pt")
    assert series.names == ["w"]
    assert any(note.endswith("Packed): q") for note in series.notes)


def test_distributed_tensors(tmp_path):
    """A DTensor is read where the file has all of it."""
    from torch import distributed
    from torch.distributed import tensor as dtensors

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = dtensors.init_device_mesh("cpu", (1,))
        values = torch.randn(4, 3)
        whole = dtensors.distribute_tensor(values, mesh, [dtensors.Shard(0)])
        pending = dtensors.DTensor.from_local(values, mesh, [dtensors.Partial()])
        part = dtensors.DTensor.from_local(
            values, mesh, [dtensors.Shard(0)], run_check=False, shape=(8, 3), stride=(3, 1)
        )
        torch.save({"a": whole, "b": pending, "c": part}, tmp_path / "0.pt")
    finally:
        distributed.destroy_process_group()
    found = read_contents(tmp_path / "0.pt").entries
    assert found["a"].problem is None
    assert "a DTensor" in found["b"].problem and "a DTensor" in found["c"].problem
    assert Series(tmp_path / "0.pt").names == ["a"]


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_compressed])
def test_tied_weights_count_once(tmp_path, save):
    w = torch.randn(4, 3)
    tied = {"emb": w, "head": w, "transposed": w.T, "reshaped": w.view(2, 6), "flat": w.view(-1)}
    save(tied | {"other": w.clone(), "part": w[:2], "minus": torch._neg_view(w)}, tmp_path / "0.pt")
    series = Series(tmp_path / "0.pt")
    assert series.names == ["emb", "other", "part", "minus"]
    assert any("tied to another tensor" in note and "transposed" in note for note in series.notes)


def tied_or_not(kind):
    """A file with a tied pair, with two tensors, or with one name of the pair."""
    first, second = torch.randn(3, 3), torch.randn(3, 3)
    pair = {"tied": {"head": first}, "apart": {"head": second}, "turned": {"head": first.T}}
    return {"emb": first, **pair.get(kind, {}), "other": torch.randn(2)}


@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        (("tied", "tied"), ["emb", "other"]),
        (("tied", "turned"), ["emb", "other"]),
        (("tied", "apart"), ["emb", "head", "other"]),
        (("tied", "tied", "apart", "tied"), ["emb", "head", "other"]),
        (("apart", "tied"), ["emb", "head", "other"]),
        (("tied", "without"), ["emb", "other"]),
        (("without", "tied"), ["emb", "other"]),
        (("without", "apart"), "found head as well"),
        (("apart", "without"), "expected the tensor head of the first checkpoint"),
        (("tied", "without", "apart"), "found head as well"),
    ],
)
def test_ties_in_some_of_the_files(tmp_path, kinds, names):
    """They count once only where they are tied in every file."""
    states = [tied_or_not(kind) for kind in kinds]
    for i, state in enumerate(states):
        torch.save(state, tmp_path / f"{i}.pt")
    if isinstance(names, str):
        with pytest.raises(CheckpointError, match=names):
            Series(tmp_path)
        return
    series = Series(tmp_path)
    assert series.names == names
    said = any("tied to another tensor, which counts): head" in note for note in series.notes)
    assert said == (kinds[0] == "tied" and "head" not in names)
    with CheckpointReader() as reader:
        for t, state in enumerate(states):
            row = torch.empty(series.numel)
            series.read(reader, t, 0, row)
            assert torch.equal(row, torch.cat([state[name].reshape(-1) for name in names]))


def test_a_compressed_file_is_not_loaded_whole(tmp_path, monkeypatch):
    """Windows of several files, turn by turn: each is inflated once, in pieces."""
    states = [{"a": torch.randn(1000), "b": torch.randn(3, 700)} for _ in range(3)]
    for i, state in enumerate(states):
        save_compressed(state, tmp_path / f"{i}.pt")
    opened = []
    original = zipfile.ZipFile.open
    monkeypatch.setattr(
        zipfile.ZipFile, "open", lambda *a, **k: opened.append(a[1]) or original(*a, **k)
    )
    series = Series(tmp_path)
    del opened[:]
    rows = [torch.empty(series.numel) for _ in states]
    with CheckpointReader() as reader:
        for begin in range(0, series.numel, 100):
            for t, row in enumerate(rows):
                series.read(reader, t, begin, row[begin : begin + 100])
    for state, row in zip(states, rows, strict=True):
        assert torch.equal(row, torch.cat([state["a"], state["b"].view(-1)]))
    assert len(opened) == 6


class Old(NamedTuple):
    """A tensor as torch 0.3 pickled it: of a storage, or of a view of one."""

    storage: tuple
    begin: int
    shape: tuple
    stride: tuple


def save_as_torch_03(tensors, storages, path):
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value if isinstance(value, tuple) and value[:1] == ("storage",) else None

    with open(path, "wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(value, file, protocol=2)
        rebuilt = {name: Rebuilt(tensor) for name, tensor in tensors.items()}
        Pickler(file, protocol=2).dump(rebuilt)
        pickle.dump(list(storages), file, protocol=2)
        for values in storages.values():
            file.write(values.numel().to_bytes(8, "little") + values.numpy().tobytes())


class Rebuilt:
    def __init__(self, old):
        self.old = old

    def __reduce__(self):
        return torch._utils._rebuild_tensor, tuple(self.old)


def test_views_of_storages_as_torch_03_wrote_them(tmp_path):
    floats, doubles = torch.arange(12.0), torch.arange(6.0, dtype=torch.float64)
    whole = ("storage", torch.FloatStorage, "a", "cpu", 12, None)
    part = ("storage", torch.FloatStorage, "a", "cuda:0", 12, ("b", 4, 6))
    other = ("storage", torch.DoubleStorage, "c", "cpu", 6, None)
    tensors = {
        "whole": Old(whole, 0, (3, 4), (4, 1)),
        "part": Old(part, 1, (2, 2), (2, 1)),
        "other": Old(other, 2, (2,), (3,)),
    }
    save_as_torch_03(tensors, {"a": floats, "c": doubles}, tmp_path / "x.pth")
    loaded = torch.load(tmp_path / "x.pth", map_location="cpu", weights_only=False)
    found = dict(read_all(tmp_path / "x.pth"))
    assert found["part"].tolist() == [[5, 6], [7, 8]] and found["other"].tolist() == [2, 5]
    for name, tensor in found.items():
        same(tensor, loaded[name])
