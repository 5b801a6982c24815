"""The state dict in what a training script saved."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntEnum
from itertools import takewhile
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..tensors.names import plain_names
from .pickles import Stub


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Words of the keys under which scripts save the weights, copies of them, and what is neither.
_WEIGHTS = _set(
    "state dict model module net network weights weight params parameters student online live"
)
_COPY = _set(
    "ema teacher target momentum shadow averaged average avg swa polyak slow moving best old ref"
    " reference frozen"
)
_OTHER = _set(
    "optimizer optimizers optim optims opt opts scheduler schedulers sched scaler scalers amp rng"
    " random loss losses criterion metric metrics log logs history callback callbacks loops hparams"
    " hyper args cfg config extra sampler dataloader dataset tokenizer precision stats grad grads"
    " gradients"
)
_MOMENTS = {"exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg"}  # of torch's optimizers
_LOGGED = _set(
    "loss losses acc accuracy metric metrics score lr step epoch iter iteration iterations error"
    " err val valid validation train test total running best global num top prec time"
)
# Counters of progress, the first that is there.
_COUNTERS = {
    "epoch": ("epoch", "current_epoch", "epoch_num"),
    "step": (
        "global_step", "global_steps", "step", "steps", "iteration", "iter", "iter_num",
        "iterations", "num_updates", "n_iter", "it", "completed_steps", "train_step",
    ),
}  # fmt: skip
_COUNTED_IN = ("meta", "extra_state", "train_iterator", "trainer", "trainer_state",
               "training_state", "train_state", "progress", "info",
               "optimizer_history")  # fmt: skip
# PEFT keeps a tensor for each adapter, whose name it leaves out of files.
_ADAPTER = re.compile(
    r"\.((?:lora|ia3|oft|boft|hada|lokr|vera|randlora|road|bone|miss|fourierft|trainable_tokens)_\w+"
    r"|ia3_\w+|prompt_encoder)\.\w+(?=\.|$)"
)
_SAVED_WHOLE = re.compile(r"\.modules_to_save\.\w+(?=\.)")
_SHOWN = 8  # keys in a message
_DEPTH = 5  # of nested dicts
_TIMES = 8  # that one dict is looked at, under several keys
Value = TypeVar("Value")


class Choice(NamedTuple):
    """The tensors that were taken for the weights."""

    tensors: dict[str, Tensor]
    key: str  # where they are: as a key it leads to the same tensors
    is_copy: bool  # an average or a teacher of the weights, by the key
    notes: list[str]
    others: Sequence[str] = ()  # the names of what is among them and not a tensor


class _Kind(IntEnum):
    """What the tensors of one dict may be: the likelier the weights, the greater."""

    OTHER = 0  # an optimizer, a loss, ...: never taken for weights
    NUMBERS = 1  # of single numbers alone
    COPY = 2
    TENSORS = 3
    WEIGHTS = 4


class _Candidate(NamedTuple):
    path: tuple[str, ...]
    tensors: dict[str, Tensor]
    kind: _Kind
    others: list[str]


def find_state_dict(
    saved: Any,
    key: str | None = None,
    fits: Callable[[Mapping[str, Tensor]], bool] | None = None,
) -> Choice:
    """Find the weights by name in a saved object.

    Parameters
    ----------
    saved : object
        A state dict, or nested dicts and lists with one in them. What an optimizer and the like
        left does not count. Copies (EMA, teacher) count where nothing else is there.
    key : str, optional
        Where to look instead, nested keys joined by dots, "" for all of it: all dicts of weights
        under it are taken together. Or what precedes the names of the tensors to take.
    fits : callable, optional
        Tells whether tensors are those of the model in use: if some do, no others count.

    Returns
    -------
    Choice

    Raises
    ------
    ValueError
        No state dict there, or several that may be it.
    """
    if key is None:
        return _best(saved, fits)
    inside = _descend(saved, key)
    if inside is None:
        within = _within(saved, key)
        if not within:
            raise ValueError(f"expected the key {key!r}, found {_describe(saved)}")
        return Choice(within, key, is_copy(key), [])
    candidates = list(_candidates(inside))
    own = [c for c in candidates if not c.path and c.kind > _Kind.NUMBERS]
    usable = own or _likeliest(candidates)
    if not usable:
        raise ValueError(f"{key}: expected a state dict, found {_describe(inside)}")
    if len(usable) == 1:
        path = ".".join(filter(None, (key, *usable[0].path)))
        return Choice(usable[0].tensors, path, is_copy(key), [], usable[0].others)
    together = {
        ".".join((*candidate.path, name)): tensor
        for candidate in usable
        for name, tensor in candidate.tensors.items()
    }
    return Choice(together, key, is_copy(key), [])


def under(tensors: Mapping[str, Value], key: str) -> dict[str, Value]:
    """Return the tensors whose plain names begin with ``key`` and a dot, without these."""
    names = plain_names(list(tensors))
    prefix = key.removesuffix(".") + "."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in zip(names, tensors.values(), strict=True)
        if name.startswith(prefix)
    }


def is_copy(key: str) -> bool:
    """Tell whether a key, or what precedes names, speaks of a copy of the weights (EMA, ...)."""
    return not _COPY.isdisjoint(_words(key))


def is_logged(name: str) -> bool:
    """Tell whether a name is that of a value that scripts log, such as loss or best_acc."""
    words = _words(name)
    return bool(words) and "." not in name and _LOGGED.issuperset(words)


def may_count(key: str) -> bool:
    """Tell whether a key may be that of a counter of progress."""
    return any(key in keys for keys in _COUNTERS.values())


def progress(
    saved: Any, number: Callable[[Tensor], float | None], depth: int = 2
) -> dict[str, float]:
    """Return the "epoch" and the "step" that a training script saved, those of them it has.

    Parameters
    ----------
    saved : object
        Nested dicts, as in a file.
    number : callable
        Returns the value of a tensor with one element.
    depth : int
        Of nested dicts that are looked at.
    """
    found: dict[str, float] = {}
    if isinstance(saved, list) and saved:
        saved = saved[-1]
    if not isinstance(saved, Mapping):
        return found
    for what, keys in _COUNTERS.items():
        for key in keys:
            value = saved.get(key)
            if isinstance(value, Tensor):
                value = number(value) if value.numel() == 1 else None
            count = _finite(value)
            if count is not None:
                found[what] = count
                break
    for key in _COUNTED_IN if depth else ():
        found = progress(saved.get(key), number, depth - 1) | found
    return found


def _finite(value: Any) -> float | None:
    """Return a number, or one in a string, as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        count = float(value)
    except (ValueError, OverflowError):
        return None
    return count if math.isfinite(count) else None


