"""Train a small diffusion model, so that there is one to make fast.

v-prediction on the cosine path (Salimans & Ho 2022): the network sees inputs of unit variance and is asked for a target
of unit variance at every level, for data of about unit variance; equal to EDM's preconditioning with sigma_data = 1. The
model is then shown on the VE path over its range of levels, whose noisy end, unlike the cosine's, still knows the data.

The training levels are log-normal in sigma/alpha, or follow a schedule that is learned meanwhile (Williams et al. 2024,
Algorithm 2): every so often the costs of the running schedule's own steps are estimated with the averaged weights, made
equal, and the schedule moves a share of the way there, little enough to survive the first, untrained scores.

A class-conditional model is told each datum's label, or, for a share of them, "no class": it then learns the score of all
data beside that of each class, which classifier-free guidance (Ho & Salimans 2022) sets against each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fewstep.config import TrainConfig
from fewstep.cost import CORRECTOR_ORDER, corrector_costs
from fewstep.denoiser import Cond, Denoiser, OnPath, Pretrained
from fewstep.networks import make_denoising_net
from fewstep.path import VE, Cosine, Path, broadcast
from fewstep.schedule import Schedule, from_costs, log_linear, step_lengths

Tensors = tuple[Tensor, ...] | list[Tensor]
KNOTS = 101  # of the running schedule: the levels between which costs are estimated


def make_denoiser(shape: tuple[int, ...], config: TrainConfig, classes: int | None = None) -> OnPath:
    """The untrained model that a TrainConfig describes; its weights depend on torch's global seed."""
    net = make_denoising_net(shape, config.network, config.width, config.depth, classes)
    levels = config.sigma_min, config.sigma_max
    return OnPath(Pretrained(net, Cosine(*levels), "v", shape=shape, classes=classes), VE(*levels))


