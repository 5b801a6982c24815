"""Averages of weights: soups of models and of checkpoint files."""

from __future__ import annotations

from .soups import Soup, greedy_soup, uniform_soup, weight_averaging_subspace

__all__ = ["Soup", "greedy_soup", "uniform_soup", "weight_averaging_subspace"]
