"""From a model's own score to its schedule.

    learn_schedule(denoiser, solver="dpmpp_2m", steps=[6])    levels for a solver: `tailor`, by its endpoint's error
    learn_schedule(denoiser, x0)                              the published method: every step costs the same

The published method (Williams et al. 2024, Algorithm 1 on a fine grid) knows no solver. Probe the cost of the steps
between levels that are log-uniform in sigma/alpha,

    theta_0 > .. > theta_k    probes
    L_i = cost of theta_i -> theta_{i+1}        averaged over draws of data and noise
    Lambda = sum_i L_i^{1/order}                the length of the curve; a grid's error falls as Lambda/N

and read off levels at equal lengths. The predictor's cost changes with the levels it is probed on, so it is iterated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep import cost as costs
from fewstep.denoiser import Denoiser, OnPath, shape_of
from fewstep.endpoint import level_range, reference
from fewstep.path import VE
from fewstep.refine import BUDGET
from fewstep.schedule import Schedule, from_costs, log_linear, step_lengths
from fewstep.tailor import NOISES, draw_noise, tailor

ROUNDS = 3  # of the predictor's cost: its unevenness is then below 1 % on exact scores
OWN_SAMPLES = 256  # drawn from the model where there are no data


def learn_schedule(
    denoiser: Denoiser,
    x0: Tensor | None = None,
    cost: str | None = None,
    *,
    solver: str | None = None,
    steps: Sequence[int] = (),
    cond: Mapping[str, Tensor] | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    start: float | None = None,
    batch_size: int = 512,
    generator: torch.Generator | None = None,
    shape: Sequence[int] | None = None,
    device: str = "cpu",
    noises: int = NOISES,
    budget: int = BUDGET,
    probes: int = 100,
    draws: int = 64,
    tolerance: float | None = None,
    progress: Callable[[Sequence], Iterable] = iter,
) -> Schedule:
    """Learn where the steps go, by score evaluations.

    cost: "endpoint" (default where a solver is given: see `tailor`), "corrector" (default otherwise) or "predictor" (solver
    euler or heun; the only one that differentiates the network).
    x0: data (n, *d) in the model's scale, on its device, for the published costs; without, the model's own samples.
    steps: numbers of steps that get refined levels of their own; needs cost "endpoint".
    start: image to image, from pictures with noise of this level (sigma/alpha) on; needs cost "endpoint".
    cond: rows are dealt out to the noises, or belong to the data, one each. shape: of one sample, where neither the
    model nor x0 says it. noises, budget: see `tailor`. probes, draws, tolerance: see `learn_by_cost`.
    The result's provenance tells how it came about and what it cost.
    """
    if cost is None:
        cost = "corrector" if solver is None else "endpoint"
    form = shape or (tuple(x0.shape[1:]) if x0 is not None else None)
    about: dict[str, Any] = {"cond": cond, "sigma_min": sigma_min, "sigma_max": sigma_max, "batch_size": batch_size}
    if cost == "endpoint":
        if solver is None:
            raise ValueError("cost 'endpoint' needs a solver, such as dpmpp_2m")
        where = str(x0.device) if x0 is not None else device
        about |= {"shape": form, "noises": noises, "budget": budget, "generator": generator, "device": where}
        return tailor(denoiser, solver, steps, start=start, **about)
    if start is not None:
        raise ValueError(f"only cost 'endpoint' learns levels for image to image, not {cost!r}; leave start out")
    if steps:
        raise ValueError(f"only cost 'endpoint' refines single numbers of steps, not {cost!r}; leave steps out")
    spent = 0
    if x0 is None:
        noise = draw_noise(OWN_SAMPLES, shape_of(denoiser, form), generator, device)
        known = reference(denoiser, noise, cond, sigma_min=sigma_min, sigma_max=sigma_max, batch_size=batch_size)
        x0, spent = known.ends, known.evaluations
        if cond:
            about["cond"] = {k: v[torch.arange(OWN_SAMPLES, device=v.device) % len(v)] for k, v in cond.items()}
    learned = learn_by_cost(
        denoiser,
        x0,
        cost,
        solver=solver,
        probes=probes,
        draws=draws,
        tolerance=tolerance,
        generator=generator,
        progress=progress,
        **about,
    )
    more = {"own_samples": OWN_SAMPLES, "evaluations": learned.provenance["evaluations"] + spent} if spent else {}
    return dataclasses.replace(learned, provenance=learned.provenance | more)


def learn_by_cost(
    denoiser: Denoiser,
    x0: Tensor,
    cost: str = "corrector",
    *,
    solver: str | None = None,
    probes: int = 100,
    draws: int = 64,
    tolerance: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    cond: Mapping[str, Tensor] | None = None,
    batch_size: int = 512,
    generator: torch.Generator | None = None,
    progress: Callable[[Sequence], Iterable] = iter,
) -> Schedule:
    """The published method. probes: levels between sigma_max and sigma_min (sigma/alpha; default the path's own range), each
    step with `draws` independent draws of data x0 (n, *d) and noise: 2 (probes - 1) draws evaluations, 12,672 by default.

    tolerance: go on doubling the draws until the split-half error is at most this (corrector cost). The provenance holds
    the length Lambda, its Monte Carlo standard error, the split-half error of the curve (largest relative difference of a
    10-point grid's sigmas between two halves of the draws), how uneven the probed steps were, and the evaluations spent.
    """
    if probes < 3 or draws < 4:
        raise ValueError(f"learn_schedule needs at least 3 probes and 4 draws, got {probes} and {draws}")
    if len(x0) < 2:
        raise ValueError(f"learn_schedule needs at least 2 data points, got {len(x0)}")
    if not bool(torch.isfinite(x0).all()):
        raise ValueError("x0 contains values that are not finite; remove or repair those samples")
    for name, value in (cond or {}).items():
        if len(value) != len(x0):
            raise ValueError(f"cond[{name!r}] has {len(value)} rows for {len(x0)} data points; give one row per datum")
    if cost == "predictor" and (solver is None or solver not in costs.PREDICTOR_ORDERS):
        raise ValueError(f"cost 'predictor' needs a solver among {', '.join(costs.PREDICTOR_ORDERS)}, got {solver!r}")
    if cost not in ("corrector", "predictor"):
        raise ValueError(f"cost must be 'endpoint', 'corrector' or 'predictor', got {cost!r}")

    path = VE(*level_range(denoiser, sigma_min, sigma_max))
    theta = log_linear(path.sigma_min, path.sigma_max).angles(probes)[:-1]
    seen, evaluations = OnPath(denoiser, path), 0
    if cost == "predictor" and solver is not None:
        order = costs.PREDICTOR_ORDERS[solver]
        small = math.prod(x0.shape[1:]) <= 16
        for last in (False,) * (ROUNDS - 1) + (True,):
            found = costs.predictor_costs(
                seen, x0, path.time(theta), draws, batch_size, solver, None if small else 4, cond, generator, progress
            )
            each, evaluations = found.each, evaluations + found.evaluations
            if not last:
                theta = from_costs(theta, each.mean(1).clamp(min=0), order).at(
                    torch.linspace(0, 1, probes, dtype=torch.float64)
                )
    else:
        order = costs.CORRECTOR_ORDER
        moments = costs.data_moments(x0) if min(draws, len(x0)) >= 16 else None

        def block(n: int) -> Tensor:
            return costs.corrector_costs(seen, x0, path.time(theta), n, batch_size, cond, generator, progress, moments)

        def error(each: Tensor) -> float:
            return split_half_error(theta, each, order)

        each = block(draws) if tolerance is None else costs.draws_until(block, error, tolerance, first=draws)
        evaluations = 2 * each.numel() * denoiser.evaluations

    mean, deviation = each.mean(1).clamp(min=0), each.std(1) / math.sqrt(each.shape[1])
    lengths = step_lengths(mean, order)
    # d Lambda = sum of dL L^{1/order - 1}/order
    length_error = float(((deviation * lengths / mean.clamp(min=1e-300) / order) ** 2).sum().sqrt())
    return from_costs(
        theta,
        mean,
        order,
        name=f"learned ({cost})",
        pure_noise=denoiser.path.ends_in_pure_noise(),
        provenance={
            "cost": cost,
            "solver": solver,
            "order": order,
            "coordinates": "VE",
            "learned_on": repr(denoiser.path),
            "sigma_min": path.sigma_min,
            "sigma_max": path.sigma_max,
            "probes": probes,
            "draws": each.shape[1],
            "data": len(x0),
            "Lambda": float(lengths.sum()),
            "Lambda_error": length_error,
            "split_half_error": split_half_error(theta, each, order),
            "probe_step_variation": float(lengths.std() / lengths.mean()),
            "evaluations": evaluations,
        },
    )


def split_half_error(theta: Tensor, each: Tensor, order: int) -> float:
    """The largest relative difference of a 10-point grid's sigmas between two halves of the draws of each (k-1, draws)."""
    halves = [from_costs(theta, each[:, part::2].mean(1).clamp(min=0), order).sigmas(10)[:-1] for part in (0, 1)]
    return float((halves[0] / halves[1]).log().abs().max())


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
