"""How many evaluations does a schedule need?   Ways of estimating the corrector cost, at equal numbers of evaluations.

    python benchmarks/estimation.py --digits RUN     three seeds, about 8 minutes; writes benchmarks/estimation.json

RUN: a folder of `fewstep train --data digits`. Every option spends 2 x 99 x draws evaluations, on 100 probes. error: the
largest relative difference of the 10-point grid's sigmas from those of the same probes with many draws. saved: mean
squared error of plain Monte Carlo over the option's, which is the factor of evaluations saved, since errors fall as
draws^{-1/2}; the mean over three seeds and their standard deviation.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from scipy.stats import chi2
from torch import Tensor

from fewstep.commands import load
from fewstep.config import Source
from fewstep.cost import controls, data_moments, draws_until, regressed
from fewstep.denoiser import Denoiser, OnPath, to_score
from fewstep.mixture import Mixture, ring
from fewstep.models import load_denoiser
from fewstep.path import VE, broadcast
from fewstep.run import write_json
from fewstep.schedule import from_costs, log_linear

PROBES = 100


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Problem:
    """A denoiser with its data, flattened, and the probes; costs(rows, eps) evaluates given draws (k-1, n, D)."""

    def __init__(self, denoiser: Denoiser, data: Tensor, truth_draws: int):
        path = VE(denoiser.path.sigma_min, denoiser.path.sigma_max)
        self.denoiser, self.shape, self.data = OnPath(denoiser, path), data.shape[1:], data.flatten(1)
        self.theta = log_linear(path.sigma_min, path.sigma_max).angles(PROBES)[:-1]
        self.path, self.times, self.sigma = path, path.time(self.theta), torch.tan(self.theta)
        self.moments, self.diagonal = data_moments(self.data), data_moments(self.data, full_up_to=0)
        g, total, rounds = seeded(10_000), 0.0, max(1, truth_draws // 256)
        for _ in range(rounds):
            rows, eps = plain(self, 256, g)
            total = total + controlled(self, rows, eps, self.costs(rows, eps), "full noise").mean(1)
        self.truth = total / rounds
        self.grid = self.levels(self.truth)
        self.length = self.truth.sqrt().sum()

    @property
    def dim(self) -> int:
        return self.data.shape[1]

    def noised(self, rows: Tensor, eps: Tensor) -> Tensor:
        return self.data[rows] + self.sigma[:-1, None, None].to(eps) * eps

    def costs(self, rows: Tensor, eps: Tensor) -> Tensor:
        n = rows.shape[1]
        x = self.noised(rows, eps).reshape(-1, *self.shape)
        each = []
        noisier, cleaner = (t.repeat_interleave(n) for t in (self.times[:-1], self.times[1:]))
        with torch.no_grad():
            for at in torch.arange(len(x)).split(8192):
                xs, high, low = x[at], noisier[at], cleaner[at]
                change = to_score(self.denoiser(xs, low), xs, self.path, low)
                change = change - to_score(self.denoiser(xs, high), xs, self.path, high)
                each.append(((broadcast(self.path.sigma(low), xs) * change).flatten(1).double() ** 2).sum(1))
        return torch.cat(each).reshape(-1, n)

    def levels(self, costs: Tensor) -> Tensor:
        return from_costs(self.theta, costs.clamp(min=0)).sigmas(10)[:-1]

    def errors(self, costs: Tensor) -> tuple[float, float]:
        """Of the grid, the largest relative one; and of the length, relative and signed."""
        curve = float((self.levels(costs) / self.grid).log().abs().max())
        return curve, float(costs.clamp(min=0).sqrt().sum() / self.length - 1)


# --- which draws ------------------------------------------------------------------------------------------------------


def plain(p: Problem, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    rows = torch.randint(len(p.data), (PROBES - 1, n), generator=g)
    return rows, torch.randn(PROBES - 1, n, p.dim, generator=g, dtype=p.data.dtype)


def shared(p: Problem, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same data and noises at every level."""
    rows = torch.randint(len(p.data), (1, n), generator=g)
    eps = torch.randn(1, n, p.dim, generator=g, dtype=p.data.dtype)
    return rows.expand(PROBES - 1, n), eps.expand(PROBES - 1, n, p.dim)


