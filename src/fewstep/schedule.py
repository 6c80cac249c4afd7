"""Which noise levels do we visit?   A Schedule is a monotone curve from u in [0, 1] to the noise angle theta.

u is the share of the way from the noisiest level (u = 0) to sigma_min (u = 1); a grid of N steps reads the curve at
u = 0, 1/(N-1), .., 1 and appends exact data, so one curve serves every N. A curve that leads `to_data` is read at
u = 0, 1/N, .., 1 instead, with exact data in place of its last level, so that no evaluation is spent at sigma_min.
Algorithm 1 of Williams et al. 2024 makes such a curve: u is the share of the total length, and every step of a grid
costs the same. With few steps the best levels lie on no common curve: `grids` holds those that were refined one by one.

Angles are stored because they belong to no path and are finite on every one; the curve is interpolated by a monotone
cubic (Fritsch-Carlson) in log tan(theta/2), which is log sigma at the clean end and still finite at pure noise.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import torch
from scipy.interpolate import PchipInterpolator
from scipy.special import betaincinv
from torch import Tensor

from fewstep.path import HALF_PI, VP, Path, as_time

FORMAT, VERSION = "fewstep.schedule", 2
KNOTS = 1025  # of a named schedule's curve: grids of up to 256 steps are then within 1e-6 of the formula


@dataclass(frozen=True, eq=False)
class Schedule:
    """u: (k,) rising from 0 to 1; theta: (k,) falling strictly within (0, pi/2].

    pure_noise: every grid starts at theta = pi/2 instead of theta[0]; for a curve learned up to a finite sigma_max on
    a path whose noisy end has alpha = 0. to_data: how the curve is read, see above. grids: steps -> angles (steps,), for
    the numbers of steps that have their own levels. provenance: how all this came about, kept in the file.
    """

    u: Tensor
    theta: Tensor
    name: str = "custom"
    pure_noise: bool = False
    to_data: bool = False
    grids: dict[int, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        u, theta = as_time(self.u), as_time(self.theta)
        object.__setattr__(self, "u", u)
        object.__setattr__(self, "theta", theta)
        if u.ndim != 1 or u.shape != theta.shape or len(u) < 2:
            raise ValueError(f"a schedule needs u and theta of one length >= 2, got {tuple(u.shape)} and {tuple(theta.shape)}")
        if not (bool(torch.isfinite(u).all()) and bool(torch.isfinite(theta).all())):
            raise ValueError("a schedule's u and theta must be finite")
        if u[0] != 0 or u[-1] != 1:
            raise ValueError(f"u must run from 0 to 1, got {float(u[0])} to {float(u[-1])}")
        _require_monotone("u", u, rising=True)
        _require_monotone("theta", theta, rising=False)
        if not (theta[0] <= HALF_PI and theta[-1] > 0):
            raise ValueError(f"theta must lie in (0, pi/2], got {float(theta[0])} to {float(theta[-1])}")
        object.__setattr__(self, "grids", {int(n): as_time(grid) for n, grid in sorted(self.grids.items())})
        for n, grid in self.grids.items():
            if grid.shape != (n,) or not bool(torch.isfinite(grid).all()) or not (grid[0] <= HALF_PI and grid[-1] > 0):
                raise ValueError(f"grids[{n}] must be {n} angles in (0, pi/2], got {grid.tolist()}")
            _require_monotone(f"grids[{n}]", grid, rising=False)

    def angles(self, steps: int) -> Tensor:
        """`steps` strictly decreasing angles and a trailing 0: (steps + 1,), float64."""
        if int(steps) != steps or steps < 1:
            raise ValueError(f"steps must be a whole number >= 1, got {steps}")
        steps = int(steps)
        if steps in self.grids:
            theta = self.grids[steps]
        else:
            theta = self.at(torch.linspace(0, 1, steps + self.to_data, dtype=torch.float64))[:steps]
            if self.pure_noise:
                theta[0] = HALF_PI
        return torch.cat([theta, theta.new_zeros(1)])

    def at(self, u: Tensor) -> Tensor:
        """The curve read off at u in [0, 1]; exact at the knots' ends."""
        theta = unbend(torch.from_numpy(PchipInterpolator(self.u.numpy(), bend(self.theta).numpy())(u.numpy())))
        theta[u == 0], theta[u == 1] = self.theta[0], self.theta[-1]
        return theta

    def sigmas(self, steps: int) -> Tensor:
        """`steps` strictly decreasing levels sigma/alpha and a trailing 0: (steps + 1,), float64; N steps of a solver.

        Raises ValueError where the grid starts from pure noise (sigma/alpha infinite): use `times` there.
        """
        theta = self.angles(steps)
        if theta[0] > HALF_PI - 1e-12:
            raise ValueError(
                f"schedule {self.name!r} starts from pure noise, where sigma/alpha is infinite; use .times(path, steps)"
            )
        return torch.tan(theta)

    def times(self, path: Path, steps: int) -> Tensor:
        """The same levels as times of a path: (steps + 1,) strictly decreasing, last one 0.

        Raises ValueError where the path has no level as noisy as the grid's first.
        """
        theta = self.angles(steps)
        widest = float(path.angle(1.0))
        if theta[0] > widest + 1e-9:
            raise ValueError(
                f"schedule {self.name!r} starts at noise angle {float(theta[0]):.6g}, but {path} ends at {widest:.6g}; "
                f"make the schedule for sigma_max <= {path.sigma_max:.6g}"
            )
        times = path.time(theta)
        _require_monotone("times", times, rising=False)
        return times

    def made_for(self) -> tuple[float, float]:
        """sigma_min and sigma_max of the range it was made for, which refined levels need not fill."""
        first, last = (float(torch.tan(self.theta[i])) for i in (0, -1))
        return self.provenance.get("sigma_min", last), self.provenance.get("sigma_max", first)

    def blend(self, other: Schedule, gamma: float) -> Schedule:
        """A curve gamma of the way from this one to the other, in log tan(theta/2) at equal u (Algorithm 2's blend)."""
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
        u = torch.unique((torch.cat([self.u, other.u]) * 2**30).round()) / 2**30  # knots equal but for rounding are one
        theta = unbend((1 - gamma) * bend(self.at(u)) + gamma * bend(other.at(u)))
        nearer = self if gamma < 0.5 else other
        about = {"blend": gamma, "of": [self.provenance, other.provenance]}
        name = f"blend of {self.name} and {other.name}"
        return Schedule(u, theta, name, nearer.pure_noise, nearer.to_data, provenance=about)

    def to_dict(self) -> dict[str, Any]:
        """The document that `save` writes."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "pure_noise": self.pure_noise,
            "to_data": self.to_data,
            "u": self.u.tolist(),
            "theta": self.theta.tolist(),
            "grids": {str(n): grid.tolist() for n, grid in self.grids.items()},
            "provenance": _finite(self.provenance),
        }

    @classmethod
    def from_dict(cls, document: Any) -> Schedule:
        """Raises ValueError, naming the fault, for anything that is not a schedule of this format."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f'not a schedule: it lacks "format": "{FORMAT}"')
        if document.get("version") not in (1, VERSION):
            raise ValueError(f"version {document.get('version')} of the format; this fewstep reads up to {VERSION}: upgrade")
        later: dict[str, Any] = {}
        try:
            if document["version"] > 1:
                later = {"to_data": bool(document["to_data"]), "grids": document["grids"]}
            return cls(**{k: document[k] for k in ("u", "theta", "name", "pure_noise", "provenance")}, **later)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"a damaged schedule: {error}") from error

    def save(self, file: str | File) -> None:
        """Versioned JSON, written whole or not at all."""
        draft = File(f"{file}.part")
        draft.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        os.replace(draft, file)

    @classmethod
    def load(cls, file: str | File) -> Schedule:
        """Raises ValueError, naming the file and the fault, for anything that is not a schedule of this format."""
        try:
            return cls.from_dict(json.loads(File(file).read_text()))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is not a schedule: it is not JSON ({error})") from error
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error


