"""The test problems of Moré, Garbow and Hillstrom, written from their formulas.

Moré, Garbow, Hillstrom, "Testing unconstrained optimization software", ACM TOMS 7 (1981), 17-41.
Each is a sum of squares; the numbers in the comments are theirs. Problem 11 follows the corrected
formula exp(-|y - x2|^x3 / x1) - t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Residuals = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Minimise |residuals(x)|^2 from ``start``."""

    name: str
    residuals: Residuals
    start: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.residuals(x).square().sum()


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def count(first: int, last: int) -> Tensor:
    return torch.arange(first, last + 1, dtype=torch.float64)


def extended_rosenbrock(x: Tensor) -> Tensor:  # 1, 21
    odd, even = x[0::2], x[1::2]
    return torch.cat([10 * (even - odd**2), 1 - odd])


def freudenstein_roth(x: Tensor) -> Tensor:  # 2
    a, b = x
    return torch.stack(
        [-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b],
    )


def powell_badly_scaled(x: Tensor) -> Tensor:  # 3
    return torch.stack([1e4 * x[0] * x[1] - 1, (-x).exp().sum() - 1.0001])


def brown_badly_scaled(x: Tensor) -> Tensor:  # 4
    return torch.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def beale(x: Tensor) -> Tensor:  # 5
    return vector(1.5, 2.25, 2.625) - x[0] * (1 - x[1] ** count(1, 3))


def jennrich_sampson(x: Tensor) -> Tensor:  # 6
    i = count(1, 10)
    return 2 + 2 * i - ((i * x[0]).exp() + (i * x[1]).exp())


def helical_valley(x: Tensor) -> Tensor:  # 7
    turn = torch.atan(x[1] / x[0]) / (2 * math.pi) + (0.5 if x[0].item() < 0 else 0.0)
    return torch.stack([10 * (x[2] - 10 * turn), 10 * (x[:2].norm() - 1), x[2]])


BARD = vector(*(14, 18, 22, 25, 29, 32, 35, 39, 37, 58, 73, 96, 134, 210, 439)) / 100


def bard(x: Tensor) -> Tensor:  # 8
    u = count(1, 15)
    v = 16 - u
    return BARD - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


GAUSSIAN = vector(*(9, 44, 175, 540, 1295, 2420, 3521, 3989)) / 1e4


def gaussian(x: Tensor) -> Tensor:  # 9
    t = (8 - count(1, 15)) / 2
    y = torch.cat([GAUSSIAN, GAUSSIAN[:-1].flip(0)])
    return x[0] * (-0.5 * x[1] * (t - x[2]) ** 2).exp() - y


MEYER = vector(
    *(34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744),
    *(8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872),
)


def meyer(x: Tensor) -> Tensor:  # 10
    return x[0] * (x[1] / (45 + 5 * count(1, 16) + x[2])).exp() - MEYER


def gulf(x: Tensor) -> Tensor:  # 11
    t = count(1, 99) / 100
    y = 25 + (-50 * t.log()) ** (2 / 3)
    return (-((y - x[1]).abs() ** x[2]) / x[0]).exp() - t


def box(x: Tensor) -> Tensor:  # 12
    t = 0.1 * count(1, 10)
    return (-t * x[0]).exp() - (-t * x[1]).exp() - x[2] * ((-t).exp() - (-10 * t).exp())


def extended_powell(x: Tensor) -> Tensor:  # 13, 22
    a, b, c, d = x.reshape(-1, 4).T
    return torch.cat(
        [a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2]
    )


def wood(x: Tensor) -> Tensor:  # 14
    a, b, c, d = x
    root = math.sqrt(10)
    return torch.stack(
        [
            *(10 * (b - a**2), 1 - a, math.sqrt(90) * (d - c**2), 1 - c),
            *(root * (b + d - 2), (b - d) / root),
        ]
    )


KOWALIK_Y = vector(*(1957, 1947, 1735, 1600, 844, 627, 456, 342, 323, 235, 246)) / 1e4
KOWALIK_U = vector(4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)


def kowalik_osborne(x: Tensor) -> Tensor:  # 15
    u = KOWALIK_U
    return KOWALIK_Y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x: Tensor) -> Tensor:  # 16
    t = count(1, 20) / 5
    return (x[0] + t * x[1] - t.exp()) ** 2 + (x[2] + x[3] * t.sin() - t.cos()) ** 2


OSBORNE_1 = (
    vector(
        *(844, 908, 932, 936, 925, 908, 881, 850, 818, 784, 751, 718, 685, 658, 628, 603, 580),
        *(558, 538, 522, 506, 490, 478, 467, 457, 448, 438, 431, 424, 420, 414, 411, 406),
    )
    / 1000
)


def osborne_1(x: Tensor) -> Tensor:  # 17
    t = 10 * count(0, 32)
    return OSBORNE_1 - (x[0] + x[1] * (-t * x[3]).exp() + x[2] * (-t * x[4]).exp())


