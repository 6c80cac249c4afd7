"""`fewstep schedule`, from a model to a schedule file with a verdict, in stages that survive a kill.

    reference.safetensors   where the ODE takes the noises, while the fit lasts
    draft.json              the schedule so far: its curve, then one refined grid after the other
    schedule.json           the result, with the verdict and what it cost, and curve.png

`check` holds a schedule against another checkpoint: a LoRA, a fine-tune, a quantised copy.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from functools import partial
from pathlib import Path as File
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep import __version__, models, report
from fewstep.commands import (
    SCHEDULE,
    Meter,
    Track,
    baselines,
    data_settings,
    load,
    model_settings,
    read_schedule,
    require_answer,
    require_shape,
    silent,
    unmetered,
)
from fewstep.config import Condition, LearnConfig, Source
from fewstep.cost import PREDICTOR_ORDERS
from fewstep.denoiser import Denoiser, Guided, shape_of
from fewstep.endpoint import Midway, Reference, level_range, reference, steps_of_reference
from fewstep.learn import learn_schedule
from fewstep.noises import POINTS, evaluations_on_arcs, reference_on_arcs
from fewstep.run import fingerprint, load_tree, open_run, save_tree
from fewstep.schedule import Schedule
from fewstep.solvers import STOCHASTIC, evaluations_of
from fewstep.tailor import LEVELS, draw_noise, fit_curve, refine_steps, require_budget
from fewstep.verdict import NO_RIVALS, REPETITIONS, Squares, entrants, guard, interval, measure_of, number, settle, squares_of

REFERENCE, DRAFT = "reference.safetensors", "draft.json"
FINE = 96  # levels of the verdict's reference
UNSEEN = 1_000_003  # added to the seed for the verdict's noises
JUDGED = (6, 10)  # where no numbers of steps were asked for
WORSE = 1.02  # a ratio to the best free schedule above this, and surely above 1, does as well
DRIFT = 1.25  # a ratio to the best free schedule that has grown by this factor asks for a new fit


def load_condition(condition: Condition, denoiser: Denoiser) -> tuple[Denoiser, dict[str, Tensor] | None]:
    """The denoiser, guided where a scale is given, and the conditions of the file."""
    if condition.cond is None:
        if condition.guidance is not None:
            raise ValueError("guidance needs --cond, a .safetensors file of the conditions and of what stands for none")
        return denoiser, None
    try:
        found = load_file(condition.cond)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{condition.cond} is not a .safetensors file of conditions ({error})") from error
    device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
    mark = "unconditional."
    none = {k.removeprefix(mark): v[:1].to(device) for k, v in found.items() if k.startswith(mark)}
    cond = {k: v.to(device) for k, v in found.items() if not k.startswith(mark)}
    rows = {k: len(v) if v.ndim else 0 for k, v in cond.items()}
    if len({*rows.values()}) != 1 or 0 in rows.values():
        raise ValueError(f"{condition.cond} must hold the same number of rows for each argument, got {rows}")
    if condition.guidance is None:
        return denoiser, cond
    if set(none) != set(cond):
        want = ", ".join(mark + k for k in cond)
        raise ValueError(f"guidance needs {want} in {condition.cond}, got {', '.join(mark + k for k in none) or 'none'}")
    return Guided(denoiser, condition.guidance, none), cond


def fit(
    model: str,
    source: Source | None,
    out: File,
    config: LearnConfig,
    condition: Condition = Condition(),
    shape: tuple[int, ...] | None = None,
    device: str = "cpu",
    track: Track = silent,
    meter: Meter = unmetered,
) -> tuple[File, Schedule]:
    """Learn the model's schedule into out/schedule.json, guarded and with its verdict; a killed run goes on with its stage."""
    cost = config.cost or "endpoint"
    config = dataclasses.replace(config, steps=tuple(sorted(set(config.steps))), cost=None if cost == "endpoint" else cost)
    if config.steps and cost != "endpoint":
        raise ValueError(f"only cost 'endpoint' refines single numbers of steps, not {cost!r}; leave --steps out")
    if config.start is not None and cost != "endpoint":
        raise ValueError(f"only cost 'endpoint' learns levels for image to image, not {cost!r}; leave --start out")
    if cost == "predictor" and config.solver not in PREDICTOR_ORDERS:
        raise ValueError(f"cost 'predictor' needs a solver among {', '.join(PREDICTOR_ORDERS)}, got {config.solver!r}")
    denoiser, cond = load_condition(condition, models.load_denoiser(model, device))
    settings = model_settings(model, denoiser, out) | dataclasses.asdict(config) | dataclasses.asdict(condition)
    x0 = None
    if source is not None:
        data = load(source)
        require_shape(denoiser, data.shape)
        settings, x0, shape = settings | data_settings(source, data), data.train.to(device), data.shape
    form = shape_of(denoiser, shape)
    if cond is not None:
        settings["cond_fingerprint"] = fingerprint([*cond.values(), *getattr(denoiser, "unconditional", {}).values()])
        if x0 is not None and cost != "endpoint" and len(next(iter(cond.values()))) != len(x0):
            raise ValueError(
                f"the conditions have {len(next(iter(cond.values())))} rows for {len(x0)} data; give one each, or no data"
            )
    sigma_max = config.sigma_max
    if config.start is not None:
        denoiser, sigma_max = Midway(denoiser, config.start, config.sigma_min, config.sigma_max), None
    if cost == "endpoint":
        require_budget(denoiser, config.solver, config.steps, config.budget, config.noises)
    low, high = level_range(denoiser, config.sigma_min, sigma_max)
    if not (File(out) / SCHEDULE).exists():
        require_answer(denoiser, form, cond, device)
    folder = open_run(out, "schedule", settings | {"shape": list(form)})
    if (folder / SCHEDULE).exists():
        return folder, Schedule.load(folder / SCHEDULE)

    about: dict[str, Any] = {"cond": cond, "batch_size": config.batch_size}
    if cost == "endpoint":
        learned = _tailored(folder, denoiser, form, config, (low, high), about, device, meter)
    else:
        learned = learn_schedule(
            denoiser,
            x0,
            cost,
            solver=config.solver,
            probes=config.probes,
            draws=config.draws,
            tolerance=config.tolerance,
            sigma_min=low,
            sigma_max=high,
            generator=torch.Generator().manual_seed(config.seed),
            shape=form,
            device=device,
            progress=lambda batches: track(batches, len(batches), "probing costs"),
            **about,
        )
    steps = config.steps or JUDGED
    grids = entrants(learned, steps, denoiser.default_levels)
    verdict = judged_afresh(denoiser, learned.made_for(), grids, config.solver, config, form, about, device, meter)
    learned = guard(learned, verdict)
    said = {"fewstep": __version__, "date": datetime.date.today().isoformat(), "seed": config.seed, "model": model}
    said |= {"data_set": source.data if source else None, "guidance": condition.guidance, "conditions": condition.cond}
    learned = dataclasses.replace(learned, provenance=said | learned.provenance)
    report.curve_figure(folder / "curve.png", baselines(learned) | {"learned": learned}, sorted(learned.grids)[:4] or (4, 9))
    report.verdict_figure(folder / "verdict.png", learned.provenance["verdict"])
    learned.save(folder / SCHEDULE)
    for file in (REFERENCE, DRAFT):
        (folder / file).unlink(missing_ok=True)
    return folder, learned


