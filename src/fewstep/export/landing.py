"""Set a scheduler's grid, and see that the intended levels stand in it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.export.schedulers import EXACT, INSTEAD, MODELS, ROWS, UNITS, Row, index_of, ratios_of, scheduler_of, unit_of
from fewstep.schedule import Schedule


class Landed(NamedTuple):
    """sigmas: the levels that now stand in the scheduler, in its unit, float32, (steps + 1,) but for Heun, which has each
    inner one twice; kwargs: what set_timesteps was given; lost: steps that fell on an index that another has already."""

    sigmas: Tensor
    kwargs: dict[str, Any]
    steps: int
    lost: int


def _plan(schedule: Schedule, scheduler: Any, steps: int, mu: float | None) -> tuple[Row, Tensor, dict[str, Any]]:
    """The scheduler's row, the levels (steps + 1,) in its unit, and the arguments of set_timesteps."""
    name, unit, settings = type(scheduler).__name__, unit_of(scheduler), scheduler.config
    if unit is None:
        raise ValueError(f"{name} counts noise in no unit that fewstep knows; it can hand a schedule to {', '.join(ROWS)}")
    row = ROWS.get(name)
    if row is None or row.unit != unit:
        of = f" of {MODELS[unit]}" if row else ""
        raise ValueError(f"{name} takes no levels{of} from outside; use {INSTEAD[unit]}.from_config(scheduler.config)")
    for key, wanted in row.needs.items():
        if (settings.get(key, wanted) or None) != (wanted or None):
            raise ValueError(
                f"{name} has {key}={settings[key]!r}, which would change the levels; "
                f"use {name}.from_config(scheduler.config, {key}={wanted!r})"
            )
    if mu is not None and not settings.get("use_dynamic_shifting"):
        raise ValueError(f"{name} has no use_dynamic_shifting, so mu={mu} has no meaning; leave it out")
    levels = UNITS[unit](schedule.angles(steps), scheduler)
    return row, levels, row.give(scheduler, levels, mu)


def to_diffusers(schedule: Schedule, scheduler: Any, steps: int, mu: float | None = None) -> dict[str, Any]:
    """The keyword arguments of scheduler.set_timesteps for a grid of N steps; of a pipeline's call, where it takes them.

    Exact but for DPMSolver*, UniPC and the schedulers of whole indices (DDPM, LCM, TCD), which round: `apply` and `using`
    mend the former and say how many steps the latter lose. mu: of a scheduler with use_dynamic_shifting; a pipeline works
    it out itself, so leave it out of its call. Raises ValueError, with the way out, for a scheduler, a setting or a level
    that it cannot be done with.
    """
    return _plan(schedule, scheduler_of(scheduler), steps, mu)[2]


def apply(
    schedule: Schedule, scheduler: Any, steps: int, mu: float | None = None, device: torch.device | str | None = None
) -> Landed:
    """Set the grid of N steps in a scheduler, or a pipeline's, and check that it stands there to 1e-6.

    Holds until the next set_timesteps, which a pipeline calls itself: there use `using`. Raises ValueError as `to_diffusers`
    does, and where a level did not land.
    """
    scheduler = scheduler_of(scheduler)
    row, levels, kwargs = _plan(schedule, scheduler, steps, mu)
    type(scheduler).set_timesteps(scheduler, device=device, **kwargs)  # its own, not the one that `using` puts before it
    wanted = row.lands(scheduler, levels, kwargs)
    if "sigmas" in row.mends:
        scheduler.sigmas = wanted.float()
    if "timesteps" in row.mends:
        inner = wanted[:-1]
        told = index_of(scheduler, inner) if row.unit == "table" else inner * scheduler.config.num_train_timesteps
        scheduler.timesteps = told.to(device=device, dtype=torch.float32)
    whole = not hasattr(scheduler, "sigmas")
    stands = row.lands(scheduler, levels, {"timesteps": scheduler.timesteps.tolist()}) if whole else scheduler.sigmas
    _require_landed(type(scheduler).__name__, stands.detach().cpu().double(), wanted)
    if len(scheduler.timesteps) > 1 and scheduler.timesteps[0] == scheduler.timesteps[1]:
        raise ValueError(
            f"the first two levels, {float(wanted[0]):.6g} and {float(wanted[1]):.6g}, both lie beyond the model's table, and "
            f"{type(scheduler).__name__} would skip one of them: make the schedule for sigma_min >= "
            f"{float(ratios_of(scheduler)[0]):.6g}"
        )
    lost = steps - len(kwargs["timesteps"]) if "timesteps" in kwargs else 0
    return Landed(stands.detach().cpu().float(), kwargs, steps - lost, lost)


def _require_landed(name: str, stands: Tensor, wanted: Tensor) -> None:
    if stands.shape != wanted.shape:
        raise ValueError(f"{name} made {len(stands)} levels where {len(wanted)} were meant; this version of it is not known")
    off = ~torch.isclose(stands, wanted, rtol=EXACT, atol=0)
    if bool(off.any()):
        i = int(off.nonzero()[0])
        raise ValueError(f"{name} made level {i} {float(stands[i]):.9g} where {float(wanted[i]):.9g} was meant")


@contextmanager
def using(schedule: Schedule, pipeline: Any) -> Iterator[None]:
    """Within it, whatever number of steps a pipeline asks its scheduler for, it gets this schedule's grid of that many.

    For every pipeline, also those that take neither sigmas nor timesteps: `with using(schedule, pipe): pipe(..)`.
    """
    scheduler = scheduler_of(pipeline)

    @functools.wraps(scheduler.set_timesteps)  # pipelines look at its signature
    def set_timesteps(
        num_inference_steps: int | None = None,
        device: Any = None,
        *,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        original_inference_steps: int | None = None,  # of LCM and TCD: of which grid of theirs to take a part
    ) -> None:
        asked = timesteps if timesteps is not None else sigmas
        steps = len(asked) if num_inference_steps is None else num_inference_steps
        apply(schedule, scheduler, steps, mu if scheduler.config.get("use_dynamic_shifting") else None, device)

    before = vars(scheduler).get("set_timesteps")
    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        if before is None:
            del scheduler.set_timesteps
        else:
            scheduler.set_timesteps = before
