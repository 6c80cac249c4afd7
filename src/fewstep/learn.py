"""From a model's own score to its schedule: probe the costs on a fine grid, then make every step cost the same.

theta_0 > .. > theta_k log-uniform in sigma/alpha    probes
L_i = cost of theta_i -> theta_{i+1}                 averaged over draws of data and noise
Lambda = sum_i L_i^{1/order}                         the length of the curve; a grid's error falls as Lambda/N
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fewstep import cost as costs
from fewstep.denoiser import Denoiser, OnPath
from fewstep.path import VE
from fewstep.schedule import Schedule, from_costs, log_linear, step_lengths


def learn_schedule(
    denoiser: Denoiser,
    x0: Tensor,
    cost: str = "corrector",
    *,
    probes: int = 100,
    draws: int = 64,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    cond: Mapping[str, Tensor] | None = None,
    batch_size: int = 512,
    generator: torch.Generator | None = None,
    progress: Callable[[Sequence], Iterable] = iter,
) -> Schedule:
    """Learn where the steps go (Williams et al. 2024, Algorithm 1 on a fine grid). No derivatives of the network.

    x0: data (n, *d) in the model's scale, on its device. probes: levels between sigma_max and sigma_min (sigma/alpha;
    default the path's own range), each step with `draws` independent draws: 2 (probes - 1) draws evaluations, 12,672 by
    default. cond: one row per datum. The result's provenance holds the length Lambda, its Monte Carlo standard error,
    the split-half error of the curve (largest relative difference of a 10-point grid's sigmas between two halves of the
    draws), how uneven the probe steps were, and the evaluations spent.
    """
    if cost != "corrector":
        raise ValueError(f"cost must be 'corrector', got {cost!r}")
    if probes < 3 or draws < 4:
        raise ValueError(f"learn_schedule needs at least 3 probes and 4 draws, got {probes} and {draws}")
    if len(x0) < 2:
        raise ValueError(f"learn_schedule needs at least 2 data points, got {len(x0)}")
    if not bool(torch.isfinite(x0).all()):
        raise ValueError("x0 contains values that are not finite; remove or repair those samples")
    for name, value in (cond or {}).items():
        if len(value) != len(x0):
            raise ValueError(f"cond[{name!r}] has {len(value)} rows for {len(x0)} data points; give one row per datum")

    path = VE(
        denoiser.path.sigma_min if sigma_min is None else sigma_min,
        denoiser.path.sigma_max if sigma_max is None else sigma_max,
    )
    if path.sigma_max > 1.001 * denoiser.path.sigma_max and not denoiser.path.ends_in_pure_noise():
        raise ValueError(f"sigma_max {path.sigma_max:g} is beyond the model's noisiest level, {denoiser.path.sigma_max:g}")
    theta = log_linear(path.sigma_min, path.sigma_max).angles(probes)[:-1]
    seen = OnPath(denoiser, path)
    each = costs.corrector_costs(seen, x0, path.time(theta), draws, batch_size, cond, generator, progress)
    order = costs.CORRECTOR_ORDER
    mean, error = each.mean(1), each.std(1) / math.sqrt(draws)
    lengths = step_lengths(mean, order)
    # d Lambda = sum of dL L^{1/order - 1}/order
    length_error = float(((error * lengths / mean.clamp(min=1e-300) / order) ** 2).sum().sqrt())
    halves = [from_costs(theta, each[:, part::2].mean(1), order).sigmas(10)[:-1] for part in (0, 1)]
    schedule = from_costs(
        theta,
        mean,
        order,
        name=f"learned ({cost})",
        pure_noise=denoiser.path.ends_in_pure_noise(),
        provenance={
            "cost": cost,
            "order": order,
            "coordinates": "VE",
            "learned_on": repr(denoiser.path),
            "sigma_min": path.sigma_min,
            "sigma_max": path.sigma_max,
            "probes": probes,
            "draws": draws,
            "data": len(x0),
            "Lambda": float(lengths.sum()),
            "Lambda_error": length_error,
            "split_half_error": float((halves[0] / halves[1]).log().abs().max()),
            "probe_step_variation": float(lengths.std() / lengths.mean()),
            "evaluations": 2 * each.numel() * denoiser.evaluations,
        },
    )
    return schedule


def step_costs(
    denoiser: Denoiser,
    x0: Tensor,
    schedule: Schedule,
    steps: int,
    draws: int = 256,
    cond: Mapping[str, Tensor] | None = None,
    batch_size: int = 512,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The corrector cost of each step of a grid of `steps` levels (the last step, to exact data, has none): (steps-1,)."""
    schedule = dataclasses.replace(schedule, pure_noise=False)
    path = VE(denoiser.path.sigma_min, float(torch.tan(schedule.theta[0])))
    times = schedule.times(path, steps)[:-1]
    return costs.corrector_costs(OnPath(denoiser, path), x0, times, draws, batch_size, cond, generator).mean(1)
