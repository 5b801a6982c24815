"""Parameter groups: weight decay of their own, and which of their parameters is which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..subspace.base import AffineSubspace
from ..tensors.names import places_of
from ..tensors.parameters import each_entry, label_of, local_shard, named_parameters, numel
from ..tensors.watch import Owners
from .options import check_number

_OWN = "weight_decay"  # all other options belong to the coordinates, and so to all parameters


class Groups(NamedTuple):
    """What an optimizer is given.

    Attributes
    ----------
    given : list
        What the user gave, generators as lists.
    leaves : list of Tensor
        The parameters that train, in the subspace's order.
    names : list of str or None
    groups : list of dict
        As ``torch.optim.Optimizer`` takes them.
    which : list of int
        The group of each of the leaves.
    """

    given: Any
    leaves: list[Tensor]
    names: list[str] | None
    groups: list[dict[str, Any]]
    which: list[int]

    @property
    def decay_is_given(self) -> bool:
        """Whether any group has a weight decay of its own."""
        return any(_OWN in group for group in self.groups)


def taken(owner: str, params: Iterable[Any], subspace: AffineSubspace) -> Groups:
    """Return the parameters and their groups; those without options of their own are one list.

    The parameters of several groups are put into the subspace's order: by their names, else by
    those that they have in the model, else by their shapes.

    Raises
    ------
    TypeError, ValueError
        As `named_parameters`; an option that a group cannot have; a parameter that needs no
        gradient, or is in two groups; an order that cannot be told.
    """
    if not isinstance(params, Tensor) and isinstance(params, Iterable):
        params = list(map(_listed, params))
    leaves, names = named_parameters(params)
    for i, p in enumerate(leaves):
        if not p.requires_grad:
            raise ValueError(f"{owner}: params[{i}]: expected requires_grad=True, got False")
    given = [entry for entry in params if isinstance(entry, dict)]
    rest = [entry for entry in params if not isinstance(entry, dict)]
    own = [_checked(owner, f"params[{i}]", group) for i, group in enumerate(given)]
    if not any(own):
        return Groups(params, leaves, names, [{"params": leaves}], [0] * len(leaves))
    place = {id(p): i for i, p in enumerate(leaves)}
    which, members = [0] * len(leaves), [*given, *([{"params": rest}] if rest else [])]
    groups: list[dict[str, Any]] = [{"params": []} for _ in members]
    seen: dict[int, int] = {}
    for k, member in enumerate(members):
        for _, p in each_entry([member], "params"):
            if seen.setdefault(id(p), k) != k:
                name = names[place[id(p)]] if names and id(p) in place else None
                label = label_of("params", place.get(id(p), 0), name)
                raise ValueError(f"{owner}: {label}: expected it in one group, got it in several")
            if id(p) in place and all(p is not other for other in groups[k]["params"]):
                groups[k]["params"].append(p)
                which[place[id(p)]] = k
    for group, options in zip(groups, own, strict=False):
        group.update(options)
    if len(groups) > 1:
        order = _order(owner, leaves, names, which, subspace)
        leaves, which = [leaves[i] for i in order], [which[i] for i in order]
        names = None if names is None else [names[i] for i in order]
    return Groups(params, leaves, names, groups, which)


def check_same_options(owner: str, groups: Sequence[dict[str, Any]]) -> None:
    """Check that groups differ in nothing but their parameters and their weight decay."""
    first = groups[0]
    for i, group in enumerate(groups[1:], 1):
        for key in group.keys() - {"params", _OWN}:
            if group[key] is not first.get(key) and group[key] != first.get(key):
                raise ValueError(
                    f"{owner}: param_groups[{i}]: {key}: expected {first.get(key)!r}, as in "
                    f"param_groups[0], got {group[key]!r}: the coordinates of a subspace belong to "
                    "all parameters"
                )


@dataclass(frozen=True)
class Decay:
    """Weight decay, 1/2 sum_i rate_i |w_i|^2.

    Attributes
    ----------
    rates : tuple of float
        One for all parameters, or one for each.
    shapes : tuple of torch.Size
        Of the parameters, on this rank; of no use with one rate for all.
    """

    rates: tuple[float, ...] = (0.0,)
    shapes: tuple[torch.Size, ...] = ()

    @classmethod
    def of(
        cls, groups: Sequence[dict[str, Any]], which: Sequence[int], params: Sequence[Tensor]
    ) -> Decay:
        """Return that of parameter groups as their options now are."""
        rates = [float(group.get(_OWN, 0.0)) for group in groups]
        if len({rates[k] for k in which}) == 1:
            return cls((rates[which[0]],))
        return cls(tuple(rates[k] for k in which), tuple(p.shape for p in params))

    def __bool__(self) -> bool:
        return any(self.rates)

    def parts(self, tensors: list[Tensor]) -> list[tuple[float, list[Tensor]]]:
        """Return each rate but 0, and the weights with zeros where another one holds.

        The zeros take no memory. ``tensors`` are the weights, or one flat vector of them.
        """
        if len(self.rates) == 1:
            return [(self.rates[0], tensors)] if self else []
        if len(tensors) != len(self.rates):
            tensors = self._pieces(*tensors)
        dtypes = {t.dtype for t in tensors}
        zero = {dtype: tensors[0].new_zeros((), dtype=dtype) for dtype in dtypes}
        pairs = list(zip(tensors, self.rates, strict=True))
        return [
            (rate, [t if own == rate else zero[t.dtype].expand(t.shape) for t, own in pairs])
            for rate in dict.fromkeys(self.rates)
            if rate
        ]

    def add_(self, flat: Tensor, point: Tensor) -> Tensor:
        """Add the gradient at a flat point."""
        if len(self.rates) == 1:
            return flat.add_(point, alpha=self.rates[0])
        pairs = zip(self._pieces(flat), self._pieces(point), strict=True)
        for (to, piece), rate in zip(pairs, self.rates, strict=True):
            to.add_(piece, alpha=rate)
        return flat

    def dot(self, subspace: AffineSubspace, a: Tensor, b: Tensor) -> float:
        """Return sum_i rate_i a_i . b_i of two flat vectors."""
        if len(self.rates) == 1:
            return self.rates[0] * subspace.dot(a, b) if self else 0.0
        weighted = self.add_(torch.zeros_like(b), b)
        return subspace.dot(a, weighted)

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]


def _listed(entry: Any) -> Any:
    """Return a group with its parameters as a list, which a generator gives once."""
    members = entry.get("params") if isinstance(entry, dict) else None
    if isinstance(members, Tensor) or not isinstance(members, Iterable):
        return entry
    return {**entry, "params": list(members)}


def _checked(owner: str, label: str, group: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a group, which may be weight decay alone."""
    others = sorted(set(group) - {"params", _OWN})
    if others:
        raise ValueError(
            f"{owner}: {label}: expected no options of single parameter groups but {_OWN}, got "
            f"{others}: the coordinates of a subspace belong to all parameters"
        )
    if _OWN not in group:
        return {}
    return {_OWN: check_number(owner, f"{label}: {_OWN}", group[_OWN], 0.0)}


