"""What is x_t, given x_0?   x_t = alpha(t) x_0 + sigma(t) eps,   eps ~ N(0, I),   t in [0, 1].

t = 0 is data exactly (alpha > 0, sigma = 0), t = 1 the noisiest level. Two derived coordinates:

    ratio(t) = sigma/alpha              "sigma" of EDM and k-diffusion; infinite where alpha(1) = 0
    angle(t) = atan2(sigma, alpha)      theta in [0, pi/2], finite on every path; what a Schedule stores

Any two paths describe the same posterior E[x_0 | x_t] at equal angles, up to the scale of x.
Times are float64 on the CPU; a coefficient is cast to the data's precision where it meets the data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

HALF_PI = math.pi / 2


def as_time(t: Tensor | float | Sequence[float]) -> Tensor:
    """`t` as a float64 tensor on the CPU; keeps the gradient of a tensor that has one."""
    return (t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float64)).to(device="cpu", dtype=torch.float64)


def broadcast(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient of shape () or (b,) in x's precision, on its device, ready to multiply x: (b, *d)."""
    c = coefficient.to(device=x.device, dtype=x.dtype)
    return c if c.ndim == 0 else c.reshape(-1, *[1] * (x.ndim - 1))


class Path(ABC):
    """The pair (alpha, sigma), its rates and its inverse. Final subclasses below.

    `sigma_min` and `sigma_max` bound, as sigma/alpha, the levels that a schedule is learned on: below sigma_min only
    the last step of a grid goes (to exact data); sigma_max is finite even where alpha(1) = 0.
    """

    sigma_min: float
    sigma_max: float

    @abstractmethod
    def alpha(self, t: Tensor | float) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Tensor | float) -> Tensor: ...

    @abstractmethod
    def rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(d alpha/dt, d sigma/dt)."""

    @abstractmethod
    def time(self, theta: Tensor | float) -> Tensor:
        """The t whose angle is theta; angles beyond the path's noisiest give t = 1."""

    def angle(self, t: Tensor | float) -> Tensor:
        return torch.atan2(self.sigma(t), self.alpha(t))

    def ratio(self, t: Tensor | float) -> Tensor:
        return self.sigma(t) / self.alpha(t)

    def ends_in_pure_noise(self) -> bool:
        return float(self.alpha(1.0)) == 0.0

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """x_t for data and noise of shape (b, *d); t of shape () or (b,)."""
        return broadcast(self.alpha(t), x0) * x0 + broadcast(self.sigma(t), x0) * eps

    def start(
        self,
        n: int,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        t: Tensor | float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """n draws of shape (n, *shape) to start a solver from at time t."""
        where = generator.device if generator is not None else device
        return self.start_from(torch.randn(n, *shape, generator=generator, dtype=dtype, device=where).to(device), t)

    def start_from(self, noise: Tensor, t: Tensor | float = 1.0) -> Tensor:
        """The start that standard normal noise (b, *d) stands for: sigma(t) times it."""
        return broadcast(self.sigma(t), noise) * noise

    def __repr__(self) -> str:
        return f"{type(self).__name__}(sigma_min={self.sigma_min:g}, sigma_max={self.sigma_max:g})"


def _check_range(sigma_min: float, sigma_max: float) -> None:
    if not (0 < sigma_min < sigma_max < math.inf):
        raise ValueError(f"a path needs 0 < sigma_min < sigma_max < inf, got sigma_min={sigma_min}, sigma_max={sigma_max}")


class VE(Path):
    """alpha = 1, sigma(t) = tan(t atan(sigma_max)): the path of EDM and k-diffusion, with exact data at t = 0."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        _check_range(sigma_min, sigma_max)
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self._widest = math.atan(sigma_max)

    def alpha(self, t):
        return torch.ones_like(as_time(t))

    def sigma(self, t):
        return torch.tan(as_time(t) * self._widest)

    def rates(self, t):
        return torch.zeros_like(as_time(t)), self._widest * (1 + self.sigma(t) ** 2)

    def time(self, theta):
        return (as_time(theta) / self._widest).clamp(max=1.0)


class VP(Path):
    """alpha = exp(-beta_min t/2 - (beta_max - beta_min) t^2/4), sigma^2 = 1 - alpha^2 (Song et al. 2021)."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, sigma_min: float = 0.01):
        if not 0 < beta_min < beta_max:
            raise ValueError(f"VP needs 0 < beta_min < beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)
        self.sigma_min, self.sigma_max = float(sigma_min), float(self.ratio(1.0))
        _check_range(self.sigma_min, self.sigma_max)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -t * self.beta_min / 2 - t**2 * (self.beta_max - self.beta_min) / 4

    def alpha(self, t):
        return torch.exp(self._log_alpha(as_time(t)))

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(as_time(t))))

    def rates(self, t):
        half_beta = (self.beta_min + as_time(t) * (self.beta_max - self.beta_min)) / 2
        alpha = self.alpha(t)
        return -half_beta * alpha, half_beta * alpha**2 / self.sigma(t)

    def time(self, theta):
        # log alpha = log cos theta is a quadratic in t; this form of its root does not cancel at t = 0
        fall = -torch.log1p(-(torch.sin(as_time(theta)) ** 2)) / 2
        t = 2 * fall / (self.beta_min / 2 + torch.sqrt(self.beta_min**2 / 4 + (self.beta_max - self.beta_min) * fall))
        return torch.where(as_time(theta) >= math.atan(self.sigma_max), torch.ones_like(t), t)


