"""How plausible is x?   An energy maps (b, *d) to (b,): low = plausible, and q(x) is proportional to exp(-D E(x)/tau).

A Value is the expected cost of the rest of the way from state x of step i, and its last slice is the energy, V(., N) = E:

    V(x, i) = tau A(x, i) + C(x, i)        A = -log p_i(x)/D + const, the density of the data noised to step i's level
                                           C = what experience with the sampler corrects

Why A: where every step of the sampler is the reverse of the path's noising, the cost to go of maximum-entropy control *is*
-log p_i, for every temperature tau. A is learned from the data alone (`density_loss`), so that value and energy are right
before the sampler makes its first move. Without A this is the paper's value.

States are divided by their path's radius, so that all are of the data's size, on VE paths too. No normalisation layers: an
energy must see scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fewstep.config import FinetuneConfig
from fewstep.denoiser import Cond, Denoiser
from fewstep.networks import Reconstruction, scalar_net
from fewstep.sampler import Sampler

PUBLISHED_TAU = 0.1  # in two dimensions
SCALAR_UP_TO = 16  # numbers per sample up to which "auto" makes the density of any number of x, not of an autoencoder's error
SIGMA = 0.5  # of data in [-1, 1]: the middle of a broad optimum on digits (docs/log.md)


class Value(nn.Module):
    """V(x, i) for steps i = 0..N; `energy(x)` is V(x, N).

    radius: (N+1,), the size of the states of each step, `Sampler.radius()`. classes: of a conditional model, whose value
    takes cond["class_labels"] (b,), the index `classes` meaning no class. density: whether V has the part tau A;
    reconstruction: whether A is made of an autoencoder's error (`networks.Reconstruction`) or of any number. shared: one
    function of x for all steps (the paper's, for images). structured: a module x (b, *d) -> (b,) that is the last slice of C,
    in place of a network of ours: an autoencoder's reconstruction error, say (the paper's, for anomalies); with a density it is
    weighted by a gain that is learned from 0.
    """

    radius: Tensor
    tau: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        radius: Tensor,
        tau: float = 0.0,
        density: bool = False,
        shared: bool = False,
        classes: int | None = None,
        features: int = 32,
        structured: nn.Module | None = None,
        reconstruction: bool = False,
    ):
        super().__init__()
        self.steps, self.dimensions, self.shared, self.classes = len(radius) - 1, math.prod(shape), shared, classes
        self.register_buffer("radius", radius.float())
        self.register_buffer("tau", torch.tensor(float(tau)))
        self.of_step = nn.Embedding(self.steps + 1, features)
        self.of_class = nn.Embedding(classes + 1, features) if classes else None
        self.critic = scalar_net(shape, features)
        self.structured = structured
        if structured is not None:
            self.gain = nn.Parameter(torch.zeros(())) if density else 1.0
        self.density_net = (Reconstruction if reconstruction else scalar_net)(shape, features) if density else None
        if density:  # V starts as the density alone
            nn.init.zeros_(self.critic.last.weight)
            nn.init.zeros_(self.critic.last.bias)
            self.density_of_step = nn.Embedding(self.steps + 1, features)
            self.density_of_class = nn.Embedding(classes + 1, features) if classes else None
            self.log_precision = nn.Parameter(torch.zeros(self.steps + 1))

    def density_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name.startswith(("density", "log_precision"))]

    def critic_parameters(self) -> list[nn.Parameter]:
        named = self.named_parameters()
        return [p for name, p in named if p.requires_grad and not name.startswith(("density", "log_precision"))]

    def _labels(self, x: Tensor, cond: Cond) -> Tensor:
        assert self.classes is not None
        labels = (cond or {}).get("class_labels")
        return torch.full((len(x),), self.classes, device=x.device) if labels is None else labels.to(x.device)

    def density(self, x: Tensor, i: int | Tensor, cond: Cond = None) -> Tensor:
        """A(x, i) = -log p_i(x) in nats per dimension, up to a constant of its own for each i: (b,)."""
        assert self.density_net is not None
        i = torch.as_tensor(i, device=x.device).expand(len(x))
        condition = self.density_of_step(i)
        if self.density_of_class is not None:
            condition = condition + self.density_of_class(self._labels(x, cond))
        scaled = x.flatten(1) / self.radius[i, None]
        gaussian = self.log_precision[i].exp() * (scaled**2).sum(1) / 2
        return (gaussian + self.density_net(scaled.reshape(x.shape), condition)) / self.dimensions

    def correction(self, x: Tensor, i: int | Tensor, cond: Cond = None) -> Tensor:
        """C(x, i): (b,)."""
        i = torch.as_tensor(i, device=x.device).expand(len(x))
        condition = self.of_step(torch.full_like(i, self.steps) if self.shared else i)
        if self.of_class is not None:
            condition = condition + self.of_class(self._labels(x, cond))
        found = self.critic((x.flatten(1) / self.radius[i, None]).reshape(x.shape), condition)
        last = i == self.steps
        if self.structured is None or not bool(last.any()):
            return found
        return found.masked_scatter(last, (self.gain * self.structured(x[last])).to(found))

    def forward(self, x: Tensor, i: int | Tensor, cond: Cond = None) -> Tensor:
        """x: (b, *d); i: one index, or one per sample (b,). Returns (b,)."""
        correction = self.correction(x, i, cond)
        return correction if self.density_net is None else self.tau * self.density(x, i, cond) + correction

    def energy(self, x: Tensor, cond: Cond = None) -> Tensor:
        """E(x): (b,); -log q(x) = D E(x)/tau + const."""
        return self(x, self.steps, cond)


def make_value(sampler: Sampler, shape: tuple[int, ...], config: FinetuneConfig, structured: nn.Module | None = None) -> Value:
    """The untrained value that a FinetuneConfig describes; its weights depend on torch's global seed."""
    tau = config.tau if config.tau is not None else PUBLISHED_TAU
    classes = sampler.denoiser.classes
    density, shared = config.density_iterations > 0, config.value == "shared"
    if structured is not None:
        require_energy(structured, shape, config, classes)
    reconstruction = config.density == "reconstruction" or (config.density == "auto" and math.prod(shape) > SCALAR_UP_TO)
    return Value(shape, sampler.radius(), tau, density, shared, classes, structured=structured, reconstruction=reconstruction)


