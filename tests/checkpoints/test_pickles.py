"""What else a file of torch.save holds is never run, and keeps no tensor from being read."""

from __future__ import annotations

import argparse
import codecs
import collections
import copyreg
import dataclasses
import datetime
import decimal
import enum
import fractions
import gzip
import os
import pathlib
import pickle
import pickletools
import random
import sys
import tarfile
import types
import uuid
import zipfile
from collections import UserDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tensor_kinds import rewritten, same, save_compressed, save_legacy, save_zip
from torch import nn

from dldr_ext.checkpoints import CheckpointError, Series
from dldr_ext.checkpoints.formats import read_contents
from dldr_ext.checkpoints.reader import CheckpointReader

RAN: list[str] = []  # what a file has made us do


def ran(*what):
    RAN.append(repr(what))
    return what


class Active:
    """A class of which every way to make or fill an instance is noticed."""

    def __new__(cls, *_):
        ran("new")
        return super().__new__(cls)

    def __init__(self, *_):
        ran("init")

    def __reduce__(self):
        return ran, ("reduce",)

    def __setstate__(self, state):
        ran("setstate")

    def __setitem__(self, key, value):
        ran("setitem")

    def append(self, value):
        ran("append")

    extend = append
    add = append


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


@dataclasses.dataclass
class Options:
    lr: float = 0.1
    path: pathlib.Path = pathlib.Path("x")


@dataclasses.dataclass
class TrainState:
    model: dict
    step: int = 3


class Slots:
    __slots__ = ("model",)


class Config(UserDict):
    pass


class Weights(collections.OrderedDict):
    pass


class Attributes(dict):
    __getattr__ = dict.__getitem__


Point = collections.namedtuple("Point", "x y")

OBJECTS = {
    "numpy scalars": [np.float64(1), np.float16(1), np.uint8(3), np.bool_(True), np.complex64(1j)],
    "numpy arrays": [np.arange(3.0), np.array(["a"]), np.array([None], object), np.ma.ones(2)],
    "numpy types": [np.dtype("f4"), np.float32, np.datetime64("2026-01-01")],
    "numpy random": [np.random.get_state(), np.random.default_rng(0), np.random.RandomState(0)],
    "python random": [random.getstate(), random.Random(3)],
    "torch": [torch.get_rng_state(), torch.device("cpu"), torch.float16, torch.Size([3])],
    "options": [argparse.Namespace(lr=1), types.SimpleNamespace(a=[1]), Options()],
    "paths": [pathlib.Path("a"), pathlib.PurePosixPath("b"), pathlib.PureWindowsPath("c")],
    "dates": [datetime.datetime.now(), datetime.timedelta(1), datetime.timezone.utc],
    "numbers": [1 << 80, 1j, decimal.Decimal("1.5"), fractions.Fraction(1, 3), float("nan")],
    "texts": [b"\0\xff", bytearray(b"x" * 300), "é" * 300, uuid.uuid4()],
    "enums": {Colour.RED: 1, Level.LOW: Colour, (Level.LOW, 3): {Colour.RED}},
    "containers": [
        collections.deque([1], 3),
        collections.Counter("aab"),
        collections.defaultdict(list, {"a": [1]}),
        collections.ChainMap({}),
        frozenset([1]),
        {2, 3},
        range(3),
        slice(1, 2),
        Point(1, 2),
        Weights(a=1),
        Config(a=1),
    ],
    "functions": [ran, len, Options, torch.relu, nn.Linear],
    "class": Options(path=None),
    "optimizers": [torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1, 0.9)],
    "schedules": [torch.optim.lr_scheduler.StepLR(torch.optim.Adam([torch.ones(1)]), 3)],
    "active": Active(),
    "storages": [torch.ones(3).untyped_storage()],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_runs():
    del RAN[:]
    yield
    assert RAN == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", list(OBJECTS))
