"""How do we go from one level to the next, when nothing is learned?

Every solver is first order in this one update, exact if E[x_0 | x_t] stayed constant on the way from t to s < t:

    x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z,      eps = (x_t - alpha_t x0)/sigma_t,   z ~ N(0, I)

It divides by sigma_t only, so it holds at a flow model's pure-noise start and, with std = 0, at exact data. The better
ones put for x0, or for eps, its mean over the step, as guessed from the values at earlier levels.

A solver is a generator function that yields x after every step; `solve` runs one. It asks for predictions at times[0],
times[1], .. in this order, once each (heun: twice), and no step looks further ahead than the level that it goes to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.denoiser import Cond, Denoiser, to_eps
from fewstep.path import Path, as_time, broadcast

Predict = Callable[[Tensor, Tensor], Tensor]
Steps = Iterator[Tensor]
Before = tuple[Tensor, Tensor] | None  # the previous x0, and the step in log(alpha/sigma) that followed it

ADAMS_BASHFORTH = {  # by the number of values known, latest first
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


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


def log_step(path: Path, t: Tensor, s: Tensor) -> Tensor:
    """The step in log(alpha/sigma), positive; infinite from pure noise and to exact data."""
    return torch.log(path.ratio(t) / path.ratio(s))


def extrapolated(x0: Tensor, h: Tensor, before: Before) -> Tensor:
    """x0 half-way along a step of h, on the line through the last two predictions; x0 itself where there is none."""
    if before is None or torch.isinf(h):
        return x0
    return x0 + broadcast(h / (2 * before[1]), x0) * (x0 - before[0])


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
    before: Before = None
    for t, s in pairwise(times):
        x0, h = predict(x, t), log_step(path, t, s)
        forward = extrapolated(x0, h, before)
        x = update(forward, to_eps(forward, x, path, t), path, s)
        before = (x0, h)
        yield x


def unipc(predict: Predict, x: Tensor, path: Path, times: Tensor, draw: Callable[[Tensor], Tensor]) -> Steps:
    """UniPC-2 on x0 with B(h) = e^h - 1 (Zhao et al. 2023): order 3, multistep, N evaluations.

    It predicts by DPM-Solver++(2M); the evaluation at the next level then repeats the step, with x0 on the way a line
    or parabola through its values at the ends and before. So what it yields is not yet corrected; the step to exact
    data is Euler's and never corrected.
    """
    before: Before = None
    repeat: Callable[[Tensor], Tensor] | None = None
    for t, s in pairwise(times):
        x0, h = predict(x, t), log_step(path, t, s)
        if repeat is not None:
            x = repeat(x0)
        forward = extrapolated(x0, h, before)
        repeat = partial(_unic, x, x0, path, t, s, h, before)
        x = update(forward, to_eps(forward, x, path, t), path, s)
        before = (x0, h)
        yield x


def _unic(x: Tensor, x0: Tensor, path: Path, t: Tensor, s: Tensor, h: Tensor, before: Before, x0_after: Tensor) -> Tensor:
    """UniC: the step t -> s with the mean of x0 over it, weighted by alpha/sigma, given x0 at s too."""
    mean = x0 + (x0_after - x0) / 2  # of a line, as UniC-1 has it: the weight left out
    if before is not None:
        # of the parabola through u = -r, 0 and 1, where u is the share of the step in log(alpha/sigma): by E[u], E[u^2]
        whole, r = -1 / torch.expm1(-h), before[1] / h
        first = whole - 1 / h
        second = whole - 2 * first / h
        back = (first - second) / (1 + r)
        mean = x0 + broadcast(first - back, x) * (x0_after - x0) + broadcast(back / r, x) * (x0 - before[0])
    return update(mean, to_eps(mean, x, path, t), path, s)


def deis(predict: Predict, x: Tensor, path: Path, times: Tensor, draw: Callable[[Tensor], Tensor]) -> Steps:
    """DEIS (Zhang & Chen 2022), 3 values of eps interpolated in log(sigma/alpha): order 3, multistep, N evaluations.

    diffusers' form, without its lowered order before the last step, which helps as often as it hurts at 5 to 10 steps;
    in sigma/alpha itself the errors there are 2 to 3 times larger. The step to exact data is Euler's.
    """
    levels: list[Tensor] = []
    past: list[Tensor] = []
    for t, s in pairwise(times):
        x0 = predict(x, t)
        levels, past = [path.ratio(t).log(), *levels[:2]], [to_eps(x0, x, path, t), *past[:2]]
        x = update(x0, past[0], path, s)
        if len(past) > 1 and s > 0:
            x = x + _bend(past, path.alpha(s) * path.ratio(t) * _deis_weights(torch.stack(levels), path.ratio(s).log()))
        if path.alpha(t) == 0:  # an infinite level is no node of a polynomial
            levels, past = [], []
        yield x


def _deis_weights(levels: Tensor, target: Tensor) -> Tensor:
    """w, such that sum_j w_j p(v_j) is the integral of p(v) e^v from 0 to target, exact for polynomials p of len(w) terms.

    v is counted from levels[0]. The integrals of v^k e^v follow by parts.
    """
    v, end = levels - levels[0], target - levels[0]
    moments = [torch.expm1(end)]
    for k in range(1, len(v)):
        moments.append(end**k * torch.exp(end) - k * moments[-1])
    return torch.linalg.solve(torch.stack([v**k for k in range(len(v))]), torch.stack(moments))


def _bend(past: list[Tensor], weights: Tensor) -> Tensor:
    """What the older eps, past[1:], add to a step that took past[0] to stay constant."""
    return torch.stack([broadcast(w, e) * (e - past[0]) for w, e in zip(weights[1:], past[1:], strict=True)]).sum(0)


def ipndm(predict: Predict, x: Tensor, path: Path, times: Tensor, draw: Callable[[Tensor], Tensor]) -> Steps:
    """iPNDM (Zhang & Chen 2022): 4th-order Adams-Bashforth in sigma/alpha, multistep, N evaluations.

    The coefficients are those of equal steps whatever the steps are, as in diffusers and the EDM lineage: order 2 on a
    grid whose steps vary, with small errors all the same. It starts at order 1, 2, 3, and ends at order 4.
    """
    past: list[Tensor] = []
    for t, s in pairwise(times):
        x0 = predict(x, t)
        past = [to_eps(x0, x, path, t), *past[:3]]
        x = update(x0, past[0], path, s)
        if len(past) > 1:
            x = x + _bend(past, path.alpha(s) * (path.ratio(s) - path.ratio(t)) * as_time(ADAMS_BASHFORTH[len(past)]))
        yield x


def ancestral(predict: Predict, x: Tensor, path: Path, times: Tensor, draw: Callable[[Tensor], Tensor]) -> Steps:
    """Ancestral sampling (DDPM; k-diffusion's euler_ancestral with eta = 1): stochastic, order 1, N evaluations."""
    for t, s in pairwise(times):
        x0 = predict(x, t)
        std = ancestral_std(path, t, s)
        x = update(x0, to_eps(x0, x, path, t), path, s, std)
        if std > 0:
            x = x + broadcast(std, x) * draw(x)
        yield x


def dpmpp_2m_sde(predict: Predict, x: Tensor, path: Path, times: Tensor, draw: Callable[[Tensor], Tensor]) -> Steps:
    """SDE-DPM-Solver++(2M), midpoint form (Lu et al. 2022): `ancestral` with the x0 of `dpmpp_2m`; weak order 2."""
    before: Before = None
    for t, s in pairwise(times):
        x0, h = predict(x, t), log_step(path, t, s)
        forward, std = extrapolated(x0, h, before), ancestral_std(path, t, s)
        x = update(forward, to_eps(forward, x, path, t), path, s, std)
        if std > 0:
            x = x + broadcast(std, x) * draw(x)
        before = (x0, h)
        yield x


SOLVERS: dict[str, Callable[..., Steps]] = {
    f.__name__: f for f in (euler, heun, dpmpp_2m, unipc, deis, ipndm, ancestral, dpmpp_2m_sde)
}
SOLVERS["ddim"] = euler

# p of a global error ~ N^-p, measured on smoothly graded grids; of the mean and variance for those that draw noise.
# The multistep ones start at order 1, whose error vanishes where they start noisy enough for eps to be constant.
ORDER: dict[str, int] = {
    "euler": 1,
    "ddim": 1,
    "heun": 2,
    "dpmpp_2m": 2,
    "unipc": 3,
    "deis": 3,
    "ipndm": 2,
    "ancestral": 1,
    "dpmpp_2m_sde": 2,
}
NOISELESS: dict[str, str] = {"ancestral": "euler", "dpmpp_2m_sde": "dpmpp_2m"}  # the same solver without the noise it draws
STOCHASTIC: frozenset[str] = frozenset(NOISELESS)


def evaluations_of(solver: str, steps: int) -> int:
    """How often a solver asks the model about one sample on its way through `steps` steps to exact data."""
    return 2 * steps - 1 if solver == "heun" else steps


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