def require_energy(energy: nn.Module, shape: tuple[int, ...], config: FinetuneConfig, classes: int | None) -> None:
    """Raises ValueError where a module is no energy of samples of this shape, (b, *shape) to (b,), each sample's its own, or
    cannot be one in this configuration.

    It has weights to learn, and is the same in training and in use.
    """
    if config.value == "shared":
        raise ValueError("an energy of its own is a last slice of its own: it needs --value per_step")
    if classes and not config.density_iterations:
        raise ValueError("an energy that is not told the class cannot be all that a conditional model learns from")
    if not isinstance(energy, nn.Module) or not any(p.requires_grad for p in energy.parameters()):
        raise ValueError(f"an energy is an nn.Module with parameters to learn; got {type(energy).__name__}")
    n = 1 + max(shape)  # no other axis is that long
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0)).to(next(energy.parameters()).device)
    wanted = f"an energy maps samples (b, {', '.join(map(str, shape))}) to (b,)"
    trains = energy.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            in_training, in_use = energy.train()(x), energy.eval()(x)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{wanted}; {type(energy).__name__} failed on {n} of them: {error}") from error
    finally:
        energy.train(trains)
    if not isinstance(in_use, Tensor) or in_use.shape != (n,):
        form = tuple(in_use.shape) if isinstance(in_use, Tensor) else type(in_use).__name__
        raise ValueError(f"{wanted}; {type(energy).__name__} returns {form} for {n} of them")
    if not torch.allclose(in_training, in_use):
        raise ValueError(
            f"{type(energy).__name__} differs between training and use; take batch statistics and dropout out of it"
        )


