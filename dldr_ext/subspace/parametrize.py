"""Models as functions of their coordinates in a subspace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..tensors.names import places_of
from ..tensors.parameters import check_matches, named_parameters, numel
from ..tensors.storage import first_shared

_PREFIX = "model."
_WRITES = "expected weights that a forward pass leaves as they are"


class _Subspace(Protocol):
    """The methods of a subspace, of any kind, that a `SubspaceModule` uses."""

    shapes: list[tuple[int, ...]] | None
    names: list[str] | None

    @property
    def dim(self) -> int: ...
    @property
    def numel(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def coordinate_dtype(self) -> torch.dtype: ...
    def reconstruct(self, theta: Tensor) -> Tensor: ...
    def reconstruct_(self, params: Iterable[Any], theta: Tensor) -> None: ...
    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> _Subspace: ...


class SubspaceModule(nn.Module):
    """A model that runs with the weights w0 + P theta; theta is the only parameter.

    Any optimizer of ``torch.optim`` works on it. Made by ``subspace.parametrize(model)``.

    Parameters
    ----------
    model : nn.Module
        Its trainable parameters must be those of the subspace: by name where the subspace knows
        names, else in order. Its own weights stay as they are until `write_back`; frozen ones are
        used as they are; buffers (batch-norm statistics) are used and updated in place. Wrappers
        of it (``torch.compile``) are kept; ``nn.DataParallel`` runs on one device.
    subspace : Subspace, GroupedSubspace or ImplicitSubspace

    Attributes
    ----------
    theta : nn.Parameter, shape (d,)
        float32 (float64 for a float64 basis), zero at first. `half`, `bfloat16` and `double` act
        on the model, not on theta.
    model, subspace
        As given; ``to(device)`` moves both along.

    Notes
    -----
    The model is not a registered submodule: its weights appear neither among the parameters nor in
    the state dict, which holds theta and the model's buffers (as ``model.<name>``).

    Raises
    ------
    ValueError
        The parameters do not match the subspace: with the first that differs. The forward pass
        writes weights.

    See Also
    --------
    dldr_ext.InSubspace : An optimizer of torch on theta that writes the model's own weights.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import Subspace
    >>> model = torch.nn.Linear(3, 1, bias=False)
    >>> basis = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]])
    >>> module = Subspace(basis, torch.zeros(3)).parametrize(model)
    >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    >>> module(torch.tensor([[2.0, 1.0, 2.0]])).sum().backward()
    >>> optimizer.step()
    >>> module.theta.data
    tensor([-1.0000, -1.1000])
    >>> module.write_back().weight.data
    tensor([[-1.0000, -0.6600, -0.8800]])
    """

    theta: nn.Parameter
    model: nn.Module

    def __init__(self, model: nn.Module, subspace: _Subspace) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        for module in model.modules():
            group: Any = getattr(module, "process_group", None)
            ddp = isinstance(module, nn.parallel.DistributedDataParallel)
            if ddp and group.size() > 1:
                raise ValueError(
                    "model: expected the module in DistributedDataParallel, which would sum no "
                    "gradient of theta over its ranks, got the wrapper: use "
                    "DistributedDataParallel(subspace.parametrize(model.module))"
                )
        # Into __dict__, past nn.Module's registration of submodules.
        self.__dict__["model"] = model
        self.subspace = subspace
        self._names = _matching_names(model, subspace)
        for name in self._names:
            most = getattr(model.get_submodule(name.rpartition(".")[0]), "max_norm", None)
            if most is not None:
                raise ValueError(
                    f"model: {name}: {_WRITES}, got an embedding with max_norm={most}, which "
                    "renormalises them: set its max_norm to None"
                )
        params = [model.get_parameter(name) for name in self._names]
        _check_apart(model, params)
        self._shapes = [p.shape for p in params]
        self._trained = [p.requires_grad for p in params]
        if params[0].device != subspace.device:
            raise ValueError(
                f"model: expected device {subspace.device}, as the subspace, got {params[0].device}"
            )
        self.theta = nn.Parameter(
            torch.zeros(subspace.dim, dtype=subspace.coordinate_dtype, device=subspace.device)
        )
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output at w0 + P theta; differentiable in theta."""
        model, prefix = self.model, ""
        while isinstance(model, nn.DataParallel):  # whose replicas could not be given weights
            model, prefix = model.module, prefix + "module."
        weights = {name.removeprefix(prefix): w for name, w in self.weights().items()}
        try:
            return functional_call(model, weights, args, kwargs)
        except RuntimeError as error:
            if "output views to be modified inplace" not in str(error):
                raise
            raise ValueError(f"model: {_WRITES}, got one that writes some: {error}") from error

    def weights(self) -> dict[str, Tensor]:
        """Return w0 + P theta as the model's parameters, differentiable in theta.

        Returns
        -------
        dict of str and Tensor
            By the names of the model, with the shape and the dtype of each parameter: what
            ``torch.func.functional_call(model, weights, args)`` takes.

        See Also
        --------
        write_back : The same, into the model's own weights.
        """
        params = self._parameters_of_model()
        flat = self.subspace.reconstruct(self.theta).split([p.numel() for p in params])
        return {
            name: values.view(p.shape).to(p.dtype)
            for name, values, p in zip(self._names, flat, params, strict=True)
        }

    def write_back(self) -> nn.Module:
        """Write w0 + P theta into the model's own weights.

        Each parameter is rounded once to its dtype; frozen ones and buffers stay as they are.

        Returns
        -------
        nn.Module
            The model, to be saved or run without the subspace.

        See Also
        --------
        weights : The same as new tensors.
        """
        self.subspace.reconstruct_(self._parameters_of_model(), self.theta.detach())
        return self.model

    def train(self, mode: bool = True) -> SubspaceModule:
        """Set training mode, of the model too."""
        super().train(mode)
        self.model.train(mode)
        return self

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's buffers."""
        if recurse:
            yield from self.model.named_buffers(
                f"{prefix}{'.' if prefix else ''}{_PREFIX[:-1]}", True, remove_duplicate
            )

    def extra_repr(self) -> str:
        """Return the model's class and the subspace."""
        return f"{type(self.model).__name__}, {self.subspace}"

    def _parameters_of_model(self) -> list[Tensor]:
        """Return the parameters as they are now, which must be like those of construction."""
        params = []
        for name, shape in zip(self._names, self._shapes, strict=True):
            try:
                p = self.model.get_parameter(name)
            except AttributeError as error:
                raise self._changed(name, f"shape {tuple(shape)}", "no parameter") from error
            if p.shape != shape:
                raise self._changed(name, f"shape {tuple(shape)}", f"{tuple(p.shape)}")
            params.append(p)
        trained = [p.requires_grad for p in params]
        if trained != self._trained and any(trained):  # none is what freezes nothing
            i = next(i for i, now in enumerate(trained) if now != self._trained[i])
            expected = f"requires_grad={self._trained[i]}"
            raise self._changed(self._names[i], expected, f"{trained[i]}")
        return list(params)

    def _changed(self, name: str, expected: str, got: str) -> ValueError:
        return ValueError(
            f"model: {name}: expected {expected}, as when the model was parametrized, got {got}; "
            "parametrize it anew, in a subspace of its parameters as they are now"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SubspaceModule:
        theta = self.theta.detach()
        super()._apply(fn, recurse)
        self.model._apply(fn, recurse)
        # Coordinates keep their precision when the model is cast; only the device is followed.
        self.theta.data = theta.to(self.theta.device)
        self.subspace = self.subspace.to(device=self.theta.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, buffer in self._saved_buffers().items():
            destination[f"{prefix}{_PREFIX}{name}"] = buffer if keep_vars else buffer.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        buffers = self._saved_buffers()
        start = prefix + _PREFIX
        rest = {key: value for key, value in state_dict.items() if not key.startswith(start)}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name, buffer in buffers.items():
            value = state_dict.get(start + name)
            if value is None:
                if strict:
                    missing_keys.append(start + name)
            elif value.shape != buffer.shape:
                error_msgs.append(
                    f"size mismatch for {start}{name}: copying a buffer with shape "
                    f"{tuple(value.shape)} from the checkpoint, the shape in the current model is "
                    f"{tuple(buffer.shape)}"
                )
            else:
                with torch.no_grad():
                    buffer.copy_(value)
        if strict:
            expected = {start + name for name in buffers}
            unexpected_keys.extend(
                key for key in state_dict if key.startswith(start) and key not in expected
            )

    def _saved_buffers(self) -> dict[str, Tensor]:
        """Return the model's buffers that belong into a state dict, by name."""
        state = self.model.state_dict(keep_vars=True)
        buffers = self.model.named_buffers(remove_duplicate=False)
        return {name: buffer for name, buffer in buffers if name in state}


def _check_apart(model: nn.Module, params: Sequence[Tensor]) -> None:
    """Refuse what lies in the memory of parameters, and would not follow theta."""
    storages = {p.untyped_storage().data_ptr() for p in params if type(p) is nn.Parameter}
    own = set(map(id, params))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if not plain or id(tensor) in own or tensor.device.type == "meta":
            continue
        if tensor.untyped_storage().data_ptr() in storages and first_shared([*params, tensor]):
            raise ValueError(
                f"model: {name}: expected memory of its own, got that of a parameter that moves "
                "with theta, without being that parameter: tie the parameter itself "
                "(b.weight = a.weight)"
            )


def _matching_names(model: nn.Module, subspace: _Subspace) -> list[str]:
    """Return the names of the model's parameters in the order of the subspace."""
    params, names = named_parameters(model.named_parameters(), "model")
    assert names is not None
    if subspace.names is not None and subspace.shapes is not None:
        places = places_of(subspace.names, names)
        for name, place in zip(subspace.names, places, strict=True):
            if place is None:
                raise ValueError(
                    f"model: expected a trainable parameter {name}, as in the subspace; it has "
                    f"{', '.join(names)}"
                )
        extra = set(range(len(names))) - set(places)
        if extra:
            raise ValueError(f"model: the subspace has no parameter {names[min(extra)]}")
        order = [place for place in places if place is not None]
        params, names = [params[i] for i in order], [names[i] for i in order]
    if subspace.shapes is not None:
        check_matches(params, subspace.shapes, names, "subspace", "model")
    elif numel(params) != subspace.numel:
        raise ValueError(
            f"model: expected {subspace.numel} trainable elements in all, as the subspace has, "
            f"got {numel(params)}"
        )
    return list(names)
