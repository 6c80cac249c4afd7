"""Which noises say most about an endpoint error?

Where a few noises in a thousand end in another mode than they should, those few make all of the error, and independent noises
hardly meet one. But z(phi) = a cos phi + b sin phi is standard normal at every phi if a and b are, so the mean over noises is
the mean along such arcs, and along an arc a change of mode is found by halving:

    1. follow an arc's noises on a few levels; again and again halve the piece with the largest
       |x(phi') - x(phi)|^2 |phi' - phi|, the square error of taking one end's picture for all of it;
    2. draw a noise from one of every two neighbouring pieces: small pieces lie where a small change of noise makes another
       picture, and so may a small error of the solver;
    3. weigh each by its piece's length: the mean stays what it is, only its variance falls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.endpoint import MEMORY, REFERENCE_SOLVER, Midway, Reference, Runs, deal, ignore, level_range, reference
from fewstep.path import HALF_PI
from fewstep.schedule import log_linear

FIRST, HALVINGS = 4, 12  # pieces of equal length, and how often one of an arc is halved
PIECES = FIRST + HALVINGS
POINTS = 8  # noises drawn on an arc
COARSE = 24  # levels on which an arc's noises are followed to find the pieces


def evaluations_on_arcs(arcs: int, levels: int, before: int = 0) -> int:
    """What `reference_on_arcs` asks of the model, which is asked `before` times about a noise until its levels begin."""
    return arcs * ((PIECES + 1) * (COARSE + before) + POINTS * (levels + before))


def reference_on_arcs(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Mapping[str, Tensor] | None = None,
    *,
    levels: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 512,
    tick: Callable[[int], object] = ignore,
) -> Reference:
    """The `reference` from POINTS noises on each of n arcs, between pairs (n, 2, *d) of standard normal noise. The i-th arc has
    the i-th of the conditions, in turn."""
    low, high = level_range(denoiser, sigma_min, sigma_max)
    pure, n, spent = denoiser.path.ends_in_pure_noise(), len(noise), 0
    theta = replace(log_linear(low, high), pure_noise=pure, to_data=True).angles(COARSE + pure)[:-1]

    def at(phi: Tensor, arc: Tensor) -> Tensor:
        """The noises of these arcs (m,) at the angles phi (m,)."""
        pair, where = noise[arc.to(noise.device)], phi.to(noise).reshape(-1, *[1] * (noise.ndim - 2))
        return pair[:, 0] * where.cos() + pair[:, 1] * where.sin()

    @torch.no_grad()
    def pictures(phi: Tensor, arcs: Tensor) -> Tensor:
        """Where the noises of the arcs (a,) at the angles phi (a, k) end, on few levels: (a, k, D)."""
        nonlocal spent
        arc, found = arcs.repeat_interleave(phi.shape[1]), []
        for rows in torch.arange(len(arc)).split(batch_size):
            given, first = deal(cond, arc[rows]), at(phi.flatten()[rows], arc[rows])
            if isinstance(denoiser, Midway):
                first, evaluations = denoiser.states(first, given)
                spent += evaluations
                tick(evaluations)
            runs = Runs(denoiser, REFERENCE_SOLVER, first, given, batch_size, tick)
            found.append(runs(theta)[0].flatten(1).cpu())
            spent += runs.evaluations
        return torch.cat(found).reshape(len(arcs), phi.shape[1], -1)

    def pieces(arcs: Tensor) -> Tensor:
        """The angles between them (a, PIECES + 1)."""
        phi = torch.linspace(0, HALF_PI, FIRST + 1, dtype=torch.float64).expand(len(arcs), -1)
        x = pictures(phi, arcs)
        for _ in range(HALVINGS):
            largest = (x.diff(dim=1).square().sum(-1) * phi.diff(dim=1)).argmax(1, keepdim=True)
            middle = (phi.gather(1, largest) + phi.gather(1, largest + 1)) / 2
            phi, order = torch.cat([phi, middle], 1).sort(1)
            x = torch.cat([x, pictures(middle, arcs)], 1).gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
        return phi

    together = max(1, MEMORY // (PIECES * noise[0, 0].numel()))  # arcs whose pictures are held at once
    phi = torch.cat([pieces(arcs) for arcs in torch.arange(n).split(together)])
    each = PIECES // POINTS
    piece = each * torch.arange(POINTS) + torch.randint(each, (n, POINTS), generator=generator)
    length, arc = phi.diff(dim=1).gather(1, piece), torch.arange(n).repeat_interleave(POINTS)
    angle = phi.gather(1, piece) + length * torch.rand(length.shape, generator=generator, dtype=torch.float64)
    about: dict[str, Any] = {"levels": levels, "sigma_min": low, "sigma_max": high, "batch_size": batch_size, "tick": tick}
    known = reference(denoiser, at(angle.flatten(), arc), deal(cond, arc), **about)
    weight = (length * PIECES / HALF_PI).flatten()
    return known._replace(weight=weight, arc=arc, evaluations=known.evaluations + spent)
