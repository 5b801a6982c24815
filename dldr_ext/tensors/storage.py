"""Memory of tensors: which of them share some of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Span(NamedTuple):
    """The bytes between the first and the last element of a tensor."""

    owner: int  # memory of its own: 0, or what stands for a storage without addresses
    begin: int
    end: int
    place: int
    tensor: Tensor

    @property
    def dense(self) -> bool:
        """Whether its elements fill the span, each byte once."""
        tensor = self.tensor
        return self.end - self.begin == tensor.numel() * tensor.element_size()


def first_shared(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Return the indices of the first two tensors found that share an element, or None.

    Of a tensor that shares elements with itself, as after ``expand``, its index comes twice.
    Views of one storage that lie beside each other or interleave share nothing.
    """
    spans = sorted(
        (_span(index, tensor) for index, tensor in enumerate(tensors) if tensor.numel()),
        key=lambda span: span[:4],
    )
    for span in spans:
        if not _distinct(span.tensor):
            return span.place, span.place
    for cluster in _clusters(spans):
        shared = _shared(cluster)
        if shared is not None:
            return shared
    return None


def _span(index: int, tensor: Tensor) -> _Span:
    size = tensor.element_size()
    extent = size * (
        1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    )
    try:
        begin, owner = tensor.data_ptr(), 0
    except RuntimeError:  # fake tensors
        begin = 0
    if begin == 0:
        owner, begin = tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * size
    return _Span(owner, begin, begin + extent, index, tensor)


def _distinct(tensor: Tensor) -> bool:
    """Return whether each element of a tensor has memory of its own."""
    if tensor.is_contiguous():
        return True
    pairs = sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    extent: Any = 1
    for stride, size in pairs:
        if stride < extent:
            break
        extent += stride * (size - 1)
    else:
        return True
    whole = 1 + sum(stride * (size - 1) for stride, size in pairs)
    if whole < tensor.numel():
        return False
    places = torch.arange(whole, device="cpu").as_strided(tensor.shape, tensor.stride())
    return places.unique().numel() == tensor.numel()


def _clusters(spans: list[_Span]) -> Iterator[list[_Span]]:
    """Yield the lists of at least two spans that overlap, one after the other."""
    cluster: list[_Span] = []
    end = 0
    for span in spans:
        if cluster and span.owner == cluster[0].owner and span.begin < end:
            cluster.append(span)
            end = max(end, span.end)
            continue
        if len(cluster) > 1:
            yield cluster
        cluster, end = [span], span.end
    if len(cluster) > 1:
        yield cluster


def _shared(cluster: list[_Span]) -> tuple[int, int] | None:
    """Return the first two tensors of overlapping spans that share an element."""
    for one, other in pairwise(cluster):
        if one.dense and other.dense and other.begin < one.end:  # the usual case, without memory
            return _in_order(one, other)
    begin, unit = cluster[0].begin, min(span.tensor.element_size() for span in cluster)
    taken = torch.full(
        ((max(span.end for span in cluster) - begin) // unit,), -1, dtype=torch.int32, device="cpu"
    )
    for place, span in enumerate(cluster):
        wide = span.tensor.element_size() // unit
        elements = taken.as_strided(
            (*span.tensor.shape, wide),
            (*(wide * stride for stride in span.tensor.stride()), 1),
            (span.begin - begin) // unit,
        )
        earlier = int(elements.max())
        if earlier >= 0:
            return _in_order(cluster[earlier], span)
        elements.fill_(place)
    return None


def _in_order(one: _Span, other: _Span) -> tuple[int, int]:
    return min(one.place, other.place), max(one.place, other.place)