def biggs_exp6(x: Tensor) -> Tensor:  # 18
    t = 0.1 * count(1, 13)
    y = (-t).exp() - 5 * (-10 * t).exp() + 3 * (-4 * t).exp()
    return x[2] * (-t * x[0]).exp() - x[3] * (-t * x[1]).exp() + x[5] * (-t * x[4]).exp() - y


OSBORNE_2 = (
    vector(
        *(1366, 1191, 1112, 1013, 991, 885, 831, 847, 786, 725, 746, 679, 608, 655, 616, 606, 602),
        *(626, 651, 724, 649, 649, 694, 644, 624, 661, 612, 558, 533, 495, 500, 423, 395, 375, 372),
        *(391, 396, 405, 428, 429, 523, 562, 607, 653, 672, 708, 633, 668, 645, 632, 591, 559, 597),
        *(625, 739, 710, 729, 720, 636, 581, 428, 292, 162, 98, 54),
    )
    / 1000
)


def osborne_2(x: Tensor) -> Tensor:  # 19
    t = count(0, 64) / 10
    bells = x[1:4, None] * (-((t - x[8:11, None]) ** 2) * x[5:8, None]).exp()
    return OSBORNE_2 - (x[0] * (-t * x[4]).exp() + bells.sum(0))


def watson(x: Tensor) -> Tensor:  # 20
    t, j = count(1, 29)[:, None] / 29, count(0, len(x) - 1)
    slope = (j[1:] * x[1:] * t ** (j[1:] - 1)).sum(1)
    inner = slope - (x * t**j).sum(1) ** 2 - 1
    return torch.cat([inner, x[:1], (x[1] - x[0] ** 2 - 1)[None]])


def penalty_1(x: Tensor) -> Tensor:  # 23
    return torch.cat([math.sqrt(1e-5) * (x - 1), (x @ x - 0.25)[None]])


def penalty_2(x: Tensor) -> Tensor:  # 24
    n, root = len(x), math.sqrt(1e-5)
    y = (count(2, n) / 10).exp() + (count(1, n - 1) / 10).exp()
    e = (x / 10).exp()
    last = ((n - count(0, n - 1)) * x**2).sum() - 1
    return torch.cat(
        [
            (x[0] - 0.2)[None],
            root * (e[1:] + e[:-1] - y),
            root * (e[1:] - math.exp(-0.1)),
            last[None],
        ]
    )


def variably_dimensioned(x: Tensor) -> Tensor:  # 25
    total = (count(1, len(x)) * (x - 1)).sum()[None]
    return torch.cat([x - 1, total, total**2])


def trigonometric(x: Tensor) -> Tensor:  # 26
    return len(x) - x.cos().sum() + count(1, len(x)) * (1 - x.cos()) - x.sin()


def brown_almost_linear(x: Tensor) -> Tensor:  # 27
    return torch.cat([x[:-1] + x.sum() - (len(x) + 1), (x.prod() - 1)[None]])


def boundary_value(x: Tensor) -> Tensor:  # 28
    n = len(x)
    h, end = 1 / (n + 1), x.new_zeros(1)
    before, after = torch.cat([end, x[:-1]]), torch.cat([x[1:], end])
    return 2 * x - before - after + h * h * (x + h * count(1, n) + 1) ** 3 / 2


def integral_equation(x: Tensor) -> Tensor:  # 29
    n = len(x)
    t = count(1, n) / (n + 1)
    cube = (x + t + 1) ** 3
    below = torch.cumsum(t * cube, 0)
    above = ((1 - t) * cube).sum() - torch.cumsum((1 - t) * cube, 0)
    return x + ((1 - t) * below + t * above) / (2 * (n + 1))


def broyden_tridiagonal(x: Tensor) -> Tensor:  # 30
    end = x.new_zeros(1)
    return (3 - 2 * x) * x - torch.cat([end, x[:-1]]) - 2 * torch.cat([x[1:], end]) + 1


def broyden_banded(x: Tensor) -> Tensor:  # 31
    i = count(1, len(x))
    gap = i[None, :] - i[:, None]  # j - i
    band = ((gap >= -5) & (gap <= 1) & (gap != 0)).to(x.dtype)
    return x * (2 + 5 * x**2) + 1 - band @ (x * (1 + x))


def linear_full_rank(x: Tensor, m: int = 20) -> Tensor:  # 32
    rest = x.new_zeros(m - len(x))
    return torch.cat([x, rest]) - 2 / m * x.sum() - 1


def linear_rank_1(x: Tensor, m: int = 20) -> Tensor:  # 33
    return count(1, m) * (count(1, len(x)) * x).sum() - 1


def linear_rank_1_zeros(x: Tensor, m: int = 20) -> Tensor:  # 34
    inner = count(1, m - 2) * (count(2, len(x) - 1) * x[1:-1]).sum() - 1
    end = x.new_full((1,), -1.0)
    return torch.cat([end, inner, end])


def chebyquad(x: Tensor) -> Tensor:  # 35
    y, n = 2 * x - 1, len(x)
    terms = [torch.ones_like(y), y]
    for _ in range(n - 1):
        terms.append(2 * y * terms[-1] - terms[-2])
    means = torch.stack(terms[1:]).mean(1)
    return means - torch.stack(
        [x.new_tensor(0.0 if i % 2 else -1 / (i * i - 1)) for i in range(1, n + 1)]
    )


