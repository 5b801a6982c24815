"""Random number generators: those of the process, those that a function reaches, their states."""

from __future__ import annotations

import ctypes
import logging
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import islice
from types import (
    BuiltinMethodType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Things that `reachable` looks into at most, the nearest first, and entries of a list or a dict.
_LOOKED_INTO, _ENTRIES = 1000, 64
# What holds no generator of the user's, or far too much else.
_LEAVES = (
    Tensor, np.ndarray, str, bytes, int, float, complex, torch.optim.Optimizer, logging.Logger,
    GetSetDescriptorType, MemberDescriptorType,
)  # fmt: skip
# By id, since a metaclass may not let its classes be hashed: most values, and lists of them.
_PLAIN = set(map(id, (Tensor, np.ndarray, bool, int, float, str, type(None), torch.dtype)))
_LISTS = {id(list), id(tuple)}
_OF_MODULES = nn.Module().__dict__.keys()
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# Their code draws from the generators of the process, or from those that it is handed.
_LIBRARIES = sys.stdlib_module_names - {"__main__"} | {
    "dldr_ext", "torch", "numpy", "torchvision", "transformers", "peft", "accelerate", "lightning",
    "pytorch_lightning",
}  # fmt: skip


class RandomState:
    """The states of generators, as they are now.

    Parameters
    ----------
    generators : iterable
        Of torch, numpy and the standard library.
    """

    def __init__(self, generators: Iterable[Any]) -> None:
        self.generators = list(generators)
        self._states = [_state(generator) for generator in self.generators]

    def __reduce__(self) -> Any:
        return RandomState, ((),)  # a copy is of nobody's generators

    def restore(self) -> None:
        """Set all generators back."""
        for generator, state in zip(self.generators, self._states, strict=True):
            _set_state(generator, state)


def process_generators() -> list[Any]:
    """Return the generators that functions draw from unless they are given another.

    torch's on the CPU and on each CUDA device in use, numpy's and that of the module `random`.
    """
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *cuda, np.random, random]


def reachable(function: Callable[..., Any]) -> list[Any]:
    """Return the generators that a function holds or refers to, directly or through others.

    Through its variables and defaults, the functions it calls by name, the objects whose methods
    they are, and the attributes and entries of all of these. Nothing is run: attributes are looked
    up where they are stored.

    Parameters
    ----------
    function : callable

    Returns
    -------
    list
        Each once.
    """
    found: dict[int, Any] = {}
    seen, waiting, count = {id(function)}, deque([function]), 0
    while waiting and count < _LOOKED_INTO:
        count += 1
        try:
            for value in _held(waiting.popleft()):
                if _is_plain(value) or id(value) in seen or isinstance(value, _LEAVES):
                    continue
                seen.add(id(value))
                if isinstance(value, _GENERATORS):
                    found[id(value)] = value
                else:
                    waiting.append(value)
        except Exception:  # it cannot be looked into, as a reference to a dead object
            continue
    # One of the operating system has no state.
    return [found[key] for key in found if not isinstance(found[key], random.SystemRandom)]


def _is_plain(value: Any) -> bool:
    kind = id(type(value))
    if kind in _LISTS:
        return all([id(type(entry)) in _PLAIN for entry in value[:_ENTRIES]])
    return kind in _PLAIN


def _held(value: Any) -> Iterator[Any]:
    """Yield what a value refers to."""
    if isinstance(value, FunctionType):
        yield from _of_function(value)
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, type):
        if not _of_library(value.__module__):
            yield from vars(value).values()
    elif isinstance(value, (staticmethod, classmethod, property)):
        yield value.fget if isinstance(value, property) else value.__func__
    elif isinstance(value, (MethodType, BuiltinMethodType)):
        yield from (value.__self__, getattr(value, "__func__", None))
    elif id(type(value)) in _LISTS:
        yield from value[:_ENTRIES]
    elif not isinstance(value, (ModuleType, CodeType)):
        if isinstance(value, dict):
            yield from islice(dict.values(value), _ENTRIES)  # as stored, whatever a subclass does
        elif isinstance(value, (list, tuple, set, frozenset)):
            yield from islice(value, _ENTRIES)
        own = getattr(value, "__dict__", {})
        if isinstance(value, nn.Module):
            for entries in (value._modules, value._forward_hooks, value._forward_pre_hooks):
                yield from entries.values()  # all, however many
            own = {key: own[key] for key in own if key not in _OF_MODULES}
        yield from own.values()
        for kind in type(value).__mro__:
            if not _of_library(kind.__module__):
                yield kind
                slots = (d for d in vars(kind).values() if isinstance(d, MemberDescriptorType))
                yield from (slot.__get__(value) for slot in slots if hasattr(value, slot.__name__))


def _of_function(function: FunctionType) -> Iterator[Any]:
    yield from function.__dict__.values()  # what a decorator wraps
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable without a value yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    if _of_library(function.__module__):
        return
    names = set(_names(function.__code__))
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        yield value
        if isinstance(value, ModuleType) and not _of_library(value.__name__):
            yield from (vars(value)[inner] for inner in names & vars(value).keys())


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that code refers to, and the code in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@cache
def _of_library(module: Any) -> bool:
    return str(module).partition(".")[0] in _LIBRARIES


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return _numpy.state() if generator is np.random else generator.getstate()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, (torch.Generator, np.random.RandomState)):
        generator.set_state(state)
    elif generator is np.random:
        _numpy.set_state(state)
    else:
        generator.setstate(state)


class _NumpyState:
    """The state of numpy's generator of the process, which takes long to read and to set.

    Most closures never draw from it. So its memory is compared with what it was when the state was
    read, which takes a hundredth of the time.
    """

    def __init__(self) -> None:
        self._bytes = b""
        self._state: Any = None

    def state(self) -> Any:
        now = self._memory()
        if self._state is None or now != self._bytes:
            state = np.random.get_state(legacy=False)
            # A second normal number may wait outside that memory.
            known = bool(now) and not state["has_gauss"]
            self._bytes, self._state = (now, state) if known else (b"", None)
            return state
        return self._state

    def set_state(self, state: Any) -> None:
        if state is not self._state or self._memory() != self._bytes:
            np.random.set_state(state)

    def _memory(self) -> bytes:
        generator = np.random.mtrand._rand._bit_generator
        if type(generator) is not np.random.MT19937:
            return b""
        return ctypes.string_at(generator.ctypes.state_address, 625 * 4)  # 624 words, a position


_numpy = _NumpyState()
