"""Lists of parameters: which tensors count, in which order, and their flat vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .derivatives import in_transform
from .names import first_other_name
from .storage import first_shared

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def named_parameters(
    params: Iterable[Any], argument: str = "params"
) -> tuple[list[Tensor], list[str] | None]:
    """Return the distinct trainable tensors in the order given, and their names if known.

    Parameters
    ----------
    params : iterable
        Tensors, ``(name, tensor)`` pairs as ``model.named_parameters()`` gives them, or parameter
        groups (dicts with the key ``"params"``). An iterator is used up.
    argument : str
        What to call it in messages.

    Returns
    -------
    list of Tensor
        Each tensor once (tied parameters are one object, hence count once). A frozen
        ``nn.Parameter`` beside trainable ones is left out, whatever its dtype and layout; if all
        are frozen (a copy kept for averaging, say) all are kept but integers, which were never
        trained. A plain tensor is always kept.
    list of str or None
        The names, if every tensor came with one.

    Raises
    ------
    TypeError
        Not an iterable of tensors; sparse; a dtype other than float32, bfloat16, float16, float64;
        a subclass of tensors that holds others (quantized ones).
    ValueError
        No tensor at all; tensors on several devices; one of a lazy module that has not run yet;
        weights that share memory without being one parameter.
    """
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        kind = "a single tensor" if isinstance(params, Tensor) else type_name(params)
        raise TypeError(f"{argument}: expected an iterable of tensors or of dicts, got {kind}")
    entries: dict[int, tuple[Tensor, str | None]] = {}
    for name, tensor in each_entry(params, argument):
        if not isinstance(tensor, Tensor):
            label = label_of(argument, len(entries), name)
            raise TypeError(f"{label}: expected a tensor, got {type_name(tensor)}")
        entries.setdefault(id(tensor), (tensor, name))
    if not entries:
        raise ValueError(f"{argument}: expected at least one tensor, got an empty list")
    pairs = list(entries.values())
    left_out = _frozen if any(tensor.requires_grad for tensor, _ in pairs) else _never_trained
    pairs = [pair for pair in pairs if not left_out(pair[0])] or pairs
    tensors = [tensor for tensor, _ in pairs]
    for i, (tensor, name) in enumerate(pairs):
        _check_tensor(tensor, label_of(argument, i, name))
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"{argument}: expected all tensors on one device, got {argument}[0] on "
                f"{tensors[0].device} and {argument}[{i}] on {tensor.device}"
            )
    names = [name for _, name in pairs]
    check_memory(tensors, names, argument)
    return tensors, [name for name in names if name is not None] if all(names) else None


def each_entry(params: Iterable[Any], argument: str) -> Iterable[tuple[str | None, Any]]:
    """Yield the names and tensors in a list of tensors, of pairs with names, or of groups."""
    for entry in params:
        if isinstance(entry, dict):
            if "params" not in entry:
                raise ValueError(
                    f"{argument}: expected a parameter group with the key 'params', got the keys "
                    f"{sorted(map(str, entry))}"
                )
            group = entry["params"]
            yield from each_entry([group] if isinstance(group, Tensor) else group, argument)
        elif isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str):
            yield entry
        else:
            yield None, entry


def gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Return each parameter's gradient; one that is None as zeros of stride 0 (no memory).

    Raises
    ------
    TypeError
        A gradient is sparse.
    """
    result = []
    for i, p in enumerate(params):
        grad = p.grad
        if grad is None:
            shape = local_shard(p).shape
            grad = torch.zeros((), dtype=p.dtype, device=p.device).expand(shape)
        elif grad.layout is not torch.strided:
            raise TypeError(
                f"params[{i}]: expected a dense gradient, got {grad.layout} for shape "
                f"{tuple(p.shape)}; build the layer with sparse=False"
            )
        result.append(grad if type(grad) is Tensor else local_shard(grad, p))
    return result


def is_dtensor(value: Any) -> TypeGuard[Any]:
    """Return whether a value is a ``DTensor``, without the import of torch.distributed.tensor."""
    return hasattr(value, "device_mesh")


