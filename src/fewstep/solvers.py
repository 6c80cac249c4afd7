"""How do we go from one level to the next, when nothing is learned?

Every solver is first order in this one update, exact if E[x_0 | x_t] stayed constant on the way from t to s < t:

    x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z,      eps = (x_t - alpha_t x0)/sigma_t,   z ~ N(0, I)

It divides by sigma_t only, so it holds at a flow model's pure-noise start and, with std = 0, at exact data. A solver is
a generator function that yields x after every step; `solve` runs one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.denoiser import Cond, Denoiser, to_eps
from fewstep.path import Path, as_time, broadcast

Predict = Callable[[Tensor, Tensor], Tensor]
Steps = Iterator[Tensor]


class Solution(NamedTuple):
    """x: the samples (b, *d); evaluations: passes through the network, per sample; trajectory: (N+1, b, *d) or None."""

    x: Tensor
    evaluations: int
    trajectory: Tensor | None


def update(x0: Tensor, eps: Tensor, path: Path, s: Tensor, std: Tensor | float = 0.0) -> Tensor:
    """The mean of x_s: the formula above without its last term."""
    left = torch.sqrt((path.sigma(s) ** 2 - as_time(std) ** 2).clamp(min=0))
    return broadcast(path.alpha(s), x0) * x0 + broadcast(left, x0) * eps


def ancestral_std(path: Path, t: Tensor, s: Tensor) -> Tensor:
    """The std of x_s given x_t and x_0: sigma_s sqrt(1 - (ratio_s/ratio_t)^2) (DDPM, Ho et al. 2020)."""
    shrink = path.ratio(s) / path.ratio(t)  # 0 where t is pure noise
    return path.sigma(s) * torch.sqrt((1 - shrink**2).clamp(min=0))


def euler(predict: Predict, x: Tensor, path: Path, times: Tensor, draw: Callable[[Tensor], Tensor]) -> Steps:
    """DDIM (Song et al. 2021), which is Euler's method in sigma/alpha: order 1, N evaluations."""
    for t, s in pairwise(times):
        x0 = predict(x, t)
        x = update(x0, to_eps(x0, x, path, t), path, s)
        yield x


def heun(predict: Predict, x: Tensor, path: Path, times: Tensor, draw: Callable[[Tensor], Tensor]) -> Steps:
    """Heun's method in sigma/alpha (Karras et al. 2022, Algorithm 1): order 2, 2N - 1 evaluations.

    Euler on the step to exact data, and on one from pure noise, where sigma/alpha is infinite.
    """
    for t, s in pairwise(times):
        x0 = predict(x, t)
        eps = to_eps(x0, x, path, t)
        x = update(x0, eps, path, s)
        if s > 0 and path.alpha(t) > 0:
            half_step = path.alpha(s) * (path.ratio(s) - path.ratio(t)) / 2
            x = x + broadcast(half_step, x) * (to_eps(predict(x, s), x, path, s) - eps)
        yield x


def dpmpp_2m(predict: Predict, x: Tensor, path: Path, times: Tensor, draw: Callable[[Tensor], Tensor]) -> Steps:
    """DPM-Solver++(2M) (Lu et al. 2022): order 2, multistep, N evaluations; the last step to exact data is Euler's."""
    before: tuple[Tensor, Tensor] | None = None  # the previous prediction, and the step in log(alpha/sigma) after it
    for t, s in pairwise(times):
        x0 = predict(x, t)
        h = torch.log(path.ratio(t) / path.ratio(s))  # infinite to exact data
        forward = x0  # extrapolated from the last two predictions, where there are two
        if before is not None and s > 0:
            forward = x0 + broadcast(h / (2 * before[1]), x) * (x0 - before[0])
        shrink = path.sigma(s) / path.sigma(t)
        x = broadcast(shrink, x) * x + broadcast(path.alpha(s) - shrink * path.alpha(t), x) * forward
        before = (x0, h)
        yield x


def ancestral(predict: Predict, x: Tensor, path: Path, times: Tensor, draw: Callable[[Tensor], Tensor]) -> Steps:
    """Ancestral sampling (DDPM): stochastic, N evaluations."""
    for t, s in pairwise(times):
        x0 = predict(x, t)
        std = ancestral_std(path, t, s)
        x = update(x0, to_eps(x0, x, path, t), path, s, std)
        if std > 0:
            x = x + broadcast(std, x) * draw(x)
        yield x


SOLVERS: dict[str, Callable[..., Steps]] = {f.__name__: f for f in (euler, heun, dpmpp_2m, ancestral)}
SOLVERS["ddim"] = euler


def require_times(times: Tensor) -> Tensor:
    """The times (N+1,) in float64; raises ValueError unless they fall strictly within [0, 1]."""
    times = as_time(times)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must be a vector of at least 2 entries, got shape {tuple(times.shape)}")
    rising = ~(times.diff() < 0)  # NaN included
    if bool(rising.any()):
        i = int(rising.nonzero()[0]) + 1
        raise ValueError(f"times must strictly decrease; times[{i}]={times[i]:.6g} >= times[{i - 1}]={times[i - 1]:.6g}")
    if times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times must lie in [0, 1], got {float(times[0]):.6g} to {float(times[-1]):.6g}")
    return times


def solve(
    denoiser: Denoiser,
    noise: Tensor,
    times: Tensor,
    solver: str = "euler",
    *,
    cond: Cond = None,
    generator: torch.Generator | None = None,
    keep_trajectory: bool = False,
) -> Solution:
    """Integrate from noise (b, *d), already scaled for times[0] (`path.start` draws it), down the times (N+1,).

    Differentiable in noise and parameters; wrap in torch.no_grad() to sample. Raises ValueError for an unknown solver,
    times that do not fall strictly within [0, 1], and a state that is not finite.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    times = require_times(times)
    evaluations = 0

    def predict(x: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += denoiser.evaluations
        return denoiser(x, t, cond)

    def draw(x: Tensor) -> Tensor:
        where = generator.device if generator is not None else x.device
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=where).to(x.device)

    x, states = noise, [noise]
    for i, x in enumerate(SOLVERS[solver](predict, noise, denoiser.path, times, draw)):
        if not bool(torch.isfinite(x).all()):
            level = float(denoiser.path.ratio(times[i]))
            raise ValueError(
                f"samples became non-finite in step {i}, from sigma/alpha = {level:.4g}; use other levels, or float32 or better"
            )
        if keep_trajectory:
            states.append(x)
    return Solution(x, evaluations, torch.stack(states) if keep_trajectory else None)