def _within(saved: Any, key: str) -> dict[str, Tensor]:
    """Return the weights whose names a key precedes, none if there are none."""
    try:
        return under(_best(saved, None).tensors, key) if key else {}
    except ValueError:
        return {}


def saved_names(name: str) -> list[str]:
    """Return the names under which PEFT may have saved a tensor of a live model, if others."""
    saved = _SAVED_WHOLE.sub("", _ADAPTER.sub(r".\1", f".{name}"))[1:]
    others = [saved, saved.removesuffix(".weight")] if "magnitude" in saved else [saved]
    if saved == "prompt_encoder.embedding.weight":
        others.append("prompt_embeddings")
    return [other for other in others if other != name]


def _best(saved: Any, fits: Callable[[Mapping[str, Tensor]], bool] | None) -> Choice:
    candidates = list(_candidates(saved))
    fitting = [c for c in candidates if c.kind and fits is not None and fits(c.tensors)]
    best = _likeliest(fitting or candidates)
    if not best:
        raise ValueError(f"expected a state dict, found {_describe(saved)}")
    if len({tuple(map(id, candidate.tensors.values())) for candidate in best}) > 1:
        raise ValueError(
            f"expected one state dict, found several {_places(best)}: name one as the key"
            f'{_common(best)} (in Python key="...", for the commands --key)'
        )
    chosen = best[0]
    taken = {candidate.path for candidate in best}
    others = [c for c in candidates if c.kind > _Kind.NUMBERS and c.path not in taken]
    notes = []
    if others:
        where = repr(".".join(chosen.path)) if chosen.path else "the top of the file"
        notes = [f"weights taken from {where}, not {_places(others)}; the key names another"]
    key = ".".join(chosen.path)
    return Choice(chosen.tensors, key, chosen.kind == _Kind.COPY, notes, chosen.others)


