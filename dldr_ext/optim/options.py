"""The arguments of the optimizers: their checks, which name what was probably meant."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

Init = TypeVar("Init", bound=Callable[..., None])


def check_number(
    owner: str,
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = True,
) -> float:
    """Return a finite number in an interval, or raise an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name}: expected a number, got {value!r}")
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (math.isfinite(value) and above and below):
        interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
        raise ValueError(f"{owner}: {name}: expected a number in {interval}, got {value!r}")
    return float(value)


def check_lr(owner: str, value: Any, *, low_open: bool = False) -> float | Tensor:
    """Return a learning rate: a number or, as torch has it, a tensor of one element, kept."""
    if isinstance(value, Tensor) and value.numel() == 1:
        check_number(owner, "lr", value.item(), 0.0, low_open=low_open)
        return value
    return check_number(owner, "lr", value, 0.0, low_open=low_open)


def check_count(owner: str, name: str, value: Any) -> int:
    """Return an int of at least 1, or raise an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{owner}: {name}: expected at least 1, got {value}")
    return value


def check_flag(owner: str, name: str, value: Any) -> bool:
    """Return True or False; refuse what is merely true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name}: expected True or False, got {value!r}")
    return value


def check_choice(owner: str, name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Check that a value is one of a few; the error lists them."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(
            f"{owner}: {name}: expected one of {listed}, got {value!r}{_meant(value, choices)}"
        )


def names_options(init: Init) -> Init:
    """Make a constructor say which option was probably meant by an unknown one."""
    names = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        for name in options:
            if name not in names:
                raise TypeError(
                    f"{type(self).__name__}: {name}: expected one of the options "
                    f"{', '.join(names)}, got an unknown one{_meant(name, names)}"
                )
        init(self, *args, **options)

    return checked  # type: ignore[return-value]


def _meant(word: Any, choices: Iterable[Any]) -> str:
    words = [choice for choice in choices if isinstance(choice, str)]
    close = difflib.get_close_matches(str(word), words, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


# Curvature condition of the strong Wolfe search, and while H has learnt nothing and no metric says
# how far to go: then one near the lowest point along the direction is worth a trial more.
C2, C2_FIRST = 0.9, 0.5
_CHOICES = {
    "line_search_fn": ("armijo", "strong_wolfe", None),
    "curvature": ("same_batch", "consecutive"),
    "damping": ("powell", None),
}


def check_pbfgs_options(**options: Any) -> dict[str, Any]:
    """Return the options of `PBFGS`, or raise an error that names the first that is wrong."""
    owner = "PBFGS"
    for name, choices in _CHOICES.items():
        check_choice(owner, name, options[name], choices)
    for name in ("max_ls", "max_iter"):
        check_count(owner, name, options[name])
    check_flag(owner, "maximize", options["maximize"])
    for name in ("tolerance_grad", "weight_decay", "residual_lr"):
        options[name] = check_number(owner, name, options[name], 0.0)
    most = C2 if options["line_search_fn"] == "strong_wolfe" else 1.0
    options["c1"] = check_number(owner, "c1", options["c1"], 0.0, most, low_open=True)
    backtrack = options["backtrack"]
    options["backtrack"] = check_number(owner, "backtrack", backtrack, 0.0, 1.0, low_open=True)
    momentum = options["residual_momentum"]
    options["residual_momentum"] = check_number(owner, "residual_momentum", momentum, 0.0, 1.0)
    options["lr"] = check_lr(owner, options["lr"], low_open=True)
    return options