class Cosine(Path):
    """alpha = cos(pi t/2), sigma = sin(pi t/2): uniform in the noise angle."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        _check_range(sigma_min, sigma_max)
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def alpha(self, t):
        t = as_time(t)
        return torch.where(t >= 1, torch.zeros_like(t), torch.cos(HALF_PI * t))  # cos(pi/2) is 6e-17 in floating point

    def sigma(self, t):
        return torch.sin(HALF_PI * as_time(t))

    def rates(self, t):
        return -HALF_PI * self.sigma(t), HALF_PI * self.alpha(t)

    def time(self, theta):
        return (as_time(theta) / HALF_PI).clamp(max=1.0)


class Linear(Path):
    """alpha = 1 - t, sigma = t: flow matching, rectified flow (SD3, Flux, SiT)."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        _check_range(sigma_min, sigma_max)
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def alpha(self, t):
        return 1 - as_time(t)

    def sigma(self, t):
        return as_time(t).clone()

    def rates(self, t):
        one = torch.ones_like(as_time(t))
        return -one, one

    def time(self, theta):
        theta = as_time(theta)
        t = torch.sin(theta) / (torch.sin(theta) + torch.cos(theta))
        return torch.where(theta >= HALF_PI, torch.ones_like(t), t)


class Tabulated(Path):
    """The path of a discrete-time model, from its table of alpha-bar (alpha^2) of K >= 2 entries, cleanest first.

    t = (index + 1)/K, so t = 1/K is the first entry and t = 0 exact data. Between entries log(sigma/alpha) is linear in
    the index, as in k-diffusion and in diffusers' Euler scheduler; the cell below the first entry, and the last one of
    a zero-terminal-SNR table, where that is infinite, are linear in the angle.
    """

    def __init__(self, alphas_cumprod: Tensor | Sequence[float]):
        abar = as_time(alphas_cumprod)
        if abar.ndim != 1 or len(abar) < 2:
            raise ValueError(f"alphas_cumprod must be a vector of at least 2 entries, got shape {tuple(abar.shape)}")
        if not (abar[0] < 1 and abar[-1] >= 0 and bool((abar.diff() < 0).all())):
            raise ValueError("alphas_cumprod must fall strictly, from below 1 to at least 0: cleanest level first")
        self._size = len(abar)
        self._theta = torch.cat([torch.zeros(1, dtype=torch.float64), torch.atan2((1 - abar).sqrt(), abar.sqrt())])
        self._log_ratio = torch.cat([abar.new_tensor([-math.inf]), (torch.log1p(-abar) - abar.log()) / 2])
        finite = self._log_ratio[1:][abar > 0].exp()
        self.sigma_min, self.sigma_max = float(finite[0]), float(finite[-1])

    def index(self, t: Tensor | float) -> Tensor:
        """The fractional index in 0..K-1 that the network is told."""
        return (as_time(t) * self._size - 1).clamp(min=0)

    def _cell(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        position = (t * self._size).clamp(0, self._size)
        low = position.detach().floor().clamp(max=self._size - 1).long()
        in_angle = ~torch.isfinite(self._log_ratio[low]) | ~torch.isfinite(self._log_ratio[low + 1])
        return low, position - low, in_angle

    def angle_and_rate(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """theta(t) and d theta/dt."""
        low, part, in_angle = self._cell(as_time(t))
        step = self._theta[low + 1] - self._theta[low]
        finite = self._log_ratio.nan_to_num(neginf=0.0, posinf=0.0)
        log_step = finite[low + 1] - finite[low]
        by_log = torch.atan(torch.exp(finite[low] + part * log_step))
        theta = torch.where(in_angle, self._theta[low] + part * step, by_log)
        # d atan(r) = sin cos d log r
        rate = torch.where(in_angle, step, torch.sin(theta) * torch.cos(theta) * log_step)
        return theta, rate * self._size

    def alpha(self, t):
        theta, _ = self.angle_and_rate(t)
        return torch.where(theta >= HALF_PI, torch.zeros_like(theta), torch.cos(theta))

    def sigma(self, t):
        return torch.sin(self.angle_and_rate(t)[0])

    def rates(self, t):
        theta, rate = self.angle_and_rate(t)
        return -torch.sin(theta) * rate, torch.cos(theta) * rate

    def time(self, theta):
        beyond = as_time(theta) >= self._theta[-1]
        theta = as_time(theta).clamp(0, float(self._theta[-1]))
        low = (torch.searchsorted(self._theta, theta.detach(), right=True) - 1).clamp(0, self._size - 1)
        in_angle = ~torch.isfinite(self._log_ratio[low]) | ~torch.isfinite(self._log_ratio[low + 1])
        finite = self._log_ratio.nan_to_num(neginf=0.0, posinf=0.0)
        log_step = finite[low + 1] - finite[low]
        by_log = (torch.log(torch.tan(theta)) - finite[low]) / torch.where(in_angle, torch.ones_like(log_step), log_step)
        by_angle = (theta - self._theta[low]) / (self._theta[low + 1] - self._theta[low])
        t = ((low + torch.where(in_angle, by_angle, by_log)) / self._size).clamp(max=1.0)
        return torch.where(beyond, torch.ones_like(t), t)
