"""Weights of checkpoints in an average: formulas that stand for a decay of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

#: Weight of checkpoint k of T, up to a factor.
_FORMULAS: dict[str, Callable[[int], float]] = {
    "mean": lambda k: 1.0,
    "linear": float,
    "1-sqrt": lambda k: math.sqrt(k) - math.sqrt(k - 1),
}
_EMA = "ema:"


def schedule_weights(schedule: str, count: int) -> list[float]:
    """Return weights that make an average stand for a run whose learning rate falls.

    The last of T checkpoints at a constant rate, w_T = w_0 + g_1 + ... + g_T, took each step g_i
    whole. Their average takes it times r_i = a_i + ... + a_T, the weights from there on: as a run
    would whose rate fell so, if its steps were the same [1]_ [2]_.

    ==========  ======================  =================================
    schedule    weight a_k, to scale    rate r_k of step k = 1 ... T
    ==========  ======================  =================================
    mean        1                       1 - (k - 1) / T: along a line
    linear      k                       1 - k (k - 1) / (T (T + 1)): late
    1-sqrt      sqrt(k) - sqrt(k - 1)   1 - sqrt((k - 1) / T): early [3]_
    ema:b       b^(T - k)               (1 - b^(T - k + 1)) / (1 - b^T)
    ==========  ======================  =================================

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
    >>> schedule_weights("linear", 4)
    [0.1, 0.2, 0.3, 0.4]
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
