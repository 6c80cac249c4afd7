"""The loop of fine-tuning: iterations of dxmi.py, watched, taken back where they go wrong, and the best state kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from fewstep.dxmi import FEW, LOOK_EVERY, FinetuneState, iterate, start_sampler
from fewstep.energy import Value
from fewstep.goal import Goal, condition, make_goal
from fewstep.metrics import auroc, sliced_wasserstein
from fewstep.processes import ALONE, Processes
from fewstep.sampler import Sampler

JUDGE_EVERY = 250  # iterations
ROLL_BACKS = 5
DIRECTIONS = 1000  # of the distance to held-out data
LOST = 0.9  # AUROC of the energy, held-out data against samples, from which on the sampler counts as lost
FALLEN = 1.5  # times the best state's distance to held-out data, with that


def complaint(state: FinetuneState, window: list[dict[str, float]], data_std: float) -> str | None:
    """What is wrong with the last iterations, or None: not finite, collapsed, blown up, or lost to the energy."""
    mean = {name: sum(row[name] for row in window) / len(window) for name in window[0]}
    bad = [name for name, value in mean.items() if not abs(value) < float("inf")]
    # the last step's metrics are from before it
    parts = {"the sampler": state.sampler, "the value": state.value}
    bad += [name for name, part in parts.items() if not all(bool(torch.isfinite(p).all()) for p in part.parameters())]
    if bad:
        return f"{bad[0]} is not finite"
    if "sample_std" not in mean:
        return None
    spread, noise = mean["sample_std"] / data_std, state.sampler.std().detach()[:-1] / state.first_std
    if not 0.5 * min(1, state.first_spread) < spread < 2 * max(1, state.first_spread):
        return f"the samples' standard deviation is {spread:.2g} of the data's"
    if bool(((noise < 0.05) | (noise > 20)).any()):
        return f"the step noises are {', '.join(f'{float(r):.2g}' for r in noise)} of those at the start"
    if mean["energy_gap"] < -0.95 / state.config.gamma:  # -1/gamma: the supports do not meet
        return "the energy tells every sample from the data"
    return None


def lost(state: FinetuneState, found: Mapping[str, float]) -> bool:
    """Whether both held-out measures say that the sampler has fallen off the best state: nothing need collapse for that."""
    if state.best.get("held_out_auroc", 1.0) >= LOST or "held_out_auroc" not in found:
        return False
    return found["held_out_auroc"] >= LOST and found["held_out_sw"] > FALLEN * state.best["held_out_sw"]


def keep_best(state: FinetuneState, held_out: Goal | None, processes: Processes = ALONE) -> dict[str, float]:
    """Now and then, hold the averaged sampler against held-out data, by a distance and by what the averaged energy makes of
    both: {"held_out_sw": .., "held_out_auroc": ..}; keeps the best by the distance in state.best. With a reward the data are
    drawn as it tilts them. Nothing, where a number is not finite: `complaint` says it, and the best state stays."""
    done = state.step - state.config.density_iterations
    if held_out is None or done <= 0 or (done % JUDGE_EVERY and state.step < state.total):
        return {}
    sampler, g, n = cast(Sampler, state.averaged.module), torch.Generator().manual_seed(0), min(FEW, len(held_out.data))
    drawn = torch.arange(n) if held_out.shares is None else held_out.rows(FEW, torch.Generator().manual_seed(0))
    data = held_out.data[drawn.to(held_out.data.device)]
    rows = torch.arange(len(data)).repeat(math.ceil(FEW / len(data)))  # few data need as many samples, or noise chooses
    start, cond = sampler.start(len(rows), tuple(data.shape[1:]), g), condition(held_out, drawn[rows])
    x = sampler.sample(start, g, cond)
    distance = sliced_wasserstein(x, data, DIRECTIONS, g) if bool(torch.isfinite(x).all()) else math.nan
    value, told = cast(Value, state.averaged_value.module), []
    with torch.no_grad():
        for each in (data[rows], x):  # smoothed with the last step's noise, as the energy has seen all it knows
            smooth = sampler.last_std.to(x) * torch.randn(each.shape, generator=g).to(x)
            told.append(value.energy(each.to(x) + smooth, cond))
    area = auroc(*told) if all(bool(torch.isfinite(each).all()) for each in told) else math.nan
    found = processes.mean({"held_out_sw": distance, "held_out_auroc": area})  # all processes have to go the same way
    if any(math.isnan(number) for number in found.values()):
        return {}
    if found["held_out_sw"] < state.best.get("held_out_sw", float("inf")):
        state.best = copy.deepcopy(found | {"step": state.step} | state.kept())
    return found


def doubt(metrics: Sequence[Mapping[str, float]]) -> str | None:
    """What to say of a run with these metrics if the energy tells the samples of the kept state from held-out data, or None."""
    judged = [row for row in metrics if "held_out_auroc" in row]
    told = min(judged, key=lambda row: row["held_out_sw"])["held_out_auroc"] if judged else 0.5
    if told < LOST:
        return None
    return (
        f"The energy tells the samples from held-out data (AUROC {told:.2f}; 0.5: it cannot), so the sampler has not "
        "learned to follow it: look at its samples, and try more --steps or another --seed."
    )


def finetune(
    state: FinetuneState, data: Tensor | Goal, held_out: Goal | None = None, processes: Processes = ALONE
) -> Iterator[dict[str, float]]:
    """Run from state.step to state.total over data (n, *d), or a goal; yields the metrics of each iteration.

    Every 50 iterations the last ones are looked at: where the sampler has collapsed or diverged, and at once where a number
    is not finite, what was learned goes back to the last good state and all rates are halved. held_out: data that
    the averaged sampler is held against now and then; the best one is kept in state.best, and gone back to where the sampler
    is `lost`. Raises ValueError, naming what is wrong, when going back has not helped 5 times.
    """
    goal = data if isinstance(data, Goal) else make_goal(data)
    if held_out is not None and len(held_out.data) < 2:
        raise ValueError(f"too few held-out data: {len(held_out.data)}; give 2 or more, or none")
    config = state.config
    data_std = float(torch.hypot(goal.data.std().cpu(), state.sampler.last_std.cpu()))
    good, window = copy.deepcopy(state.learned()), list[dict[str, float]]()
    while state.step < state.total:
        if state.step == config.density_iterations > 0:
            start_sampler(state, goal)
            good, window = copy.deepcopy(state.learned()), []
        metrics = iterate(state, goal, processes)
        state.step += 1
        window.append(metrics)
        finite = all(abs(value) < float("inf") for value in metrics.values())
        if finite and not state.first_spread:
            state.first_spread = metrics.get("sample_std", 0.0) / data_std
        if not finite or state.step % LOOK_EVERY == 0:
            wrong = complaint(state, window[-1:] if not finite else window, data_std)
            if wrong and state.rolled_back == ROLL_BACKS:
                raise ValueError(f"{wrong} at iteration {state.step}, after {ROLL_BACKS} roll-backs; lower --lr and --lr-value")
            if wrong:
                state.restore(copy.deepcopy(good))
                state.rate, state.rolled_back = state.rate / 2, state.rolled_back + 1
            else:
                good = copy.deepcopy(state.learned())
            window = []
        metrics = {name: value for name, value in metrics.items() if abs(value) < float("inf")}
        judged = keep_best(state, held_out, processes)
        if lost(state, judged) and state.fallen < ROLL_BACKS:
            state.restore_best()
            state.rate, state.fallen = state.rate / 2, state.fallen + 1
            good, window = copy.deepcopy(state.learned()), []
        yield metrics | {"rolled_back": float(state.rolled_back + state.fallen)} | judged
