"""Names of parameters, with and without what wrappers of modules put into them."""

from __future__ import annotations

from collections.abc import Sequence

# Wherever they wrap: torch.compile, FSDP, activation checkpointing.
_INNER = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Around the whole: DataParallel, DistributedDataParallel, DeepSpeed, AveragedModel.
_OUTER = "module."
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, beside its module


def plain_names(names: Sequence[str]) -> list[str]:
    """Remove from names what DistributedDataParallel, FSDP and torch.compile put into them.

    Raises
    ------
    ValueError
        Two names become the same.
    """
    plain = list(names)
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


def first_other_name(names: Sequence[str], expected: Sequence[str]) -> int | None:
    """Return the first place where two lists of names, of the same length, name other parameters.

    What wrappers put into names makes no difference, nor what all names of one list have in front
    of those of the other (Lightning's "model.").
    """
    places = places_of(expected, names)
    return next((i for i, place in enumerate(places) if place != i), None)


def places_of(wanted: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Return where each of some names is in a list, with the differences of `first_other_name`."""
    wanted = _comparable(wanted)
    places = {name: i for i, name in enumerate(_comparable(names))}
    found = [places.get(name) for name in wanted]
    if None not in found:
        return found
    first = wanted[0]
    for name in places:
        there: list[str] = []
        if name.endswith("." + first):
            prefix = name.removesuffix(first)
            there = [prefix + other for other in wanted]
        elif first.endswith("." + name):
            prefix = first.removesuffix(name)
            there = [other.removeprefix(prefix) for other in wanted if other.startswith(prefix)]
        if len(there) == len(wanted) and all(other in places for other in there):
            return [places[other] for other in there]
    return found


def _comparable(names: Sequence[str]) -> list[str]:
    try:
        return plain_names(names)
    except ValueError:  # they are told apart by their prefixes
        return list(names)