def averaged(module: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a module, with diffusers' warm-up: decay (1 + n)/(10 + n) in the n-th update."""

    def update(average: Tensors, current: Tensors, n: Tensor | int) -> None:
        get_ema_multi_avg_fn(min(decay, (1 + int(n)) / (10 + int(n))))(average, current, n)

    return AveragedModel(module, multi_avg_fn=update)


class TrainState:
    """All that the next iteration needs. `averaged.module` is the denoiser to use, `schedule` the adaptive one, or None.

    classes: the number of classes K of a class-conditional model, whose labels are 0 .. K-1; None for others.
    """

    def __init__(self, shape: tuple[int, ...], config: TrainConfig, device: str = "cpu", classes: int | None = None):
        if config.labels and classes is None:
            raise ValueError("config.labels asks for a class-conditional model: give TrainState its number of classes")
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.denoiser = make_denoiser(shape, config, classes).to(device)
        self.averaged = averaged(self.denoiser, config.ema)
        self.optimiser = torch.optim.Adam(self.denoiser.parameters(), lr=config.lr)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.schedule = first_schedule(config) if config.schedule == "adaptive" else None
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "denoiser": self.denoiser.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "schedule": vars(self.schedule) if self.schedule else None,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.denoiser.load_state_dict(state["denoiser"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.schedule = Schedule(**state["schedule"]) if state["schedule"] else None
        self.step = state["step"]


def velocity_loss(net: Callable[..., Tensor], path: Path, x0: Tensor, ratio: Tensor, eps: Tensor, cond: Cond = None) -> Tensor:
    """|v - net(x, t)|^2 for data and noise (b, *d) at levels sigma/alpha (b,): (b,), mean over dimensions."""
    t = path.time(torch.atan(ratio))
    x = path.noised(x0, eps, t)
    v = broadcast(path.alpha(t), x) * eps - broadcast(path.sigma(t), x) * x0
    return ((net(x, t.to(x), **(cond or {})) - v) ** 2).flatten(1).mean(1)


def first_schedule(config: TrainConfig) -> Schedule:
    """Log-uniform: where adaptive training starts."""
    bend = torch.sinh(4 * torch.linspace(1, 0, KNOTS, dtype=torch.float64))
    u = 1 - bend / bend[0]  # closer together towards the clean end, where a wide step's cost says little of its length
    return Schedule(u, log_linear(config.sigma_min, config.sigma_max).at(u), "log_linear")


def training_levels(state: TrainState) -> Tensor:
    """sigma/alpha of one batch: (b,), log-normal, or one from each b-th of the running schedule."""
    config, g = state.config, state.generator
    if state.schedule is None:
        normal = torch.randn(config.batch_size, generator=g, dtype=torch.float64)
        return torch.exp(config.level_mean + config.level_std * normal)
    within = torch.rand(config.batch_size, generator=g, dtype=torch.float64)
    return torch.tan(state.schedule.at((torch.arange(config.batch_size) + within) / config.batch_size))


def adapt(
    running: Schedule, denoiser: Denoiser, data: Tensor, config: TrainConfig, generator: torch.Generator, cond: Cond = None
) -> tuple[Schedule, dict[str, float]]:
    """One round of Algorithm 2 (Williams et al. 2024): the running schedule, blended with the one that equalises its costs.

    Its knots stay at the same u. Also Lambda, the length of the running schedule, and cost_variation, the standard
    deviation of dLambda/du over its mean: 0 on the optimum. By default a twelfth of the evaluations of the iterations
    in between. cond: one row per datum.
    """
    draws = max(4, config.batch_size // 8)
    times = denoiser.path.time(running.theta)
    costs = corrector_costs(denoiser, data, times, draws, config.batch_size, cond, generator).mean(1)
    lengths = step_lengths(costs, CORRECTOR_ORDER)
    blended = running.blend(from_costs(running.theta, costs, CORRECTOR_ORDER), config.schedule_blend)
    share, part = lengths / lengths.sum(), running.u.diff()
    metrics = {"Lambda": float(lengths.sum()), "cost_variation": float(((share - part) ** 2 / part).sum().sqrt())}
    about = {"cost": "corrector", "order": CORRECTOR_ORDER, "coordinates": "VE", "learned_on": repr(denoiser.path)}
    about |= {"every": config.schedule_every, "blend": config.schedule_blend, "draws": draws}
    return Schedule(running.u, blended.at(running.u), "learned while training", provenance=about | metrics), metrics


def dropped(labels: Tensor, none: int, share: float, generator: torch.Generator) -> Tensor:
    """Labels (b,), a share of them replaced by `none`."""
    lost = torch.rand(len(labels), generator=generator) < share
    return torch.where(lost.to(labels.device), none, labels)


def require_labels(state: TrainState, data: Tensor, labels: Tensor | None) -> None:
    classes = state.denoiser.classes
    if classes is None and labels is not None:
        raise ValueError("labels were given to a model without classes: make it with TrainState(.., classes=K)")
    if classes is not None and labels is None:
        raise ValueError(f"the model has {classes} classes: give train the labels of the data as well")
    if classes is None or labels is None:
        return
    if labels.shape != data.shape[:1]:
        raise ValueError(f"labels of shape {tuple(labels.shape)} for {len(data)} samples; give one number per sample")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"labels must lie in 0 .. {classes - 1}, got {int(labels.min())} .. {int(labels.max())}")


def train(state: TrainState, data: Tensor, labels: Tensor | None = None) -> Iterator[dict[str, float]]:
    """Run from state.step to the configured number of iterations over data (n, *d); yields {"loss": ..} after each.

    labels: (n,), int64, of a state with classes. loss: mean square error of v, per dimension. Raises ValueError when it is
    not finite, or where labels do not fit. Every config.schedule_every iterations, adaptive training also yields the
    metrics of `adapt`.
    """
    require_labels(state, data, labels)
    config, g = state.config, state.generator
    model = cast(Pretrained, state.denoiser.denoiser)
    every = None if labels is None else {"class_labels": labels}
    while state.step < config.iterations:
        lr = config.lr * (1 + math.cos(math.pi * state.step / config.iterations)) / 2
        state.optimiser.param_groups[0]["lr"] = lr
        rows = torch.randint(len(data), (config.batch_size,), generator=g).to(data.device)
        x0 = data[rows]
        ratio = training_levels(state)
        eps = torch.randn(x0.shape, generator=g).to(x0)
        cond = None
        if labels is not None:
            cond = {"class_labels": dropped(labels[rows], cast(int, model.classes), config.label_dropout, g)}
        loss = velocity_loss(model.net, model.path, x0, ratio, eps, cond).mean()
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"the loss is not finite at iteration {state.step}: lower --lr, or the data's scale, and give another --out"
            )
        state.optimiser.zero_grad()
        loss.backward()
        state.optimiser.step()
        state.averaged.update_parameters(state.denoiser)
        state.step += 1
        metrics = {"loss": float(loss.detach())}
        if state.schedule is not None and state.step % config.schedule_every == 0:
            denoiser = cast(Denoiser, state.averaged.module)
            state.schedule, more = adapt(state.schedule, denoiser, data, config, g, every)
            metrics |= more
        yield metrics
