"""Unpickling without running anything: tensors become places, objects become their attributes.

A pickle is a program that calls what it names. Here a name never becomes the thing it names: only
the few functions below, which make containers and descriptions of tensors, can be called, and every
other call gives a `Stub`. Nothing is imported, and no attribute of an object is set.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Untyped": torch.uint8,
    # The codes of quantized tensors.
    "QUInt8": torch.uint8,
    "QInt8": torch.int8,
    "QInt32": torch.int32,
    "QUInt4x2": torch.uint8,
    "QUInt2x4": torch.uint8,
}
_DEPTH = 6  # of nested dicts in which modules are looked for
_DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}


class Storage(NamedTuple):
    """The memory of tensors, somewhere in the file."""

    dtype: torch.dtype
    key: str
    numel: int
    begin: int = 0  # elements before it, of a view of a storage


class Place(NamedTuple):
    """Where a tensor lies in its storage; or why it cannot be read."""

    storage: Storage | None
    begin: int = 0  # elements of the tensor's dtype
    conj: bool = False
    neg: bool = False
    problem: str | None = None


class Stub(dict[Any, Any]):
    """An object that is not made: its items, attributes and arguments that are dicts."""

    def __init__(self, name: str, args: Iterable[Any] = ()) -> None:
        super().__init__()
        self.name, self.args, self.state = name, tuple(args), cast(Any, None)
        for arg in self.args:
            if isinstance(arg, dict):
                self.update(arg)

    def build(self, state: Any) -> None:
        """Take in what pickle would set as attributes."""
        self.state = state
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.update(part)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __repr__(self) -> str:
        return f"<{self.name}>"


class _Name(NamedTuple):
    """What the file names, a function or a class: never looked up."""

    name: str


def place_of(tensor: Tensor) -> Place:
    """Return where a tensor that `load` gave lies."""
    place: Place = tensor._place  # type: ignore[attr-defined]
    return place


def load(file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """Unpickle one object from a file, and leave the file after it.

    Tensors come on the meta device: `place_of` tells where their values are. An ``nn.Module`` comes
    as its state dict.

    Returns
    -------
    object
    dict of str to Storage
        Those that it mentions, by key.

    Raises
    ------
    Exception
        Any, if the pickle is damaged.
    """
    unpickler = _Unpickler(file, encoding="utf-8", errors="surrogateescape")
    unpickler.storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on rare dtypes
        return _with_state_dicts(unpickler.load()), unpickler.storages


class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def persistent_load(self, pid: Any) -> Any:
        kind, *data = pid
        if kind in ("module", b"module"):  # a class and its source, before torch 1.6
            return data[0]
        kind, key, _, numel, *view = data
        storage = Storage(_storage_dtype(kind), _text(key), _count(numel))
        self.storages.setdefault(storage.key, storage)
        if view and view[0] is not None:
            _, begin, size = view[0]
            storage = storage._replace(begin=_count(begin), numel=_count(size))
        return storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return _Name(f"{module}.{name}")

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1], args)

    def _newobj_ex(self) -> None:
        del self.stack[-1]
        self._reduce()

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(_called(klass, args))

    def _build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Stub):
            self.stack[-1].build(state)

    def _set(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _setitems(self) -> None:
        self._set(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self.pop_mark())

    def _additems(self) -> None:
        items = self.pop_mark()
        if isinstance(self.stack[-1], set):
            self.stack[-1].update(items)

    def _bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    def _refused(self) -> None:
        raise pickle.UnpicklingError("an opcode that torch.save does not write")

    storages: dict[str, Storage]
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    for _opcode, _function in (
        (pickle.REDUCE, _reduce),
        (pickle.NEWOBJ, _reduce),
        (pickle.NEWOBJ_EX, _newobj_ex),
        (pickle.BUILD, _build),
        (pickle.SETITEM, _setitem),
        (pickle.SETITEMS, _setitems),
        (pickle.APPEND, _append),
        (pickle.APPENDS, _appends),
        (pickle.ADDITEMS, _additems),
        (pickle.BYTEARRAY8, _bytearray8),
        (pickle.NEXT_BUFFER, _refused),
        (pickle.READONLY_BUFFER, _refused),
        (pickle.EXT1, _refused),
        (pickle.EXT2, _refused),
        (pickle.EXT4, _refused),
    ):
        dispatch[_opcode[0]] = _function


def _called(function: Any, args: Any) -> Any:
    """Return what a call gives: of all functions but the known ones, a stub."""
    if not isinstance(function, _Name):
        return Stub(type(function).__name__, args)
    known = _KNOWN.get(function.name)
    return Stub(function.name, args) if known is None else known(*args)


def _storage_dtype(kind: Any) -> torch.dtype:
    if isinstance(kind, torch.dtype):
        return kind
    name = kind.name.rpartition(".")[2]
    return STORAGES[name.removesuffix("Storage")]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise pickle.UnpicklingError(f"expected a count, found {value!r:.40}")
    return value


def _tensor(place: Place, dtype: torch.dtype, shape: Any, stride: Any = None) -> Tensor:
    shape = tuple(map(_count, shape))
    tensor: Any = (
        torch.empty(shape, dtype=dtype, device="meta")
        if stride is None
        else torch.empty_strided(shape, tuple(map(_count, stride)), dtype=dtype, device="meta")
    )
    tensor._place = place
    return cast(Tensor, tensor)


def _unreadable(problem: str, shape: Any = (), dtype: Any = torch.uint8) -> Tensor:
    if not isinstance(dtype, torch.dtype):
        dtype = torch.uint8
    return _tensor(Place(None, problem=problem), dtype, shape)


def _strided(
    storage: Storage, begin: Any, shape: Any, stride: Any, *rest: Any, dtype: Any = None
) -> Tensor:
    metadata = next((part for part in rest[2:] if isinstance(part, dict)), {})
    place = Place(storage, _count(begin), bool(metadata.get("conj")), bool(metadata.get("neg")))
    return _tensor(place, dtype or storage.dtype, shape, stride)


def _strided_v3(storage: Storage, begin: Any, shape: Any, stride: Any, *rest: Any) -> Tensor:
    _, _, dtype, *metadata = rest
    return _strided(storage, begin, shape, stride, *rest[:2], *metadata, dtype=dtype)


def _quantized(storage: Storage, begin: Any, shape: Any, *_: Any) -> Tensor:
    return _unreadable("a quantized tensor", shape, storage.dtype)


def _sparse(layout: Any, data: Any) -> Tensor:
    values, shape = (data[1], data[2]) if len(data[0].shape) == 2 else (data[2], data[3])
    return _unreadable(f"a sparse tensor ({_text(layout)})", shape, values.dtype)


def _nested(values: Tensor, *_: Any) -> Tensor:
    return _unreadable("a nested tensor", values.shape, values.dtype)


def _meta(dtype: Any, shape: Any, *_: Any) -> Tensor:
    return _unreadable("on the meta device: it has no values", shape, dtype)


def _wrapper_subclass(kind: _Name, dtype: Any, shape: Any, *_: Any) -> Tensor:
    return _unreadable(f"a {kind.name}", shape, dtype)


def _from_type(function: _Name, kind: Any, args: Any, state: Any) -> Any:
    """Return a tensor of a subclass: its values, where the subclass is only a name for them."""
    tensor = _called(function, args)
    if not isinstance(tensor, Tensor):
        return _unreadable(f"a {kind.name}")
    if place_of(tensor).problem is None:
        return tensor
    attributes = Stub("")
    attributes.build(state)
    local, spec = attributes.get("_local_tensor"), attributes.get("_spec", {})
    if not isinstance(local, Tensor):
        return tensor
    placements = spec.get("placements", ()) if isinstance(spec, dict) else ()
    if local.shape == tensor.shape and not any("Partial" in repr(p) for p in placements):
        return local
    problem = f"a DTensor, of which this file has the part of one rank, {tuple(local.shape)}"
    return _unreadable(problem, tensor.shape, tensor.dtype)


def _uninitialized(*_: Any) -> Tensor:
    return _unreadable("a parameter of a lazy module that has not run yet")


def _array(data: Any, dtype: Any, *_: Any) -> Tensor:
    return _unreadable("a tensor of another device, kept as an array", (), dtype)


def _number(kind: Any, data: Any) -> Any:
    """Return a scalar of NumPy, if it is a number."""
    if isinstance(kind, Stub) and isinstance(kind.state, tuple) and isinstance(data, bytes):
        code = f"{kind.state[1]}{kind.args[0]}"
        if re.fullmatch("[<>][fiu][248]|[|][iub]1", code):
            return np.frombuffer(data, code)[0].item()
    return Stub("a scalar of NumPy")


_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *_: {},
    "builtins.set": lambda items=(): set(items),
    "__builtin__.set": lambda items=(): set(items),
    "_codecs.encode": lambda text, *_: text.encode("latin1"),  # how protocol 2 has bytes
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "torch.Size": lambda sizes: tuple(sizes),
    "torch.serialization._get_layout": lambda name: name,
    "copyreg._reconstructor": lambda kind, base, state: Stub(kind.name, (state,)),
    "copy_reg._reconstructor": lambda kind, base, state: Stub(kind.name, (state,)),
    "torch._utils._rebuild_tensor": _strided,
    "torch._utils._rebuild_tensor_v2": _strided,
    "torch._utils._rebuild_tensor_v3": _strided_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _sparse,
    "torch._utils._rebuild_nested_tensor": _nested,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_wrapper_subclass": _wrapper_subclass,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda tensor, *_: tensor,
    "torch._utils._rebuild_device_tensor_from_numpy": _array,
    "torch._utils._rebuild_xla_tensor": _array,
    "torch.nn.parameter.UninitializedParameter": _uninitialized,
    "torch.nn.parameter.UninitializedBuffer": _uninitialized,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
}


def _with_state_dicts(saved: Any) -> Any:
    """Put the state dict of a pickled module in its place, wherever one is in nested dicts."""
    seen: set[int] = set()

    def replaced(value: Any, depth: int) -> Any:
        if _is_module(value):
            return _state_dict(value, "", ())
        if isinstance(value, dict) and depth < _DEPTH and id(value) not in seen:
            seen.add(id(value))
            for key, inner in value.items():
                if isinstance(inner, dict):
                    value[key] = replaced(inner, depth + 1)
        return value

    return replaced(saved, 0)


def _is_module(value: Any) -> bool:
    return isinstance(value, Stub) and "_parameters" in value and "_modules" in value


def _state_dict(module: Stub, prefix: str, inside: tuple[int, ...]) -> dict[str, Any]:
    if id(module) in inside:
        raise pickle.UnpicklingError("a module that is in itself")
    hidden = module.get("_non_persistent_buffers_set", ())
    own = [*module["_parameters"].items(), *module.get("_buffers", {}).items()]
    state = {
        f"{prefix}{name}": value for name, value in own if value is not None and name not in hidden
    }
    for name, child in module["_modules"].items():
        if _is_module(child):
            state |= _state_dict(child, f"{prefix}{name}.", (*inside, id(module)))
    return state
