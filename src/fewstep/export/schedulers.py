"""What is each scheduler of diffusers handed, so that exactly the grid's levels stand in it afterwards?

ROWS says so. Flow schedulers bend what they are given by s -> k s/(1 + (k - 1) s), with k the static shift, e^mu or mu, so
they are handed s/(k - (k - 1) s). The others look levels up in a table of alpha-bar, by a whole or a fractional index.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.export.levels import PURE, flow_levels
from fewstep.path import HALF_PI, Tabulated

EXACT = 1e-6  # how far a level may be off, relative, in float32


def unit_of(scheduler: Any) -> str | None:
    """Which unit the scheduler's model counts noise in; None where it is none of ours."""
    name, settings = type(scheduler).__name__, scheduler.config
    if name.startswith("FlowMatch") or settings.get("use_flow_sigmas") or settings.get("prediction_type") == "flow_prediction":
        return "flow"
    if name.startswith("EDM"):
        return "edm"
    return "table" if hasattr(scheduler, "betas") else None


def ratios_of(scheduler: Any) -> Tensor:
    """sigma/alpha of the scheduler's own table in its own float32 arithmetic, cleanest first: (K,) float64."""
    abar = scheduler.alphas_cumprod.detach().cpu()
    return (((1 - abar) / abar) ** 0.5).double()


def index_of(scheduler: Any, levels: Tensor) -> Tensor:
    """The fractional indices of levels sigma/alpha, as `from_diffusers` tells them to the network."""
    abar = scheduler.alphas_cumprod.detach().cpu().double()
    if scheduler.config.get("rescale_betas_zero_snr"):
        abar[-1] = 0
    path, noisiest = Tabulated(abar), float(ratios_of(scheduler)[-1])
    return path.index(path.time(torch.where(levels < noisiest, torch.atan(levels), HALF_PI)))


def _table_levels(theta: Tensor, scheduler: Any) -> Tensor:
    levels = torch.where(theta > PURE, math.inf, torch.tan(theta))
    if scheduler.config.get("timestep_type") == "continuous" and scheduler.config.get("prediction_type") == "v_prediction":
        return levels  # told log(sigma)/4 instead of an index
    noisiest = float(ratios_of(scheduler)[-1])
    if scheduler.config.get("rescale_betas_zero_snr"):
        return levels.clamp(max=noisiest)  # some schedulers write 2^-24 for the last alpha-bar of 0, and 4096 for its level
    return _require_span(levels, noisiest)


def _edm_levels(theta: Tensor, scheduler: Any) -> Tensor:
    return _require_span(torch.tan(theta), scheduler.config.sigma_max)


def _require_span(levels: Tensor, noisiest: float) -> Tensor:
    if levels[0] > noisiest * (1 + EXACT):
        raise ValueError(
            f"the schedule starts at sigma/alpha = {float(levels[0]):.6g}, but the scheduler's noisiest level is "
            f"{noisiest:.6g}: export sub_range(schedule, sigma={noisiest:.6g}), or make it for sigma_max <= {noisiest:.6g}"
        )
    return levels


UNITS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "table": _table_levels,
    "edm": _edm_levels,
    "flow": lambda theta, scheduler: flow_levels(theta),
}
MODELS = {"table": "an eps or v model", "edm": "an EDM model", "flow": "a flow model"}
INSTEAD = {
    "table": "EulerDiscreteScheduler",
    "edm": "EDMEulerScheduler",
    "flow": "FlowMatchEulerDiscreteScheduler",
}

# what set_timesteps is given: (scheduler, levels (N + 1,), mu) -> kwargs


def _verbatim(scheduler: Any, levels: Tensor, mu: float | None) -> dict[str, Any]:
    return {"sigmas": levels.tolist()}  # N + 1: without the trailing 0 a step would be lost


def _unshifted(scheduler: Any, levels: Tensor, mu: float | None) -> dict[str, Any]:
    """N levels such that the scheduler's own shift brings them to where they should be, and mu where it wants that."""
    settings = scheduler.config
    dynamic, kind = settings.get("use_dynamic_shifting"), settings.get("time_shift_type", "exponential")
    if dynamic and mu is None:
        raise ValueError(
            f"{type(scheduler).__name__} shifts by a mu that depends on the image's size: give mu=, as the pipeline does, "
            "or use a constant shift: from_config(scheduler.config, use_dynamic_shifting=False)"
        )
    static = scheduler.shift if hasattr(type(scheduler), "shift") else settings.get("flow_shift", 1.0)
    k = (math.exp(mu) if kind == "exponential" else float(mu)) if dynamic and mu is not None else float(static)
    given = levels[:-1] / (k - (k - 1) * levels[:-1])
    return {"sigmas": given.tolist()} | ({"mu": float(mu)} if dynamic and mu is not None else {})


def _unshifted_array(scheduler: Any, levels: Tensor, mu: float | None) -> dict[str, Any]:
    kwargs = _unshifted(scheduler, levels, mu)
    return kwargs | {"sigmas": np.array(kwargs["sigmas"])}  # it does arithmetic on them, which a list cannot


def _ramp(scheduler: Any, levels: Tensor, mu: float | None) -> dict[str, Any]:
    """Karras' ramp backwards: the scheduler takes its "sigmas" for shares of the way from sigma_max to sigma_min."""
    rho, low, high = scheduler.config.rho, scheduler.config.sigma_min, scheduler.config.sigma_max
    return {"sigmas": (high ** (1 / rho) - levels[:-1] ** (1 / rho)) / (high ** (1 / rho) - low ** (1 / rho))}


