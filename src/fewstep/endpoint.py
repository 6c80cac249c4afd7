"""Where does a solver end, and where should it?

The probability-flow ODE takes every noise to one picture. `reference` follows it finely from many noises; `Runs` follows
it with a solver and few levels, from the same noises. The root mean square difference of the two ends, per dimension, is
the endpoint error: what a schedule for a deterministic solver has to make small.

On the way the reference sees how the model's belief D = E[x_0 | x] bends along a trajectory. A method of order p with
steps h in log sigma replaces D by a polynomial through p points, so on the VE path a step's local error is about

    c h^{p+1} |d^p D / d(log sigma)^p|

(for p = 2 there is a smaller term in the first derivative, which is left out). Its mean square is a cost of order 2(p+1),
whose equalised curve spreads the local error evenly over a grid's steps.

Image to image starts from pictures with noise instead, at some level on the way: `Midway`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.denoiser import Cond, Denoiser, OnPath
from fewstep.path import HALF_PI, VE, as_time
from fewstep.schedule import log_linear
from fewstep.solvers import ORDER, SOLVERS, STOCHASTIC, solve

REFERENCE_SOLVER = "unipc"  # of the solvers here the nearest to the end at 64 levels, on mixtures and digits
MIDWAY_STEPS = 12  # from noise to where image to image begins
APART = 31_415_926  # the seed of noise that must not be what the ends came from
MEMORY = 2**26  # numbers of the reference's trajectories held at once
Log = list[tuple[float, Tensor]]


class Reference(NamedTuple):
    """noise (m, *d): standard normal, or what stands for it (`Midway`); ends (m, *d): where the ODE takes it; theta (k,): the
    levels; bending[p - 1] (k - p, m): the squared norm of D's p-th difference quotient in log sigma, p = 1, 2.

    weight (m,): what a noise counts in a mean, 1 where all are drawn alike. arc (m,): which of them were drawn together, by
    `reference_on_arcs`; else each on its own."""

    noise: Tensor
    ends: Tensor
    theta: Tensor
    bending: tuple[Tensor, Tensor]
    evaluations: int
    weight: Tensor
    arc: Tensor


def ignore(evaluations: int) -> None:
    """Nobody watches the progress."""


def local_error_order(solver: str) -> int:
    """The p of the local error that a curve is learned from: the solver's order, but at most 2, beyond which D's
    differences are noise before they are asymptotics."""
    return min(ORDER[solver], 2)


def require_solver(solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")


def require_deterministic(solver: str) -> None:
    require_solver(solver)
    if solver in STOCHASTIC:
        raise ValueError(f"{solver} has no end to compare: it draws noise; choose a deterministic solver, such as dpmpp_2m")


def deal(cond: Mapping[str, Tensor] | None, rows: Tensor) -> dict[str, Tensor] | None:
    """The conditions of these noises: row i of n conditions goes to the noises i, i + n, i + 2n, .."""
    return {k: v[(rows % len(v)).to(v.device)] for k, v in cond.items()} if cond else None


class Runs:
    """A solver's end as a function of its levels, from fixed noises (m, *d), standard normal; counts its evaluations.

    A run starts from what the path makes of the noise (`path.start_from`). The solver must be deterministic.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        solver: str,
        noise: Tensor,
        cond: Cond = None,
        batch_size: int = 512,
        tick: Callable[[int], object] = ignore,
    ):
        require_deterministic(solver)
        self.denoiser, self.solver, self.noise, self.cond, self.tick = denoiser, solver, noise, cond, tick
        self.batches = torch.arange(len(noise)).split(batch_size)
        self.evaluations = 0

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        parts = []
        for rows in self.batches:
            parts.append(self.denoiser(x[rows[0] : rows[-1] + 1], t, deal(self.cond, rows)))
            self.evaluations += len(rows) * self.denoiser.evaluations
            self.tick(len(rows) * self.denoiser.evaluations)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def __call__(self, theta: Tensor, replay: Log | None = None) -> tuple[Tensor, Log]:
        """The ends (m, *d) on the levels theta (N,), exact data after them, and what the model said on the way.

        replay: the log of a run whose first levels were the same; what the model says there is not asked again.
        """
        path, same = self.denoiser.path, replay is not None
        log: Log = []

        def predict(x: Tensor, t: Tensor) -> Tensor:
            nonlocal same
            known = replay[len(log)] if same and replay and len(log) < len(replay) else None
            same = known is not None and known[0] == float(t)
            log.append((float(t), known[1] if known and same else self.predict(x, t)))
            return log[-1][1]

        times = torch.cat([path.time(theta), theta.new_zeros(1)])
        start = path.start_from(self.noise, times[0])
        *_, x = SOLVERS[self.solver](predict, start, path, times, torch.randn_like)
        return x, log


