"""What each command does, from files to files. Parsing and progress bars are cli.py's, the methods are elsewhere.

`track(iterable, total, title)` wraps every long loop, so that a caller can show its progress.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep import __version__, models, report
from fewstep.config import Source, TrainConfig
from fewstep.data import SAMPLES, Data, count_classes, load_data
from fewstep.denoiser import Denoiser, Guided, shape_of
from fewstep.endpoint import deal, ignore
from fewstep.free import free_schedules
from fewstep.run import (
    fingerprint,
    open_run,
    record,
    require_free,
    require_tensorboard,
    resume,
)
from fewstep.sampler import Sampler, in_steps
from fewstep.schedule import NAMED, Schedule
from fewstep.solvers import SOLVERS, solve
from fewstep.training import TrainState
from fewstep.training import train as train_loop

Track = Callable[[Iterable, int, str], Iterable]
Meter = Callable[[int, str], AbstractContextManager[Callable[[int], object]]]
SCHEDULE = "schedule.json"


def silent(loop: Iterable, total: int, title: str) -> Iterable:
    return loop


@contextmanager
def unmetered(total: int, title: str) -> Iterator[Callable[[int], object]]:
    yield ignore


def load(source: Source) -> Data:
    return load_data(source.data, source.data_folder, source.size)


def data_settings(source: Source, data: Data) -> dict[str, Any]:
    """A data set's name as a run folder keeps it, and what tells its samples from others."""
    return {"data": source.data, "data_size": source.size, "data_fingerprint": fingerprint([data.train])}


def model_settings(model: str, denoiser: Denoiser, out: File) -> dict[str, Any]:
    """A model's name as a run folder keeps it, and what tells its weights from others."""
    name, local = models.relative_to(model, out)
    return {"model": name, "model_is_local": local, "model_fingerprint": fingerprint(denoiser.state_dict().values())}


def train(
    source: Source,
    out: File,
    config: TrainConfig,
    device: str = "cpu",
    track: Track = silent,
    tensorboard: bool = False,
) -> File:
    """Train a diffusion model into the folder `out`; continues where a killed run stood."""
    if tensorboard:
        require_tensorboard()
    data = load(source)
    spread = float(data.train.std())
    if not 0.1 < spread < 10:
        raise ValueError(f"{source.data} has standard deviation {spread:.3g}; scale it to about 1 (it must lie in 0.1 .. 10)")
    settings = data_settings(source, data) | {"shape": list(data.shape)} | dataclasses.asdict(config)
    labels, classes = None, None
    if config.labels:
        if data.train_labels is None:
            raise ValueError(
                f"{source.data} has no labels, one whole number per sample; leave --labels out, or give an .npz file that "
                "has them under y or labels"
            )
        labels, classes = data.train_labels.to(device), count_classes(data.train_labels)
        settings |= {"classes": classes, "labels_fingerprint": fingerprint([labels])}
    state = TrainState(data.shape, config, device, classes)
    folder = open_run(out, "train", settings, dataclasses.asdict(TrainConfig()))
    resume(folder, state)
    loop = record(folder, state, train_loop(state, data.train.to(device), labels), tensorboard=tensorboard)
    for _ in track(loop, config.iterations - state.step, "training"):
        pass
    if state.schedule is not None:  # before the weights, which tell that the run has finished
        about = {"fewstep": __version__, "date": datetime.date.today().isoformat(), "seed": config.seed, "data": source.data}
        dataclasses.replace(state.schedule, provenance=about | state.schedule.provenance).save(folder / SCHEDULE)
    models.save_weights(state.averaged.module.state_dict(), folder / models.MODEL)
    return folder


def baselines(like: Schedule) -> dict[str, Schedule]:
    """The free schedules over the same range of levels."""
    ends = like.made_for()
    return {"karras": NAMED["karras"](*ends), "log-linear": NAMED["log_linear"](*ends)}


