"""The peers: other ways to choose a sampler's levels, each written from its paper, behind one call.

    fit(name, problem) -> Fit(sigmas, evaluations, gradients)

    name                            looks at (all: steps, the range)    from
    karras, karras3                                                     Karras et al. 2022, rho = 7 and 3
    log_linear, kl_optimal, linear                                      see `schedule`
    beta                                                                Lee et al. 2024
    dmn                                                                 Xue et al. 2024
    entropic, entropic_rescaled     denoiser, x0, generator             Stancevic et al. 2025
    corrector, predictor            denoiser, x0, generator             Williams et al. 2024
    ays                             denoiser, x0, generator             Sabour et al. 2024
    gits_l1, gits_l2                denoiser, noise                     Chen et al. 2024
    oss                             denoiser, noise                     Pei et al. 2025
    ld3                             denoiser, solver, noise, generator  Tong et al. 2025

Everything happens on the VE path, where a level is sigma and Euler's direction is (x - D)/sigma. Over a finite range
"cosine" is kl_optimal, so it is not listed twice.

Every grid of N steps ends in exact data. EDM's way is to put N levels, the last of them sigma_min, before it: so do the
curves (named schedules, beta, entropic, corrector, predictor). Papers whose N steps end at sigma_min (dmn, ays, gits, oss,
ld3) ask the model at N levels and not at that last one, which here becomes 0. A curve can be read in this second way too:
`karras_to_data`, ...
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from fewstep import schedule
from fewstep.baselines.denoising import ays, entropic, klub
from fewstep.baselines.endpoint import ld3
from fewstep.baselines.free import dmn, named, to_data
from fewstep.baselines.problem import Counted, Fit, Peer, Problem
from fewstep.baselines.score_optimal import score_optimal
from fewstep.baselines.teacher import cheapest, gits, oss

__all__ = [
    "CURVES",
    "PEERS",
    "Fit",
    "Peer",
    "Problem",
    "ays",
    "cheapest",
    "dmn",
    "entropic",
    "fit",
    "gits",
    "klub",
    "ld3",
    "oss",
    "score_optimal",
    "to_data",
]

CURVES: dict[str, Peer] = {
    "karras": named(schedule.karras),
    "karras3": named(partial(schedule.karras, rho=3.0)),
    "log_linear": named(schedule.log_linear),
    "kl_optimal": named(schedule.kl_optimal),
    "linear": named(schedule.linear),
    "beta": named(schedule.beta),
    "entropic": entropic,
    "entropic_rescaled": partial(entropic, rescaled=True),
    "corrector": score_optimal,
    "predictor": partial(score_optimal, cost="predictor"),
}
PEERS: dict[str, Peer] = {
    **CURVES,
    **{f"{name}_to_data": to_data(curve) for name, curve in CURVES.items()},
    "dmn": dmn,
    "ays": ays,
    "gits_l1": partial(gits, norm=1),
    "gits_l2": partial(gits, norm=2),
    "oss": oss,
    "ld3": ld3,
}


def fit(peer: str | Peer, problem: Problem) -> Fit:
    """The levels that a peer chooses, and what it spent. peer: a name, or e.g. partial(ld3, epochs=100)."""
    if isinstance(peer, str) and peer not in PEERS:
        raise ValueError(f"peer must be one of {', '.join(PEERS)}, got {peer!r}")
    counted = Counted(problem.denoiser, problem.batch_size)
    with torch.no_grad():
        sigmas = (PEERS[peer] if isinstance(peer, str) else peer)(replace(problem, denoiser=counted))
    return Fit(sigmas, counted.spent, counted.sent_back)
