"""What do the runtimes outside diffusers read?"""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path as File
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.export.levels import PURE, flow_levels, ratio_levels
from fewstep.schedule import Schedule


def to_k_diffusion(schedule: Schedule, steps: int) -> Tensor:
    """sigma/alpha for k-diffusion's samplers: (steps + 1,) float32, trailing 0."""
    return ratio_levels(schedule, steps).float()


def to_comfyui(schedule: Schedule, steps: int, flow: bool = False) -> str:
    """The text of ComfyUI's ManualSigmas node: steps + 1 decimals, trailing 0; its parser knows no exponents.

    flow: for flow models, whose sigmas lie in [0, 1].
    """
    levels = flow_levels(schedule.angles(steps)) if flow else ratio_levels(schedule, steps)
    return ", ".join(np.format_float_positional(level, trim="0") for level in levels.float().numpy())


def to_a1111(schedule: Schedule, steps: int) -> list[float]:
    """sigma/alpha as in A1111's align-your-steps lists: `steps` levels without the trailing 0, which it appends itself."""
    return ratio_levels(schedule, steps)[:-1].tolist()


def to_json(schedule: Schedule, steps: int) -> dict[str, Any]:
    """The grid in every unit: theta, sigma (sigma/alpha, None where infinite) and flow, each of steps + 1 numbers."""
    theta = schedule.angles(steps)
    return {
        "schedule": schedule.name,
        "steps": steps,
        "theta": theta.tolist(),
        "sigma": [None if angle > PURE else math.tan(angle) for angle in theta.tolist()],
        "flow": flow_levels(theta).tolist(),
        "provenance": schedule.provenance,
    }


def comfyui_node(schedule: Schedule | str | File) -> str:
    """The source of a custom node for ComfyUI that holds the schedule, or its file's, and gives SIGMAS for any steps."""
    if not isinstance(schedule, Schedule):
        schedule = Schedule.load(schedule)
    source = resources.files("fewstep").joinpath("assets/comfyui_node.py").read_text()
    return source.replace('json.loads("{}")', f"json.loads({json.dumps(schedule.to_dict(), allow_nan=False)!r})", 1)