def _order(
    owner: str,
    leaves: list[Tensor],
    names: list[str] | None,
    which: list[int],
    subspace: AffineSubspace,
) -> Sequence[int]:
    """Return the order that puts the parameters of several groups where the subspace has them."""
    as_given, expected = range(len(leaves)), subspace.names
    if subspace.numel != numel(map(local_shard, leaves)):
        return as_given  # which is refused by that
    model = Owners(leaves).model
    found: dict[int, tuple[int, str]] = {}
    if model is not None:
        found = {id(p): (i, name) for i, (name, p) in enumerate(model.named_parameters())}
    known = names or [found[id(p)][1] for p in leaves if found]
    if known and expected:
        places = [i for i in places_of(expected, known) if i is not None]
        if len(places) == len(set(places)) == len(leaves):
            return places
        if names:
            return as_given  # the first name that differs is going to be named
    if found:
        return sorted(as_given, key=lambda i: found[id(leaves[i])][0])
    if subspace.shapes is not None:
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, p in enumerate(leaves):
            by_shape.setdefault(tuple(local_shard(p).shape), []).append(i)
        if sorted(by_shape) != sorted(set(map(tuple, subspace.shapes))):
            return as_given  # which is refused by the first shape that differs
        if all(len({which[i] for i in same}) == 1 for same in by_shape.values()):
            waiting = {shape: iter(same) for shape, same in by_shape.items()}
            order = [next(waiting[tuple(shape)], -1) for shape in subspace.shapes]
            return order if sorted(order) == list(as_given) else as_given
    raise ValueError(
        f"{owner}: params: expected groups whose parameters can be told apart as those of the "
        "subspace, got several without names, in no model that could be found: make groups of "
        "(name, parameter) pairs and the subspace of named_parameters()"
    )