class Midway(OnPath):
    """The same model from the level `start` down, where image to image begins: its runs start from pictures with noise.

    Noised pictures are distributed as the ODE's states at that level are, so no data are needed. A run's first level is
    always `start`: what begins there cannot be rescaled.
    """

    def __init__(self, denoiser: Denoiser, start: float, sigma_min: float | None = None, sigma_max: float | None = None):
        low, self.noisiest = level_range(denoiser, sigma_min, sigma_max)
        if not low < start < self.noisiest:
            raise ValueError(
                f"image to image starts between the model's cleanest and noisiest level, {low:g} and {self.noisiest:g}; "
                f"got {start:g}"
            )
        super().__init__(denoiser, VE(low, start))
        self.default_levels = None

    @torch.no_grad()
    def states(self, noise: Tensor, cond: Cond = None) -> tuple[Tensor, int]:
        """Where the ODE takes standard normal noise (b, *d) until the level `start`, over `start`, so that the path's
        `start_from` gives it back; and the evaluations."""
        inner, start = self.denoiser, self.path.sigma_max
        pure = inner.path.ends_in_pure_noise()
        theta = log_linear(start, self.noisiest).angles(MIDWAY_STEPS + 1 - pure)[:-1]
        times = inner.path.time(torch.cat([as_time([HALF_PI]), theta]) if pure else theta)
        done = solve(inner, inner.path.start_from(noise, times[0]), times, REFERENCE_SOLVER, cond=cond)
        return done.x / float(inner.path.sigma(times[-1])), done.evaluations * len(noise)


def squared_errors(x: Tensor, ends: Tensor) -> Tensor:
    """Mean square difference per dimension of each sample: (m,), float64."""
    return ((x - ends).double() ** 2).flatten(1).mean(1).cpu()


def mean_square(runs: Runs, theta: Tensor, ends: Tensor) -> float:
    """The square of the endpoint error on these levels; infinite where the solver overflows."""
    error = float(squared_errors(runs(theta)[0], ends).mean())
    return error if math.isfinite(error) else math.inf


def steps_of_reference(denoiser: Denoiser, levels: int) -> int:
    """How often a reference of so many levels asks the model about one noise: once more at pure noise."""
    return levels + (MIDWAY_STEPS if isinstance(denoiser, Midway) else 0) + denoiser.path.ends_in_pure_noise()