def grid(n: int) -> Tensor:
    return count(1, n) / (n + 1)


PROBLEMS = [
    Problem("Rosenbrock", extended_rosenbrock, vector(-1.2, 1)),
    Problem("Freudenstein-Roth", freudenstein_roth, vector(0.5, -2)),
    Problem("Powell badly scaled", powell_badly_scaled, vector(0, 1)),
    Problem("Brown badly scaled", brown_badly_scaled, vector(1, 1)),
    Problem("Beale", beale, vector(1, 1)),
    Problem("Jennrich-Sampson", jennrich_sampson, vector(0.3, 0.4)),
    Problem("helical valley", helical_valley, vector(-1, 0, 0)),
    Problem("Bard", bard, vector(1, 1, 1)),
    Problem("Gaussian", gaussian, vector(0.4, 1, 0)),
    Problem("Meyer", meyer, vector(0.02, 4000, 250)),
    Problem("Gulf", gulf, vector(5, 2.5, 0.15)),
    Problem("Box", box, vector(0, 10, 20)),
    Problem("Powell singular", extended_powell, vector(3, -1, 0, 1)),
    Problem("Wood", wood, vector(-3, -1, -3, -1)),
    Problem("Kowalik-Osborne", kowalik_osborne, vector(0.25, 0.39, 0.415, 0.39)),
    Problem("Brown-Dennis", brown_dennis, vector(25, 5, -5, -1)),
    Problem("Osborne 1", osborne_1, vector(0.5, 1.5, -1, 0.01, 0.02)),
    Problem("Biggs EXP6", biggs_exp6, vector(1, 2, 1, 1, 1, 1)),
    Problem("Osborne 2", osborne_2, vector(1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5)),
    Problem("Watson 6", watson, torch.zeros(6, dtype=torch.float64)),
    Problem("Watson 9", watson, torch.zeros(9, dtype=torch.float64)),
    Problem("extended Rosenbrock 20", extended_rosenbrock, vector(-1.2, 1).repeat(10)),
    Problem("extended Powell 20", extended_powell, vector(3, -1, 0, 1).repeat(5)),
    Problem("penalty I 10", penalty_1, count(1, 10)),
    Problem("penalty II 10", penalty_2, torch.full((10,), 0.5, dtype=torch.float64)),
    Problem("variably dimensioned 10", variably_dimensioned, 1 - count(1, 10) / 10),
    Problem("trigonometric 10", trigonometric, torch.full((10,), 0.1, dtype=torch.float64)),
    Problem(
        "Brown almost linear 10", brown_almost_linear, torch.full((10,), 0.5, dtype=torch.float64)
    ),
    Problem("boundary value 20", boundary_value, grid(20) * (grid(20) - 1)),
    Problem("integral equation 20", integral_equation, grid(20) * (grid(20) - 1)),
    Problem("Broyden tridiagonal 20", broyden_tridiagonal, -torch.ones(20, dtype=torch.float64)),
    Problem("Broyden banded 20", broyden_banded, -torch.ones(20, dtype=torch.float64)),
    Problem("linear full rank 10", linear_full_rank, torch.ones(10, dtype=torch.float64)),
    Problem("linear rank 1, 10", linear_rank_1, torch.ones(10, dtype=torch.float64)),
    Problem("linear rank 1 zeros 10", linear_rank_1_zeros, torch.ones(10, dtype=torch.float64)),
    Problem("Chebyquad 8", chebyquad, grid(8)),
]


def chained_rosenbrock(x: Tensor) -> Tensor:
    """Every two neighbours are coupled, unlike in problem 21."""
    return torch.cat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])


PROBLEMS += [
    Problem(f"Rosenbrock chain {n}", chained_rosenbrock, vector(-1.2, 1).repeat(n // 2 + 1)[:n])
    for n in (3, 5, 10, 15, 20, 30, 40)
]

# Minima where the published start leads; from the paper, rounded as there.
PUBLISHED_MINIMA = {
    "Freudenstein-Roth": 48.9842,
    "Jennrich-Sampson": 124.362,
    "Bard": 8.21487e-3,
    "Gaussian": 1.12793e-8,
    "Meyer": 87.9458,
    "Kowalik-Osborne": 3.07505e-4,
    "Brown-Dennis": 85822.2,
    "Osborne 1": 5.46489e-5,
    "Osborne 2": 4.01377e-2,
    "Watson 6": 2.28767e-3,
    "Watson 9": 1.39976e-6,
    "penalty I 10": 7.08765e-5,
    "penalty II 10": 2.93660e-4,
    "linear full rank 10": 10.0,
    "linear rank 1, 10": 20 * 19 / (2 * 41),
    "linear rank 1 zeros 10": (20**2 + 3 * 20 - 6) / (2 * (2 * 20 - 3)),
    "Chebyquad 8": 3.51687e-3,
}
