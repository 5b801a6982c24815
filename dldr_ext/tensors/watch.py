"""Parameters that are used again and again: whether they are still what they were."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from .parameters import (
    DTYPES,
    check_memory,
    dtype_name,
    dtype_names,
    each_entry,
    is_dtensor,
)

_ANEW = "make a new one for the parameters as they are now"
# What modules have that are not in the making; those of torch.jit have another kind of dict.
_HELD = "_parameters", "_modules"


class Watch:
    """A list of parameters as it was taken, to be compared with what it has become.

    Parameters
    ----------
    given : iterable
        What a user gave: tensors, pairs with names, or groups.
    tensors : list of Tensor
        Those of them that count.
    names : list of str or None
    maker : str
        Who took them, for messages: "trajectory" or "optimizer".
    prefix : str
        What messages begin with.

    Attributes
    ----------
    names : list of str or None
        Those of the model that was found, if none were given.
    """

    def __init__(
        self,
        given: Iterable[Any],
        tensors: list[Tensor],
        names: list[str] | None,
        maker: str,
        prefix: str = "",
    ) -> None:
        self._tensors = tensors
        self._maker, self._prefix = maker, prefix
        for i, t in enumerate(tensors):
            if t.is_inference():
                raise ValueError(
                    f"{prefix}params[{i}]: expected one that shows when it is written, got one "
                    "made in torch.inference_mode: make or load the model outside of it"
                )
        self._shapes = list(map(Tensor.size, tensors))
        self._device = tensors[0].device
        self._trained = [t.requires_grad for t in tensors]
        self._addresses: Sequence[int] | None = None  # at the last check
        self._versions: list[int] | None = None  # at the last check
        self._owners: Owners | None = Owners(tensors)
        frozen = {id(t): (t, name) for name, t in each_entry(given, "params")}
        if self._owners.model is not None:
            of_model = {id(p): (p, name) for name, p in self._owners.model.named_parameters()}
            names = names or [of_model[id(t)][1] for t in tensors]
            frozen |= of_model
        self.names = names
        counted = set(map(id, tensors))
        self._frozen = [
            (weakref.ref(t), name)
            for key, (t, name) in frozen.items()
            if key not in counted and not t.requires_grad
        ]

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the list is of no module that could be found, and weak references cannot be
        # pickled.
        return {**self.__dict__, "_owners": None, "_frozen": []}

    def check(self, *, owners_may_go: bool = False) -> None:
        """Check that they are the same parameters, of the same model.

        Parameters
        ----------
        owners_may_go : bool
            Whether the modules that held them may be gone. Otherwise they may as long as something
            still writes to the parameters.

        Raises
        ------
        ValueError
            Naming the first that was replaced, added, frozen, unfrozen, resized or moved. A change
            of the dtype is no error.
        """
        tensors = self._tensors
        if list(map(Tensor.size, tensors)) != self._shapes:
            i = next(i for i, t in enumerate(tensors) if t.shape != self._shapes[i])
            expected, got = (str(tuple(shape)) for shape in (self._shapes[i], tensors[i].shape))
            raise self._error(i, f"expected shape {expected}", f"got {got}", _ANEW)
        if [t.requires_grad for t in tensors] != self._trained:
            i = next(i for i, t in enumerate(tensors) if t.requires_grad != self._trained[i])
            raise self._changed_grad(f"params[{i}]", self._trained[i], self.named(i))
        for ref, name in self._frozen:
            tensor = ref()
            if tensor is not None and tensor.requires_grad:
                raise self._changed_grad("params", False, f" ({name})" if name else "")
        addresses = self._now()
        if addresses != self._addresses:
            for i, t in enumerate(tensors):
                if t.dtype not in DTYPES:
                    expected, got = dtype_names(DTYPES), dtype_name(t.dtype)
                    raise self._error(i, f"expected a dtype of {expected}", f"got {got}", _ANEW)
                if t.device != self._device:
                    got = f"got {t.device}"
                    raise self._error(i, f"expected device {self._device}", got, _ANEW)
                if addresses and not addresses[i] and t.numel() and t.device.type != "meta":
                    raise self._error(i, "expected memory", "got none: it was freed", _ANEW)
            check_memory(tensors, self.names)
            self._addresses = addresses
        versions = [t._version for t in tensors]
        written = versions != self._versions
        self._versions = versions
        self._check_owners(owners_may_go, owners_may_go or written)

    def _check_owners(self, forget: bool, may_go: bool) -> None:
        change = None if self._owners is None else self._owners.change()
        if change is None or self._owners is None:
            return
        if change.kind == "added":
            raise ValueError(
                f"{self._prefix}params: expected the trainable parameters that the model had when "
                f"the {self._maker} was made, got {change.name} too; freeze it, or {_ANEW}"
            )
        if change.kind == "replaced":
            raise self._error(
                change.which,
                "expected the parameter that the model has",
                "got one that was replaced there since",
                f"{_ANEW}, and load weights with load_state_dict without assign=True",
            )
        if not may_go:
            raise self._error(
                change.which,
                "expected a parameter of a model",
                "got one that nothing has written to since, and whose model is gone: it was "
                "copied, or another one took its place",
                _ANEW,
            )
        if forget:
            self._owners.forget_gone()

    def named(self, i: int) -> str:
        """Return the name of a parameter in brackets, for messages; nothing if there is none."""
        return f" ({self.names[i]})" if self.names else ""

    def _changed_grad(self, label: str, was: bool, name: str) -> ValueError:
        return ValueError(
            f"{self._prefix}{label}: expected requires_grad={was}, as when the {self._maker} was "
            f"made, got {not was}{name}: the list of parameters that train has changed; "
            f"{'unfreeze it' if was else 'freeze it'}, or {_ANEW}"
        )

    def _error(self, i: int, expected: str, got: str, way_out: str) -> ValueError:
        return ValueError(
            f"{self._prefix}params[{i}]: {expected}, as when the {self._maker} was made, "
            f"{got}{self.named(i)}; {way_out}"
        )

    def _now(self) -> Sequence[int]:
        if any(map(is_dtensor, self._tensors)):
            return ()
        return [t.data_ptr() for t in self._tensors]


class Change(NamedTuple):
    """What has become of a model since its parameters were taken.

    Attributes
    ----------
    kind : "replaced", "gone" or "added"
        A parameter that its module no longer has; one whose module is no more; a trainable one
        that was not there.
    which : int
        Of the parameter, in the list that was taken.
    name : str
        Of the one that was added, in the model.
    """

    kind: Literal["replaced", "gone", "added"]
    which: int = -1
    name: str = ""


class Owners:
    """The modules that hold some parameters, and the model whose trainable parameters they are.

    A list of parameters does not say whose they are, and a module that is given another parameter
    does not tell those who have the old one. So modules are looked for among all objects there
    are, which takes some milliseconds once; to look at them again takes less than a microsecond a
    parameter. None is kept alive. Sharded parameters, which modules swap while they run, are not
    looked for.

    Attributes
    ----------
    places : list of (weakref of module, str, int)
        Each module that holds one, under which name, and its index.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self.places: list[tuple[weakref.ref[nn.Module], str, int]] = []
        self._root: weakref.ref[nn.Module] | None = None
        self._look_below(None)
        if any(is_dtensor(t) or hasattr(t, "_fsdp_flattened") for t in tensors):
            return
        modules = live_modules()
        self.places = self._found(modules)
        root = self._root_of(modules)
        self._root = None if root is None else weakref.ref(root)
        self._look_below(root)

    @property
    def model(self) -> nn.Module | None:
        """The smallest module whose trainable parameters are these, if there is one."""
        return None if self._root is None else self._root()

    def change(self) -> Change | None:
        """Return what has changed, if anything has."""
        tensors = self._tensors
        same = all(
            (module := ref()) is not None and module._parameters.get(key) is tensors[i]
            for ref, key, i in self.places
        )
        if same and self._below() == self._seen:
            return None
        root = self.model
        whole = {} if root is None else {id(p): name for name, p in root.named_parameters()}
        if not same:
            found = self._found(live_modules())
            there = {i for _, _, i in found if root is None or id(tensors[i]) in whole}
            lost = [(ref(), i) for ref, _, i in self.places if i not in there]
            for module, i in sorted(lost, key=lambda pair: (pair[0] is None, pair[1])):
                return Change("gone" if module is None and root is None else "replaced", i)
            self.places = found
        known = {id(t) for t in tensors}
        for p in () if root is None else root.parameters():
            if p.requires_grad and id(p) not in known:
                return Change("added", name=whole[id(p)])
        self._look_below(root)
        return None

    def forget_gone(self) -> None:
        """Go on without the modules that are no more."""
        self.places = [place for place in self.places if place[0]() is not None]

    def _found(self, modules: Iterable[nn.Module]) -> list[tuple[weakref.ref[nn.Module], str, int]]:
        wanted = {id(t): i for i, t in enumerate(self._tensors)}
        return [
            (weakref.ref(module), key, wanted[id(p)])
            for module in modules
            for key, p in list(module._parameters.items())  # other threads may make some
            if id(p) in wanted
        ]

    def _root_of(self, modules: Sequence[nn.Module]) -> nn.Module | None:
        parents: dict[int, list[nn.Module]] = {}
        for module in modules:
            for child in list(module._modules.values()):
                parents.setdefault(id(child), []).append(module)
        around: dict[int, nn.Module] | None = None
        for holder in {id(m): m for ref, _, _ in self.places if (m := ref()) is not None}.values():
            above, rest = {id(holder): holder}, [holder]
            while rest:
                for parent in parents.get(id(rest.pop()), ()):
                    if id(parent) not in above:
                        above[id(parent)] = parent
                        rest.append(parent)
            around = above if around is None else {k: above[k] for k in around.keys() & above}
        wanted = {id(t) for t in self._tensors}
        whole = [m for m in (around or {}).values() if {id(p) for p in _counting(m)} == wanted]
        return min(whole, key=lambda module: sum(1 for _ in module.modules()), default=None)

    def _look_below(self, root: nn.Module | None) -> None:
        below = [] if root is None else list(root.modules())
        self._tree = [weakref.ref(module) for module in below]
        self._seen = self._below()

    def _below(self) -> list[int]:
        """Return which parameters and modules the modules of the model hold, as numbers."""
        modules = [module for ref in self._tree if (module := ref()) is not None]
        held = (d.values() for m in modules for d in (m._parameters, m._modules))
        return list(map(id, chain.from_iterable(held)))


def live_modules() -> list[nn.Module]:
    """Return all modules that there are, but those of torch.jit."""
    # By their types: to ask an object for its class may run its code.
    found = [x for x in gc.get_objects() if issubclass(type(x), nn.Module)]
    return [x for x in found if all(isinstance(x.__dict__.get(key), dict) for key in _HELD)]


def _counting(module: nn.Module) -> list[nn.Parameter]:
    every = list(module.parameters())
    return [p for p in every if p.requires_grad] or every
