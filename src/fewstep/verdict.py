"""Does the schedule help, on noises that it has never seen?

A deterministic solver is judged by the endpoint error on arcs of noises (`reference_on_arcs`); a stochastic one by the energy
distance of its samples to the model's own finely solved ones, which falls into a share of every noise. Intervals are
bootstrapped over arcs, or noises, in pairs: every schedule meets the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.endpoint import Midway, Reference, Runs, deal, ignore, squared_errors
from fewstep.free import free_schedules
from fewstep.metrics import energy_distance_shares
from fewstep.schedule import Schedule
from fewstep.solvers import STOCHASTIC, evaluations_of, solve
from fewstep.tailor import LEARNED_CURVES, learned_curves, learned_on_the_way, refined_others

Squares = dict[int, dict[str, Tensor]]  # by number of steps and name
NO_RIVALS = ("learned", "default")  # entrants that could not stand in the schedule's place
REPETITIONS = 5  # of a stochastic solver, from every noise
ENDLESS = 1e9  # a ratio from here on is infinite
WIDE = 1.15  # an interval's upper end over its lower one


def entrants(
    schedule: Schedule, steps: Sequence[int], default: Callable[[int], Tensor | None] | None = None
) -> dict[int, dict[str, Tensor]]:
    """What is judged: for every number of steps, by name, the angles (steps,) of the schedule ("learned"), of the model's own
    levels ("default": steps -> angles) and of its `alternatives`."""
    rivals = alternatives(schedule, steps)
    found = {}
    for n in steps:
        own = default(n) if default is not None else None
        found[n] = {"learned": schedule.angles(n)[:-1]} | ({} if own is None else {"default": own})
        found[n] |= {name: each.angles(n)[:-1] for name, each in rivals.items() if not each.grids or n in each.grids}
    return found


def alternatives(schedule: Schedule, steps: Sequence[int]) -> dict[str, Schedule]:
    """What could stand in the schedule's place: the free schedules over its range, and what was learned on the way to it. Those
    that have grids are for these numbers of steps alone."""
    free = free_schedules(*schedule.made_for(), steps, schedule.pure_noise)
    return free | learned_curves(schedule) | refined_others(schedule)


def squares_of(
    denoiser: Denoiser,
    solver: str,
    grids: Mapping[int, Mapping[str, Tensor]],
    known: Reference,
    *,
    cond: Mapping[str, Tensor] | None = None,
    batch_size: int = 512,
    seed: int = 0,
    tick: Callable[[int], object] = ignore,
) -> tuple[Squares, int]:
    """The mean squared errors of the entrants on each arc of a reference that nothing was fitted to (arcs,), and evaluations;
    of a stochastic solver, whose noise has this seed, the noises' shares of a squared energy distance (m,)."""
    found, spent = Squares(), 0
    for n, entered in grids.items():
        if solver in STOCHASTIC:
            found[n], evaluations = _energy_distances(denoiser, solver, entered, known, cond, batch_size, seed, tick)
        else:
            runs = Runs(denoiser, solver, known.noise, deal(cond, known.arc), batch_size, tick)
            found[n] = {k: on_each_arc(squared_errors(runs(theta)[0], known.ends), known) for k, theta in entered.items()}
            evaluations = runs.evaluations
        spent += evaluations
    return found, spent


def on_each_arc(squares: Tensor, known: Reference) -> Tensor:
    """The weighted mean on every arc of the reference (arcs,) of the squared errors of its noises (m,)."""
    arcs = torch.bincount(known.arc)
    found = torch.zeros(len(arcs), dtype=torch.float64).index_add(0, known.arc, known.weight * squares)
    return (found / arcs).nan_to_num(math.inf, posinf=math.inf)


