"""What does the model believe x_0 is?   denoiser(x, t, cond) = E[x_0 | x_t = x].

Whatever a network predicts is affine in x and E[x_0 | x], so one table turns it into a denoiser (a = alpha, s = sigma,
dots for rates in t):

    predicts   y stands for           E[x_0 | x] =
    x0         x_0                    y
    eps        eps                    (x - s y) / a
    v          a eps - s x_0          (a x - s y) / (a^2 + s^2)
    flow       dx/dt = a' x_0 + s' eps  (s' x - s y) / (s' a - s a')
    score      -eps / s               (x + s^2 y) / a

and back:  eps = (x - a x_0) / s,  score = -eps / s,  velocity = a' x_0 + s' eps.
eps and score cannot be turned into x_0 where alpha = 0; x0, v and flow can.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fewstep.config import Prediction
from fewstep.path import Path, as_time, broadcast

Cond = Mapping[str, Any] | None


def to_x0(predicts: Prediction, y: Tensor, x: Tensor, path: Path, t: Tensor | float) -> Tensor:
    """E[x_0 | x] from what the network returned: the table above. Shapes (b, *d), t () or (b,)."""
    a, s = broadcast(path.alpha(t), x), broadcast(path.sigma(t), x)
    if predicts == "x0":
        return y
    if predicts == "eps":
        return (x - s * y) / a
    if predicts == "v":
        return (a * x - s * y) / (a**2 + s**2)
    if predicts == "flow":
        da, ds = (broadcast(rate, x) for rate in path.rates(t))
        return (ds * x - s * y) / (ds * a - s * da)
    if predicts == "score":
        return (x + s**2 * y) / a
    raise ValueError(f"predicts must be one of {', '.join(get_args(Prediction))}, got {predicts!r}")


def to_eps(x0: Tensor, x: Tensor, path: Path, t: Tensor | float) -> Tensor:
    """The noise that goes with a belief about x_0: (x - alpha x_0)/sigma, for sigma > 0."""
    return (x - broadcast(path.alpha(t), x) * x0) / broadcast(path.sigma(t), x)


def to_score(x0: Tensor, x: Tensor, path: Path, t: Tensor | float) -> Tensor:
    """grad log p_t(x) by Tweedie's formula, for sigma > 0."""
    return -to_eps(x0, x, path, t) / broadcast(path.sigma(t), x)


def to_velocity(x0: Tensor, x: Tensor, path: Path, t: Tensor | float) -> Tensor:
    """dx/dt of the probability flow: alpha' x_0 + sigma' eps, for sigma > 0."""
    da, ds = (broadcast(rate, x) for rate in path.rates(t))
    return da * x0 + ds * to_eps(x0, x, path, t)


class Denoiser(nn.Module, ABC):
    """A model on a path. `shape` is one sample's shape where it is known; `evaluations` the passes per call.

    classes: K of a class-conditional model, whose cond is {"class_labels": (b,) int64 in 0 .. K}. K means "no class", and
    so does no cond.
    """

    path: Path
    shape: tuple[int, ...] | None = None
    classes: int | None = None
    evaluations: int = 1
    default_levels: Callable[[int], Tensor | None] | None = None

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        """E[x_0 | x_t = x] of x's shape (b, *d); t of shape () or (b,); cond is handed to the network verbatim."""


def shape_of(denoiser: Denoiser, shape: Sequence[int] | None = None) -> tuple[int, ...]:
    """One sample's shape: the one given, or the model's own."""
    found = shape or denoiser.shape
    if found is None:
        raise ValueError("the model does not say its samples' shape; give it, as in --shape 3 --shape 32 --shape 32")
    return tuple(found)


class Pretrained(Denoiser):
    """Any network, described by three facts: its path, what its output means, and what clock number it is told.

    net: called as net(x, clock(t), **cond), with the clock of shape (b,) in x's precision, returns x's shape.
    clock: from t to the number the network was trained with; default t itself. `path.ratio` for EDM, `path.index` for
    a discrete-time model (a fractional index, never rounded). default_levels: from a number of steps to the angles
    (steps,) that the model is sampled at today, or None where it has no such grid; for a verdict. classes: K of a network
    that takes class_labels, K itself, or none, for "no class" (`Denoiser`).
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        path: Path,
        predicts: Prediction,
        clock: Callable[[Tensor], Tensor] | None = None,
        shape: tuple[int, ...] | None = None,
        default_levels: Callable[[int], Tensor | None] | None = None,
        classes: int | None = None,
    ):
        super().__init__()
        if predicts not in get_args(Prediction):
            raise ValueError(f"predicts must be one of {', '.join(get_args(Prediction))}, got {predicts!r}")
        self.net, self.path, self.predicts, self.clock = net, path, predicts, clock
        self.shape, self.default_levels, self.classes = shape, default_levels, classes

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        t = as_time(t)
        told = self.clock(t) if self.clock is not None else t
        y = self.net(x, told.to(device=x.device, dtype=x.dtype).expand(len(x)), **(cond or {}))
        if y.shape != x.shape:
            raise ValueError(f"the network returned shape {tuple(y.shape)} for an input of shape {tuple(x.shape)}")
        return to_x0(self.predicts, y, x, self.path, t)


class Guided(Denoiser):
    """Classifier-free guidance: D_u + scale (D_c - D_u) (Ho & Salimans 2022); two evaluations, one batch.

    unconditional: the mapping that stands for "no condition", with the same keys as cond. Its values, like cond's, are
    tensors with one row per sample, or with a single row that is used for all.
    """

    def __init__(self, denoiser: Denoiser, scale: float, unconditional: Mapping[str, Tensor]):
        super().__init__()
        self.denoiser, self.scale, self.unconditional = denoiser, float(scale), dict(unconditional)
        self.path, self.shape, self.evaluations = denoiser.path, denoiser.shape, 2 * denoiser.evaluations
        self.default_levels, self.classes = denoiser.default_levels, denoiser.classes

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        if cond is None or set(cond) != set(self.unconditional):
            raise ValueError(f"guidance needs cond with the keys {sorted(self.unconditional)}, got {sorted(cond or {})}")
        n = len(x)
        both = {k: torch.cat([_rows(cond[k], n), _rows(self.unconditional[k].to(cond[k]), n)]) for k in cond}
        t = as_time(t).expand(n)
        with_cond, without = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return without + self.scale * (with_cond - without)


def _rows(value: Tensor, n: int) -> Tensor:
    if len(value) not in (1, n):
        raise ValueError(f"a condition has {len(value)} rows for a batch of {n}; give one row per sample, or one for all")
    return value.expand(n, *value.shape[1:])


class OnPath(Denoiser):
    """The same model seen on another path: same angle, x rescaled, so the posterior mean is unchanged.

    Where the new path is noisier than the model's noisiest level, the model is asked at that level.
    """

    def __init__(self, denoiser: Denoiser, path: Path):
        super().__init__()
        self.denoiser, self.path = denoiser, path
        self.shape, self.evaluations = denoiser.shape, denoiser.evaluations
        self.default_levels, self.classes = denoiser.default_levels, denoiser.classes

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        theirs = self.denoiser.path
        t_theirs = theirs.time(self.path.angle(t))
        radius = torch.hypot(theirs.alpha(t_theirs), theirs.sigma(t_theirs))
        scale = radius / torch.hypot(self.path.alpha(t), self.path.sigma(t))
        return self.denoiser(broadcast(scale, x) * x, t_theirs, cond)
