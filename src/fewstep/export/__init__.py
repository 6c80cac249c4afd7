"""How does a schedule land in other people's samplers?

A runtime counts noise in a unit of its own, and takes the grid in one form only:

    unit     noise level is         who
    table    sigma/alpha            diffusers with alphas_cumprod, k-diffusion, ComfyUI and A1111 for eps and v models
    edm      sigma/alpha            diffusers' EDM schedulers
    flow     sigma/(alpha + sigma)  flow matching; pure noise is 1
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fewstep.export.kept import FILE, KEY, attach, attached
from fewstep.export.landing import Landed, apply, to_diffusers, using
from fewstep.export.levels import flow_levels, ratio_levels, sub_range
from fewstep.export.runtimes import comfyui_node, to_a1111, to_comfyui, to_json, to_k_diffusion
from fewstep.export.schedulers import EXACT, ROWS
from fewstep.schedule import Schedule

__all__ = [
    "EXACT",
    "FILE",
    "KEY",
    "ROWS",
    "Landed",
    "apply",
    "attach",
    "attached",
    "comfyui_node",
    "export",
    "flow_levels",
    "ratio_levels",
    "sub_range",
    "to_a1111",
    "to_comfyui",
    "to_diffusers",
    "to_json",
    "to_k_diffusion",
    "using",
]


def _diffusers_json(schedule: Schedule, steps: int, scheduler: Any, mu: float | None) -> str:
    if scheduler is None:
        raise ValueError(
            "diffusers takes another grid for every scheduler: give scheduler= (--scheduler), one or a saved pipeline's folder"
        )
    kwargs = to_diffusers(schedule, scheduler, steps, mu)
    return json.dumps({k: v.tolist() if hasattr(v, "tolist") else v for k, v in kwargs.items()})


def export(
    schedule: Schedule, target: str, steps: int, *, scheduler: Any = None, mu: float | None = None, flow: bool = False
) -> str:
    """A grid of N steps as the text that a runtime reads: JSON, for ComfyUI a list of decimals, or its node's source.

    scheduler and mu: for diffusers, as in `to_diffusers`; flow: for comfyui. Raises ValueError for an unknown target.
    """
    makers: dict[str, Callable[[], str]] = {
        "diffusers": lambda: _diffusers_json(schedule, steps, scheduler, mu),
        "k-diffusion": lambda: json.dumps(to_k_diffusion(schedule, steps).tolist()),
        "comfyui": lambda: to_comfyui(schedule, steps, flow),
        "comfyui-node": lambda: comfyui_node(schedule),
        "a1111": lambda: json.dumps(to_a1111(schedule, steps)),
        "json": lambda: json.dumps(to_json(schedule, steps), allow_nan=False),
    }
    if target not in makers:
        raise ValueError(f"target must be one of {', '.join(makers)}, got {target!r}")
    return makers[target]()
