"""How good are the samples, for how many evaluations?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep import models, report
from fewstep.commands import (
    Track,
    data_settings,
    find_schedule,
    generate,
    guided,
    labels_for,
    load,
    model_settings,
    require_shape,
    silent,
    solvers_of,
)
from fewstep.config import Source
from fewstep.data import Data
from fewstep.denoiser import Denoiser
from fewstep.metrics import energy_distance, frechet_distance, precision_recall, sliced_wasserstein
from fewstep.run import fingerprint, open_run, read_lines, write_json, write_lines
from fewstep.sampler import Sampler, in_steps
from fewstep.schedule import NAMED

ROWS = "evaluation.jsonl"
Told = dict[str, Tensor] | None  # conditions, dealt out to the samples


def judge(x: Tensor, data: Tensor, features: Callable[[Tensor], Tensor] | None, seed: int = 0) -> dict[str, float]:
    """fd: Frechet distance in the features (pixels if none); sliced Wasserstein and energy distance in the data's space.

    With features, precision and recall in them as well, of equal counts, at most 10,000 of each.
    """
    with torch.no_grad():
        fx, fd = (features(x), features(data)) if features else (x, data)
    few = 1000  # the energy distance takes all pairs
    equal = min(len(fx), len(fd), 10_000)
    both = precision_recall(fx[:equal], fd[:equal]) if features else ()
    return {
        "fd": frechet_distance(fx, fd),
        "sw": sliced_wasserstein(x, data, 500, torch.Generator().manual_seed(seed)),
        "energy_distance": energy_distance(x[:few], data[:few]),
    } | dict(zip(("precision", "recall"), both, strict=False))


def evaluate(
    model: str | None,
    source: Source,
    out: File,
    steps: Sequence[int],
    schedules: Sequence[str],
    solvers: Sequence[str],
    samplers: Sequence[str] = (),
    count: int = 2000,
    seeds: int = 3,
    features: str | None = None,
    device: str = "cpu",
    track: Track = silent,
    sampler_steps: Sequence[int] = (),
    guidance: float | None = None,
    labels: bool = True,
) -> tuple[File, list[dict[str, Any]], dict[str, float]]:
    """Quality of every schedule x solver x steps of a model, and of fine-tuned samplers, cell by cell into evaluation.jsonl.

    solvers: where there are none, those that the schedules were learned for (`solvers_of`). sampler_steps: of the samplers,
    if not their own. Class-conditional ones are told labels in the shares that the data have them, or without `labels` no
    class; guidance: scale of the model's classifier-free guidance towards them. Returns the folder, the rows, and the floor:
    the same measures between held-out and training data. A repeated command goes on with the cells that are missing.
    """
    if model is None and guidance is not None:
        raise ValueError("--guidance is for a --model: fine-tuned samplers know none")
    if guidance is not None and not labels:
        raise ValueError("--guidance is towards labels: leave it or --no-labels out")
    if sampler_steps and not samplers:
        raise ValueError("--sampler-steps is for a --sampler; a model's are --steps")
    data = load(source)
    if not labels:
        data = dataclasses.replace(data, train_labels=None)
    extract = models.load_function(features) if features else None
    settings: dict[str, Any] = {"steps": list(steps), "count": count, "seeds": seeds}
    settings |= {"features": features, "guidance": guidance, "sampler_steps": list(sampler_steps) or None}
    settings |= data_settings(source, data)
    cells: list[tuple[str, Denoiser | Sampler, Tensor, str, Told]] = []
    if model is not None:
        denoiser = models.load_denoiser(model, device)
        require_shape(denoiser, data.shape)
        settings |= model_settings(model, denoiser, out)
        told = told_labels(model, denoiser, data)
        if guidance is not None:
            if denoiser.classes is None:
                raise ValueError(
                    f"{model} knows no classes, so leave --guidance out; models of `fewstep train --labels` and DiTs do"
                )
            if told is None:
                raise ValueError(f"{source.data} has no labels to guide towards, so leave --guidance out")
            denoiser = guided(denoiser, guidance)
        names = labels_of(schedules, "learned")
        chosen_schedules = {label: find_schedule(name, denoiser, steps) for label, name in names.items()}
        solvers = list(solvers) or solvers_of(chosen_schedules.values())
        for label, found in chosen_schedules.items():
            grids = [found.times(denoiser.path, n) for n in dict.fromkeys(steps)]
            settings[f"schedule: {label}"] = fingerprint(grids)
            cells += [(f"{label}, {s}", denoiser, times, s, told) for s in solvers for times in grids]
    for label, name in labels_of(samplers, "fine-tuned").items():
        tuned, _ = models.load_sampler(name, device)
        settings[f"sampler: {label}"] = fingerprint(tuned.state_dict().values())
        told = told_labels(name, tuned.denoiser, data)
        for n in dict.fromkeys(sampler_steps or [tuned.steps]):
            other = tuned if n == tuned.steps else in_steps(tuned, n)
            cells.append((label, other, other.times.cpu(), "", told))
    settings["solvers"] = list(solvers) or ["euler"]
    if data.train_labels is not None and any(told for *_, told in cells):
        settings["labels_fingerprint"] = fingerprint([data.train_labels])
    folder = open_run(out, "evaluate", settings)

    rows = read_lines(folder / ROWS)
    write_lines(folder / ROWS, rows)
    known = {(row["method"], row["steps"], row["seed"]) for row in rows}
    todo = [(*cell, seed) for cell in cells for seed in range(seeds) if (cell[0], len(cell[2]) - 1, seed) not in known]
    with open(folder / ROWS, "a") as file:
        for method, chosen, times, solver, told, seed in track(todo, len(todo), "evaluating"):
            x, evaluations = generate(chosen, times, count, data.shape, solver, 1000 + seed, device, cond=told)
            row = {"method": method, "steps": len(times) - 1, "evaluations": evaluations, "seed": seed, "count": count}
            rows.append(row | judge(x, data.train, extract))
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
    floor = judge(data.test, data.train, extract)
    write_json(folder / "floor.json", floor | {"held_out": len(data.test), "data": len(data.train)})
    what = f"Frechet distance in {features or 'pixels'}, {count} samples"
    report.quality_figure(folder / "quality.png", rows, "fd", what, floor["fd"])
    return folder, rows, floor


def told_labels(name: str, denoiser: Denoiser, data: Data) -> Told:
    """The data's labels, shuffled, for a class-conditional model of this name, to be dealt out; None where there are none."""
    labels = labels_for(name, denoiser, data.train_labels)
    if labels is None:
        return None
    return {"class_labels": labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]}