def settle(
    grids: Mapping[int, Mapping[str, Tensor]],
    squares: Callable[[int, int, Mapping[int, Mapping[str, Tensor]]], tuple[Squares, int]],
    solver: str,
    noises: int,
    doublings: int,
) -> dict[str, Any]:
    """The verdict, as it stands in the file, from as many noises as it takes: `noises`, doubled up to `doublings` times.

    squares(k, m, grids): as `squares_of`, of m fresh noises of round k. What is clearly worse than the best entrant does not
    take part in the next round (a race); a number of steps does while it is open which is the best.
    """
    known, met, spent, open_ = {n: dict[str, Tensor]() for n in grids}, dict.fromkeys(grids, 0), 0, grids
    for k in range(doublings + 1):
        count = noises * 2 ** max(k - 1, 0)
        fresh, evaluations = squares(k, count, open_)
        spent += evaluations
        for n, found in fresh.items():
            before, met[n] = known[n], met[n] + count
            known[n] = before | {name: torch.cat([before.get(name, each[:0]), each]) for name, each in found.items()}
        staying = {n: still_in(entered, known[n]) for n, entered in open_.items()}
        open_ = {n: entered for n, entered in staying.items() if undecided(known[n], entered)}
        if not open_:
            break
    rows = {str(n): row_of(found, met[n]) for n, found in known.items()}
    most = max(met.values())
    return {"measure": measure_of(solver), "solver": solver, "noises": most, "steps": rows, "evaluations": spent}


def measure_of(solver: str) -> str:
    return "energy distance" if solver in STOCHASTIC else "endpoint error"


