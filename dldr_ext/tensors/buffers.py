"""Buffers of a module: saved, and put back however a forward pass has changed them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .parameters import DTYPES

Buffers = nn.Module | list[Tensor]


class SavedBuffers:
    """The buffers of a module, or a list of tensors, as they are when this is made.

    The buffers of a module are found by name, in it and in its submodules as they are at that
    time, so that it does not matter whether a forward pass writes a buffer in place, assigns
    another tensor, makes, deletes or resizes it. Tensors that are plain attributes are not seen.
    """

    @torch.no_grad()
    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._tensors: list[_Saved] = []
        self._tree: dict[str, dict[str, tuple[_Saved | None, bool]]] = {}
        self._frozen: list[tuple[str, Tensor, int, int]] = []
        if isinstance(buffers, nn.Module):
            for path, module in buffers.named_modules():
                self._tree[path] = {
                    key: (self._save(tensor), _is_persistent(module, key))
                    for key, tensor in module._buffers.items()
                }
                self._frozen += [
                    (f"{path}.{key}".lstrip("."), p, p._version, p.data_ptr())
                    for key, p in _frozen_weights(module)
                ]
        else:
            for tensor in buffers:
                self._save(tensor)

    def _save(self, tensor: Tensor | None) -> _Saved | None:
        if tensor is None:
            return None
        self._tensors.append(_Saved(tensor))
        return self._tensors[-1]

    def written_frozen(self) -> str | None:
        """Return the name of a frozen parameter that was written since, which is no buffer."""
        return next(
            (name for name, p, *seen in self._frozen if [p._version, p.data_ptr()] != seen), None
        )

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the buffers what they were; in modules that are new since they stay."""
        written = [saved.writable() for saved in self._tensors]
        pairs = [pair for pair in written if pair is not None]
        if pairs:
            torch._foreach_copy_([to for to, _ in pairs], [values for _, values in pairs])
        modules = self._buffers.named_modules() if isinstance(self._buffers, nn.Module) else ()
        for path, module in modules:
            known, current = self._tree.get(path), dict(module._buffers.items())
            if known is None:
                continue
            for key in current.keys() - known.keys():
                delattr(module, key)
            for key, (saved, persistent) in known.items():
                tensor = None if saved is None else saved.tensor
                if key not in current:
                    module.__dict__.pop(key, None)  # assigned since as a plain attribute
                    module.register_buffer(key, tensor, persistent)
                elif current[key] is not tensor:
                    setattr(module, key, tensor)


class _Saved:
    """A tensor and its values.

    Attributes
    ----------
    tensor : Tensor
        Another one from `writable` on, if that could not be written.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._shape, self._stride = tensor, tensor.shape, _stride(tensor)
        self._expanded = 0 in (self._stride or ())
        self._values = (_once(tensor) if self._expanded else tensor).clone()

    def writable(self) -> tuple[Tensor, Tensor] | None:
        """Return what is to be written, and the values; None if that is done."""
        tensor, values = self.tensor, self._values
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            self.tensor = values.clone().expand(self._shape)
        elif (
            tensor.shape != self._shape
            or _stride(tensor) != self._stride
            or tensor.dtype != values.dtype
            or tensor.device != values.device
        ):  # resized, cast or moved
            tensor.data = values.clone().expand(self._shape)
        elif tensor.is_conj() or tensor.is_neg():  # not in a list that is written
            tensor.copy_(values)
        else:
            return (_once(tensor) if self._expanded else tensor), values
        return None


def checked_buffers(buffers: nn.Module | Iterable[Tensor] | None) -> Buffers:
    """Return the argument ``buffers`` of an optimizer: a module, or a list of tensors.

    Raises
    ------
    TypeError
        Neither.
    ValueError
        A buffer of a lazy module that has not run yet.
    """
    if buffers is None:
        return []
    if isinstance(buffers, nn.Module):
        for name, buffer in buffers.named_buffers():
            _check_initialised(buffer, f"buffers: {name}")
        return buffers
    if isinstance(buffers, Tensor) or not isinstance(buffers, Iterable):
        raise TypeError(
            "buffers: expected a module, an iterable of tensors or None, got "
            f"{type(buffers).__name__}"
        )
    result = list(buffers)
    for i, buffer in enumerate(result):
        if not isinstance(buffer, Tensor):
            raise TypeError(f"buffers[{i}]: expected a tensor, got {type(buffer).__name__}")
        _check_initialised(buffer, f"buffers[{i}]")
        if buffer.is_inference():
            raise ValueError(
                f"buffers[{i}]: expected a tensor that can be written, got one made in inference "
                "mode: pass the module that has it"
            )
    return result


def _check_initialised(buffer: Tensor, label: str) -> None:
    if is_lazy(buffer):
        raise ValueError(f"{label}: not initialised yet: run the model once, on any batch")


def _frozen_weights(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Yield the parameters that nothing should write: frozen, and neither quantized nor sharded."""
    if getattr(module, "max_norm", None) is not None:
        return  # written in each forward pass, but for the first with the same values
    for key, p in module._parameters.items():
        if p is not None and not p.requires_grad and p.dtype in DTYPES and type(p) is nn.Parameter:
            yield key, p


def _is_persistent(module: nn.Module, key: str) -> bool:
    return key not in getattr(module, "_non_persistent_buffers_set", ())


def _stride(tensor: Tensor) -> Any:
    return tensor.stride() if tensor.layout == torch.strided else None


def _once(tensor: Tensor) -> Tensor:
    """Return a view with each element of an expanded tensor once: only that can be written."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, _stride(tensor) or (), strict=False)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