@torch.no_grad()
def reference(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Mapping[str, Tensor] | None = None,
    *,
    levels: int = 48,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    batch_size: int = 512,
    tick: Callable[[int], object] = ignore,
) -> Reference:
    """Follow the ODE from standard normal noise (m, *d) on `levels` log-uniform levels: m evaluations for each,
    and for each of MIDWAY_STEPS to where a `Midway` begins."""
    sigma_min, sigma_max = level_range(denoiser, sigma_min, sigma_max)
    theta = log_linear(sigma_min, sigma_max).angles(levels)[:-1]
    grid = torch.cat([as_time([HALF_PI]), theta]) if denoiser.path.ends_in_pure_noise() else theta
    h = math.log(sigma_max / sigma_min) / (levels - 1)
    chunk = max(1, min(batch_size, MEMORY // (levels * noise[0].numel())))
    starts, ends, bending, evaluations = [], [], [], 0
    for rows in torch.arange(len(noise)).split(chunk):
        given, first = deal(cond, rows), noise[rows.to(noise.device)]
        if isinstance(denoiser, Midway):
            first, spent = denoiser.states(first, given)
            evaluations += spent
            tick(spent)
        runs = Runs(denoiser, REFERENCE_SOLVER, first, given, batch_size, tick)
        x, log = runs(grid)
        evaluations += runs.evaluations
        starts.append(first)
        ends.append(x)
        slope = torch.stack([belief for _, belief in log[-levels:]]).flatten(2).double().diff(dim=0) / h
        bending.append([(slope**2).sum(-1).cpu(), ((slope.diff(dim=0) / h) ** 2).sum(-1).cpu()])
    first, second = (torch.cat(part, 1) for part in zip(*bending, strict=True))
    x = torch.cat(ends)
    if not bool(torch.isfinite(x).all()):
        raise ValueError(
            "the model's trajectories are not finite; check it with `fewstep sample --steps 64`, or raise sigma_min"
        )
    alike, each = torch.ones(len(x), dtype=torch.float64), torch.arange(len(x))
    return Reference(torch.cat(starts), x, theta, (first, second), evaluations, weight=alike, arc=each)


@torch.no_grad()
def denoising_errors(
    denoiser: Denoiser,
    known: Reference,
    draws: int,
    cond: Mapping[str, Tensor] | None = None,
    batch_size: int = 512,
    tick: Callable[[int], object] = ignore,
) -> Tensor:
    """E|x_0 - E[x_0 | x_t]|^2 at the reference's levels (k,), summed over dimensions: of its ends, the model's own samples,
    noised anew. k draws evaluations."""
    level = torch.arange(len(known.theta)).repeat_interleave(draws)
    rows, g = torch.arange(len(level)) % len(known.ends), torch.Generator().manual_seed(APART)
    times, found = denoiser.path.time(known.theta)[level], []
    for part in torch.arange(len(level)).split(batch_size):
        x0 = known.ends[rows[part].to(known.ends.device)]
        eps = torch.randn(x0.shape, generator=g, dtype=x0.dtype).to(x0.device)
        x = denoiser.path.noised(x0, eps, times[part])
        found.append(squared_errors(denoiser(x, times[part], deal(cond, rows[part])), x0))
        tick(len(part) * denoiser.evaluations)
    return torch.cat(found).reshape(-1, draws).mean(1) * known.ends[0].numel()


def local_error_costs(bending: tuple[Tensor, Tensor], order: int) -> Tensor:
    """The cost, up to a constant, of each step between the reference's levels (k - 1,), for a solver of order p = 1 or 2;
    a cost of order 2(p + 1)."""
    each = bending[order - 1].mean(1)
    if order == 1:
        return each
    at_levels = torch.cat([each[:1], each, each[-1:]])  # the second differences lie on the levels, but the first and last
    return torch.sqrt(at_levels[:-1] * at_levels[1:])


def level_range(denoiser: Denoiser, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    """The levels sigma/alpha to learn on: the path's own unless given; raises ValueError beyond the model's noisiest."""
    path = denoiser.path
    low = path.sigma_min if sigma_min is None else sigma_min
    high = path.sigma_max if sigma_max is None else sigma_max
    if not 0 < low < high < math.inf:
        raise ValueError(f"want 0 < sigma_min < sigma_max, got {low:g} and {high:g}")
    if path.ends_in_pure_noise():
        return low, high
    if high > 1.001 * path.sigma_max:
        raise ValueError(f"sigma_max {high:g} is beyond the model's noisiest level, {path.sigma_max:g}")
    return low, min(high, path.sigma_max)  # as people round it
