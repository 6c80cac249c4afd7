"""Does the schedule help, on noises that it has never seen?

A deterministic solver is judged by the endpoint error, noise by noise; a stochastic one by the sliced Wasserstein
distance of its samples to the model's own finely solved ones, repetition by repetition. Intervals are bootstrapped over
noises, or repetitions, in pairs: every schedule meets the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.endpoint import Reference, Runs, deal, ignore, squared_errors
from fewstep.free import free_schedules
from fewstep.metrics import sliced_wasserstein
from fewstep.schedule import Schedule
from fewstep.solvers import STOCHASTIC, solve

REPETITIONS = 5  # of a stochastic solver
WIDE = 1.15  # an interval's upper end over its lower one


def judge(
    denoiser: Denoiser,
    solver: str,
    schedule: Schedule,
    steps: Sequence[int],
    known: Reference,
    *,
    default: Callable[[int], Tensor | None] | None = None,
    cond: Mapping[str, Tensor] | None = None,
    batch_size: int = 512,
    seed: int = 0,
    tick: Callable[[int], object] = ignore,
) -> dict[str, Any]:
    """The verdict, as it stands in the file: for every number of steps the error of the schedule, of every free one, and of
    the model's current default; the best free one; the ratio to it and to the default, with 95 % intervals.

    known: a reference from noises that nothing was fitted to. default: steps -> angles (steps,), the model's own levels. seed:
    of a stochastic solver's noise.
    """
    free = free_schedules(*schedule.made_for(), steps, schedule.pure_noise)
    rows = torch.arange(len(known.noise))
    result: dict[str, Any] = {
        "measure": "sliced Wasserstein distance" if solver in STOCHASTIC else "endpoint error",
        "solver": solver,
        "noises": len(known.noise),
        "steps": {},
    }
    spent = known.evaluations
    for n in steps:
        grids = {"learned": schedule.angles(n)[:-1]} | {name: s.angles(n)[:-1] for name, s in free.items()}
        if default is not None and (own := default(n)) is not None:
            grids["default"] = own
        if solver in STOCHASTIC:
            squares, evaluations = _weak(denoiser, solver, grids, known, cond, batch_size, seed, tick)
        else:
            runs = Runs(denoiser, solver, known.noise, deal(cond, rows), batch_size, tick)
            squares = {k: squared_errors(runs(theta)[0], known.ends).nan_to_num(math.inf) for k, theta in grids.items()}
            evaluations = runs.evaluations
        spent += evaluations
        errors = {name: math.sqrt(float(each.mean())) for name, each in squares.items()}
        best = min(free, key=lambda name: errors[name])
        row = {"errors": errors, "best_free": best, "against_best_free": ratio(squares["learned"], squares[best])}
        if "default" in grids:
            row["against_default"] = ratio(squares["learned"], squares["default"])
        result["steps"][str(n)] = row
    return result | {"evaluations": spent}


def settle(judged: Callable[[int], dict[str, Any]], noises: int, doublings: int) -> dict[str, Any]:
    """judged(count), the count doubled from `noises` up to `doublings` times while an interval is wide and holds 1. Where a
    few noises go astray and make all of the error, some dozens of them say nothing."""
    spent = 0
    for count in (noises * 2**k for k in range(doublings + 1)):
        verdict = judged(count)
        spent += verdict["evaluations"]
        found = [row["against_best_free"] for row in verdict["steps"].values()]
        if not any(f["low"] <= 1 <= f["high"] and f["high"] > WIDE * f["low"] for f in found):
            break
    return verdict | {"evaluations": spent}


def _weak(
    denoiser: Denoiser,
    solver: str,
    grids: Mapping[str, Tensor],
    known: Reference,
    cond: Mapping[str, Tensor] | None,
    batch_size: int,
    seed: int,
    tick: Callable[[int], object],
) -> tuple[dict[str, Tensor], int]:
    """Squared sliced Wasserstein distances (repetitions,) of each grid's samples to the reference's ends, and evaluations."""
    spent = 0

    def distance(theta: Tensor, repetition: int) -> float:
        nonlocal spent
        g, times = torch.Generator().manual_seed(seed + repetition), torch.cat([denoiser.path.time(theta), theta.new_zeros(1)])
        start = denoiser.path.start(len(known.noise), known.noise.shape[1:], g, times[0], device=known.noise.device)
        ends = []
        for rows in torch.arange(len(start)).split(batch_size):
            try:
                with torch.no_grad():
                    done = solve(denoiser, start[rows.to(start.device)], times, solver, cond=deal(cond, rows), generator=g)
            except ValueError:  # it overflows on these levels
                return math.inf
            spent += done.evaluations * len(rows)
            tick(done.evaluations * len(rows))
            ends.append(done.x)
        return sliced_wasserstein(torch.cat(ends), known.ends, 200, torch.Generator().manual_seed(repetition))

    found = {name: [distance(theta, k) for k in range(REPETITIONS)] for name, theta in grids.items()}
    return {name: torch.tensor(distances, dtype=torch.float64) ** 2 for name, distances in found.items()}, spent


def ratio(ours: Tensor, theirs: Tensor, resamplings: int = 2000) -> dict[str, float]:
    """The ratio of two root mean squares (m,), (m,) of the same noises, and its 95 % bootstrap interval."""
    draw = np.random.default_rng(0).integers(len(ours), size=(resamplings, len(ours)))
    if not bool(torch.isfinite(ours).all()) or not bool(torch.isfinite(theirs).all()):
        never = math.inf if not bool(torch.isfinite(ours).all()) else 0.0  # one of the two overflows
        return {"ratio": never, "low": never, "high": never}
    means = np.sqrt(ours.numpy()[draw].mean(1) / np.maximum(theirs.numpy()[draw].mean(1), 1e-300))
    low, high = np.quantile(means, [0.025, 0.975])
    return {"ratio": math.sqrt(float(ours.mean()) / max(float(theirs.mean()), 1e-300)), "low": float(low), "high": float(high)}


def guard(schedule: Schedule, verdict: dict[str, Any]) -> Schedule:
    """The schedule with the best free grid in place of its own wherever that did better; the verdict goes into the file."""
    free = free_schedules(*schedule.made_for(), [int(n) for n in verdict["steps"]], schedule.pure_noise)
    grids, kept = dict(schedule.grids), {}
    for n, row in verdict["steps"].items():
        wins = row["against_best_free"]["ratio"] <= 1
        kept[n] = "learned" if wins else row["best_free"]
        if not wins:
            grids[int(n)] = free[row["best_free"]].angles(int(n))[:-1]
    return replace(schedule, grids=grids, provenance=schedule.provenance | {"verdict": verdict | {"kept": kept}})


def sentences(verdict: dict[str, Any]) -> list[str]:
    """The verdict in words, a line for each number of steps."""
    lines = []
    for n, row in verdict["steps"].items():
        versus = row["against_best_free"]
        best = f"{interval(versus)} of the best free schedule's ({row['best_free']})"
        said = f", {interval(row['against_default'])} of the model's default's" if "against_default" in row else ""
        kept = verdict.get("kept", {}).get(n, "learned")
        end = "" if kept == "learned" else f"; it does not win, so the file keeps {kept}"
        lines.append(
            f"{n} steps of {verdict['solver']}: {verdict['measure']} {row['errors']['learned']:.4g}, {best}{said}{end}"
        )
    return lines


def interval(found: dict[str, float]) -> str:
    """A ratio and its interval, for people."""
    return f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
