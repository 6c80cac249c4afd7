"""The exact denoiser, sampler and energy of a Gaussian mixture: what everything else is held to.

p_0 = sum_k w_k N(m_k, diag(c_k^2)), so at (alpha, sigma)   p_t = sum_k w_k N(alpha m_k, v_k),   v_k = alpha^2 c_k^2 + sigma^2,
E[x_0 | x] = sum_k r_k(x) [m_k + alpha c_k^2 (x - alpha m_k)/v_k],   with r_k the posterior weight of component k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.denoiser import Cond, Denoiser
from fewstep.path import VE, Path, as_time


class Mixture(Denoiser):
    """means: (k, *d); stds: a number, (k,) or (k, *d); weights: (k,), uniform if None. Computed in x's precision."""

    means: Tensor
    stds: Tensor
    weights: Tensor

    def __init__(
        self,
        means: Tensor | Sequence,
        stds: Tensor | Sequence | float,
        weights: Tensor | Sequence | None = None,
        path: Path | None = None,
    ):
        super().__init__()
        m, c = as_time(means), as_time(stds)
        if m.ndim < 2:
            raise ValueError(f"means must have shape (k, *d), got {tuple(m.shape)}")
        w = as_time(weights) if weights is not None else torch.ones(len(m), dtype=torch.float64)
        if w.shape != (len(m),) or not bool((w > 0).all()):
            raise ValueError(f"weights must be {len(m)} positive numbers, got {w.tolist()}")
        if not bool((c >= 0).all()):
            raise ValueError("stds must not be negative")
        if c.ndim == 1:
            c = c.reshape(-1, *[1] * (m.ndim - 1))
        if c.ndim not in (0, m.ndim) or any(a not in (1, b) for a, b in zip(c.shape, m.shape, strict=False)):
            raise ValueError(f"stds must be a number, ({len(m)},) or {tuple(m.shape)}, got {tuple(as_time(stds).shape)}")
        self.shape = tuple(m.shape[1:])
        self.path = path if path is not None else VE()
        self.register_buffer("means", m.flatten(1))
        self.register_buffer("stds", c.expand(m.shape).flatten(1).contiguous())
        self.register_buffer("weights", w / w.sum())

    def _components(self, x: Tensor, t: Tensor | float):
        """Differences (b, k, D), variances (b or 1, k, D), log weight + log density (b, k), alpha (b or 1, 1, 1)."""
        a, s = (c.to(x).reshape(-1, 1, 1) for c in (self.path.alpha(t), self.path.sigma(t)))
        variance = a**2 * self.stds.to(x) ** 2 + s**2
        difference = x.flatten(1)[:, None] - a * self.means.to(x)
        log = -(difference**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1) / 2
        return difference, variance, log + self.weights.to(x).log(), a

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        difference, variance, log, a = self._components(x, t)
        each = self.means.to(x) + a * self.stds.to(x) ** 2 * difference / variance
        return (log.softmax(-1)[..., None] * each).sum(1).reshape(x.shape)

    def log_prob(self, x: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """log p_t(x) in nats, summed over dimensions: (b,)."""
        return self._components(x, t)[2].logsumexp(-1)

    def energy(self, x: Tensor) -> Tensor:
        """-log p_0(x) in nats, summed over dimensions: (b,)."""
        return -self.log_prob(x)

    def sample(self, n: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """n exact draws of p_0: (n, *d)."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return (self.means[which] + self.stds[which] * noise).to(dtype).reshape(n, *(self.shape or ()))


def ring(
    modes: int = 8, radius: float = 4 / math.sqrt(2), std: float = 0.5 / math.sqrt(2), path: Path | None = None
) -> Mixture:
    """Equal Gaussians on a circle; the defaults are the 8 Gaussians of the DxMI paper (radius 2.829, std 0.354)."""
    angles = torch.arange(modes, dtype=torch.float64) * 2 * math.pi / modes
    return Mixture(radius * torch.stack([angles.cos(), angles.sin()], 1), std, path=path)