def labels_of(names: Sequence[str], kind: str) -> dict[str, str]:
    """label -> name: a named schedule by its name, a file or folder by its kind, with its own name where there are several."""
    named = {name: name.replace("_", "-") for name in names if name.replace("-", "_") in {*NAMED, "dmn"}}
    files = [name for name in names if name not in named]
    labels = named | {name: kind if len(files) == 1 else f"{kind} {File(name).stem}" for name in files}
    if len({*labels.values()}) < len(names):
        raise ValueError(f"{', '.join(names)} cannot be told apart in a table; leave repetitions out, or rename them")
    return {label: name for name, label in labels.items()}


def table_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of an evaluation, seeds pooled as mean +- standard deviation, sorted by evaluations; the head first."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["evaluations"], row["method"]), []).append(row)

    def pooled(group: list[dict[str, Any]], key: str) -> str:
        values = [row[key] for row in group]
        return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")

    columns = {"fd": "Fréchet distance", "sw": "sliced Wasserstein", "energy_distance": "energy distance"}
    columns |= {k: k for k in ("precision", "recall") if all(k in row for row in rows)}
    body = [
        [method, str(evaluations), *(pooled(group, k) for k in columns), str(len(group))]
        for (evaluations, method), group in sorted(groups.items())
    ]
    return [["method", "evaluations", *columns.values(), "seeds"], *body]
