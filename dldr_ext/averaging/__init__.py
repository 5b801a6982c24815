"""Averages of weights: soups of models and of checkpoint files."""

from __future__ import annotations

from .soups import Soup, greedy_soup, uniform_soup, weight_averaging_subspace
from .weights import schedule_weights

__all__ = [
    "Soup",
    "greedy_soup",
    "schedule_weights",
    "uniform_soup",
    "weight_averaging_subspace",
]
