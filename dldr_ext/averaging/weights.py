"""Weights of checkpoints in an average: formulas that stand for a decay of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

#: Weight of checkpoint k of T, up to a factor: the rate of step k less that of the next.
_FORMULAS: dict[str, Callable[[int], float]] = {
    "mean": lambda k: 1.0,
    "linear": lambda k: 1.0,  # of rates along a line
    "1-sqrt": lambda k: math.sqrt(k) - math.sqrt(k - 1),
}
_EMA = "ema:"


def schedule_weights(schedule: str, count: int) -> list[float]:
    """Return weights that make an average stand for a run whose learning rate falls.

    Of T checkpoints of a run at a constant rate the last is w_T = w_0 + g_1 + ... + g_T. A run
    whose rate falls, step k being taken r_k times, ends at w_0 + r_1 g_1 + ... + r_T g_T if its
    steps are the same. That is the average of w_1 ... w_T with the weights a_k = r_k - r_(k + 1),
    where r_1 is 1 and r_(T + 1) is 0 [1]_.

    ==============  ======================  =================================
    schedule        weight a_k, to scale    rate r_k of step k = 1 ... T
    ==============  ======================  =================================
    linear or mean  1                       1 - (k - 1) / T [1]_
    1-sqrt          sqrt(k) - sqrt(k - 1)   1 - sqrt((k - 1) / T) [3]_
    ema:b           b^(T - k)               (1 - b^(T - k + 1)) / (1 - b^T) [2]_
    ==============  ======================  =================================

    A rate that falls along a line is the plain mean, under either name.

    Parameters
    ----------
    schedule : str
        "mean", "linear", "1-sqrt" or "ema:" and a number above 0 and below 1, the factor from one
        checkpoint to the one before.
    count : int
        Checkpoints, T; the first is the oldest.

    Returns
    -------
    list of float
        They sum to 1.

    Raises
    ------
    ValueError
        An unknown schedule; no checkpoint.

    See Also
    --------
    uniform_soup : averages with them.

    References
    ----------
    .. [1] Tian et al., "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM
       Pre-training", 2025, arXiv:2507.17634.
    .. [2] Sandler et al., "Training trajectories, mini-batch losses and the curious role of the
       learning rate", 2023, arXiv:2301.02312: moving and stochastic averages.
    .. [3] Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
       Durations", NeurIPS 2024, arXiv:2405.18392: the decay.

    Examples
    --------
    >>> schedule_weights("linear", 4), schedule_weights("ema:0.5", 2)
    ([0.25, 0.25, 0.25, 0.25], [0.3333333333333333, 0.6666666666666666])
    """
    formula = _FORMULAS.get(schedule) or _ema(schedule, count)
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    return normalized([formula(k) for k in range(1, count + 1)])


def _ema(schedule: str, count: int) -> Callable[[int], float]:
    try:
        decay = float(schedule.removeprefix(_EMA)) if schedule.startswith(_EMA) else math.nan
    except ValueError:
        decay = math.nan
    if not 0 < decay < 1:
        known = ", ".join(_FORMULAS)
        raise ValueError(
            f"schedule: expected one of {known}, or ema: and a number between 0 and 1, as "
            f"ema:0.99, got {schedule}"
        )
    return lambda k: decay ** (count - k)


def normalized(weights: Sequence[float]) -> list[float]:
    """Return weights divided by their sum.

    Raises
    ------
    ValueError
        One is not finite; their sum is 0, or no more than rounding leaves of it.
    """
    total = math.fsum(weights) if all(map(math.isfinite, weights)) else math.nan
    if not abs(total) > 1e-12 * math.fsum(map(abs, weights)):
        raise ValueError(
            f"weights: expected finite numbers whose sum is not 0, got {list(weights)}"
        )
    return [weight / total for weight in weights]