def _candidates(
    saved: Any, path: tuple[str, ...] = (), seen: Counter[int] | None = None
) -> Iterator[_Candidate]:
    """Yield the tensors of each dict and list in a saved object, which may hold itself."""
    seen = Counter() if seen is None else seen
    if not isinstance(saved, (Mapping, list, tuple)) or seen[id(saved)] == _TIMES:
        return
    seen[id(saved)] += 1
    pairs = saved.items() if isinstance(saved, Mapping) else enumerate(saved)
    items = {str(name): value for name, value in pairs}
    if _is_optimizer(items):
        return
    tensors = {name: value for name, value in items.items() if isinstance(value, Tensor)}
    if tensors:
        others = [name for name in items if name not in tensors]
        yield _Candidate(path, tensors, _kind(path, tensors), others)
    if len(path) < _DEPTH:
        for name, value in items.items():
            yield from _candidates(value, (*path, name), seen)


def _kind(path: tuple[str, ...], tensors: dict[str, Tensor]) -> _Kind:
    words = {word for part in path for word in _words(part)}
    random = all(t.dtype == torch.uint8 and t.dim() == 1 for t in tensors.values())
    logged = all(map(is_logged, tensors))
    if logged or random or not _OTHER.isdisjoint(words) or not _MOMENTS.isdisjoint(tensors):
        return _Kind.OTHER
    if all(tensor.dim() == 0 for tensor in tensors.values()):
        return _Kind.NUMBERS
    if not _COPY.isdisjoint(words):
        return _Kind.COPY
    usual = bool(path) and not _WEIGHTS.isdisjoint(_words(path[-1]))
    named = any("." in name or name in ("weight", "bias") for name in tensors)
    return _Kind.WEIGHTS if usual or (named and not path) else _Kind.TENSORS


def _likeliest(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    kinds = {candidate.kind for candidate in candidates} - {_Kind.OTHER}
    return [candidate for candidate in candidates if kinds and candidate.kind == max(kinds)]


def _descend(saved: Any, key: str) -> Any:
    """Return what is under a key, whose parts may have dots of their own; None if nothing is."""
    if not key:
        return saved
    if isinstance(saved, (list, tuple)):
        saved = dict(enumerate(saved))
    if not isinstance(saved, Mapping):
        return None
    for name, value in saved.items():
        if str(name) == key:
            return value
        if key.startswith(f"{name}."):
            inside = _descend(value, key[len(str(name)) + 1 :])
            if inside is not None:
                return inside
    return None


def _is_optimizer(items: Mapping[str, Any]) -> bool:
    return "param_groups" in items and "state" in items


def _words(key: str) -> list[str]:
    """Return the words of a key such as model_ema, modelEMA or model.ema."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)]


def _places(candidates: Sequence[_Candidate]) -> str:
    """Name where candidates are: under 'a', 'b' and at the top (names)."""
    paths = [repr(".".join(c.path)) for c in candidates if c.path]
    keys = ", ".join(paths[:_SHOWN]) + (", ..." if len(paths) > _SHOWN else "")
    top = next((list(c.tensors) for c in candidates if not c.path), None)
    places = [f"under {keys}"] if keys else []
    if top is not None:
        places.append(f"at the top ({', '.join(top[:3])}{', ...' if len(top) > 3 else ''})")
    return " and ".join(places)


def _common(candidates: Sequence[_Candidate]) -> str:
    """Name the key under which all candidates lie."""
    if any(not candidate.path for candidate in candidates):
        return ""
    levels = zip(*(candidate.path[:-1] for candidate in candidates), strict=False)
    shared = takewhile(lambda keys: len(set(keys)) == 1, levels)
    return f", or {'.'.join(keys[0] for keys in shared)!r} for all of them together"


def _describe(saved: Any) -> str:
    if isinstance(saved, (list, tuple)):
        what = type(saved).__name__
        return f"a {what} of {len(saved)}" if saved else f"an empty {what}"
    if not isinstance(saved, Mapping):
        return f"a {type(saved).__name__}"
    if _is_optimizer({str(key): value for key, value in saved.items()}):
        return "the state of an optimizer (param_groups, state), which is not weights"
    if isinstance(saved, Stub):
        return f"an object of {saved.name}, not weights"
    keys = [str(key) for key in saved]
    if "growth_factor" in keys:
        return "the state of a gradient scaler, which is not weights"
    if "cpu" in keys and "python" in keys:
        return "the states of random generators, which are not weights"
    if "last_epoch" in keys and "_step_count" in keys:
        return "the state of a learning-rate scheduler, which is not weights"
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return f"a dict with the keys {keys[:8]}{more}" if keys else "an empty dict"
