"""Random number generators: which ones a function reaches, and their states."""

from __future__ import annotations

import functools
import logging
import random
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dldr_ext
from dldr_ext import virtual_batch
from dldr_ext.tensors import random_state
from dldr_ext.tensors.random_state import RandomState, process_generators, reachable

GENERATOR = torch.Generator()


def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand((), generator=GENERATOR)


class Noise(nn.Module):
    def __init__(self, rng: Any) -> None:
        super().__init__()
        self.settings = {"draws": [rng]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return noisy(x)


class Experiment:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss(self) -> torch.Tensor:
        return self.model(torch.ones(2)).sum()


def test_generators_are_found_wherever_the_closure_reaches_them() -> None:
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Identity(), Noise(rng))
    experiment = Experiment(model)

    def decorated() -> Any:
        @torch.no_grad()
        def loss() -> torch.Tensor:
            return model(torch.ones(2)).sum()

        return loss

    for function in (
        experiment.loss,
        functools.partial(experiment.loss),
        lambda: model(torch.ones(2)),
        lambda m=model: m(torch.ones(2)),
        decorated(),
        virtual_batch(model, [torch.ones(2)]),
    ):
        assert {id(found) for found in reachable(function)} == {id(rng), id(GENERATOR)}


def test_generators_of_methods_loaders_and_modules() -> None:
    rng, old, own = np.random.default_rng(0), np.random.RandomState(0), random.Random(0)
    for method, generator in ((rng.random, rng), (old.rand, old), (own.random, own)):
        assert reachable(method) == [generator]
    loader: Any = torch.utils.data.DataLoader([1, 2], shuffle=True, generator=GENERATOR)
    assert reachable(virtual_batch(torch.sum, loader, weights=[1, 1])) == [GENERATOR]
    constants = types.ModuleType("constants")
    constants.rng = rng
    function = types.FunctionType(
        compile("constants.rng.random()", "", "eval"), {"constants": constants}
    )
    assert reachable(function) == [rng]


class Slotted:
    __slots__ = ("empty", "rng")

    def __init__(self, rng: Any) -> None:
        self.rng = rng


class Shared:
    rng = random.Random(0)

    @staticmethod
    def of_function() -> torch.Tensor:
        return noisy(torch.ones(2))

    @classmethod
    def of_class(cls) -> float:
        return cls.rng.random()

    @property
    def of_property(self) -> float:
        return self.rng.random()


class Steps(list):
    """A list that has more than its entries."""


def test_generators_in_slots_and_classes() -> None:
    rng = np.random.default_rng(0)
    steps = Steps([[1, {"of": rng}]])
    steps.own = GENERATOR
    assert {id(found) for found in reachable(lambda: steps)} == {id(rng), id(GENERATOR)}
    slotted, shared = Slotted(rng), Shared()
    assert reachable(lambda: slotted.rng.random()) == [rng]
    for function in (
        lambda: shared.of_property,
        lambda: Shared.of_class(),
        Shared.of_class,
        Shared.of_function,
    ):
        found = {id(generator) for generator in reachable(function)}
        assert id(Shared.rng) in found or function is Shared.of_function
        assert id(GENERATOR) in found


class Trainer:
    """A class as scripts have it: it names this package, a log and a generator."""

    log = logging.getLogger(__name__)

    def __init__(self) -> None:
        self.weights = [nn.Parameter(torch.ones(2))]
        self.generator = torch.Generator()
        self.optimizer = dldr_ext.PBFGS(self.weights, dldr_ext.IdentitySubspace(self.weights))

    def record(self) -> dldr_ext.Trajectory:
        self.log.info("recorded")
        return dldr_ext.Trajectory(self.weights, capacity=2)


def test_code_of_this_package_and_of_libraries_is_not_looked_through(monkeypatch) -> None:
    """A thousand functions, loggers and classes behind three names would take milliseconds."""
    trainer, looked_into, held = Trainer(), [], random_state._held
    monkeypatch.setattr(
        random_state, "_held", lambda value: looked_into.append(value) or held(value)
    )
    assert reachable(lambda: trainer.weights[0].sum()) == [trainer.generator]
    assert len(looked_into) < 40


def test_what_has_no_state_or_cannot_be_looked_into_is_passed_over() -> None:
    class Broken:
        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError(name)

    system, broken, itself = random.SystemRandom(), Broken(), []
    itself.append(itself)
    assert reachable(lambda: (system, broken, itself)) == []


@pytest.mark.parametrize("normal", [False, True])
def test_states_are_restored(normal: bool) -> None:
    """Also half-way through a pair of normal numbers, one of which waits."""
    given = [torch.Generator(), np.random.default_rng(0), np.random.RandomState(0), random.Random()]
    generators = [*process_generators(), *given]

    def draw() -> list[float]:
        gen, rng, old, own = given
        return [
            torch.rand(()).item(),
            np.random.randn() if normal else np.random.rand(),
            random.random(),
            torch.rand((), generator=gen).item(),
            rng.random(),
            old.randn(),
            own.gauss(0.0, 1.0),
        ]

    for _ in range(3):
        state = RandomState(generators)
        first = draw()
        assert first != draw()
        state.restore()
        assert draw() == first
        state.restore()
        state.restore()
        assert draw() == first


def test_numpy_seeded_or_given_another_bit_generator_between_states() -> None:
    np.random.seed(1)
    state = RandomState([np.random])
    first = np.random.rand()
    np.random.seed(2)
    state.restore()
    assert np.random.rand() == first
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        state = RandomState([np.random])
        first = np.random.rand()
        state.restore()
        assert np.random.rand() == first
    finally:
        np.random.set_bit_generator(before)
