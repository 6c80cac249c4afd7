"""Which few levels bring this solver closest to where it should end?

Below about ten steps the levels are too far apart for any density to be right, so they are moved themselves: least
squares in the endpoint's error over many noises, by Levenberg-Marquardt. The network is never differentiated. A
Jacobian's column is a run with one level moved, of which the steps before that level need no evaluation; between
Jacobians Broyden's update learns from the runs that are made anyway.

Levels are moved by the logarithms of their gaps in log tan(theta/2), so that they cannot cross. The first one's gap is that
to infinite noise, asinh(1/sigma): where sigma is large it moves by log sigma, and may lie on the upper end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.endpoint import Log, Midway, Reference, Runs, deal, ignore, mean_square
from fewstep.schedule import Schedule, bend, unbend
from fewstep.solvers import evaluations_of

BUDGET = 15_000  # evaluations of the network for one number of steps
LEAST_GAP = 1e-3
SCREENING = 32  # noises that the starts are tried on
STARTS = 3  # tried starts that are then moved
STOP = 2e-3  # relative gain of a step below which a Jacobian is renewed, or the search ends


class Refined(NamedTuple):
    """theta: (N,) levels. evaluations: spent on the way. start: the schedule it came from. moved: whether it left that.
    others: the levels that it ended at on fewer noises, by the start that they came from."""

    theta: Tensor
    evaluations: int
    start: str
    moved: bool
    others: dict[str, Tensor]


class Bounds(NamedTuple):
    """The range of levels in the bent coordinate, and whether the first level may leave the upper end."""

    low: float
    high: float
    free_start: bool

    @property
    def first(self) -> int:
        """The first level that may move."""
        return 0 if self.free_start else 1

    def gaps(self, bent: Tensor) -> Tensor:
        """(N,) gaps down to each level, the first from infinite noise, where the bent coordinate is 0."""
        gaps = -torch.cat([bent.new_zeros(1), bent]).diff().clamp(max=-LEAST_GAP)
        gaps[0] = max(float(-bent[0]), -self.high) if self.free_start else -self.high
        return gaps

    def levels(self, gaps: Tensor) -> Tensor:
        """(N,) falling levels, pushed up where they would leave the lower end."""
        floor = self.low + LEAST_GAP * torch.arange(len(gaps) - 1, -1, -1, dtype=torch.float64)
        return torch.maximum(-gaps.cumsum(0), floor)

    def step(self, hessian: Tensor, gradient: Tensor, gaps: Tensor) -> Tensor:
        """Newton's step in the free logarithms, that of the first gap held at the upper end where it would leave it."""
        step = -torch.linalg.solve(hessian, gradient)
        if self.free_start and step[0] < (least := math.log(-self.high / float(gaps[0]))):
            rest = -torch.linalg.solve(hessian[1:, 1:], gradient[1:] + least * hessian[1:, 0])
            step = torch.cat([step.new_tensor([least]), rest])
        return step


def bounds_of(denoiser: Denoiser, theta: Tensor) -> Bounds:
    """From the first to the last of the levels theta. The first level may move on a VE path only: there every runtime starts
    from that level's own noise. Pictures have the noise that they have."""
    path = denoiser.path
    first = path.angle(1.0) if path.ends_in_pure_noise() else theta[0]
    free_start = float(path.alpha(1.0)) == 1.0 and not isinstance(denoiser, Midway)
    return Bounds(float(bend(theta[-1])), float(bend(first)), free_start)


def descend(runs: Runs, ends: Tensor, bent: Tensor, bounds: Bounds, budget: int) -> tuple[Tensor, float]:
    """Levenberg-Marquardt from the levels bent (N,), within `budget` evaluations: the levels and their mean square error."""

    def residual(levels: Tensor, replay: Log | None = None) -> tuple[Tensor, Log]:
        x, log = runs(unbend(levels), replay)
        return (x - ends).flatten().double().cpu(), log

    free = slice(bounds.first, None)
    spent = runs.evaluations
    gaps = bounds.gaps(bent)
    bent = bounds.levels(gaps)
    r, log = residual(bent)
    if not bool(torch.isfinite(r).all()):
        return bent, math.inf
    if len(bent) == 1 and not bounds.free_start:
        return bent, float(r @ r) / len(r)
    one_run = runs.evaluations - spent
    jacobian, moves, failures, damping = None, 0, 0, 1e-2  # moves, failures: since the Jacobian was taken, in a row
    while runs.evaluations - spent + one_run <= budget:
        if jacobian is None:
            if runs.evaluations - spent + one_run * (len(bent) + 5) // 2 > budget:
                break
            jacobian, moves, failures = _jacobian(residual, r, log, bent, gaps, bounds), 0, 0
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ r
        scale = normal.diagonal() + 1e-9 * normal.trace()
        step = bounds.step(normal + damping * scale.diag(), gradient, gaps)
        step = step / max(1.0, float(step.abs().max()))  # no gap changes by more than a factor e
        moved = gaps.clone()
        moved[free] *= torch.exp(step)
        trial = bounds.levels(moved)
        moved = bounds.gaps(trial)
        r_trial, log_trial = residual(trial)
        better = bool(torch.isfinite(r_trial).all()) and bool(r_trial @ r_trial < r @ r)
        step = (moved[free] / gaps[free]).log()
        if (better or moves) and bool(torch.isfinite(r_trial).all()) and float(step @ step) > 0:
            jacobian = jacobian + torch.outer(r_trial - r - jacobian @ step, step) / (step @ step)
        if better:
            gain = 1 - float((r_trial @ r_trial) / (r @ r))
            gaps, bent, r, log, damping = moved, trial, r_trial, log_trial, max(damping / 4, 1e-6)
            moves, failures = moves + 1, 0
            if gain < STOP:
                if moves == 1:
                    break
                jacobian = None
        else:
            failures, damping = failures + 1, max(6 * damping, 1e-3)
            if moves and failures == 2:
                jacobian = None
            elif damping > 1e5:
                break
    return bent, float(r @ r) / len(r)