def find_schedule(name: str, denoiser: Denoiser, steps: Sequence[int] = ()) -> Schedule:
    """A named schedule over the model's range of levels, a schedule file, or a folder of `fewstep schedule`, from noise on.

    steps: the numbers of steps that "dmn", which is no curve, has grids for.
    """
    low, high = denoiser.path.sigma_min, denoiser.path.sigma_max
    if name.replace("-", "_") in NAMED:
        return NAMED[name.replace("-", "_")](low, high)
    if name == "dmn":
        if not steps or min(steps) < 2:
            raise ValueError("dmn's levels are for a number of steps, 2 or more: one step leaves nothing to choose")
        return free_schedules(low, high, steps)[name]
    if not File(name).exists():
        names = ", ".join([*NAMED, "dmn"])
        raise ValueError(f"no schedule {name!r}: give one of {names}, a schedule file, or a folder of `fewstep schedule`")
    found = read_schedule(name)
    if (start := found.provenance.get("start")) is not None:
        raise ValueError(f"{name} is for image to image, from pictures with noise of {start:g}; here samples start from noise")
    return found


def read_schedule(name: str) -> Schedule:
    """A schedule file, or the one in a folder."""
    file = File(name) / SCHEDULE if File(name).is_dir() else File(name)
    if not file.is_file():
        raise ValueError(f"no schedule file {name!r}: give one, or a folder of `fewstep schedule` (with its {SCHEDULE})")
    return Schedule.load(file)


def solvers_of(schedules: Iterable[Schedule]) -> list[str]:
    """What these schedules were learned and judged for, or euler where none says it."""
    named = [each.provenance.get("solver") for each in schedules]
    return list(dict.fromkeys(name for name in named if name in SOLVERS)) or ["euler"]


def require_answer(denoiser: Denoiser, form: tuple[int, ...], cond: Mapping[str, Tensor] | None, device: str) -> None:
    """Ask the model once, so that a wrong shape or condition is found before anything is written."""
    try:
        with torch.no_grad():
            denoiser(torch.zeros(1, *form, device=device), 0.5, deal(cond, torch.arange(1)))
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        fault = f"{error}".strip().splitlines()
        raise ValueError(
            f"the model does not take a sample of shape {form} with the conditions {sorted(cond or {})}: "
            f"{fault[0] if fault else type(error).__name__}; see --shape and --cond"
        ) from error


def require_shape(denoiser: Denoiser, shape: tuple[int, ...]) -> None:
    if denoiser.shape is not None and denoiser.shape != shape:
        hint = f" (--size {denoiser.shape[-1]} resizes images)" if len(denoiser.shape) == len(shape) == 3 else ""
        raise ValueError(f"the model takes samples of shape {denoiser.shape}, the data has {shape}{hint}")


def labels_for(name: str, denoiser: Denoiser, labels: Tensor | None) -> Tensor | None:
    """The data's labels (n,), where a class-conditional model of this name is to be told them."""
    if denoiser.classes is None or labels is None:
        return None
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= denoiser.classes:
        raise ValueError(f"the data's labels must lie in 0 .. {denoiser.classes - 1} for {name}, got {low} .. {high}")
    return labels


def label_cond(name: str, denoiser: Denoiser, labels: Sequence[int]) -> dict[str, Tensor]:
    """The conditions that these labels are for the class-conditional model of this name."""
    if denoiser.classes is None:
        raise ValueError(f"{name} knows no classes, so leave --label out; models of `fewstep train --labels` and DiTs do")
    if bad := [label for label in labels if not 0 <= label < denoiser.classes]:
        raise ValueError(f"--label must lie in 0 .. {denoiser.classes - 1} for {name}, got {bad[0]}")
    return {"class_labels": torch.tensor(labels)}


def guided(denoiser: Denoiser, scale: float) -> Denoiser:
    """Classifier-free guidance of a class-conditional model: the class after its last stands for none."""
    return Guided(denoiser, scale, {"class_labels": torch.tensor([denoiser.classes])})