@pytest.mark.parametrize("save", [save_zip, save_legacy, save_compressed])
def test_objects_beside_the_weights(tmp_path, what, save):
    for protocol in range(2, 6) if save is save_zip else [2]:
        saved = {"extra": OBJECTS[what], "model": {"w": torch.arange(3.0)}, "last": [OBJECTS[what]]}
        path = tmp_path / "0.pth"
        if save is save_zip:
            torch.save(saved, path, pickle_protocol=protocol)
        else:
            save(saved, path)
        del RAN[:]
        series = Series(path)
        row = torch.empty(series.numel)
        with CheckpointReader() as reader:
            series.read(reader, 0, 0, row)
        assert row.tolist() == [0, 1, 2]


def test_objects_among_the_weights_are_named(tmp_path):
    state = {"w": torch.ones(2), "epoch": 3, "x._extra_state": Options(), "a": np.ones(2)}
    for i in range(3):
        torch.save(state, tmp_path / f"{i}.pt")
    series = Series(tmp_path)
    assert series.names == ["w"]
    assert series.notes == ["left out (not tensors): epoch, x._extra_state, a"]


STATE = {"w": torch.randn(3), "b": torch.randn(2, 2)}


@pytest.mark.parametrize(
    "saved",
    [
        Weights(STATE),
        Config(STATE),
        Attributes(model=Attributes(STATE)),
        collections.defaultdict(int, STATE),
        types.SimpleNamespace(model=STATE, lr=3),
        argparse.Namespace(state_dict=STATE),
        TrainState(STATE),
        Config(model=Config(STATE)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_weights_in_an_object(tmp_path, saved):
    for protocol in (2, 4):
        torch.save(saved, tmp_path / "0.pt", pickle_protocol=protocol)
        assert Series(tmp_path / "0.pt").names == ["w", "b"]


def test_weights_in_a_slot(tmp_path):
    saved = Slots()
    saved.model = STATE
    torch.save(saved, tmp_path / "0.pt")
    assert Series(tmp_path / "0.pt").names == ["w", "b"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm1d(2)])
        self.register_buffer("mask", torch.ones(2))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.none = nn.Linear(2, 2, bias=False)
        self.tied = nn.Linear(2, 2, bias=False)
        self.tied.weight = self.none.weight
        self.options = {"a": torch.ones(3)}
        self.gru = nn.GRU(2, 2)


@pytest.mark.filterwarnings("ignore")  # of torch: save of a module in the old format
@pytest.mark.parametrize("save", [save_zip, save_legacy])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickled_module_is_its_state_dict(tmp_path, save, wrapped):
    net = Net()
    save({"epoch": 3, "model": nn.DataParallel(net)} if wrapped else net, tmp_path / "0.pt")
    entries = read_contents(tmp_path / "0.pt").entries
    assert list(entries) == list(net.state_dict())
    with CheckpointReader() as reader:
        for name, entry in entries.items():
            found = torch.empty(entry.shape, dtype=entry.dtype)
            reader.read(entry, 0, found.view(-1))
            same(found, net.state_dict()[name])


class Code:
    """A pickle, written opcode by opcode."""

    NAME = b"ctest_pickles\nran\n"
    CLASS = b"ctest_pickles\nActive\n"
    ATTACKS = {  # noqa: RUF012
        "reduce": NAME + b"(S'x'\ntR.",
        "reduce of a class": CLASS + b")R.",
        "newobj": CLASS + b")\x81.",
        "newobj_ex": CLASS + b")}\x92.",
        "inst": b"(itest_pickles\nActive\n.",
        "inst of a function": b"(S'x'\nitest_pickles\nran\n.",
        "obj": b"(" + CLASS + b"o.",
        "stack_global": b"\x80\x04\x8c\x0ctest_pickles\x8c\x03ran\x93)R.",
        "nested name": b"\x80\x04\x8c\x0ctest_pickles\x8c\x0dActive.extend\x93(NNtR.",
        "build": CLASS + b")\x81}b.",
        "build of a class": CLASS + b"N}S'append'\n" + NAME + b"s\x86b.",
        "setitem": CLASS + b")\x81S'a'\nS'b'\ns.",
        "setitems": CLASS + b")\x81(S'a'\nS'b'\nu.",
        "append": CLASS + b")\x81S'a'\na.",
        "appends": CLASS + b")\x81(S'a'\ne.",
        "additems": CLASS + b")\x81(S'a'\n\x90.",
        "eval": b"cbuiltins\neval\n(S\"__import__('test_pickles').ran()\"\ntR.",
        "python 2": b'c__builtin__\nexec\n(S"import test_pickles; test_pickles.ran()"\ntR.',
        "partial": b"cfunctools\npartial\n(" + NAME + b"S'x'\ntR)R.",
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'test_pickles'\ntRS'ran'\ntR)R.",
        "map": b"cbuiltins\nlist\n(cbuiltins\nmap\n(" + NAME + b"(S'x'\nltRtR.",
        "rebuild of a type": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + NAME + CLASS + b")}tR.",
        "rebuild of a parameter": b"ctorch._utils\n_rebuild_parameter\n(" + NAME + b")NtR.",
        "reconstructor": b"ccopyreg\n_reconstructor\n(" + CLASS + NAME + b")tR.",
        "default": b"ccollections\ndefaultdict\n(" + NAME + b"tRS'a'\nS'b'\ns.",
        "extension": b"\x82\xf0)R.",
        "dtype of a name": b"ctorch\nos\n)R.",
        "persistent": b"(S'storage'\n" + NAME + b"S'0'\nS'cpu'\nI3\ntQ.",
        "persistent by text": b"Pstorage\n.",
        "import": b"cantigravity\nfly\n)R.",
    }


AUDITED = (
    "os.",
    "subprocess",
    "exec",
    "compile",
    "import",
    "pickle.find_class",
    "socket",
    "ctypes",
)
_watching = [False]


def _audit(event, args):
    if _watching[0] and event.startswith(AUDITED):
        RAN.append(f"{event} {args}")


sys.addaudithook(_audit)
# Imported by the first file with names or texts in them, in whichever test that is.
for _name in ("cp437", "raw_unicode_escape", "ascii", "latin-1"):
    codecs.lookup(_name)


def read_watched(path):
    """Read a file; whatever is imported, looked up or run is noted down."""
    _watching[0] = True
    try:
        return read_contents(path).entries
    finally:
        _watching[0] = False


@pytest.mark.parametrize("attack", list(Code.ATTACKS))
def test_nothing_in_a_file_is_run(tmp_path, attack):
    copyreg.add_extension("test_pickles", "ran", 0xF0)
    copyreg._extension_cache[0xF0] = ran
    try:
        _every_way(tmp_path, Code.ATTACKS[attack])
    finally:
        copyreg.remove_extension("test_pickles", "ran", 0xF0)
        copyreg._extension_cache.pop(0xF0, None)
    assert "antigravity" not in sys.modules


def _every_way(tmp_path, attack):
    path = tmp_path / "x.pt"
    save_zip({"w": torch.ones(2)}, path)
    read_contents(path)  # what reading itself imports
    pickles = lambda name, data: attack if name.endswith("data.pkl") else data  # noqa: E731
    for options in ({}, {"compression": zipfile.ZIP_DEFLATED}):
        rewritten({"w": torch.ones(2)}, path, pickles, **options)
        _read_or_refused(path)

    def beside(name, data):
        start, end = data[:2] + b"}(X\1\0\0\0a", b"X\1\0\0\0m" + data[2:-1] + b"u."
        return start + attack[:-1] + end if name.endswith("data.pkl") else data

    rewritten({"w": torch.ones(2)}, path, beside)
    _read_or_refused(path)
    save_legacy({"w": torch.ones(2)}, path)
    whole = path.read_bytes()
    ends = []
    with open(path, "rb") as file:
        for _ in range(3):
            pickle.load(file)
            ends.append(file.tell())
    for start in (b"", *(whole[:end] for end in ends)):
        path.write_bytes(start + attack + whole)
        _read_or_refused(path)


def _read_or_refused(path):
    try:
        read_watched(path)
    except CheckpointError as error:
        assert str(path) in str(error)


@settings(max_examples=20_000 if os.environ.get("DLDR_EVERY_CASE") else 300, deadline=None)
@given(st.data())
def test_nothing_in_a_damaged_file_is_run(tmp_path_factory, data):
    """The old format has no checksums: any change reaches the unpickler."""
    folder = tmp_path_factory.getbasetemp()
    source, path = folder / "whole.pth", folder / "changed.pth"
    if not source.exists():
        extra = [np.float64(1), Options(), {1, 2}, torch.Size([1]), collections.Counter("ab"), ran]
        saved = {"model": {"w": torch.ones(2), "s": torch.eye(2).to_sparse()}, "extra": extra}
        save_legacy(saved, source)
        read_contents(source)  # what reading itself imports
    whole = bytearray(source.read_bytes())
    codes = st.sampled_from(sorted(ord(op.code) for op in pickletools.opcodes))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255) | codes)
    path.write_bytes(whole)
    _read_or_refused(path)
    assert RAN == []


