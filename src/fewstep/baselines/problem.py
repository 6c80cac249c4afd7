"""What may a peer look at, and what did it spend?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.denoiser import Cond, Denoiser
from fewstep.path import VE, as_time


class Fit(NamedTuple):
    """sigmas: (steps + 1,), float64, falling to a trailing 0. evaluations: samples sent through the network on the way;
    gradients: how many of those were sent back through it."""

    sigmas: Tensor
    evaluations: int
    gradients: int


@dataclass(frozen=True, eq=False)
class Problem:
    """What a peer may look at.

    denoiser: on a VE path, whose sigma_min and sigma_max bound the levels. x0: data (n, *d). noise: where a solver
    starts, (m, *d), i.e. sigma_max times standard normal noise. batch_size: of one call without gradients.
    """

    denoiser: Denoiser
    solver: str
    steps: int
    x0: Tensor
    noise: Tensor
    generator: torch.Generator | None = None
    batch_size: int = 512

    def __post_init__(self):
        if not isinstance(self.denoiser.path, VE):
            raise ValueError(f"a peer needs a denoiser on a VE path, got {self.denoiser.path}; wrap it in OnPath(.., VE(..))")
        if self.steps < 2:
            raise ValueError(f"steps must be a whole number >= 2, got {self.steps}")

    @property
    def ends(self) -> tuple[float, float]:
        return self.denoiser.path.sigma_min, self.denoiser.path.sigma_max

    def denoised(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x] at levels sigma of shape () or (b,)."""
        return self.denoiser(x, self.denoiser.path.time(torch.atan(sigma)))

    @property
    def where(self) -> torch.device:
        return self.generator.device if self.generator is not None else torch.device("cpu")

    def data(self, n: int) -> Tensor:
        """n data, with replacement."""
        rows = torch.randint(len(self.x0), (n,), generator=self.generator, device=self.where)
        return self.x0[rows.to(self.x0.device)]

    def normal(self, n: int) -> Tensor:
        """Standard normal noise for n data."""
        shape = (n, *self.x0.shape[1:])
        return torch.randn(shape, generator=self.generator, dtype=self.x0.dtype, device=self.where).to(self.x0.device)

    def uniform(self, n: int) -> Tensor:
        """n numbers, one in each n-th of [0, 1]."""
        inside = torch.rand(n, generator=self.generator, dtype=torch.float64, device=self.where).cpu()
        return (torch.arange(n) + inside) / n


Peer = Callable[[Problem], Tensor]


class Counted(Denoiser):
    """The same denoiser, in batches, counting the samples that went through the network and, with gradients on, back."""

    def __init__(self, denoiser: Denoiser, batch_size: int):
        super().__init__()
        self.denoiser, self.batch_size, self.spent, self.sent_back = denoiser, batch_size, 0, 0
        self.path, self.shape, self.evaluations = denoiser.path, denoiser.shape, denoiser.evaluations

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        self.spent += len(x) * self.evaluations
        if torch.is_grad_enabled():
            self.sent_back += len(x) * self.evaluations
        parts = zip(x.split(self.batch_size), as_time(t).expand(len(x)).split(self.batch_size), strict=True)
        return torch.cat([self.denoiser(a, b, cond) for a, b in parts])


def ending_in_data(levels: Tensor) -> Tensor:
    """A grid down to sigma_min, with exact data in place of that last level, at which no model is asked."""
    return torch.cat([levels[:-1], levels.new_zeros(1)])