@torch.no_grad()
def generate(
    model: Denoiser | Sampler,
    times: Tensor,
    count: int,
    shape: tuple[int, ...],
    solver: str,
    seed: int,
    device: str = "cpu",
    batch_size: int = 500,
    track: Track = silent,
    cond: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, int]:
    """Samples (count, *shape) on the CPU and evaluations per sample. Equal seeds start from equal noise, in any batches.

    cond: any number of rows, dealt out in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(count, *shape, generator=generator)
    done, evaluations = [], 0
    here = {k: v.to(device) for k, v in cond.items()} if cond else None
    for rows in track(torch.arange(count).split(batch_size), -(-count // batch_size), "sampling"):
        x, told = start[rows].to(device), deal(here, rows)
        if isinstance(model, Sampler):
            result = model.sample(model.start_from(x), generator, told)
            evaluations = model.steps * model.denoiser.evaluations
        else:
            x = model.path.start_from(x, times[0])
            result, evaluations, _ = solve(model, x, times, solver, cond=told, generator=generator)
        done.append(result.cpu())
    return torch.cat(done), evaluations


def sample(
    model: str,
    out: File,
    steps: int | None,
    count: int,
    schedule_name: str | None = None,
    solver: str | None = None,
    shape: Sequence[int] | None = None,
    seed: int = 0,
    device: str = "cpu",
    track: Track = silent,
    labels: Sequence[int] = (),
    guidance: float | None = None,
) -> File:
    """Samples into out/samples.npz (under x) and out/samples.png: 10 steps on karras unless told otherwise, of the solver that
    the schedule was learned for (`solvers_of`).

    labels: of a class-conditional model, dealt out in turn (and kept under y); without any, it samples from no class in
    particular. guidance: scale of classifier-free guidance towards them. A fine-tuned sampler has its own levels, in its own
    number of steps unless told otherwise, and knows no guidance; a schedule, solver or guidance for it raises ValueError.
    """
    if guidance is not None and not labels:
        raise ValueError("--guidance needs a --label to guide towards")
    chosen: Denoiser | Sampler
    if models.is_sampler(model):
        chosen, _ = models.load_sampler(model, device)
        if schedule_name or solver or guidance is not None:
            raise ValueError(
                f"{model} was fine-tuned on its own levels, without guidance; leave --schedule, --solver and --guidance out"
            )
        if steps not in (None, chosen.steps):
            chosen = in_steps(chosen, steps)
        times, form, solver = chosen.times.cpu(), shape_of(chosen.denoiser, shape), ""
    else:
        chosen = models.load_denoiser(model, device)
        found = find_schedule(schedule_name or "karras", chosen, [steps or 10])
        times, solver = found.times(chosen.path, steps or 10), solver or solvers_of([found])[0]
        form = shape_of(chosen, shape)
    denoiser = chosen.denoiser if isinstance(chosen, Sampler) else chosen
    settings = model_settings(model, denoiser, out) | {"times": times.tolist(), "solver": solver}
    settings |= {"shape": list(form), "count": count, "seed": seed, "labels": list(labels) or None, "guidance": guidance}
    cond = label_cond(model, denoiser, labels) if labels else None
    if guidance is not None:
        chosen = guided(denoiser, guidance)
    folder = require_free(out, "sample", settings)
    if (folder / SAMPLES).exists():
        return folder
    require_answer(denoiser, form, cond, device)
    x, evaluations = generate(chosen, times, count, form, solver, seed, device, track=track, cond=cond)
    open_run(folder, "sample", settings)
    title = f"{count} samples, {evaluations} evaluations each"
    report.samples_figure(folder / "samples.png", {title: x}, columns=min(10, count), rows=-(-min(count, 100) // 10))
    if dealt := deal(cond, torch.arange(count)):
        np.savez(folder / "part.npz", x=x.numpy(), y=dealt["class_labels"].numpy())
    else:
        np.savez(folder / "part.npz", x=x.numpy())
    os.replace(folder / "part.npz", folder / SAMPLES)
    return folder
