"""What does a step between neighbouring levels cost?

The corrector-optimised cost of a step from level t to the cleaner t' (Williams et al. 2024, Sec. 3, with v = sigma):

    L(t, t') = sigma(t')^2  E_{x ~ p_t} || score(x, t') - score(x, t) ||^2

x is drawn at the *noisier* level by noising data, both scores are taken at the *same* x, the weight is the *cleaner*
level's. It is the work that a Langevin corrector has to do after the step. Score evaluations only, no derivatives.
Computed on the VE path, because the cost changes under x -> x/alpha (but not under a change of clock).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser, to_score
from fewstep.path import broadcast

CORRECTOR_ORDER = 2  # L = O(dt^2), so the length element is L^{1/2}


def corrector_costs(
    denoiser: Denoiser,
    x0: Tensor,
    times: Tensor,
    draws: int,
    batch_size: int,
    cond: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[Sequence], Iterable] = iter,
) -> Tensor:
    """The cost of every step of `times` (k,), drawing by drawing: (k-1, draws), float64, summed over dimensions.

    denoiser: on a VE path. x0: data (n, *d); each step gets `draws` independent pairs of a datum and a noise. cond: one
    row per datum. 2 (k-1) draws samples go through the denoiser. `progress` wraps the batches.
    """
    steps = len(times) - 1
    step = torch.arange(steps).repeat_interleave(draws)
    where = generator.device if generator is not None else "cpu"
    which = torch.randint(len(x0), (len(step),), generator=generator, device=where)
    costs = torch.empty(len(step), dtype=torch.float64)
    path = denoiser.path
    for at in progress(torch.arange(len(step)).split(batch_size)):
        noisier, cleaner, rows = times[step[at]], times[step[at] + 1], which[at.to(which.device)].to(x0.device)
        datum = x0[rows]
        noise = torch.randn(datum.shape, generator=generator, dtype=x0.dtype, device=where).to(x0.device)
        x = path.noised(datum, noise, noisier)
        given = {k: v[rows.to(v.device)] for k, v in cond.items()} if cond else None
        with torch.no_grad():
            before = to_score(denoiser(x, noisier, given), x, path, noisier)
            change = to_score(denoiser(x, cleaner, given), x, path, cleaner) - before
        weighted = (broadcast(path.sigma(cleaner), x) * change).flatten(1).double()
        costs[at] = (weighted**2).sum(1).cpu()
        if not bool(torch.isfinite(costs[at]).all()):
            bad = int(step[at][~torch.isfinite(costs[at])][0])
            high, low = path.ratio(times[bad]), path.ratio(times[bad + 1])
            raise ValueError(f"the model's score is not finite between sigma/alpha {high:.4g} and {low:.4g}")
    return costs.reshape(steps, draws)
