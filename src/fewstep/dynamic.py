"""At which of many levels should a solver stop?   Dynamic programming along a fine trajectory.

After n steps every level keeps one route to it: of those that go on from a route kept a step before, that whose state is
nearest to where the ODE passes (mean square over the noises). Then the model is asked in this state, once: its answer serves
all steps that begin there. The last step goes to data. This is OSS (Pei et al. 2025) with the solver's own steps in the place
of Euler's, its memory of the route included, and only among levels where somebody's schedule has step n.

The levels come from a grid and are a place for `refine` to begin. That moves levels a little at a time; this finds them from
anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.endpoint import Reference, Runs, deal, ignore, squared_errors
from fewstep.path import HALF_PI, as_time
from fewstep.schedule import Schedule, log_linear
from fewstep.solvers import SOLVERS

GRID = 32  # levels to choose from, but at least twice as many as there are steps
MOST, LEAST = 16, 8  # noises that decide
SHARE = 0.15  # of the budget at most
TEACHER = "dpmpp_2m"  # its states are final, where UniPC corrects one when it has left it
BLIND = ("heun",)  # whose steps ask the model where they end as well, for every end another question


class Route(NamedTuple):
    """stops: indices of levels, where it is and where it has been; said: the model's answers at those before; away: the mean
    square distance of its state x to the ODE's."""

    stops: tuple[int, ...]
    said: tuple[Tensor, ...]
    away: float
    x: Tensor


def grid_of(starts: Collection[Schedule], known: Reference, steps: int, pure_noise: bool) -> tuple[Tensor, list[range]]:
    """Levels (k,), and for each step which of them it may begin at: those between the noisiest and the cleanest of the
    schedules' levels for that step, and one more to either side."""
    sigma_max, sigma_min = torch.tan(known.theta[[0, -1]]).tolist()
    theta = log_linear(sigma_min, sigma_max).angles(max(GRID, 2 * steps))[:-1]
    if pure_noise:
        theta = torch.cat([as_time([HALF_PI]), theta])
    levels = torch.stack([schedule.angles(steps)[:-1] for schedule in starts])
    found = [range(1)]
    for n in range(1, steps):
        room = len(theta) - steps + n  # later steps need levels of their own
        first = int((theta > levels[:, n].max()).sum()) - 1
        last = max(int((theta >= levels[:, n].min()).sum()), found[-1].stop)
        found.append(range(min(first, room), min(last, room) + 1))
    return theta, found


@torch.no_grad()
def best_route(
    denoiser: Denoiser,
    solver: str,
    steps: int,
    known: Reference,
    starts: Collection[Schedule],
    *,
    cond: Mapping[str, Tensor] | None = None,
    budget: int,
    batch_size: int = 512,
    tick: Callable[[int], object] = ignore,
) -> tuple[Tensor | None, int]:
    """The levels (N,) of `steps` steps of a deterministic solver, by dynamic programming from the last of the reference's
    noises, and the evaluations spent; no levels where SHARE of the budget is too little for LEAST noises, or for BLIND solvers.
    """
    path = denoiser.path
    theta, places = grid_of(starts, known, steps, path.ends_in_pure_noise())
    each = len(theta) + sum(len(place) for place in places[1:])
    noises = min(MOST, int(SHARE * budget) // each)
    if noises < LEAST or solver in BLIND:
        return None, 0
    rows = torch.arange(len(known.noise))[-noises:]
    noise, times = known.noise[-noises:], path.time(theta)
    runs = Runs(denoiser, solver, noise, deal(cond, rows), batch_size, tick)

    def follow(solver: str, stops: Tensor, answer: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        *_, x = SOLVERS[solver](answer, path.start_from(noise, stops[0]), path, stops, torch.randn_like)
        return x

    to_data = torch.cat([times, times.new_zeros(1)])
    passed, said = [], []

    def asked(x: Tensor, t: Tensor) -> Tensor:
        passed.append(x)
        said.append(runs.predict(x, t))
        return said[-1]

    follow(TEACHER, to_data, asked)
    passed.append(known.ends[-noises:])

    def onward(route: Route, answer: Tensor, j: int) -> Route:
        answers = (*route.said, answer)
        told: Iterator[Tensor] = iter(answers)
        x = follow(solver, to_data[[*route.stops, j]], lambda x, t: next(told))
        away = float(squared_errors(x, passed[j]).mean())
        return Route((*route.stops, j), answers, away if math.isfinite(away) else math.inf, x)

    kept = {0: Route((0,), (), 0.0, passed[0])}
    for place in (*places[1:], range(len(theta), len(theta) + 1)):
        answers = {i: runs.predict(route.x, times[i]) if i else said[0] for i, route in kept.items()}
        nearest: dict[int, Route] = {}
        for i, j in ((i, j) for i in kept for j in place if i < j):
            route = onward(kept[i], answers[i], j)
            if j not in nearest or route.away < nearest[j].away:
                nearest[j] = route
        kept = nearest
    return theta[list(kept[len(theta)].stops[:-1])], runs.evaluations
