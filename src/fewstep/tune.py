"""`fewstep finetune`, from a model and data to a few-step sampler and its energy, in a run folder.

First the levels of its steps, where none are given: `levels_for`. The loop is finetuning.py's, the method dxmi.py's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path as File

import torch
from torch import nn

from fewstep import models
from fewstep.commands import (
    SCHEDULE,
    Meter,
    Track,
    data_settings,
    find_schedule,
    labels_for,
    load,
    model_settings,
    require_shape,
    silent,
    unmetered,
)
from fewstep.config import FinetuneConfig, Source
from fewstep.denoiser import Denoiser
from fewstep.dxmi import make_state
from fewstep.energy import require_energy
from fewstep.finetuning import finetune as finetune_loop
from fewstep.goal import Goal, make_goal
from fewstep.levels import MOST_REFINED, learn_levels
from fewstep.processes import ALONE, Processes
from fewstep.refine import BUDGET
from fewstep.run import fingerprint, open_run, record, require_place, require_tensorboard, resume
from fewstep.schedule import Schedule

LEARNED = "learned"  # not a schedule's name, but how fine-tuning comes by one


def finetune(
    model: str,
    source: Source,
    out: File,
    steps: int,
    config: FinetuneConfig,
    schedule_name: str = LEARNED,
    device: str = "cpu",
    track: Track = silent,
    meter: Meter = unmetered,
    reward: str | None = None,
    reward_weight: float = 1.0,
    processes: Processes = ALONE,
    tensorboard: bool = False,
    energy: str | None = None,
) -> File:
    """Fine-tune a sampler of `steps` evaluations and its energy into the folder `out`; continues where a killed run stood.

    schedule_name: as for `find_schedule`, or LEARNED (`levels_for`). The weights that are kept are those whose samples were
    closest to the held-out data. A conditional model is given the data's labels. Of several processes only the first one
    writes.
    """
    if tensorboard:
        require_tensorboard()
    require_place(out, "finetune")
    denoiser, data = models.load_denoiser(model, device), load(source)
    require_shape(denoiser, data.shape)
    if len(data.train) < config.batch_size:
        raise ValueError(f"too few samples: {len(data.train)} for a batch of {config.batch_size}; lower --batch-size")
    if config.batch_size % processes.count:
        raise ValueError(f"--batch-size {config.batch_size} cannot be shared evenly by {processes.count} processes")
    labels, test_labels = (labels_for(model, denoiser, each) for each in (data.train_labels, data.test_labels))
    worth = models.load_reward(reward, device) if reward else None
    goal = make_goal(data.train.to(device), labels, worth, reward_weight)
    with torch.random.fork_rng(devices=[]):  # so that a repeated command begins with the same energy
        torch.manual_seed(config.seed)
        structured, made_by = models.load_energy(energy) if energy else (None, "")
    if structured is not None:
        require_energy(structured, data.shape, config, denoiser.classes)
    learned = schedule_name == LEARNED
    if learned:
        schedule = levels_for(denoiser, steps, out, goal, config, device, meter)
    else:
        schedule = find_schedule(schedule_name, denoiser, [steps])
    times = processes.same(schedule.times(denoiser.path, steps))
    state = make_state(denoiser, times, config, data.shape, structured)
    settings = model_settings(model, denoiser, out) | {"times": times.tolist(), "shape": list(data.shape)}
    if reward is not None:
        settings |= {"reward": models.relative_to(reward, out)[0], "reward_weight": reward_weight}
        settings |= {"reward_fingerprint": fingerprint(worth.state_dict().values())} if isinstance(worth, nn.Module) else {}
    if energy is not None:
        settings |= {"energy": models.relative_to(energy, out)[0], "energy_fingerprint": made_by}
    if labels is not None:
        settings |= {"labels_fingerprint": fingerprint([labels])}
    settings |= data_settings(source, data) | dataclasses.asdict(config) | {"learned_levels": learned}
    if processes.index == 0:
        # what runs did before there was a choice
        before = dataclasses.asdict(FinetuneConfig(score="density", density="scalar"))
        open_run(out, "finetune", settings, before | {"learned_levels": False})
        if learned:
            schedule.save(out / SCHEDULE)
    processes.wait()
    resume(out, state, processes.index == 0)
    held_out = make_goal(data.test.to(device), test_labels, worth, reward_weight, least=1.0)
    loop = finetune_loop(state, goal, held_out, processes)
    if processes.index == 0:
        loop = record(out, state, loop, tensorboard=tensorboard)
    for _ in track(loop, state.total - state.step, f"fine-tuning {steps} steps"):
        pass
    if not state.best:
        raise ValueError("no state's samples and energies were finite; lower --lr and --lr-value, and give another --out")
    if processes.index == 0:
        models.save_weights(state.best["sampler"], out / models.SAMPLER)
        models.save_weights(state.best["value"], out / models.VALUE)
    return out


def levels_for(
    denoiser: Denoiser, steps: int, out: File, goal: Goal, config: FinetuneConfig, device: str, meter: Meter
) -> Schedule:
    """The schedule that a sampler of so many steps learns on (`learn_levels`). That of an unfinished run is its folder's."""
    if (out / SCHEDULE).exists():
        return Schedule.load(out / SCHEDULE)
    fits = 1 + (steps <= MOST_REFINED)
    with meter(fits * BUDGET * denoiser.evaluations, "learning levels") as tick:
        return learn_levels(denoiser, steps, goal, config, device, tick)