def test_the_tables_of_the_unpickler_stay(tmp_path):
    """A file cannot reach what the next one is read with."""
    save_zip({"w": torch.ones(2)}, tmp_path / "good.pt")
    attack = (
        b"\x80\x02ccollections\nOrderedDict\nq\0}S'update'\nS'x'\nsb"  # BUILD of a class
        b"ctorch._utils\n_rebuild_tensor_v2\nN}S'__code__'\nS'x'\ns\x86b0"
        b"h\0S'a'\nS'b'\ns0h\0(S'a'\ne0h\0)R."
    )
    rewritten({}, tmp_path / "x.pt", lambda n, data: attack if n.endswith("data.pkl") else data)
    _read_or_refused(tmp_path / "x.pt")
    assert Series(tmp_path / "good.pt").names == ["w"]
    assert collections.OrderedDict(a=1) == {"a": 1}


def numpy_archive(path):
    np.savez(path.with_suffix(".npz"), a=np.ones(2))
    path.with_suffix(".npz").rename(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: torch.jit.script(nn.Linear(2, 2)).save(str(p)), "found a TorchScript archive"),
        (numpy_archive, "found a zip archive of a.npy"),
        (lambda p: p.write_bytes(pickle.dumps({"w": 1})), "found a pickle of a dict"),
        (lambda p: p.write_bytes(pickle.dumps(Options())), "found a pickle of a test_pickles.Opt"),
        (lambda p: p.write_bytes(gzip.compress(b"x")), "found a gzip archive"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        (lambda p: p.write_text("<!DOCTYPE html><html>Not found"), "found an HTML page"),
        (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n"), "found an HDF5 file"),
        (lambda p: tarfile.open(p, "w").close(), "found a tar archive"),
        (lambda p: torch.save(None, p), "expected a state dict, found a NoneType"),
    ],
)  # fmt: skip
def test_whole_files_of_another_kind_are_named(tmp_path, write, message):
    path = tmp_path / "x.pth"
    write(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_contents(path)
    assert "corrupt" not in str(caught.value)


def test_files_without_checksums(tmp_path):
    """`torch.serialization.set_crc32_options(False)` makes saving faster."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "0.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert Series(tmp_path / "0.pt").names == ["w", "b"]


def test_a_read_only_file_in_a_read_only_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for save, name in ((save_zip, "0.pt"), (save_legacy, "1.pt"), (save_compressed, "2.pt")):
        save(STATE, folder / name)
        (folder / name).chmod(0o444)
    folder.chmod(0o555)
    try:
        series = Series(folder)
        row = torch.empty(series.numel)
        with CheckpointReader() as reader:
            series.read(reader, 2, 0, row)
        assert torch.equal(row, torch.cat([t.view(-1) for t in STATE.values()]))
    finally:
        folder.chmod(0o755)