def density_loss(
    value: Value, sampler: Sampler, x0: Tensor, eps: Tensor, far: Tensor, reach: Tensor, cond: Cond = None
) -> dict[str, Tensor]:
    """What A is learned by, at the levels of all steps at once: {"score_loss": (), "contrast_loss": ()}, to be added.

    score_loss: denoising score matching, the mean square of sigma_i D grad A - eps, per dimension; its least value is that of
    a perfect noise prediction. It does not see how the weights of separate modes compare. contrast_loss, in nats: conditional
    noise-contrastive estimation (Ceylan & Gutmann 2018), softplus(D A(x) - D A(x + s z)) with steps s of all sizes, does.

    x0: data (b, *d); eps, far: standard normal (N+1, b, *d); reach: (b,) in [0, 1], the size of s between the cleanest and
    the noisiest level, in logarithm. The last level is the noise of the sampler's last step, or the path's cleanest where
    that has none: the data itself may have no density.
    """
    levels, n = sampler.levels(), value.steps + 1
    i = torch.arange(n, device=x0.device).repeat_interleave(len(x0))
    alpha, sigma = (level.to(x0)[i].reshape(-1, *[1] * (x0.ndim - 1)) for level in levels)
    eps, every = eps.flatten(0, 1), joined([cond] * n)
    x = (alpha * x0.repeat(n, *[1] * (x0.ndim - 1)) + sigma * eps).requires_grad_(True)
    low, high = (float(end) for end in (levels[1] / levels[0].clamp(min=1e-3)).log()[[-1, 0]])
    s = alpha * torch.exp(low + (high - low) * reach).repeat(n).reshape(alpha.shape)
    with torch.enable_grad():
        here = value.dimensions * value.density(x, i, every)
        (gradient,) = torch.autograd.grad(here.sum(), x, create_graph=True)
        there = value.dimensions * value.density((x + s * far.flatten(0, 1)).detach(), i, every)
        return {
            "score_loss": ((sigma * gradient - eps) ** 2).mean(),
            "contrast_loss": nn.functional.softplus(here - there).mean(),
        }


@torch.no_grad()
def mean_energy(value: Value, x: Tensor, std: float, draws: int = 16) -> Tensor:
    """The mean of E over draws of noise with the standard deviation that the sampler's last step leaves, as the energy has seen
    all it knows: samples x (b, *d) to (b,). The draws are the same for every x. Where the value takes classes, of the class
    whose energy is lowest."""
    g = torch.Generator().manual_seed(0)
    noise = std * torch.randn(draws, *x.shape[1:], generator=g).to(x)
    told: list[Cond] = [None]
    if value.classes:
        told = [{"class_labels": torch.full((len(x),), k, device=x.device)} for k in range(value.classes)]
    of_class = [torch.stack([value.energy(x + each, cond) for each in noise]).mean(0) for cond in told]
    return torch.stack(of_class).amin(0)


@torch.no_grad()
def denoising_error(denoiser: Denoiser, x: Tensor, sigma: float = SIGMA, draws: int = 16) -> Tensor:
    """What a diffusion model alone says: the mean square, per dimension, between samples x (b, *d) and what it makes of them
    noised to sigma/alpha, over draws of noise that are the same for every x: (b,). draws evaluations of each."""
    path, g = denoiser.path, torch.Generator().manual_seed(0)
    t = path.time(torch.atan(torch.tensor(sigma, dtype=torch.float64)))
    noise = float(path.sigma(t)) * torch.randn(draws, *x.shape[1:], generator=g).to(x)
    scaled = float(path.alpha(t)) * x
    return torch.stack([(denoiser(scaled + each, t) - x).square().flatten(1).mean(1) for each in noise]).mean(0)


def joined(parts: list[Cond]) -> Cond:
    """The conditions of several batches, or of one that is repeated, as those of one batch."""
    known = [part for part in parts if part is not None]
    return {k: torch.cat([part[k] for part in known]) for k in known[0]} if known else None