def antithetic(p: Problem, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every datum with a noise and its opposite."""
    rows, eps = plain(p, n // 2, g)
    return torch.cat([rows, rows], 1), torch.cat([eps, -eps], 1)


def sobol(p: Problem, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A scrambled Sobol sequence over datum and noise, shifted at random at every level."""
    engine = torch.quasirandom.SobolEngine(1 + p.dim, scramble=True, seed=int(torch.randint(2**31, (), generator=g)))
    u = (engine.draw(n, dtype=torch.float64) + torch.rand(PROBES - 1, 1, 1 + p.dim, generator=g, dtype=torch.float64)) % 1
    rows = (u[..., 0] * len(p.data)).long().clamp(max=len(p.data) - 1)
    return rows, torch.special.ndtri(u[..., 1:].clamp(1e-12, 1 - 1e-12)).to(p.data.dtype)


def radii(p: Problem, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """The norm of the noise in n equally probable strata."""
    rows, eps = plain(p, n, g)
    u = (torch.arange(n) + torch.rand(PROBES - 1, n, generator=g, dtype=torch.float64)) / n
    radius = torch.from_numpy(np.sqrt(chi2.ppf(u.numpy(), p.dim))).to(eps)
    return rows, eps / eps.norm(dim=-1, keepdim=True) * radius[..., None]


def each_datum_once(p: Problem, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Data without replacement."""
    _, eps = plain(p, n, g)
    need = (PROBES - 1) * n
    order = torch.cat([torch.randperm(len(p.data), generator=g) for _ in range(-(-need // len(p.data)))])[:need]
    return order.reshape(PROBES - 1, n), eps


# --- what is made of them ---------------------------------------------------------------------------------------------


def controlled(p: Problem, rows: Tensor, eps: Tensor, each: Tensor, which: str) -> Tensor:
    """Less the share of controls: "full" or "diagonal" Gaussian, "noise": |eps|^2, or two of them."""
    moments = p.diagonal if "diagonal" in which else p.moments
    high, low = (s.repeat_interleave(rows.shape[1]) for s in (p.sigma[:-1], p.sigma[1:]))
    both = controls(p.noised(rows, eps).flatten(0, 1), eps.flatten(0, 1), high, low, moments).reshape(*rows.shape, 2)
    columns = [which != "noise", "noise" in which]
    return regressed(each, both[..., torch.tensor(columns)])


def smoothed(each: Tensor, width: float) -> Tensor:
    """Local quadratic regression of log cost over the levels, Gaussian kernel of `width` probe steps, weighted by errors."""
    cost = each.mean(1)
    error = each.std(1) / math.sqrt(each.shape[1]) / cost
    at = torch.arange(len(cost), dtype=torch.float64)
    distance = at[:, None] - at
    weight = torch.exp(-((distance / width) ** 2) / 2) / (error**2 + 1e-6)
    basis = torch.stack([torch.ones_like(distance), distance, distance**2], -1)
    left = torch.einsum("ij,ija,ijb->iab", weight, basis, basis)
    right = torch.einsum("ij,ija,j->ia", weight, basis, cost.log() + error**2 / 2)  # E log is below log E
    return torch.linalg.solve(left, right)[:, 0].exp()


def allotted(p: Problem, n: int, g: torch.Generator) -> Tensor:
    """A quarter of the draws everywhere, the rest where the length's error is: (k-1,) costs."""
    pilot = p.costs(*plain(p, n // 4, g))
    lengths = pilot.mean(1).sqrt()
    share = lengths * (pilot.std(1) / pilot.mean(1)).clamp(min=0.1)
    share = torch.nn.functional.avg_pool1d(torch.nn.functional.pad(share[None, None], (3, 3), mode="replicate"), 7, 1)[0, 0]
    more = (share / share.sum() * (n - n // 4) * (PROBES - 1)).long()
    step = torch.arange(PROBES - 1).repeat_interleave(more)
    rows = torch.randint(len(p.data), (len(step),), generator=g)
    eps = torch.randn(len(step), p.dim, generator=g, dtype=p.data.dtype)
    x = (p.data[rows] + p.sigma[:-1].to(eps)[step, None] * eps).reshape(-1, *p.shape)
    high, low = p.times[step], p.times[step + 1]
    with torch.no_grad():
        change = to_score(p.denoiser(x, low), x, p.path, low) - to_score(p.denoiser(x, high), x, p.path, high)
    each = ((broadcast(p.path.sigma(low), x) * change).flatten(1).double() ** 2).sum(1)
    total = pilot.sum(1).index_add(0, step, each)
    return total / (n // 4 + more)


def once(p: Problem, n: int, g: torch.Generator) -> dict[str, Tensor]:
    """The costs (k-1,) by every option, from one seed."""
    rows, eps = plain(p, n, g)
    each = p.costs(rows, eps)
    found = {"plain": each.mean(1)}
    for which in ("noise", "diagonal", "full", "diagonal noise", "full noise"):
        found[f"controls: {which}"] = controlled(p, rows, eps, each, which).mean(1)
    found |= {f"smoothed over {width} levels": smoothed(each, width) for width in (2, 4)}
    for draw in (shared, antithetic, each_datum_once, radii, sobol):
        rows, eps = draw(p, n, g)
        each = p.costs(rows, eps)
        found[draw.__name__.replace("_", " ")] = each.mean(1)
    found["sobol, controls: full noise"] = controlled(p, rows, eps, each, "full noise").mean(1)
    found["allotted by a pilot"] = allotted(p, n, g)
    return found


def automatic(p: Problem, tolerance: float, which: str, g: torch.Generator) -> tuple[int, float]:
    """Draws per step until the split-half error is below the tolerance, and the true error then."""

    def block(n: int) -> Tensor:
        rows, eps = plain(p, n, g)
        each = p.costs(rows, eps)
        return controlled(p, rows, eps, each, which) if which else each

    def split_half(each: Tensor) -> float:
        return float((p.levels(each[:, ::2].mean(1)) / p.levels(each[:, 1::2].mean(1))).log().abs().max())

    each = draws_until(block, split_half, tolerance, first=64, most=1024)
    return each.shape[1], p.errors(each.mean(1))[0]


def rms(values: list[float]) -> float:
    return math.sqrt(mean(v**2 for v in values))


def measure(p: Problem, draws: int, repeats: int, seeds: int, tolerance: float) -> dict:
    errors: list[dict[str, list[tuple[float, float]]]] = []
    stops: dict[str, list[tuple[int, float]]] = {"plain": [], "controls: full noise": []}
    for seed in range(seeds):
        g, found = seeded(seed), {}
        for _ in range(repeats):
            for option, costs in once(p, draws, g).items():
                found.setdefault(option, []).append(p.errors(costs))
        errors.append(found)
        for option in stops:
            stops[option] += [automatic(p, tolerance, option.partition(": ")[2], g) for _ in range(3)]
    options = {}
    for option in errors[0]:
        row = {}
        for k, name in enumerate(("curve", "length")):
            each = [[e[k] for e in found[option]] for found in errors]
            ratios = [(rms([e[k] for e in found["plain"]]) / rms(one)) ** 2 for found, one in zip(errors, each, strict=True)]
            row |= {
                f"{name}_rms": rms([e for one in each for e in one]),
                f"{name}_saved": mean(ratios),
                f"{name}_saved_sd": stdev(ratios),
            }
        row["length_bias"] = mean(e[1] for found in errors for e in found[option])
        options[option] = {k: float(f"{v:.3g}") for k, v in row.items()}
    ends = {
        o: {"draws": mean(n for n, _ in s), "true_error_rms": float(f"{rms([e for _, e in s]):.3g}")} for o, s in stops.items()
    }
    return {"draws": draws, "repeats": repeats, "options": options, "automatic": {"tolerance": tolerance, **ends}}


def problems(digits: str) -> dict[str, Callable[[], tuple[Problem, int, int, float]]]:
    """Name -> problem, draws, repeats per seed, tolerance of the automatic number of draws."""

    def exact(mixture: Mixture, truth: int, dtype: torch.dtype = torch.float64) -> Problem:
        return Problem(mixture, mixture.sample(20_000, seeded(1), dtype), truth)

    modes = torch.randn(10, 64, generator=seeded(5), dtype=torch.float64)
    return {
        "N(0, 0.5^2)": lambda: (exact(Mixture([[0.0]], 0.5), 8192), 64, 40, 0.02),
        "8 Gaussians": lambda: (exact(ring(), 16384), 64, 20, 0.02),
        "10 modes in 64 dimensions": lambda: (exact(Mixture(modes, 0.3), 1024, torch.float32), 32, 8, 0.005),
        "digits, learned": lambda: (Problem(load_denoiser(digits), load(Source("digits")).train, 4096), 64, 10, 0.005),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "command": "python benchmarks/estimation.py --digits RUN",
        "date": str(datetime.date.today()),
        "torch": torch.__version__,
        "probes": PROBES,
        "seeds": arguments.seeds,
    }
    for name, make in problems(arguments.digits).items():
        problem, draws, repeats, tolerance = make()
        result[name] = measure(problem, draws, repeats, arguments.seeds, tolerance)
        print(name, json.dumps(result[name], indent=1), flush=True)
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
