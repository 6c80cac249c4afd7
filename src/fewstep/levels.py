"""On which levels does a few-step sampler learn?   On those that suit what it begins as: ancestral sampling, from its start.

It starts at the Gaussian of its goal (start.py), so that no evaluation is spent where that is all that can be seen; how far
down the first level lies is decided as for the others, by the endpoint error (tailor.py). No level lies below the noise that
its last step leaves, under which its energy sees nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.config import FinetuneConfig
from fewstep.denoiser import Denoiser, OnPath
from fewstep.endpoint import ignore
from fewstep.goal import Goal, goals_gaussian, make_goal
from fewstep.path import VE
from fewstep.schedule import Schedule
from fewstep.start import FromGaussian
from fewstep.tailor import NOISES, tailor

MOST_REFINED = 20  # steps that get levels of their own: more are read off the curve
SHOWS = 3.0  # noise, in the data's largest standard deviations, above which they are taken for their Gaussian


def learn_levels(
    denoiser: Denoiser,
    steps: int,
    data: Tensor | Goal,
    config: FinetuneConfig,
    device: str = "cpu",
    tick: Callable[[int], object] = ignore,
) -> Schedule:
    """The schedule of a sampler of so many steps of data (n, *d), or of a goal: at most 30,000 evaluations, no gradient.

    With `config.density_iterations` 0 the sampler starts in noise, as in the paper; on a path that ends in pure noise it
    begins below that, where there is something to be seen.
    """
    goal = data if isinstance(data, Goal) else make_goal(data)
    path, lower = denoiser.path, None
    if config.density_iterations:
        gaussian = goals_gaussian(goal, config.seed)
        lower = float(gaussian.variances[0].sqrt())
        cleanest = max(path.sigma_min, min(config.last_std, path.sigma_max / 2))
        highest = min(path.sigma_max, max(SHOWS * lower, 2 * cleanest))
        denoiser = OnPath(denoiser, FromGaussian(cleanest, highest, gaussian))
    elif path.ends_in_pure_noise():
        denoiser = OnPath(denoiser, VE(path.sigma_min, path.sigma_max))
    return tailor(
        denoiser,
        "ancestral",
        [steps] if steps <= MOST_REFINED else [],
        shape=goal.data.shape[1:],
        cond=None if goal.labels is None else {"class_labels": goal.labels[:NOISES].to(device)},
        batch_size=config.batch_size,
        generator=torch.Generator().manual_seed(config.seed),
        device=device,
        tick=tick,
        lower=lower,
    )