def _finite(value: Any) -> Any:
    """JSON knows no infinity and no NaN: None stands for the error of a grid that overflowed."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bend(theta: Tensor) -> Tensor:
    """log tan(theta/2): the coordinate in which curves are interpolated and levels are moved."""
    return torch.log(torch.tan(theta / 2))


def unbend(bent: Tensor) -> Tensor:
    return 2 * torch.atan(torch.exp(bent))


def _require_monotone(name: str, values: Tensor, rising: bool) -> None:
    wrong = (values.diff() <= 0) if rising else (values.diff() >= 0)
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0]) + 1
        verb, sign = ("increase", "<=") if rising else ("decrease", ">=")
        raise ValueError(f"{name} must strictly {verb}; {name}[{i}]={values[i]:.6g} {sign} {name}[{i - 1}]={values[i - 1]:.6g}")


# --- learned from costs -------------------------------------------------------------------------------------------


def step_lengths(costs: Tensor, order: float = 2) -> Tensor:
    """cost^{1/order}: the length of each step. order 2: corrector cost; 2(p+1): predictor of order p.

    Costs below 1e-12 of the largest are raised to that, so that the curve stays strictly monotone.
    """
    costs = as_time(costs)
    bad = ~torch.isfinite(costs) | (costs < 0)
    if bool(bad.any()):
        raise ValueError(f"costs must be finite and >= 0; cost {int(bad.nonzero()[0])} is {float(costs[bad][0])}")
    if float(costs.max()) == 0:
        raise ValueError("all costs are zero: the model's score does not depend on the level")
    return costs.clamp(min=1e-12 * float(costs.max())) ** (1 / order)


def from_costs(theta: Tensor, costs: Tensor, order: float = 2, damping: float = 0.0, **about: Any) -> Schedule:
    """The constant-cost curve through the levels theta (k,), given the costs (k-1,) of the steps between them.

    damping: a share of the mean length that every step gets on top, so that no stretch of levels is skipped altogether.
    """
    lengths = step_lengths(costs, order)
    lengths = lengths + damping * lengths.mean()
    u = torch.cat([lengths.new_zeros(1), lengths.cumsum(0) / lengths.sum()])
    u[-1] = 1.0
    return Schedule(u, theta, **about)


def equalise(theta: Tensor, costs: Tensor, points: int | None = None, order: float = 2) -> Tensor:
    """Algorithm 1 of Williams et al. 2024: from levels theta (k,), noisiest first, and step costs (k-1,), the `points`
    (default k) levels between the same ends whose steps all cost the same."""
    points = len(theta) if points is None else points
    return from_costs(theta, costs, order).at(torch.linspace(0, 1, points, dtype=torch.float64))


# --- named schedules ----------------------------------------------------------------------------------------------


def _uniform_in(
    name: str,
    warp: Callable[[Tensor], Tensor],
    unwarp: Callable[[Tensor], Tensor],
    sigma_min: float,
    sigma_max: float,
    **settings: float,
) -> Schedule:
    """The schedule whose levels are uniform in warp(sigma)."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"{name} needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    bend = torch.sinh(4 * torch.linspace(1, 0, KNOTS, dtype=torch.float64))
    u = 1 - bend / bend[0]  # closer together towards the clean end, where log sigma is steep
    first, last = warp(as_time([sigma_max, sigma_min]))
    theta = torch.atan(unwarp(first + u * (last - first)))
    theta[0], theta[-1] = math.atan(sigma_max), math.atan(sigma_min)
    noisiest = sigma_max if math.isfinite(sigma_max) else "pure noise"
    return Schedule(u, theta, name, provenance={"named": name, "sigma_min": sigma_min, "sigma_max": noisiest, **settings})


