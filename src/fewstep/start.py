"""Where does a few-step sampler start?   At the Gaussian of the data, seen through the noise of its first level.

The ODE of a Gaussian needs no network: from level to level a state's distance to the mean grows, along a principal component
of variance v, as sqrt(alpha^2 v + sigma^2). At noisy levels a model of any data says little else (Wang & Vastola 2024), so a
sampler that knows the data may begin where that ends, and not spend one of its few evaluations above. It must, where the
noisiest level still shows the data: many models are sampled from noise alone there, which their networks have never seen
(Lin et al. 2024).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.path import VE, as_time

COMPONENTS = 64


class Gaussian(NamedTuple):
    """mean (*d); components (K, *d), orthonormal, the widest first; variances (K,). Nothing else varies."""

    mean: Tensor
    components: Tensor
    variances: Tensor


@torch.no_grad()
def gaussian_of(data: Tensor) -> Gaussian:
    """That of data (n, *d), in at most 64 principal components."""
    rows = data.flatten(1)
    with torch.random.fork_rng([rows.device] if rows.device.type == "cuda" else []):
        torch.manual_seed(0)  # of a randomised decomposition
        _, singular, components = torch.pca_lowrank(rows, min(COMPONENTS, *rows.shape))
    shape = data.shape[1:]
    return Gaussian(rows.mean(0).reshape(shape), components.T.reshape(-1, *shape), singular**2 / len(rows))


def start_basis(gaussian: Gaussian, alpha: float, sigma: float) -> Tensor:
    """The b_k (K, *d) with which `started` has the Gaussian's covariance at a level: sigma + |b_k|^2 is the root of
    alpha^2 v_k + sigma^2."""
    shown = alpha**2 * gaussian.variances
    gain = torch.sqrt(shown / (torch.sqrt(shown + sigma**2) + sigma))  # no difference of like numbers
    return gain.reshape(-1, *[1] * gaussian.mean.ndim) * gaussian.components


def started(noise: Tensor, mean: Tensor, basis: Tensor, sigma: float) -> Tensor:
    """mean + sigma z + sum_k b_k <b_k, z> for standard normal z (b, *d): (b, *d).

    At every level the state that the ODE of the Gaussian has, if it comes from the noise z.
    """
    flat = basis.flatten(1)
    return mean + sigma * noise + (noise.flatten(1) @ flat.T @ flat).reshape(noise.shape)


class FromGaussian(VE):
    """A VE path whose solvers start at a Gaussian of data, whatever the level they start from."""

    def __init__(self, sigma_min: float, sigma_max: float, gaussian: Gaussian):
        super().__init__(sigma_min, sigma_max)
        self.gaussian = gaussian

    def start_from(self, noise, t=1.0):
        sigma = float(self.sigma(as_time(t)))
        known = Gaussian(*(each.to(noise) for each in self.gaussian))
        return started(noise, known.mean, start_basis(known, 1.0, sigma), sigma)
