"""Which levels, without asking the model?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from scipy.optimize import LinearConstraint, minimize
from torch import Tensor

from fewstep import schedule
from fewstep.baselines.problem import Peer, Problem, ending_in_data
from fewstep.path import as_time
from fewstep.schedule import Schedule


def named(make: Callable[..., Schedule]) -> Peer:
    return lambda p: make(*p.ends).sigmas(p.steps)


def to_data(curve: Peer) -> Peer:
    """The curve's N steps from sigma_max to sigma_min as the N steps to data."""
    return lambda p: ending_in_data(curve(replace(p, steps=p.steps + 1))[:-1])


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


def dmn(p: Problem) -> Tensor:
    """The levels that minimise `dmn_bound`, from three starts (Xue et al. 2024, Sec. 3; theirs is trust-constr)."""
    low, high = p.ends
    ends = as_time([-math.log(high), -math.log(low)])

    @torch.enable_grad()
    def objective(inner: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(inner).requires_grad_()
        value = dmn_bound(torch.cat([ends[:1], x, ends[1:]]))
        return float(value.detach()), torch.autograd.grad(value, x)[0].numpy()

    gaps = np.eye(p.steps, p.steps - 1) - np.eye(p.steps, p.steps - 1, -1)
    least = 0.01 * float(ends[1] - ends[0]) / p.steps
    shift = np.r_[-float(ends[0]), np.zeros(p.steps - 2), float(ends[1])]
    apart = LinearConstraint(gaps, least - shift, np.inf)
    starts = [make(low, high) for make in (schedule.log_linear, schedule.karras, partial(schedule.karras, rho=3))]
    found = [
        minimize(objective, -s.sigmas(p.steps + 1)[1:-2].log().numpy(), jac=True, method="SLSQP", constraints=apart, tol=1e-6)
        for s in starts
    ]
    best = min(found, key=lambda result: result.fun).x
    return torch.cat([as_time([high]), torch.exp(-torch.from_numpy(best)), as_time([0.0])])
