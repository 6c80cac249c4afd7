"""Which levels suit this solver?   A curve for every number of steps, refined grids for the numbers asked for.

1. `reference`: where the ODE takes some noises, and how the model's belief bends on the way.
2. Curves: of equal local error; of equal entropy; through the refined levels of one middling number of steps; and free
   ones. The one with the least endpoint error, over several numbers of steps and noises that nothing was fitted to, is kept.
3. `refine`: below about ten steps no curve is right for all numbers, so each number asked for gets its own levels, from any of
   these or from `best_route`.

Nothing differentiates the network. The curve costs at most `budget` evaluations, and every refined number as much again.
A stochastic solver has no endpoint to compare. Its levels are those of the same solver without the noise (`NOISELESS`): what
a step gets wrong is the same, the bending of the model's belief, while the noise is right on any levels.

Equal entropy: what the states of a level still leave open about x_0 falls by sigma dH = E|x_0 - D|^2/sigma dlog sigma, in the
rescaled form of Stancevic et al. (2025); they measure it on data, here it is measured on the model's own ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser, shape_of
from fewstep.dynamic import SHARE, best_route
from fewstep.endpoint import (
    Midway,
    Reference,
    Runs,
    deal,
    denoising_errors,
    ignore,
    level_range,
    local_error_costs,
    local_error_order,
    mean_square,
    reference,
    require_solver,
    steps_of_reference,
)
from fewstep.free import free_schedules
from fewstep.refine import BUDGET, STARTS, bounds_of, descend, noises_for, refine
from fewstep.schedule import Schedule, bend, from_costs, log_linear, unbend
from fewstep.solvers import NOISELESS, evaluations_of

NOISES, LEVELS = 128, 48
LEARNED_CURVES = ("equal local error", "equal entropy")
REFINED_FROM = "refined from "
DRAWS = 6  # of data and noise per level, for the entropy
DAMPING = 0.05  # share of the mean length in every step of the curve of equal local error
TRIED_AT = (5, 9, 16)  # numbers of steps at which the curves compete
MIDDLING = 8  # the number of steps whose refined levels make a curve
CONTENDERS = ("karras to data", "log_linear to data", "linear to data")  # with the three learned ones
AT_LEAST = 12  # noises that a curve competes on, and that its levels are fitted to


def draw_noise(count: int, shape: Sequence[int], generator: torch.Generator | None, device: str = "cpu") -> Tensor:
    """Standard normal noise (count, *shape); from seed 0 without a generator."""
    return torch.randn(count, *shape, generator=generator or torch.Generator().manual_seed(0)).to(device)


def curve_of(known: Reference, solver: str, pure_noise: bool) -> Schedule:
    """The curve along which a step's local error, squared, is the same everywhere: read to data."""
    order = local_error_order(solver)
    costs = local_error_costs(known.bending, order)
    return from_costs(known.theta, costs, 2 * (order + 1), DAMPING, name=LEARNED_CURVES[0], pure_noise=pure_noise, to_data=True)


def entropy_curve(known: Reference, errors: Tensor, pure_noise: bool) -> Schedule:
    """The curve along which the rescaled entropy falls evenly, from `denoising_errors`: read to data."""
    rate = errors / torch.tan(known.theta)
    costs = (rate[1:] + rate[:-1]) / 2
    return from_costs(known.theta, costs, 1, name=LEARNED_CURVES[1], pure_noise=pure_noise, to_data=True)


def learned_on_the_way(name: str) -> bool:
    """Whether `learned_curves` or `refined_others` have something of this name."""
    return name in LEARNED_CURVES or name.startswith(REFINED_FROM)


def learned_curves(schedule: Schedule) -> dict[str, Schedule]:
    """By name: the curves of equal local error and of equal entropy that a schedule of `fit_curve` has in its provenance."""
    found = {}
    for name, u in schedule.provenance.get("curves", {}).items():
        theta = log_linear(*schedule.made_for()).angles(len(u))[:-1]
        found[name] = Schedule(torch.tensor(u, dtype=torch.float64), theta, name, schedule.pure_noise, to_data=True)
    return found


def refined_others(schedule: Schedule) -> dict[str, Schedule]:
    """By name: the other refinements that `refine_steps` left in a provenance, for some numbers of steps each."""
    found: dict[str, Schedule] = {}
    for n, note in schedule.provenance.get("refined", {}).items():
        for start, theta in note.get("others", {}).items():
            same = found.get(name := REFINED_FROM + start, replace(schedule, grids={}))
            found[name] = replace(same, grids=same.grids | {int(n): torch.tensor(theta, dtype=torch.float64)})
    return found


