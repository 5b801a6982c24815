"""The state dict in what a training script saved, and the plain names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Where scripts put the weights beside an optimizer, an epoch, ...: tried in this order.
_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
# What wrappers of modules put into names, wherever they wrap.
_INNER = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_OUTER = "module."
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, beside its module


def find_state_dict(saved: Any, key: str | None = None) -> dict[str, Tensor]:
    """Find the tensors by name in a saved object.

    Parameters
    ----------
    saved : object
        A state dict, or nested dicts with one in them: under a usual key ("state_dict", "model",
        ...), or the only entry that holds tensors.
    key : str, optional
        Where to look instead, nested keys joined by dots.

    Returns
    -------
    dict of str to Tensor

    Raises
    ------
    ValueError
        No state dict there, or several candidates.
    """
    if key is not None:
        for part in key.split("."):
            if not isinstance(saved, Mapping) or part not in saved:
                raise ValueError(f"expected the key {key!r}, found {_describe(saved)}")
            saved = saved[part]
    state = _search(saved, 0)
    if state is None:
        raise ValueError(f"expected a state dict, found {_describe(saved)}")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def plain_names(names: list[str]) -> list[str]:
    """Remove from names what DistributedDataParallel, FSDP and torch.compile put into them.

    Raises
    ------
    ValueError
        Two names become the same.
    """
    plain = names
    for wrapper in _INNER:
        plain = [name.replace(wrapper, "") for name in plain]
    while plain and all(name.startswith(_OUTER) or name == _COUNTER for name in plain):
        if plain == [_COUNTER]:
            break
        plain = [name.removeprefix(_OUTER) for name in plain]
    if len(set(plain)) < len(plain):
        twice = next(name for name in plain if plain.count(name) > 1)
        raise ValueError(f"two tensors are called {twice!r} once prefixes are removed")
    return plain


def _search(saved: Any, depth: int) -> Mapping[Any, Any] | None:
    """Return the state dict among nested dicts; None if there is none."""
    if not isinstance(saved, Mapping) or depth > 4:
        return None
    for key in _KEYS:
        inner = _search(saved.get(key), depth + 1)
        if inner is not None:
            return inner
    if any(isinstance(value, Tensor) for value in saved.values()):
        return saved
    candidates = {
        key: state
        for key, value in saved.items()
        if key not in ("optimizer", "optim", "optimizer_state_dict")
        and (state := _search(value, depth + 1)) is not None
    }
    if len(candidates) > 1:
        raise ValueError(
            f"expected one state dict, found several under {', '.join(map(repr, candidates))}: "
            "name one as the key"
        )
    return next(iter(candidates.values()), None)


def _describe(saved: Any) -> str:
    if isinstance(saved, Mapping):
        keys = [str(key) for key in saved]
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        return f"a dict with the keys {keys[:8]}{more}" if keys else "an empty dict"
    return f"a {type(saved).__name__}"