def _tailored(
    folder: File,
    denoiser: Denoiser,
    form: tuple[int, ...],
    config: LearnConfig,
    ends: tuple[float, float],
    about: Mapping[str, Any],
    device: str,
    meter: Meter,
) -> Schedule:
    noise = draw_noise(config.noises, form, torch.Generator().manual_seed(config.seed), device)
    stored = load_tree(folder / REFERENCE) if (folder / REFERENCE).exists() else {}
    if stored.keys() == set(Reference._fields):  # an older fewstep's had fewer
        there = {k: stored[k].to(device) for k in ("noise", "ends")}
        known = Reference(**stored | there | {"bending": tuple(stored["bending"])})
    else:
        with meter(config.noises * steps_of_reference(denoiser, LEVELS) * denoiser.evaluations, "reference") as tick:
            known = reference(denoiser, noise, levels=LEVELS, sigma_min=ends[0], sigma_max=ends[1], tick=tick, **about)
        save_tree(folder / REFERENCE, known._asdict())
    if (folder / DRAFT).exists():
        schedule = Schedule.load(folder / DRAFT)
    else:
        with meter(config.budget * denoiser.evaluations - known.evaluations, "curve") as tick:
            schedule = fit_curve(denoiser, config.solver, known, budget=config.budget, tick=tick, **about)
        schedule.save(folder / DRAFT)
    for n in config.steps:
        if n not in schedule.grids:
            with meter(config.budget * denoiser.evaluations, f"refining {n} steps") as tick:
                schedule = refine_steps(denoiser, schedule, n, known, budget=config.budget, tick=tick, **about)
            schedule.save(folder / DRAFT)
    return schedule