def local_shard(tensor: Any, like: Any = None) -> Tensor:
    """Return the local shard of a ``DTensor``, placed as ``like`` is; other tensors as they are."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        placements = getattr(like, "placements", tensor.placements)
        if tensor.placements != placements:
            tensor = tensor.redistribute(placements=placements)
        return tensor.to_local()


def check_matches(
    params: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    names: Sequence[str] | None = None,
    what: str = "trajectory",
    argument: str = "params",
) -> None:
    """Check a list of tensors against the shapes that ``what`` was made with.

    Raises
    ------
    ValueError
        Naming the first tensor that differs, what was expected and what came.
    """
    for i, (tensor, shape) in enumerate(zip(params, shapes, strict=False)):
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{argument}[{i}]{_named(names, i)}: expected shape {tuple(shape)}, as in the "
                f"{what}, got {tuple(tensor.shape)}"
            )
    if len(params) != len(shapes):
        i = min(len(params), len(shapes))
        first = (
            f"{argument}[{i}]{_named(names, i)} of shape {tuple(shapes[i])} is missing"
            if len(params) < len(shapes)
            else f"{argument}[{i}] of shape {tuple(params[i].shape)} is too many"
        )
        raise ValueError(
            f"{argument}: expected {len(shapes)} tensors, as in the {what}, got {len(params)}: "
            f"{first}"
        )


def check_names(
    names: Sequence[str] | None,
    expected: Sequence[str] | None,
    what: str = "trajectory",
    argument: str = "params",
) -> None:
    """Check names against those that ``what`` was made with, where both are known.

    Wrappers of modules in front of names make no difference.

    Raises
    ------
    ValueError
        Naming the first that differs.
    """
    if names is None or expected is None:
        return
    i = first_other_name(names, expected)
    if i is not None:
        raise ValueError(
            f"{argument}[{i}]: expected the name {expected[i]}, as in the {what}, got {names[i]}"
        )


def check_memory(
    tensors: Sequence[Tensor],
    names: Sequence[str | None] | None,
    argument: str = "params",
    *,
    plain: bool = False,
) -> None:
    """Check that no two weights share memory: they would count and be written twice.

    Parameters
    ----------
    tensors : sequence of Tensor
    names : sequence of str or None
    argument : str
        What to call the list in messages.
    plain : bool
        Look at plain tensors too, which are about to be written.

    Raises
    ------
    ValueError
        Naming the first two that share memory, or one whose elements do.
    """
    if in_transform():
        return  # its tensors show no memory
    looked_at = [
        i for i, t in enumerate(tensors) if plain or t.requires_grad or isinstance(t, nn.Parameter)
    ]
    shared = first_shared([local_shard(tensors[i]).detach() for i in looked_at])
    if shared is None:
        return
    first, second = (
        label_of(argument, looked_at[i], names[looked_at[i]] if names else None) for i in shared
    )
    if first == second:
        raise ValueError(
            f"{first}: expected memory for each element, got some that share theirs (stride "
            f"{tensors[looked_at[shared[0]]].stride()}, as after expand): make it a parameter of "
            "its own with p.data = p.data.clone(), or of the shape before expand"
        )
    raise ValueError(
        f"{second}: expected memory of its own, got that of {first}: they would count twice and "
        "overwrite each other; tie the parameter itself (b.weight = a.weight, not "
        "b.weight.data = a.weight.data), or part them with p.data = p.data.clone()"
    )


def label_of(argument: str, i: int, name: str | None) -> str:
    """Return how messages call an entry of a list: ``params[0] (0.weight)``."""
    return f"{argument}[{i}]" if name is None else f"{argument}[{i}] ({name})"


def numel(params: Iterable[Tensor]) -> int:
    """Return the number of elements of all tensors together."""
    return sum(p.numel() for p in params)


def flatten(params: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the values of all tensors as one flat vector of ``dtype``, in logical order.

    Raises
    ------
    ValueError
        The tensors are on the meta device: they have no values.
    """
    if params[0].device.type == "meta":
        raise ValueError("params: expected tensors with values, got tensors on the meta device")
    flat = torch.empty(numel(params), dtype=dtype, device=params[0].device)
    for piece, p in zip(flat.split([p.numel() for p in params]), params, strict=True):
        piece.view(p.shape).copy_(p.detach())
    return flat


def forget_computed() -> None:
    """Drop what contexts of the caller have computed from weights that are about to be others.

    These are the casts of ``torch.autocast`` and what ``parametrize.cached`` keeps.
    """
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name without "torch."."""
    return str(dtype).removeprefix("torch.")


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """Return the names of the dtypes that an argument may have, for messages."""
    return ", ".join(map(dtype_name, dtypes))


def type_name(value: object) -> str:
    """Return the name of the type of a value, for messages."""
    return "None" if value is None else type(value).__name__


def _check_tensor(tensor: Tensor, label: str) -> None:
    if is_lazy(tensor):
        raise ValueError(
            f"{label}: not initialised yet: run the model once, on a batch of any size, so that "
            "its lazy modules know their shapes"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{label}: expected a dense tensor, got {tensor.layout}")
    if tensor.dtype not in DTYPES:
        way_out = (
            "; keep it as a real parameter (torch.view_as_real) and use torch.view_as_complex in "
            "forward"
            if tensor.is_complex()
            else ""
        )
        raise TypeError(
            f"{label}: expected a dtype of {dtype_names(DTYPES)}, got {dtype_name(tensor.dtype)}"
            f"{way_out}"
        )
    if tensor.is_neg() and isinstance(tensor, nn.Parameter):
        raise TypeError(
            f"{label}: expected numbers as they are stored, got a view whose sign is flipped when "
            "it is read (Tensor.is_neg): p.data = p.data.resolve_neg()"
        )
    if hasattr(tensor, "__tensor_flatten__") and not is_dtensor(tensor):
        raise TypeError(
            f"{label}: expected an ordinary tensor, got {type_name(tensor)}, which holds others: "
            "freeze it (requires_grad_(False)), or make it a parameter of its values"
        )


def _frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _never_trained(tensor: Tensor) -> bool:
    number = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    return isinstance(tensor, nn.Parameter) and not number


def _named(names: Sequence[str] | None, i: int) -> str:
    return f" ({names[i]})" if names is not None and i < len(names) else ""