def _jacobian(residual: Callable, r: Tensor, log: Log, bent: Tensor, gaps: Tensor, bounds: Bounds) -> Tensor:
    """d residual/d log gaps of the levels that may move, each moved by a twentieth of a gap: (m * d, N or N - 1).

    To the wider side, and where the solver overflows there to the other one, by one run more; where it does so on both, the
    level counts as one that changes nothing.
    """

    def column(i: int, side: float) -> Tensor:
        move, moved = 0.05 * max(-1.0, min(side, 1.0)), bent.clone()
        moved[i] += move
        return (residual(moved, log)[0] - r) / move

    columns = []
    for i in range(bounds.first, len(bent)):
        below = float(gaps[i + 1]) if i + 1 < len(bent) else max(float(bent[-1]) - bounds.low, 10 * LEAST_GAP)
        sides = [-below] if i == 0 else sorted((float(gaps[i]), -below), key=abs, reverse=True)
        tried = (column(i, side) for side in sides)
        columns.append(next((c for c in tried if bool(torch.isfinite(c).all())), torch.zeros_like(r)))
    # a gap moves its own level and all below it
    return -torch.stack(columns, 1).flip(1).cumsum(1).flip(1) * gaps[bounds.first :]


def noises_for(solver: str, steps: int, starts: int, budget: int) -> int:
    """How many noises the starts can be tried on and moved on; raises ValueError where they are too few."""
    one_run = evaluations_of(solver, steps)
    trying, moving = one_run * starts, one_run * (steps + 1) // 2 + 3 * one_run
    affordable = min(SCREENING, int(0.2 * budget) // trying, int(0.15 * budget) // moving)
    if affordable < 4:
        least = max(20 * trying, 27 * moving)
        raise ValueError(
            f"{budget} evaluations are too few to refine {steps} steps of {solver} from {starts} starts; want at least {least}"
        )
    return affordable


def refine(
    denoiser: Denoiser,
    solver: str,
    steps: int,
    known: Reference,
    starts: Mapping[str, Schedule],
    *,
    cond: Mapping[str, Tensor] | None = None,
    budget: int = BUDGET,
    move: int = STARTS,
    batch_size: int = 512,
    tick: Callable[[int], object] = ignore,
) -> Refined:
    """The levels of `steps` steps with the smallest endpoint error over the reference's noises, from the best of the starts.

    All starts are tried on a few noises, the best `move` of them moved on those, the best outcome moved on as many as the
    budget allows. The first quarter of the noises, which nothing was fitted to, judges between start and outcomes. Spends at
    most `budget` evaluations, twice that where each is two by guidance; raises ValueError where that is too few.
    """
    budget = budget * denoiser.evaluations
    bounds = bounds_of(denoiser, known.theta)
    one_run = evaluations_of(solver, steps) * denoiser.evaluations  # of one noise
    jacobian = one_run * (steps + 1) // 2
    held = len(known.noise) // 4

    def on(rows: slice) -> tuple[Runs, Tensor]:
        index = torch.arange(len(known.noise))[rows]
        return Runs(denoiser, solver, known.noise[rows], deal(cond, index), batch_size, tick), known.ends[rows]

    affordable = noises_for(solver, steps, len(starts), budget // denoiser.evaluations)
    if len(known.noise) < 16:
        raise ValueError(f"{len(known.noise)} noises are too few to refine {steps} steps of {solver}; want at least 16")
    screen, screen_ends = on(slice(held, held + affordable))
    tried = {}
    for name, schedule in starts.items():
        theta = schedule.angles(steps)[:-1]
        tried[name] = mean_square(screen, theta, screen_ends), theta
    names = sorted(tried, key=lambda name: tried[name][0])
    moved = {name: descend(screen, screen_ends, bend(tried[name][1]), bounds, int(0.15 * budget)) for name in names[:move]}
    start = min(moved, key=lambda name: moved[name][1])

    judge, judge_ends = on(slice(0, min(held, int(0.1 * budget) // (3 * one_run))))
    left = budget - screen.evaluations - 3 * len(judge.noise) * one_run
    fit, fit_ends = on(slice(held, held + max(affordable, left // (jacobian + 8 * one_run))))
    outcome, _ = descend(fit, fit_ends, moved[start][0], bounds, left)
    candidates = [tried[names[0]][1], unbend(moved[start][0]), unbend(outcome)]
    errors = [mean_square(judge, theta, judge_ends) for theta in candidates]
    best = errors.index(min(errors))
    spent = screen.evaluations + fit.evaluations + judge.evaluations
    others = {name: unbend(bent) for name, (bent, _) in moved.items()}
    return Refined(candidates[best], spent, names[0] if best == 0 else start, best > 0, others)