def row_of(squares: Mapping[str, Tensor], noises: int) -> dict[str, Any]:
    """One number of steps: the error of every entrant, the best free one, the ratio to it and to the default, with 95 %
    intervals; best_rival: the best of the alternatives; given_up: after how many of the noises those that
    did not stay to the end were."""
    learned, best = squares["learned"], best_free_of(squares)
    row: dict[str, Any] = {"errors": {name: math.sqrt(max(float(each.mean()), 0.0)) for name, each in squares.items()}}
    row |= {"best_free": best, "against_best_free": ratio(learned, squares[best]), "best_rival": best_but(squares, NO_RIVALS)}
    if "default" in squares:
        row["against_default"] = ratio(learned, squares["default"])
    given_up = {k: noises * len(each) // len(learned) for k, each in squares.items() if len(each) < len(learned)}
    return row | {"noises": noises} | ({"given_up": given_up} if given_up else {})


def best_but(squares: Mapping[str, Tensor], left_out: Sequence[str]) -> str:
    """The entrant with the least mean square of those that have met all noises."""
    taking_part = [name for name, each in squares.items() if name not in left_out and len(each) == len(squares["learned"])]
    return min(taking_part, key=lambda name: float(squares[name].mean()))


def best_free_of(squares: Mapping[str, Tensor]) -> str:
    return best_but(squares, [name for name in squares if name in NO_RIVALS or learned_on_the_way(name)])


def still_in(entered: Mapping[str, Tensor], squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the alternatives whose mean square is above the best one's by more than two standard errors."""
    best = best_but(squares, NO_RIVALS)
    staying = (*NO_RIVALS, best, best_free_of(squares))

    def worse(name: str) -> bool:
        more = squares[name] - squares[best]
        return not float(more.mean()) <= 2 * float(more.std()) / math.sqrt(len(more))

    return {name: theta for name, theta in entered.items() if name in staying or not worse(name)}


def undecided(squares: Mapping[str, Tensor], staying: Iterable[str]) -> bool:
    """Whether the interval of the ratio of the best entrant to one that stays in is wide and holds 1."""
    best = best_but(squares, ("default",))
    found = [ratio(squares[best], squares[name]) for name in staying if name not in ("default", best)]
    return any(each["low"] <= 1 <= each["high"] and each["high"] > WIDE * each["low"] for each in found)


def _energy_distances(
    denoiser: Denoiser,
    solver: str,
    grids: Mapping[str, Tensor],
    known: Reference,
    cond: Mapping[str, Tensor] | None,
    batch_size: int,
    seed: int,
    tick: Callable[[int], object],
) -> tuple[dict[str, Tensor], int]:
    """Each noise's share of the squared energy distance of each grid's samples to the reference's ends (m,), the mean over
    REPETITIONS samples from every noise; and the evaluations."""
    spent = 0

    def shares(theta: Tensor, repetition: int) -> Tensor:
        nonlocal spent
        g, times = torch.Generator().manual_seed(seed + repetition), torch.cat([denoiser.path.time(theta), theta.new_zeros(1)])
        fresh = torch.randn(known.noise.shape, generator=g, dtype=known.noise.dtype).to(known.noise.device)
        start = denoiser.path.start_from(known.noise if isinstance(denoiser, Midway) else fresh, times[0])
        ends = []
        for rows in torch.arange(len(start)).split(batch_size):
            asked = evaluations_of(solver, len(theta)) * len(rows) * denoiser.evaluations
            spent += asked
            tick(asked)
            try:
                with torch.no_grad():
                    done = solve(denoiser, start[rows.to(start.device)], times, solver, cond=deal(cond, rows), generator=g)
            except ValueError:  # it overflows on these levels
                return torch.full((len(start),), math.inf, dtype=torch.float64)
            ends.append(done.x)
        return energy_distance_shares(torch.cat(ends), known.ends)

    return {name: torch.stack([shares(theta, k) for k in range(REPETITIONS)]).mean(0) for name, theta in grids.items()}, spent


def ratio(ours: Tensor, theirs: Tensor, resamplings: int = 2000) -> dict[str, float]:
    """The ratio of two root mean squares (m,), (m,) of the same arcs or noises, and its 95 % bootstrap interval. A mean square
    below 0, as an unbiased estimate of a small one may be, counts as 0; 0 over 0 is 1."""
    draw = np.random.default_rng(0).integers(len(ours), size=(resamplings, len(ours)))
    if not bool(torch.isfinite(ours).all()) or not bool(torch.isfinite(theirs).all()):
        never = math.inf if not bool(torch.isfinite(ours).all()) else 0.0  # one of the two overflows
        return {"ratio": never, "low": never, "high": never}

    ours_, theirs_ = (np.maximum(np.append(each.numpy()[draw].mean(1), float(each.mean())), 0) for each in (ours, theirs))
    known = theirs_ > 0
    ratios = np.where(known, np.sqrt(ours_ / np.where(known, theirs_, 1)), np.where(ours_ > 0, ENDLESS, 1.0)).clip(max=ENDLESS)
    found = {"ratio": ratios[-1]} | dict(zip(("low", "high"), np.quantile(ratios[:-1], [0.025, 0.975]), strict=True))
    return {name: float(value) if value < ENDLESS else math.inf for name, value in found.items()}


def guard(schedule: Schedule, verdict: dict[str, Any]) -> Schedule:
    """The schedule with the best alternative's grid in place of its own wherever that did better; the verdict goes into the
    file."""
    rivals = alternatives(schedule, [int(n) for n in verdict["steps"]])
    grids, kept = dict(schedule.grids), {}
    for n, row in verdict["steps"].items():
        wins = row["errors"]["learned"] <= row["errors"][row["best_rival"]]
        kept[n] = "learned" if wins else row["best_rival"]
        if not wins:
            grids[int(n)] = rivals[row["best_rival"]].angles(int(n))[:-1]
    return replace(schedule, grids=grids, provenance=schedule.provenance | {"verdict": verdict | {"kept": kept}})


def sentences(verdict: dict[str, Any]) -> list[str]:
    """The verdict in words, a line for each number of steps."""
    lines = []
    for n, row in verdict["steps"].items():
        versus = row["against_best_free"]
        best = f"{interval(versus)} of the best free schedule's ({row['best_free']})"
        said = f", {interval(row['against_default'])} of the model's default's" if "against_default" in row else ""
        kept = verdict.get("kept", {}).get(n, "learned")
        what = "the curve of " if kept in LEARNED_CURVES else "the levels " if learned_on_the_way(kept) else ""
        why = "better still" if learned_on_the_way(kept) else "it does not win"
        instead = f"; {why}, so the file keeps {what}{kept}, {number(row['errors'][kept]):.4g}"
        end = instead if kept != "learned" else ""
        lines.append(
            f"{n} steps of {verdict['solver']}: {verdict['measure']} {number(row['errors']['learned']):.4g}, {best}{said}{end}"
        )
    return lines


def interval(found: dict[str, float]) -> str:
    """A ratio and its interval, for people."""
    ratio, low, high = (number(found[k]) for k in ("ratio", "low", "high"))
    return f"{ratio:.2f} [{low:.2f}, {high:.2f}]"


def number(saved: float | None) -> float:
    """A file knows no infinity: None stands for the error of a grid that overflowed."""
    return math.inf if saved is None else saved