def split_half_error(known: Reference, solver: str) -> float:
    """The largest relative difference of the sigmas of a 10-step grid between two halves of the noises."""
    first, second = known.bending
    halves = [known._replace(bending=(first[:, part::2], second[:, part::2])) for part in (0, 1)]
    grids = [curve_of(half, solver, False).sigmas(10)[:-1] for half in halves]
    return float((grids[0] / grids[1]).log().abs().max())


def through(theta: Tensor, like: Schedule) -> Schedule:
    """The curve, read to data, whose grid of N = len(theta) steps is theta."""
    end = torch.minimum(like.theta[-1:], theta[-1:] * 0.5)
    u = torch.linspace(0, 1, len(theta) + 1, dtype=torch.float64)
    return Schedule(u, torch.cat([theta, end]), f"through {len(theta)} refined levels", like.pure_noise, to_data=True)


def shares(solver: str, noises: int, budget: int, spent: int) -> tuple[int, int]:
    """How many noises the curves compete on, and how many the levels of the last are fitted to, for a budget of which the
    reference and the entropy have spent so much."""
    left = budget - spent
    held, each = noises // 4, sum(evaluations_of(solver, n) for n in TRIED_AT) * (len(CONTENDERS) + 3)
    moving = evaluations_of(solver, MIDDLING) * (MIDDLING + 21) // 2
    judged = min(held, max(0, int(0.6 * left)) // each)
    moved = min(noises - held, max(0, left - judged * each) // moving)
    if held < AT_LEAST:
        raise ValueError(f"{noises} noises are too few to fit a curve; want at least {4 * AT_LEAST}")
    if min(judged, moved) < AT_LEAST:
        least = math.ceil(AT_LEAST * max(each / 0.6, each + moving)) + AT_LEAST
        fewer = ", or fewer noises" if held > AT_LEAST else ""
        raise ValueError(
            f"{budget} evaluations are too few to fit a curve, of which the reference and the entropy take {spent}: "
            f"want about {spent + least}{fewer}"
        )
    return judged, moved


def require_budget(
    denoiser: Denoiser, solver: str, steps: Sequence[int], budget: int, noises: int, lower: float | None = None
) -> None:
    """Raises ValueError where a budget is too small for the curve, or for one of the steps, before anything is spent."""
    shares(solver, noises, budget, noises * steps_of_reference(denoiser, LEVELS) + DRAWS * LEVELS)
    starts = len(free_schedules(0.1, 1.0)) + 4 + len(CONTENDERS) * (lower is not None)
    for n in steps:
        noises_for(solver, n, starts + (n > 1), budget - int(SHARE * budget))  # and DMN's


def fit_curve(
    denoiser: Denoiser,
    solver: str,
    known: Reference,
    *,
    cond: Mapping[str, Tensor] | None = None,
    budget: int = BUDGET,
    batch_size: int = 512,
    tick: Callable[[int], object] = ignore,
) -> Schedule:
    """The best curve for a solver, within `budget` evaluations (twice that where each is two by guidance), the
    reference's included.

    Its provenance holds the errors of all the curves that competed, those of `learned_curves`, the split-half error of the
    first of them and the evaluations spent.
    """
    sigma_max, sigma_min = (float(torch.tan(theta)) for theta in (known.theta[0], known.theta[-1]))
    pure_noise = denoiser.path.ends_in_pure_noise()
    free = free_schedules(sigma_min, sigma_max, pure_noise=pure_noise)
    uncertain = denoising_errors(denoiser, known, DRAWS, cond, batch_size, tick)
    spent = known.evaluations + DRAWS * len(known.theta) * denoiser.evaluations
    learned = [curve_of(known, solver, pure_noise), entropy_curve(known, uncertain, pure_noise)]
    curves = {each.name: each for each in learned} | {name: free[name] for name in CONTENDERS}
    left = budget * denoiser.evaluations - spent
    judged, moved = shares(solver, len(known.noise), budget, spent // denoiser.evaluations)
    held = len(known.noise) // 4
    rows = torch.arange(len(known.noise))
    quiet = NOISELESS.get(solver, solver)
    judge = Runs(denoiser, quiet, known.noise[:judged], deal(cond, rows[:judged]), batch_size, tick)
    fitted = slice(held, held + moved)
    fit = Runs(denoiser, quiet, known.noise[fitted], deal(cond, rows[fitted]), batch_size, tick)

    def errors(curve: Schedule) -> list[float]:
        return [math.sqrt(mean_square(judge, curve.angles(n)[:-1], known.ends[:judged])) for n in TRIED_AT]

    scores = {name: errors(curve) for name, curve in curves.items()}

    def total(name: str) -> float:
        return sum(math.log(error) for error in scores[name])

    best = min(scores, key=total)
    start = bend(curves[best].angles(MIDDLING)[:-1])
    remaining = left - judge.evaluations - judge.evaluations // len(curves)  # the last one is judged as well
    bent, _ = descend(fit, known.ends[fitted], start, bounds_of(denoiser, known.theta), remaining)
    passing = through(unbend(bent), learned[0])
    curves[passing.name], scores[passing.name] = passing, errors(passing)
    best = min(scores, key=total)
    about = {
        "cost": "endpoint",
        "solver": solver,
        "order": 2 * (local_error_order(solver) + 1),
        "learned_on": repr(denoiser.path),
        "start": denoiser.path.sigma_max if isinstance(denoiser, Midway) else None,
        "noisiest": denoiser.noisiest if isinstance(denoiser, Midway) else None,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "noises": len(known.noise),
        "split_half_error": split_half_error(known, solver),
        "curve": best,
        "curves": {each.name: each.u.tolist() for each in learned},
        "curve_errors": {name: dict(zip(map(str, TRIED_AT), score, strict=True)) for name, score in scores.items()},
        "evaluations": spent + judge.evaluations + fit.evaluations,
        "refined": {},
    }
    return replace(curves[best], name=f"learned ({solver})", provenance=about)


def refine_steps(
    denoiser: Denoiser,
    schedule: Schedule,
    steps: int,
    known: Reference,
    *,
    cond: Mapping[str, Tensor] | None = None,
    budget: int = BUDGET,
    batch_size: int = 512,
    tick: Callable[[int], object] = ignore,
    lower: float | None = None,
) -> Schedule:
    """The schedule of `fit_curve` with a refined grid of this many steps as well; at most `budget` evaluations.

    lower: a noisiest level from which a refinement is tried too, where solvers may begin there.
    """
    solver, about = schedule.provenance["solver"], schedule.provenance
    low, high = schedule.made_for()
    starts = free_schedules(low, high, [steps], schedule.pure_noise)
    starts |= learned_curves(schedule) | {"the curve": replace(schedule, grids={})}
    if lower is not None and low < lower < high:
        below = free_schedules(low, lower)
        starts |= {f"{name} from {lower:.3g}": below[name] for name in CONTENDERS}
    quiet = NOISELESS.get(solver, solver)
    about_runs: dict[str, Any] = {"cond": cond, "batch_size": batch_size, "tick": tick}
    chosen, spent = best_route(denoiser, quiet, steps, known, starts.values(), budget=budget, **about_runs)
    if chosen is not None:
        starts["dynamic programming"] = replace(schedule, grids={steps: chosen})
    left = budget - spent // denoiser.evaluations
    move = STARTS - (chosen is not None)  # which costs as much as moving one of them
    found = refine(denoiser, quiet, steps, known, starts, budget=left, move=move, **about_runs)
    others = {name: theta.tolist() for name, theta in found.others.items()}
    note = {"evaluations": spent + found.evaluations, "from": found.start, "moved": found.moved, "others": others}
    grids = schedule.grids | {steps: found.theta}
    return replace(schedule, grids=grids, provenance=about | {"refined": about["refined"] | {str(steps): note}})


def tailor(
    denoiser: Denoiser,
    solver: str,
    steps: Sequence[int] = (),
    *,
    shape: Sequence[int] | None = None,
    noises: int = NOISES,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    start: float | None = None,
    cond: Mapping[str, Tensor] | None = None,
    budget: int = BUDGET,
    batch_size: int = 512,
    generator: torch.Generator | None = None,
    device: str = "cpu",
    tick: Callable[[int], object] = ignore,
    lower: float | None = None,
) -> Schedule:
    """All of it, for a solver: `reference`, `fit_curve`, and `refine_steps` for each of `steps`.

    start: the level at which image to image begins (`Midway`), whose levels go from there to data. lower: see `refine_steps`.
    """
    require_solver(solver)
    noise = draw_noise(noises, shape_of(denoiser, shape), generator, device)
    if start is not None:
        denoiser, sigma_max = Midway(denoiser, start, sigma_min, sigma_max), None
    require_budget(denoiser, solver, steps, budget, noises, lower)
    low, high = level_range(denoiser, sigma_min, sigma_max)
    about: dict[str, Any] = {"cond": cond, "batch_size": batch_size, "tick": tick}
    known = reference(denoiser, noise, levels=LEVELS, sigma_min=low, sigma_max=high, **about)
    schedule = fit_curve(denoiser, solver, known, budget=budget, **about)
    for n in steps:
        schedule = refine_steps(denoiser, schedule, n, known, budget=budget, lower=lower, **about)
    return schedule
