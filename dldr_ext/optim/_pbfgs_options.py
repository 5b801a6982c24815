"""The options of PBFGS that live in ``param_groups``, checked."""

from __future__ import annotations

from typing import Any

from ._options import check_choice, check_count, check_flag, check_lr, check_number

__all__ = ["C2", "checked"]

# Curvature condition of the strong Wolfe search.
C2 = 0.9

_CHOICES = {
    "update": ("bfgs", "lbfgs", "sr1"),
    "line_search_fn": ("armijo", "strong_wolfe", None),
    "curvature": ("same_batch", "overlap", "consecutive"),
    "damping": ("powell", None),
}


def checked(**options: Any) -> dict[str, Any]:
    """The options, or an error that names the first that is wrong."""
    owner = "PBFGS"
    for name, choices in _CHOICES.items():
        check_choice(owner, name, options[name], choices)
    for name in ("history_size", "max_ls", "max_iter"):
        check_count(owner, name, options[name])
    for name in ("interpolate", "maximize"):
        check_flag(owner, name, options[name])
    for name in ("tolerance_grad", "weight_decay", "residual_lr"):
        options[name] = check_number(owner, name, options[name], 0.0)
    most = C2 if options["line_search_fn"] == "strong_wolfe" else 1.0
    options["c1"] = check_number(owner, "c1", options["c1"], 0.0, most, low_open=True)
    backtrack = options["backtrack"]
    options["backtrack"] = check_number(owner, "backtrack", backtrack, 0.0, 1.0, low_open=True)
    momentum = options["residual_momentum"]
    options["residual_momentum"] = check_number(owner, "residual_momentum", momentum, 0.0, 1.0)
    if options["first_step"] is not None:
        first = options["first_step"]
        options["first_step"] = check_number(owner, "first_step", first, 0.0, low_open=True)
    options["lr"] = check_lr(owner, options["lr"], low_open=True)
    return options