def _interpolated(scheduler: Any, levels: Tensor, mu: float | None) -> dict[str, Any]:
    """The fractional indices between which the scheduler, linear in sigma/alpha, finds the levels."""
    table = ratios_of(scheduler).numpy()
    if levels[-2] < table[0] * (1 - EXACT):
        raise ValueError(
            f"the schedule's last level is sigma/alpha = {float(levels[-2]):.6g}, but {type(scheduler).__name__} has none "
            f"below {table[0]:.6g}: make it for sigma_min >= {table[0]:.6g}, or use "
            f"{INSTEAD['table']}.from_config(scheduler.config)"
        )
    return {"timesteps": np.interp(levels[:-1].numpy(), table, np.arange(len(table))).tolist()}


def _rounded(scheduler: Any, levels: Tensor, mu: float | None) -> dict[str, Any]:
    return {"timesteps": index_of(scheduler, levels[:-1]).round().long().tolist()}


def _distinct(scheduler: Any, levels: Tensor, mu: float | None, lowest: int = 0) -> dict[str, Any]:
    whole = _rounded(scheduler, levels, mu)["timesteps"]
    return {"timesteps": sorted({max(t, lowest) for t in whole}, reverse=True)}


# what then has to stand in it: (scheduler, levels (N + 1,), kwargs) -> levels


def _as_asked(scheduler: Any, levels: Tensor, kwargs: dict[str, Any]) -> Tensor:
    return levels


def _each_twice(scheduler: Any, levels: Tensor, kwargs: dict[str, Any]) -> Tensor:
    return torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])


def _below_one(scheduler: Any, levels: Tensor, kwargs: dict[str, Any]) -> Tensor:
    return levels.clamp(max=1 - 1e-6)  # its own, against log 0 at pure noise


def _of_indices(scheduler: Any, levels: Tensor, kwargs: dict[str, Any]) -> Tensor:
    return torch.cat([ratios_of(scheduler)[kwargs["timesteps"]], levels[-1:]])


def _of_indices_to_the_first(scheduler: Any, levels: Tensor, kwargs: dict[str, Any]) -> Tensor:
    return ratios_of(scheduler)[[*kwargs["timesteps"], 0]]


NO_REMAKING = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
ENDS_AT_DATA = {"final_sigmas_type": "zero"}


@dataclass(frozen=True)
class Row:
    """How one scheduler takes a grid. needs: the settings that leave it as it is. mends: what has to be written over after
    set_timesteps has rounded it: the levels, or what the network is told of them."""

    unit: str
    give: Callable[[Any, Tensor, float | None], dict[str, Any]]
    lands: Callable[[Any, Tensor, dict[str, Any]], Tensor] = _as_asked
    needs: Mapping[str, Any] = field(default_factory=dict)
    mends: tuple[str, ...] = ()


_FLOW_MATCH = Row("flow", _unshifted, needs=NO_REMAKING | {"invert_sigmas": False, "shift_terminal": None})
_DPM = Row("table", _rounded, needs=NO_REMAKING | ENDS_AT_DATA | {"use_lu_lambdas": False}, mends=("sigmas", "timesteps"))
_WHOLE = Row("table", _distinct, _of_indices)
ROWS: dict[str, Row] = {
    "EulerDiscreteScheduler": Row("table", _verbatim),
    "HeunDiscreteScheduler": Row("table", _interpolated, _each_twice, NO_REMAKING),
    "DPMSolverMultistepScheduler": _DPM,
    "DPMSolverSinglestepScheduler": _DPM,
    "DDPMScheduler": _WHOLE,
    "LCMScheduler": _WHOLE,
    # it ends at index 0, not at data: a step from there would go nowhere
    "TCDScheduler": Row("table", functools.partial(_distinct, lowest=1), _of_indices_to_the_first),
    "EDMEulerScheduler": Row("edm", _ramp, needs=ENDS_AT_DATA | {"sigma_schedule": "karras"}),
    "FlowMatchEulerDiscreteScheduler": _FLOW_MATCH,
    "FlowMatchLCMScheduler": _FLOW_MATCH,
    "UniPCMultistepScheduler": Row(
        "flow", _unshifted_array, _below_one, NO_REMAKING | ENDS_AT_DATA | {"shift_terminal": None}, ("timesteps",)
    ),
}


def scheduler_of(thing: Any) -> Any:
    """A scheduler: itself, a pipeline's, or that of a saved pipeline's folder or hub id."""
    if isinstance(thing, (str, os.PathLike)):
        import diffusers

        source = os.fspath(thing)
        if not File(source).exists() and source.count("/") != 1:
            raise ValueError(f"{source} does not exist; want a scheduler, a pipeline, its folder, or a hub id as owner/name")
        folder = None if (File(source) / "scheduler_config.json").is_file() else "scheduler"
        settings = diffusers.EulerDiscreteScheduler.load_config(source, subfolder=folder)
        return getattr(diffusers, settings["_class_name"]).from_config(settings)
    found = getattr(thing, "scheduler", thing)
    if not (hasattr(found, "set_timesteps") and hasattr(found, "config")):
        raise ValueError(f"want a scheduler or a pipeline of diffusers, got {type(thing).__name__}")
    return found
