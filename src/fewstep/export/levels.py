"""What are a grid's levels, in a runtime's unit, and what of them is left for image to image?"""

from __future__ import annotations

import math

import torch
from scipy.optimize import brentq
from torch import Tensor

from fewstep.path import HALF_PI, as_time
from fewstep.schedule import Schedule

PURE = HALF_PI - 1e-12


def flow_levels(theta: Tensor) -> Tensor:
    """sigma/(alpha + sigma) at the angles theta: 1 at pure noise."""
    return torch.sin(theta) / (torch.sin(theta) + torch.cos(theta))


def ratio_levels(schedule: Schedule, steps: int) -> Tensor:
    """sigma/alpha of a grid, (steps + 1,); raises ValueError, with the way out, where it starts from pure noise."""
    theta = schedule.angles(steps)
    if theta[0] > PURE:
        raise ValueError(
            f"schedule {schedule.name!r} starts from pure noise, where sigma/alpha is infinite; for a flow model ask for "
            "flow levels, for any other begin at its noisiest level: sub_range(schedule, sigma=sigma_max)"
        )
    return torch.tan(theta)


def sub_range(schedule: Schedule, *, strength: float | None = None, sigma: float | None = None) -> Schedule:
    """The part of the same curve below a level, for image to image: all of its N steps lie there; grids are left out.

    strength: the share of the curve that is kept, in (0, 1]; 1 is the schedule itself. sigma: the first level, as
    sigma/alpha; s/(1 - s) for a flow model's level s. Raises ValueError unless exactly one is given, within the curve.
    """
    if (strength is None) == (sigma is None):
        raise ValueError(f"sub_range wants either strength or sigma, got strength={strength} and sigma={sigma}")
    if strength is not None:
        if not 0 < strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {strength}")
        start = 1 - strength
    else:
        first, last = schedule.theta[0].item(), schedule.theta[-1].item()
        begin = math.atan(float(sigma or 0))
        if not last < begin <= first:
            raise ValueError(
                f"schedule {schedule.name!r} goes from sigma/alpha = {math.tan(first):.6g} to {math.tan(last):.6g}; "
                f"want a start between them, got {sigma}"
            )
        start = brentq(lambda u: float(schedule.at(as_time([u]))) - begin, 0, 1, xtol=1e-15) if begin < first else 0.0
    if start == 0:
        return schedule
    knots = torch.cat([as_time([start]), schedule.u[schedule.u > start]])
    # more knots between few ones, closest at each of them, so that the cubics through them stay the ones that they were
    many = 1 if len(knots) > 256 else math.ceil(2048 / (len(knots) - 1))
    between = (1 - torch.cos(math.pi * torch.arange(many, dtype=torch.float64) / many)) / 2
    knots = torch.cat([(knots[:-1, None] + between * knots.diff()[:, None]).flatten(), knots[-1:]])
    u = torch.unique(((knots - start) / (1 - start) * 2**30).round()) / 2**30
    theta = schedule.at(start + u * (1 - start))
    provenance = {"sub_range": {"strength": 1 - start}, "of": schedule.provenance}
    name = f"{schedule.name} below {math.tan(theta[0]):.4g}"
    return Schedule(u, theta, name, to_data=schedule.to_data, provenance=provenance)
