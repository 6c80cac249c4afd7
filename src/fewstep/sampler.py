"""The trainable few-step sampler: a denoiser on a grid of levels, whose steps are Gaussian.

    step i:  x_{i+1} = mean + std_i z,   mean = alpha_s x0 + sqrt(sigma_s^2 - std0_i^2) eps,   t = times[i], s = times[i+1]

std0 is ancestral sampling's, so an untrained Sampler *is* the ancestral sampler; std is learned from there, apart from the
mean, except in the last step (to exact data), where it is fixed.
Ancestral noise is right if x0 is known; `posterior_std` gives what few, long steps need, where it is not: more, and more in
some dimensions than in others (`noise_scale`), or a border that is the same in all data would get the noise of what is not. The
error of x0 that it adds depends on the level that a step starts from alone, so that `in_steps` can take a sampler to another
number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.denoiser import Cond, Denoiser
from fewstep.path import Path, broadcast
from fewstep.schedule import Schedule, bend
from fewstep.solvers import ancestral_std, require_times
from fewstep.start import Gaussian, start_basis, started


class Transition(NamedTuple):
    """N(mean, std^2 diag(scale^2)): mean (b, *d), std () or (b,), scale (*d) or (b, *d) with a geometric mean of 1."""

    mean: Tensor
    std: Tensor
    scale: Tensor | float = 1.0

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """A reparametrised draw: differentiable in mean and std."""
        where = generator.device if generator is not None else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=where)
        return self.at(noise.to(self.mean.device))

    def at(self, noise: Tensor) -> Tensor:
        """The draw that standard normal noise (b, *d) stands for."""
        return self.mean + self.deviation() * noise

    def deviation(self) -> Tensor:
        """Of each dimension: like mean, or what broadcasts to it."""
        return broadcast(self.std, self.mean) * torch.as_tensor(self.scale).to(self.mean)


class Sampler(nn.Module):
    """denoiser: trainable, on its own path. times: (N+1,) strictly decreasing. last_std: noise of the last step.

    start_mean (*d) and start_basis (K, *d): where rollouts start (`start_where_data_are`); None for noise alone. noise_scale
    (N, *d): each dimension's share of the steps' noise (`set_noise`); None for 1.
    """

    times: Tensor
    start_mean: Tensor | None
    start_basis: Tensor | None
    noise_scale: Tensor | None
    of_x: Tensor
    of_x0: Tensor
    last_std: Tensor

    def __init__(self, denoiser: Denoiser, times: Tensor, last_std: float = 0.0):
        super().__init__()
        times = require_times(times)
        if times[-1] != 0:
            raise ValueError(f"a sampler's times must end at exact data, 0, not at {times[-1]:.6g}")
        if last_std < 0:
            raise ValueError(f"a sampler needs last_std >= 0, got {last_std}")
        self.denoiser = denoiser
        path, t, s = denoiser.path, times[:-1], times[1:]
        std = ancestral_std(path, t, s)
        of_x = torch.sqrt((path.sigma(s) ** 2 - std**2).clamp(min=0)) / path.sigma(t)
        self.register_buffer("times", times)
        self.register_buffer("of_x", of_x, persistent=False)  # mean = of_x x + of_x0 x0
        self.register_buffer("of_x0", path.alpha(s) - of_x * path.alpha(t), persistent=False)
        self.register_buffer("last_std", torch.tensor([last_std], dtype=torch.float32))
        self.log_std = nn.Parameter(std[:-1].log().float())
        self.register_buffer("start_mean", None)
        self.register_buffer("start_basis", None)
        self.register_buffer("noise_scale", None)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in ("start_mean", "start_basis", "noise_scale"):  # of the data's shape, which only the file knows
            found = state_dict.get(prefix + name)
            setattr(self, name, None if found is None else self.log_std.new_empty(found.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def path(self) -> Path:
        return self.denoiser.path

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def radius(self) -> Tensor:
        """The size of the states of each step, hypot(alpha, sigma): (N+1,)."""
        return torch.hypot(self.path.alpha(self.times), self.path.sigma(self.times))

    def levels(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma of the states of each step, 2 x (N+1,): the path's, and at the end the last step's own noise.

        Where that is none, the path's cleanest level.
        """
        alpha, sigma = self.path.alpha(self.times), self.path.sigma(self.times).clone()
        sigma[-1] = float(self.last_std) or self.path.sigma_min
        return alpha, sigma

    def std(self) -> Tensor:
        """The noise of every step, the geometric mean of its dimensions': (N,)."""
        return torch.cat([self.log_std.exp(), self.last_std])

    def noise(self) -> Tensor:
        """That of every step in each dimension: (N, *d), or (N,) if it is the same in all."""
        std, scale = self.std().detach(), self.noise_scale
        return std if scale is None else broadcast(std, scale) * scale

    @torch.no_grad()
    def set_noise(self, std: Tensor) -> None:
        """Give every step but the last this noise, (N-1, *d), or (N-1,) if it is the same in all dimensions.

        Its geometric mean over dimensions goes on being learned, each dimension's share of it does not. Raises ValueError for
        another number of steps.
        """
        if len(std) != self.steps - 1:
            raise ValueError(f"a sampler of {self.steps} steps has noise of its own in {self.steps - 1}, got {len(std)}")
        log = std.double().log()
        mean = log.flatten(1).mean(1) if log.ndim > 1 else log
        self.log_std.copy_(mean)
        self.noise_scale = None
        if log.ndim > 1:
            last = log.new_ones(1, *log.shape[1:])
            self.noise_scale = torch.cat([(log - broadcast(mean, log)).exp(), last]).to(self.log_std)

    def step(self, x: Tensor, i: int | Tensor, cond: Cond = None) -> Transition:
        """The law of x_{i+1} given x_i = x (b, *d); i a step index, or one per sample (b,). Differentiable."""
        j = torch.as_tensor(i, device=self.times.device)
        if bool((j < 0).any()):
            raise IndexError(f"steps count from 0 to {self.steps - 1}, got {int(j.min())}")
        x0 = self.denoiser(x, self.times[j].cpu(), cond)
        mean = broadcast(self.of_x[j], x) * x + broadcast(self.of_x0[j], x) * x0
        return Transition(mean, self.std()[j], 1.0 if self.noise_scale is None else self.noise_scale[j])

    def start(self, n: int, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """n states to roll out from: (n, *shape), on the sampler's device."""
        where = generator.device if generator is not None else self.log_std.device
        return self.start_from(torch.randn(n, *shape, generator=generator, dtype=self.log_std.dtype, device=where))

    def start_from(self, noise: Tensor) -> Tensor:
        """The states to roll out from that standard normal noise (b, *d) stands for: (b, *d), on the sampler's device."""
        noise, t = noise.to(self.log_std), self.times[0].cpu()
        if self.start_mean is None or self.start_basis is None:
            return self.path.start_from(noise, t)
        return started(noise, self.start_mean, self.start_basis, float(self.path.sigma(t)))

    def shown(self) -> float:
        """How much wider than the noise the data show where rollouts start: alpha^2 v/sigma^2 in the widest direction, or 0."""
        if self.start_basis is None:
            return 0.0
        sigma, widest = float(self.path.sigma(self.times[0].cpu())), float(self.start_basis.flatten(1).square().sum(1).max())
        return (1 + widest / sigma) ** 2 - 1

    @torch.no_grad()
    def rollout(self, start: Tensor, generator: torch.Generator | None = None, cond: Cond = None) -> Tensor:
        """All states from noise to data, without gradients: (N+1, b, *d). N evaluations per sample."""
        states = [start]
        for i in range(self.steps):
            states.append(self.step(states[-1], i, cond).draw(generator))
        return torch.stack(states)

    @torch.no_grad()
    def sample(
        self,
        start: Tensor,
        generator: torch.Generator | None = None,
        cond: Cond = None,
        value: Callable[..., Tensor] | None = None,
        guidance: float = 0.0,
    ) -> Tensor:
        """Samples (b, *d): a rollout whose last step is its mean, without noise. N evaluations per sample.

        value, guidance: value guidance, x_{i+1} - guidance std_i grad V(x_{i+1}, i+1) after every step (DxMI, Eq. 11), std_i
        being each dimension's own.
        """
        x = start
        for i in range(self.steps):
            law = self.step(x, i, cond)
            x = law.draw(generator) if i < self.steps - 1 else law.mean
            if value is not None and guidance:
                with torch.enable_grad():
                    at = x.detach().requires_grad_(True)
                    (gradient,) = torch.autograd.grad(value(at, i + 1, cond).sum(), at)
                x = x - guidance * law.deviation() * gradient
        return x


@torch.no_grad()
def start_where_data_are(sampler: Sampler, gaussian: Gaussian) -> None:
    """Start the sampler's rollouts at the Gaussian of the data, noised to its first level.

    The data of all classes make one Gaussian, whatever class is asked for.
    """
    t, known = sampler.times[0].cpu(), Gaussian(*(each.to(sampler.log_std) for each in gaussian))
    alpha, sigma = float(sampler.path.alpha(t)), float(sampler.path.sigma(t))
    sampler.start_mean, sampler.start_basis = alpha * known.mean, start_basis(known, alpha, sigma)


@torch.no_grad()
def posterior_std(sampler: Sampler, data: Tensor, noise: Tensor, cond: Cond = None) -> Tensor:
    """The noise that gives every step but the last its right variance in each dimension, x0 being unknown: (N-1, *d).

    std_i^2 = std0_i^2 + of_x0_i^2 E(x_0 - E[x_0 | x_i])^2, whose mean is measured on data (b, *d) with standard normal noise
    (b, *d): the optimal diagonal covariance of Bao et al. (2022, Analytic-DPM, Theorem 1, and after it "Estimating the Optimal
    Covariance with Imperfect Mean"), the same for all states.
    """
    path, known = sampler.path, ancestral_std(sampler.path, sampler.times[:-1].cpu(), sampler.times[1:].cpu())
    found = []
    for i in range(sampler.steps - 1):
        t = sampler.times[i].cpu()
        x = path.noised(data, noise, t)
        error = ((sampler.denoiser(x, t, cond) - data) ** 2).double().mean(0).cpu()
        found.append(torch.sqrt(known[i] ** 2 + sampler.of_x0[i].cpu() ** 2 * error))
    return torch.stack(found) if found else known.new_zeros(0, *data.shape[1:])


def in_steps(sampler: Sampler, steps: int) -> Sampler:
    """The same network in another number of steps: levels on the curve through its own, step noises from the same levels.

    What a step's variance has beyond ancestral sampling's, in each dimension, is of_x0^2 times the error of x0 at the level it
    starts from (`posterior_std`). That error, which the learned noise implies, is interpolated over the levels in units of
    sigma^2/(alpha^2 + sigma^2), which it has where the data are N(0, I), so that both ends are right. A sampler of one step
    implies none: its other steps' noise is ancestral. The factor that a step has learned is taken for a part of the error: on
    levels of the sampler's own that serves other numbers of steps best, but Karras' not in 2 (docs/log.md).

    The curve goes on to the path's cleanest level and is read to data, except where it ends there already (named schedules):
    more steps are then read as those are, or some would go below it.
    """
    path, angles = sampler.path, sampler.path.angle(sampler.times.cpu())
    cleanest, knots = float(torch.atan(torch.tensor(path.sigma_min))), angles[:-1]
    to_data = steps < sampler.steps or sampler.steps == 1 or float(knots[-1]) > 1.01 * cleanest
    if to_data:
        knots = torch.cat([knots, knots.new_tensor([min(float(knots[-1]) / 2, cleanest)])])
    curve = Schedule(torch.linspace(0, 1, len(knots), dtype=torch.float64), knots, to_data=to_data)
    other = Sampler(sampler.denoiser, curve.times(path, steps), float(sampler.last_std)).to(sampler.log_std.device)
    other.start_mean, other.start_basis = sampler.start_mean, sampler.start_basis
    if min(steps, sampler.steps) > 1:
        noise = sampler.noise()[:-1].double().cpu()
        std = noise.reshape(len(noise), -1)
        known, new = (ancestral_std(path, s.times[:-2].cpu(), s.times[1:-1].cpu())[:, None] for s in (sampler, other))
        of_x0, of_x0_new = (s.of_x0[:-1, None].cpu() for s in (sampler, other))
        at, where = angles[:-2].flip(0), path.angle(other.times.cpu()[:-2])
        weights = np.stack([np.interp(bend(where), bend(at), level) for level in np.eye(len(at))], 1)  # of the levels, in each
        error = ((std**2 - known**2) / of_x0**2).flip(0) / at.sin()[:, None] ** 2
        error = torch.from_numpy(weights) @ error * where.sin()[:, None] ** 2
        variance = (new**2 + of_x0_new**2 * error).clamp(min=0.01 * new**2)
        other.set_noise(variance.sqrt().reshape(-1, *noise.shape[1:]))
    return other
