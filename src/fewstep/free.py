"""Which schedules cost nothing, not one evaluation of a model?

The named curves, in both readings, and the levels of DMN (Xue et al. 2024), which are no curve's: for each number of steps
they minimise a bound on the solver's error, locally: beyond ten steps or so, other starts end elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch
from scipy.optimize import LinearConstraint, minimize
from torch import Tensor

from fewstep.path import HALF_PI, as_time
from fewstep.schedule import NAMED, Schedule, karras, kl_optimal, log_linear


def free_schedules(
    sigma_min: float, sigma_max: float, steps: Sequence[int] = (), pure_noise: bool = False
) -> dict[str, Schedule]:
    """By name: the curves as they are usually read, N levels down to sigma_min before exact data, and read `to data`; with
    steps, "dmn" as well, whose grids are for these numbers of steps only."""
    curves = {name: make(sigma_min, sigma_max) for name, make in NAMED.items() if name != "cosine"}  # that is kl_optimal
    curves["karras (rho 3)"] = karras(sigma_min, sigma_max, rho=3.0)
    curves |= {f"{name} to data": replace(curve, to_data=True) for name, curve in curves.items()}
    grids = {n: torch.atan(dmn(sigma_min, sigma_max, n)[:-1]) for n in steps if n > 1}  # one step leaves nothing to choose
    if grids:
        for theta in grids.values():
            theta[0] = HALF_PI if pure_noise else math.atan(sigma_max)
        curves["dmn"] = replace(kl_optimal(sigma_min, sigma_max), name="dmn", grids=grids)
    return {name: replace(curve, pure_noise=pure_noise) for name, curve in curves.items()}


def dmn(sigma_min: float, sigma_max: float, steps: int) -> Tensor:
    """The levels that minimise `dmn_bound`, the best of three starts (Xue et al. 2024, Sec. 3; theirs is trust-constr):
    (steps + 1,), float64, falling from sigma_max to a trailing 0; steps at least 2."""
    return as_time([sigma_max, *_inner_levels(sigma_min, sigma_max, steps), 0.0])


@cache
def _inner_levels(sigma_min: float, sigma_max: float, steps: int) -> tuple[float, ...]:
    ends = as_time([-math.log(sigma_max), -math.log(sigma_min)])

    @torch.enable_grad()
    def objective(inner: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(inner).requires_grad_()
        value = dmn_bound(torch.cat([ends[:1], x, ends[1:]]))
        return float(value.detach()), torch.autograd.grad(value, x)[0].numpy()

    gaps = np.eye(steps, steps - 1) - np.eye(steps, steps - 1, -1)
    least = 0.01 * float(ends[1] - ends[0]) / steps
    shift = np.r_[-float(ends[0]), np.zeros(steps - 2), float(ends[1])]
    apart = LinearConstraint(gaps, least - shift, np.inf)
    starts = [make(sigma_min, sigma_max) for make in (log_linear, karras, partial(karras, rho=3))]
    found = [
        minimize(objective, -s.sigmas(steps + 1)[1:-2].log().numpy(), jac=True, method="SLSQP", constraints=apart, tol=1e-6)
        for s in starts
    ]
    allowed = [result for result in found if (gaps @ result.x + shift > 0).all()]
    best = min(allowed, key=lambda result: result.fun).x if allowed else -starts[0].sigmas(steps + 1)[1:-2].log().numpy()
    return tuple(np.exp(-best).tolist())


def dmn_bound(half_log_snr: Tensor) -> Tensor:
    """How much errors of the data prediction move the end of an order-3 multistep integrator (Xue et al. 2024, Sec. 3).

    The prediction at (alpha, sigma), alpha^2 + sigma^2 = 1, is taken to be off by sigma^2/alpha. Orders 1, 2, 3, .., 3, 2,
    1. A node's errors cancel across steps, except in the first three steps and the last, as in the authors' code.
    """
    lam, steps = half_log_snr, len(half_log_snr) - 1
    error = torch.exp(-2 * lam) / torch.sqrt(1 + torch.exp(-2 * lam))
    h = lam.diff()
    each = torch.arange(steps)
    orders = torch.minimum(each + 1, steps - each).clamp(max=3)
    moved = lam.new_zeros(steps, steps)  # by a step, through a node
    for order in (1, 2, 3):
        step = each[orders == order]
        node = step[:, None] + torch.arange(1 - order, 1)
        moments = [torch.expm1(h[step])]  # of exp over the step
        for m in range(1, order):
            moments.append(torch.exp(h[step]) * h[step] ** m - m * moments[-1])
        powers = torch.stack([(lam[node] - lam[step, None]) ** m for m in range(order)], 1)
        weight = torch.linalg.solve(powers, torch.stack(moments, 1))
        moved = moved.index_put((step[:, None], node), torch.exp(lam[step, None]) * weight * error[node])
    apart = (each < 3) | (each == steps - 1)
    return torch.linalg.vector_norm(moved[apart], dim=1).sum() + moved[~apart].sum(0).abs().sum()