def judged_afresh(
    denoiser: Denoiser,
    ends: tuple[float, float],
    grids: Mapping[int, Mapping[str, Tensor]],
    solver: str,
    config: LearnConfig,
    form: tuple[int, ...],
    about: Mapping[str, Any],
    device: str,
    meter: Meter,
) -> dict[str, Any]:
    """The verdict on the entrants (`entrants`), on noises that no fit has seen, as many as it takes to decide."""
    stochastic = solver in STOCHASTIC

    def squares(k: int, count: int, open_: Mapping[int, Mapping[str, Tensor]]) -> tuple[Squares, int]:
        seed, units = config.seed + UNSEEN * (k + 1), count if stochastic else count // POINTS
        g, before = torch.Generator().manual_seed(seed), steps_of_reference(denoiser, 0)
        noise = draw_noise(units, form if stochastic else (2, *form), g, device)
        most = count * (FINE + before) if stochastic else evaluations_on_arcs(units, FINE, before)
        runs = sum(len(each) * evaluations_of(solver, n) for n, each in open_.items())
        most += count * runs * (REPETITIONS if stochastic else 1)
        met = 0 if k == 0 else units  # earlier rounds have dealt out this many conditions
        given = {name: v.roll(-met, 0) for name, v in about["cond"].items()} if about["cond"] else None
        with meter(most * denoiser.evaluations, f"verdict, round {k + 1}: {count} noises") as tick:
            dealt: dict[str, Any] = {**about, "cond": given, "tick": tick}
            fine: dict[str, Any] = {"levels": FINE, "sigma_min": ends[0], "sigma_max": ends[1], **dealt}
            draw = reference if stochastic else partial(reference_on_arcs, generator=g)
            known = draw(denoiser, noise, **fine)
            found, spent = squares_of(denoiser, solver, open_, known, seed=seed + 1, **dealt)
            return found, known.evaluations + spent

    return settle(grids, squares, solver, config.verdict_noises, config.verdict_doublings)


def check(
    file: str | File,
    model: str,
    config: LearnConfig,
    condition: Condition = Condition(),
    shape: tuple[int, ...] | None = None,
    device: str = "cpu",
    meter: Meter = unmetered,
) -> tuple[dict[str, Any], list[str]]:
    """Hold a schedule file against another checkpoint: its verdict there, and what follows from it, in words."""
    schedule = read_schedule(str(file))
    before = schedule.provenance.get("verdict")
    if before is None:
        raise ValueError(f"{file} has no verdict to compare with; make it with `fewstep schedule`")
    if before["measure"] != measure_of(before["solver"]):
        raise ValueError(
            f"{file} was judged by the {before['measure']}, by an older fewstep; make it again with `fewstep schedule`"
        )
    denoiser, cond = load_condition(condition, models.load_denoiser(model, device))
    if (start := schedule.provenance.get("start")) is not None:
        denoiser = Midway(denoiser, start, schedule.made_for()[0], schedule.provenance.get("noisiest"))
    steps = [int(n) for n in before["steps"]]
    about: dict[str, Any] = {"cond": cond, "batch_size": config.batch_size}
    form = shape_of(denoiser, shape)
    require_answer(denoiser, form, cond, device)
    grids = {
        n: {k: theta for k, theta in entered.items() if k in NO_RIVALS or k in before["steps"][str(n)]["errors"]}
        for n, entered in entrants(schedule, steps, denoiser.default_levels).items()
    }  # an older file's verdict may have had fewer rivals
    now = judged_afresh(denoiser, schedule.made_for(), grids, before["solver"], config, form, about, device, meter)
    lines, refit = [], False
    for n, row in now["steps"].items():
        kept = before["kept"][n]
        was, error = number(before["steps"][n]["errors"][kept]), row["errors"]["learned"]
        free = number(before["steps"][n]["errors"][before["steps"][n]["best_free"]])
        before_ratio = was / free if free > 0 else 1.0
        versus = row["against_best_free"]
        refit |= versus["ratio"] > DRIFT * before_ratio > 0 or (versus["low"] > 1 and versus["ratio"] > WORSE)
        grown = f" ({error / was:.2f} times)" if was > 0 else ""
        lines.append(
            f"{n} steps of {now['solver']}: {now['measure']} {error:.4g}, it was {was:.4g}{grown}; "
            f"{interval(row['against_best_free'])} of the best free schedule's ({row['best_free']}), it was {before_ratio:.2f}"
        )
    says = "refit: the schedule no longer suits this model" if refit else "keep: the schedule still suits this model"
    return now | {"refit": refit}, [*lines, f"{says}; {now['evaluations']:,} evaluations"]