def karras(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Schedule:
    """sigma^{1/rho} uniform (Karras et al. 2022, Eq. 5)."""
    return _uniform_in("karras", lambda s: s ** (1 / rho), lambda w: w**rho, sigma_min, sigma_max, rho=rho)


def log_linear(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Schedule:
    """log sigma uniform: Karras with rho to infinity; optimal for a point mass."""
    return _uniform_in("log_linear", torch.log, torch.exp, sigma_min, sigma_max)


def kl_optimal(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Schedule:
    """atan sigma uniform: optimal in KL for unit-variance Gaussian data (Sabour et al. 2024)."""
    return _uniform_in("kl_optimal", torch.atan, torch.tan, sigma_min, sigma_max)


def linear(sigma_min: float = 0.002, sigma_max: float = math.inf) -> Schedule:
    """t uniform on the linear (flow) path; by default from pure noise."""
    return _uniform_in("linear", lambda s: 1 / (1 + 1 / s), lambda t: t / (1 - t), sigma_min, sigma_max)


def cosine(sigma_min: float = 0.002, sigma_max: float = math.inf) -> Schedule:
    """t uniform on the cosine path, by default from pure noise; over a finite range it is kl_optimal."""
    return _uniform_in("cosine", torch.atan, torch.tan, sigma_min, sigma_max)


def beta(sigma_min: float = 0.002, sigma_max: float = 80.0, a: float = 0.6, b: float = 0.6) -> Schedule:
    """Quantiles of Beta(a, b) in the timesteps of the linear-beta VP path, over the range (Lee et al. 2024)."""
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"beta needs 0 < sigma_min < sigma_max < inf, got {sigma_min} and {sigma_max}")
    clock, ends = VP(), torch.atan(as_time([sigma_max, sigma_min]))
    first, last = clock.time(ends)
    u = (1 - torch.cos(math.pi * torch.linspace(0, 1, KNOTS, dtype=torch.float64))) / 2  # the quantiles are steep at both ends
    share = torch.from_numpy(betaincinv(a, b, (1 - u).numpy()))
    theta = clock.angle(last + share * (first - last))
    theta[0], theta[-1] = ends
    return Schedule(
        u, theta, "beta", provenance={"named": "beta", "sigma_min": sigma_min, "sigma_max": sigma_max, "a": a, "b": b}
    )


NAMED: dict[str, Callable[..., Schedule]] = {f.__name__: f for f in (karras, log_linear, kl_optimal, linear, cosine, beta)}
