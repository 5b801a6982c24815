"""Physics-informed networks in float64: P-BFGS on all weights beside torch's LBFGS.

A network u(x; w) of a few hundred weights solves a differential equation by least squares on its
residuals. Such losses are ill-conditioned, and a quasi-Newton method that keeps the whole inverse
Hessian gets further with as many evaluations than one that keeps the last pairs. `IdentitySubspace`
gives P-BFGS every weight as a coordinate, at no cost. The closure differentiates u in x and returns
a loss with its graph; P-BFGS differentiates that in the weights.

Problems: Poisson on the unit square, u = sin(pi x) sin(pi y), and Burgers with viscosity 0.01 / pi
(Raissi, Perdikaris, Karniadakis, "Physics-informed neural networks", J. Comput. Phys. 2019), whose
solution is known by the Cole-Hopf transformation (Basdevant et al., Comput. Fluids 1986).
"""

import argparse
import itertools
import math
import time

import numpy as np
import torch
from torch import nn

from dldr_ext import PBFGS, IdentitySubspace

PI = math.pi


def network(*sizes):
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        linear = nn.Linear(inputs, outputs, dtype=torch.float64)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def derivative(u, points):
    return torch.autograd.grad(u.sum(), points, create_graph=True)[0]


def grid(*sides):
    return torch.cartesian_prod(*sides)


def line(start, end, count):
    return torch.linspace(start, end, count, dtype=torch.float64)


class Poisson:
    """u_xx + u_yy = f on the unit square, u = 0 on its edges."""

    def __init__(self):
        self.points = grid(line(0, 1, 17)[1:-1], line(0, 1, 17)[1:-1]).requires_grad_()
        side, zeros = line(0, 1, 16), torch.zeros(16, dtype=torch.float64)
        edges = [(side, zeros), (side, zeros + 1), (zeros, side), (zeros + 1, side)]
        self.edges = torch.cat([torch.stack(edge, 1) for edge in edges])
        self.source = -2 * PI**2 * self.solution(self.points.detach())
        self.tested = grid(line(0, 1, 51), line(0, 1, 51))
        self.sizes = 2, 20, 20, 1

    def solution(self, points):
        return torch.sin(PI * points[:, 0]) * torch.sin(PI * points[:, 1])

    def loss(self, model):
        slope = derivative(model(self.points), self.points)
        laplacian = sum(derivative(slope[:, i], self.points)[:, i] for i in (0, 1))
        return (laplacian - self.source).square().mean() + 10 * model(self.edges).square().mean()


class Burgers:
    """u_t + u u_x = nu u_xx on [-1, 1], u(x, 0) = -sin(pi x), u = 0 at both ends."""

    nu = 0.01 / PI

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        random = torch.rand(1500, 2, generator=generator, dtype=torch.float64)
        self.points = (random * torch.tensor([2, 1]) - torch.tensor([1, 0])).requires_grad_()
        x, zero = line(-1, 1, 101), torch.zeros(1, dtype=torch.float64)
        ends = grid(torch.tensor([-1.0, 1.0], dtype=torch.float64), line(0, 1, 51))
        self.known = torch.cat([grid(x, zero), ends])
        self.values = torch.cat([-torch.sin(PI * x), torch.zeros(len(ends), dtype=torch.float64)])
        self.tested = grid(line(-1, 1, 101), line(0.1, 1, 10))
        self.sizes = 2, 20, 20, 20, 1

    def solution(self, points):
        """Gauss-Hermite quadrature of the two integrals of Cole and Hopf."""
        nodes, weights = map(torch.tensor, np.polynomial.hermite.hermgauss(100))
        x, t = points[:, :1], points[:, 1:]
        place = x - nodes * torch.sqrt(4 * self.nu * t)
        exponent = -torch.cos(PI * place) / (2 * PI * self.nu)
        factor = weights * torch.exp(exponent - exponent.amax(1, keepdim=True))
        return -(factor * torch.sin(PI * place)).sum(1) / factor.sum(1)

    def loss(self, model):
        u = model(self.points)
        u_x, u_t = derivative(u, self.points).unbind(1)
        u_xx = derivative(u_x, self.points)[:, 0]
        residual = u_t + u[:, 0] * u_x - self.nu * u_xx
        return residual.square().mean() + (model(self.known)[:, 0] - self.values).square().mean()


def lbfgs(model, loss, evaluations):
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=evaluations, max_eval=evaluations, history_size=100,
        line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0,
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def pbfgs(model, loss, evaluations):
    params = list(model.named_parameters())
    optimizer = PBFGS(params, IdentitySubspace(params))
    before = loss.count
    while loss.count - before < evaluations:
        optimizer.step(loss)
        if not optimizer.status.moved:
            break


class Counted:
    """A closure that counts its calls."""

    def __init__(self, problem, model):
        self.problem, self.model, self.count = problem, model, 0

    def __call__(self):
        self.count += 1
        with torch.enable_grad():  # a trial may run under torch.no_grad(); u is differentiated in x
            return self.problem.loss(self.model)


def solve(problem, method, evaluations, seed=0):
    torch.manual_seed(seed)
    model = network(*problem.sizes)
    loss = Counted(problem, model)
    start = time.perf_counter()
    method(model, loss, evaluations)
    seconds, count = time.perf_counter() - start, loss.count
    with torch.no_grad():
        exact = problem.solution(problem.tested)
        error = ((model(problem.tested)[:, 0] - exact).norm() / exact.norm()).item()
    return {"evaluations": count, "loss": loss().item(), "error": error, "seconds": seconds}


def main(problems=(Poisson, Burgers), evaluations=2000, seeds=1):
    found = {}
    for problem in problems:
        for seed in range(seeds):
            for method in (lbfgs, pbfgs):
                row = solve(problem(), method, evaluations, seed)
                found[problem.__name__, method.__name__, seed] = row
                figures = (f"{key} {value:.4g}" for key, value in row.items())
                print(f"{problem.__name__:8} {method.__name__:6} seed {seed}", *figures, flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--evaluations", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=1)
    main(**vars(parser.parse_args()))
