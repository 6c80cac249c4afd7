"""Learn what each step does: a few-step sampler and an energy, jointly, by maximum-entropy inverse reinforcement learning.

    min over E, max over pi    E_data[E(x)] - E_pi[E(x_N)] + tau H(pi)                     (DxMI, Yoon et al. 2024)

solved by dynamic programming (DxDP) along the sampler's own rollouts x_0 .. x_N, noise to data: no teacher, no
back-propagation through the chain, no MCMC. V(x, i) = tau A(x, i) + C(x, i), the last slice being the energy (energy.py).

First A, from the data alone (`density_loss`). Then, per iteration, on fresh data and one transition of each of a batch of
rollouts, another in each of N iterations (of N/n with n `critic_steps`); then the batch is rolled out anew:

    energy   mean C(data, N) - mean C(x_N, N) + gamma (mean C(data, N)^2 + mean C(x_N, N)^2)
    value    ( stopgrad[ V(x_{i+1}, i+1) + c_i ] - V(x_i, i) )^2        i another one of each rollout, all i in a batch
    sampler  V(x'_{i+1}, i+1) + c_i,  x'_{i+1} redrawn from the policy, gradient through one transition only
    c_i    = tau ( -log std_i + |x_i - k_i x_{i+1}|^2 / (2 s_i^2) )     running cost, mean per dimension

The paper has no A. Its energy, held to 0 by gamma, has the optimum (pi - p)/(2 gamma (pi + p)), which is 0 where pi = p:
then nothing but entropy is left to follow, and the sampler spreads too far. Here gamma holds E to tau A instead, so that
p = pi = q is a fixed point: C = 0, E = tau A, and exp(-A) is the density (docs/guide.md). A costs `density_iterations`;
with none, all is the paper's. The sampler's rate is what moves its policy by `trust` nats an iteration (`keep_pace`), and
it follows the pretrained model's score in the place of A's unless told otherwise (`next_value`).

c_i bounds the entropy by the data-processing inequality, against a backward chain N(k_i x_{i+1}, s_i^2). The paper takes
k_i = 1. Ours is the path's own noising kernel, k_i = alpha_t/alpha_s, which is the same on a VE path but does not charge for
the rescaling of the others. With A, s_i^2 stays that kernel's variance, for which the cost to go is A, if rollouts start where
the noising ends. They start at the data's Gaussian (start.py); where that is far off (`SHOWN`), they have farther to go than
the noising went, and s_i^2 follows their running mean square (the paper's adaptive velocity regularisation), or going there
would cost too much. A step without noise has no running cost.

The last step's noise is fixed, so the sampler cannot reach the data itself, only the data with that noise added: that is
what it is held to, or the energy would learn to see the noise. `Sampler.sample` leaves the noise of the last step out.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.config import FinetuneConfig
from fewstep.denoiser import Cond, Denoiser
from fewstep.energy import Value, density_loss, joined, make_value
from fewstep.goal import Goal, condition, goals_gaussian
from fewstep.path import broadcast
from fewstep.processes import ALONE, Processes
from fewstep.sampler import Sampler, Transition, posterior_std, start_where_data_are
from fewstep.training import averaged

SPREAD = 0.025  # of tau D A over the data, in units of C, which gamma = 1 confines to +-1/2
LOOK_EVERY = 50  # iterations; runs are saved, looked at and taken back at multiples, where no rollout is left over
FIRST_PACE, PACE_EVERY = 0.1, 10  # the trust region's first share of the rate; iterations between two looks
AVERAGE_EVERY = 10  # iterations: an average over a thousand does not miss the ones between
SHOWN = 4.0  # variance of the data over the noise's, at the start, from which on the running cost follows the rollouts' moves
VELOCITY_DECAY = 0.99
FEW = 1000  # data that a statistic is taken over, and samples to hold against held-out data


class Rollouts(NamedTuple):
    """states (N+1, b, *d); what the sampler was told; the states' density A (N+1, b), which does not learn any more, if any."""

    states: Tensor
    cond: Cond
    density: Tensor | None


class FinetuneState:
    """All that the next iteration needs. `averaged.module` is the sampler to use, `averaged_value.module` its energy.

    step counts the density's iterations first, then the sampler's. rate: share of the learning rates that is left after
    roll-backs, of which rolled_back led to the last good state and fallen to the best one; pace: share of the sampler's rate
    that the trust region leaves. best: what is `kept` of the state with the least `held_out_sw`, where data are held out, and
    its measures. model: a copy of the pretrained denoiser where its score is followed, else None; alpha, sigma and model_times
    (N+1,): the levels of the states before each step, and its time for them; knows_last: whether it is any good at the last one
    (`model_denoises`). rollouts: what transitions are taken from; not saved.
    """

    rollouts: Rollouts | None

    def __init__(self, sampler: Sampler, value: Value, config: FinetuneConfig, model: Denoiser | None = None):
        if value.steps != sampler.steps:
            raise ValueError(f"the value is made for {value.steps} steps, the sampler takes {sampler.steps}")
        if not any(p.requires_grad for p in sampler.denoiser.parameters()):
            raise ValueError(
                "the sampler's denoiser has no parameters to train; hand its network over as an nn.Module, not as a function "
                "around one"
            )
        follows = config.score == "model" and value.density_net is not None
        if follows and model is None:
            raise ValueError('score "model" needs the pretrained model: use make_state, give model=, or set score="density"')
        self.config, self.sampler, self.value = config, sampler, value
        self.model = copy.deepcopy(model).eval().requires_grad_(False) if model is not None and follows else None
        self.start_averages()
        betas = (config.momentum, 0.999)
        self.sampler_optimiser = torch.optim.Adam(
            [{"params": list(sampler.denoiser.parameters())}, {"params": [sampler.log_std]}],
            lr=config.lr,
            betas=betas,
            fused=True,
        )
        self.value_optimiser = torch.optim.Adam(value.critic_parameters(), lr=config.lr_value, betas=betas, fused=True)
        self.density_optimiser = torch.optim.Adam([{"params": value.density_parameters()}], lr=config.lr_density, fused=True)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step, self.rate, self.pace = 0, 1.0, FIRST_PACE
        self.rolled_back = self.fallen = 0
        self.best: dict[str, Any] = {}
        self.rollouts = None
        self.first_std = sampler.std().detach()[:-1].clone()
        self.first_spread = 0.0  # of the first samples, in the data's standard deviations; a start may be far off

        path, t, s = sampler.path, sampler.times[:-1].cpu(), sampler.times[1:].cpu()
        back = path.alpha(t) / path.alpha(s)
        self.back_scale = back.to(sampler.log_std)
        self.back_variance = (path.sigma(t) ** 2 - (back * path.sigma(s)) ** 2).to(sampler.log_std)
        self.noisy = (sampler.std() > 0).detach()
        self.alpha, self.sigma = sampler.levels()
        self.model_times = path.time(torch.atan2(self.sigma, self.alpha))
        self.knows_last = False

    def start_averages(self) -> None:
        decay = self.config.ema**AVERAGE_EVERY
        self.averaged, self.averaged_value = averaged(self.sampler, decay), averaged(self.value, decay)

    def average(self) -> None:
        """Take the iteration that ends into the averages, if it is one in AVERAGE_EVERY, or the last one of its kind."""
        ends = self.step + 1
        if ends % AVERAGE_EVERY and ends not in (self.config.density_iterations, self.total):
            return
        if ends > self.config.density_iterations:
            self.averaged.update_parameters(self.sampler)
        self.averaged_value.update_parameters(self.value)

    @property
    def total(self) -> int:
        return self.config.density_iterations + self.config.iterations

    @property
    def left(self) -> float:
        """The share of the learning rates that roll-backs and the fall over the second half leave, after the density."""
        done = (self.step - self.config.density_iterations) / self.config.iterations
        return self.rate * min(1.0, 2 * (1 - done))

    @property
    def velocity_decay(self) -> float:
        """The config's, or 1, but where rollouts start so low that the data's Gaussian is far from where the noising ends."""
        if self.config.velocity_decay is not None:
            return self.config.velocity_decay
        return VELOCITY_DECAY if self.sampler.shown() > SHOWN else 1.0

    @property
    def _parts(self) -> dict[str, Any]:
        return {
            "sampler": self.sampler,
            "value": self.value,
            "averaged": self.averaged,
            "averaged_value": self.averaged_value,
            "sampler_optimiser": self.sampler_optimiser,
            "value_optimiser": self.value_optimiser,
            "density_optimiser": self.density_optimiser,
        }

    def learned(self) -> dict[str, Any]:
        """What a roll-back restores."""
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        return parts | {"back_variance": self.back_variance, "pace": self.pace}

    def restore(self, learned: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            part.load_state_dict(learned[name])
        self.back_variance = learned["back_variance"].to(self.back_variance).clone()
        self.pace, self.rollouts = learned["pace"], None

    def kept(self) -> dict[str, Any]:
        """What `best` holds: the averaged sampler and value, and what goes with them."""
        averages = {"sampler": self.averaged.module.state_dict(), "value": self.averaged_value.module.state_dict()}
        return averages | {"back_variance": self.back_variance}

    def restore_best(self) -> None:
        """Go on from the averaged sampler and value in `best`, with optimisers that have forgotten how they left it, and so at
        the first pace again."""
        for name, each in (("sampler", self.averaged), ("value", self.averaged_value)):
            for part in (self._parts[name], each.module):
                part.load_state_dict(self.best[name])
        self.back_variance = self.best.get("back_variance", self.back_variance).to(self.back_variance).clone()
        for optimiser in (self.sampler_optimiser, self.value_optimiser):
            optimiser.state.clear()
        self.pace, self.rollouts = min(self.pace, FIRST_PACE), None

    def state_dict(self) -> dict[str, Any]:
        own = {"generator": self.generator.get_state(), "step": self.step, "rate": self.rate}
        own |= {"rolled_back": self.rolled_back, "fallen": self.fallen, "best": self.best, "knows_last": self.knows_last}
        return self.learned() | own | {"first_std": self.first_std, "first_spread": self.first_spread}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restore(state)
        self.generator.set_state(state["generator"])
        self.step, self.rate = state["step"], state["rate"]
        self.rolled_back, self.fallen = state["rolled_back"], state.get("fallen", 0)
        self.best, self.first_std = state["best"], state["first_std"].to(self.first_std)
        self.first_spread, self.knows_last = state["first_spread"], state.get("knows_last", False)


def make_state(
    denoiser: Denoiser, times: Tensor, config: FinetuneConfig, shape: tuple[int, ...], energy: nn.Module | None = None
) -> FinetuneState:
    """A fresh state: a sampler on `times` from a trainable copy of the denoiser, and a new value for samples of this shape.

    energy: a module from samples (b, *shape) to (b,) whose structure the energy is to have (`Value`).
    """
    own = copy.deepcopy(denoiser).requires_grad_(True)
    if config.compile:
        own.compile()
    sampler = Sampler(own, times, config.last_std)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        value = make_value(sampler, shape, config, copy.deepcopy(energy))
    device = next(own.parameters(), torch.empty(0)).device
    return FinetuneState(sampler.to(device), value.to(device), config, denoiser)


# --- the costs ----------------------------------------------------------------------------------------------------


def squared_velocity(state: FinetuneState, i: Tensor, x: Tensor, x_next: Tensor) -> Tensor:
    """|x_i - k_i x_{i+1}|^2 of transitions x -> x_next (b, *d) in steps i (b,): (b,), mean per dimension."""
    return ((x - broadcast(state.back_scale[i], x) * x_next) ** 2).flatten(1).mean(1)


def running_cost(state: FinetuneState, i: Tensor, x: Tensor, x_next: Tensor, std: Tensor) -> Tensor:
    """c_i of transitions x -> x_next (b, *d) in steps i (b,) with noise std (b,): (b,), nats, mean per dimension, times tau.

    std is the geometric mean over dimensions, whose logarithm is the entropy whatever each dimension's share of the noise.
    """
    entropy = -torch.where(state.noisy[i], std, 1.0).log()
    velocity = squared_velocity(state, i, x, x_next) / (2 * state.back_variance[i])
    return state.value.tau * state.noisy[i] * (entropy + velocity)


def time_cost(kind: str, steps: int) -> Tensor:
    """R(i) of the paper's image experiments, (N,): what a shared value, which cannot see i, is told that step i costs.

    sigmoid: S(N/2 - i) - S(N/2 - i - 1), S logistic; linear: 0.05.
    """
    i = torch.arange(steps, dtype=torch.float32)
    if kind == "sigmoid":
        return torch.sigmoid(steps / 2 - i) - torch.sigmoid(steps / 2 - i - 1)
    return torch.full((steps,), 0.05 if kind == "linear" else 0.0)


def reward_cost(state: FinetuneState, goal: Goal, x: Tensor) -> Tensor:
    """What a goal's reward adds to the energy of finished samples x (b, *d): (b,)."""
    assert goal.reward is not None
    return -state.value.tau * goal.weight / state.value.dimensions * goal.reward(x).to(x)


# --- one step of each ---------------------------------------------------------------------------------------------


def value_step(
    state: FinetuneState,
    goal: Goal,
    batches: list[tuple[Tensor, Cond]],
    rollouts: Rollouts,
    i: Tensor,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """A step of energy and value together on each batch of data (b, *d) and on the rollouts, which stay the same.

    i: (b,), the step of each rollout whose transition the value learns from. Returns the metrics of the first batch, and the
    largest norm of the gradient, or one that is not finite.
    """
    value, steps, (states, cond, density) = state.value, state.sampler.steps, rollouts
    row = torch.arange(len(i), device=i.device)
    x, x_next, ends, finished = states[i, row], states[i + 1, row], states[-1], i == steps - 1
    with torch.no_grad():
        costs = running_cost(state, i, x, x_next, state.sampler.std()[i])
        if value.shared:
            costs = time_cost(state.config.time_cost, steps).to(x)[i]
        if density is not None:
            costs = costs + value.tau * (density[i + 1, row] - density[i, row])
        if goal.reward is not None:
            costs[finished] += reward_cost(state, goal, x_next[finished])
    found, norms = dict[str, Tensor](), list[float]()
    for data, data_cond in batches:
        with torch.no_grad():
            target = value.correction(x_next, i + 1, cond) + costs
        if not value.shared:  # only differences within a step matter, and the constants of A are arbitrary
            target = target - mean_of_step(target, i, steps, processes)[i]
        j = torch.cat([i, i.new_full((len(i) + len(data),), steps)])
        every = value.correction(torch.cat([x, ends, data]), j, joined([cond, cond, data_cond]))
        of_now, of_generated, of_data = every.split([len(x), len(ends), len(data)])
        gap = of_data.mean() - of_generated.mean()
        energy_loss = gap + state.config.gamma * ((of_data**2).mean() + (of_generated**2).mean())
        value_loss = ((target - of_now) ** 2).mean()
        # the paper takes one gradient step per level: a mean over the levels would slow each of them down N times
        norms.append(take_step(state.value_optimiser, energy_loss + steps * value_loss, processes))
        if not found:
            found = {"energy_data": of_data.mean(), "energy_generated": of_generated.mean(), "energy_gap": gap}
            found["value_loss"] = value_loss
    worst = next((norm for norm in norms if not norm < math.inf), max(norms))
    return processes.mean({k: float(v.detach()) for k, v in found.items()}) | {"value_gradient_norm": worst}


def mean_of_step(values: Tensor, i: Tensor, steps: int, processes: Processes) -> Tensor:
    """The mean of the values (m,) of each step i (m,), over all processes: (N,), 0 where there is none."""
    of_step = torch.nn.functional.one_hot(i, steps).to(values)
    total, count = processes.average(torch.stack([values @ of_step, of_step.sum(0)]))
    return total / count.clamp(min=1 / processes.count)


def chosen(cond: Cond, rows: Tensor | slice) -> Cond:
    """These rows of each argument of a condition."""
    return None if cond is None else {name: each[rows] for name, each in cond.items()}


def next_value(state: FinetuneState, x: Tensor, i: Tensor, cond: Cond = None) -> Tensor:
    """V(x, i) of states x (b, *d) before steps i (b,), i >= 1, or what has its slope: (b,).

    With config.score "model" the slope has the pretrained model's score in the place of -D grad A: of what the density has
    learned in a short while the values will do, but the slopes are worse than the model's. A is then left out, but in a last
    slice that the model does not know.
    """
    if state.model is None:
        return state.value(x, i, cond)
    rest = i[:0] if state.knows_last else (i == state.value.steps).nonzero()[:, 0]
    if len(rest) == len(x):
        return state.value(x, i, cond)
    ask = i < state.value.steps if len(rest) else slice(None)
    slices = i[ask].cpu()
    alpha, sigma, t = (each[slices] for each in (state.alpha, state.sigma, state.model_times))
    with torch.no_grad():  # in full precision: a score divides by sigma
        at, slope = x[ask], torch.zeros_like(x)
        on_path = broadcast(state.model.path.alpha(t) / alpha, at) * at  # the last states are data and noise, unscaled
        x0 = state.model(on_path, t, chosen(cond, ask))
        slope[ask] = (at - broadcast(alpha, at) * x0) / broadcast(sigma, at) ** 2 / state.value.dimensions
    inner = ((x - x.detach()) * slope).flatten(1).sum(1)  # 0, but for its gradient
    if len(rest):
        inner = inner.index_add(0, rest, state.value.density(x[rest], i[rest], chosen(cond, rest)))
    return state.value.tau * inner + state.value.correction(x, i, cond)


def sampler_step(
    state: FinetuneState,
    goal: Goal,
    i: Tensor,
    x: Tensor,
    law: Transition,
    noise: Tensor,
    cond: Cond = None,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """One step of the sampler on transitions from x (b, *d) in steps i (b,), whose laws are these, with noise like x: expected
    value plus cost."""
    before = None
    if state.step % PACE_EVERY == 0:  # in full precision: an iteration moves the steps by less than bfloat16 resolves
        with torch.no_grad():
            before = state.sampler.step(x, i, cond) if state.config.bf16 else law
    x_next = law.at(noise)
    to_go = next_value(state, x_next, i + 1, cond).mean()
    if goal.reward is not None:
        to_go = to_go + reward_cost(state, goal, x_next[i == state.sampler.steps - 1]).sum() / len(x)
    cost = running_cost(state, i, x, x_next, law.std).mean()
    norm = take_step(state.sampler_optimiser, state.sampler.steps * (to_go + cost), processes, state.config.clip)
    found = processes.mean({"value_next": float(to_go.detach()), "running_cost": float(cost.detach())})
    if before is not None:
        keep_pace(state, processes.mean({"kl": divergence(state, before, x, i, cond)})["kl"])
    return found | {"gradient_norm": norm, "pace": state.pace}


@torch.no_grad()
def divergence(state: FinetuneState, before: Transition, x: Tensor, i: Tensor, cond: Cond) -> float:
    """KL of the policy now from what it was before, by their means: nats, summed over dimensions, mean over transitions.

    Those that have noise, that is; where none has (one step, last_std 0), as if they had a noise of .1.
    """
    noisy = state.noisy[i]
    std = torch.where(broadcast(noisy, x).bool(), before.deviation(), 0.1)
    nats = (((state.sampler.step(x, i, cond).mean - before.mean) / std) ** 2 / 2).flatten(1).sum(1)
    return float(nats[noisy].mean() if bool(noisy.any()) else nats.mean())


def keep_pace(state: FinetuneState, found: float) -> None:
    """Set the sampler's rate to where an iteration moves its policy by config.trust, or to the full rate below that.

    trust falls with the rates. Nothing is learned from an iteration that failed.
    """
    if 0 < found < math.inf:
        state.pace = min(1.0, state.pace * math.sqrt(state.config.trust * state.left**2 / found))


def take_step(optimiser: torch.optim.Optimizer, loss: Tensor, processes: Processes, clip: float = float("inf")) -> float:
    """A gradient step, if the gradient is finite. Returns the norm of the first group's gradient, before clipping to `clip`, or
    whichever norm is not finite."""
    groups = [[p for p in group["params"] if p.requires_grad] for group in optimiser.param_groups]
    learn = [p for group in groups for p in group]
    for p in learn:
        p.grad = None  # as zero_grad, which takes a fortieth of a small network's iteration
    loss.backward(inputs=learn)  # nothing else that the loss goes through
    processes.average_gradients(optimiser)
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    wild = [float(norm) for norm in norms if not norm < math.inf]
    if wild:
        return wild[0]
    if clip < math.inf:
        nn.utils.clip_grads_with_norm_(groups[0], clip, norms[0])
    optimiser.step()
    return float(norms[0])


def density_step(state: FinetuneState, goal: Goal, processes: Processes) -> dict[str, float]:
    """One step of the density, with noise on data and on points afar for each level; its rate falls to 0 along a cosine."""
    b, levels = state.config.batch_size, state.sampler.steps + 1
    rows = goal.rows(b, state.generator)
    noise = torch.randn(2 * levels, b, *goal.data.shape[1:], generator=state.generator)
    rows, noise = processes.share(rows), processes.share(noise, 1).to(goal.data)
    data, cond = goal.data[rows.to(goal.data.device)], condition(goal, rows)
    reach = processes.share(torch.linspace(0, 1, b)).to(data)
    done = state.step / state.config.density_iterations
    group = state.density_optimiser.param_groups[0]
    group["lr"] = state.rate * state.config.lr_density * (1 + math.cos(math.pi * done)) / 2
    eps, far = noise.chunk(2)
    losses = density_loss(state.value, state.sampler, data, eps, far, reach, cond)
    norm = take_step(state.density_optimiser, sum(losses.values(), torch.zeros(())), processes)
    state.average()
    return processes.mean({k: float(v.detach()) for k, v in losses.items()}) | {"density_gradient_norm": norm}


@torch.no_grad()
def start_sampler(state: FinetuneState, goal: Goal) -> None:
    """When the density is known: where rollouts start, the noise of each step, and tau from the density's spread."""
    config, sampler = state.config, state.sampler
    start_where_data_are(sampler, goals_gaussian(goal, config.seed))
    rows = goal.rows(FEW, state.generator)
    noise = torch.randn(2, len(rows), *goal.data.shape[1:], generator=state.generator)
    data, cond = goal.data[rows.to(goal.data.device)], condition(goal, rows)
    sampler.set_noise(posterior_std(sampler, data, noise[0].to(data), cond))
    state.first_std = sampler.std()[:-1].clone()
    state.value.load_state_dict(state.averaged_value.module.state_dict())
    if config.tau is None:
        smoothed = data + float(sampler.last_std) * noise[1].to(data)
        nats = state.value.dimensions * state.value.density(smoothed, sampler.steps, cond)
        state.value.tau.fill_(SPREAD * state.value.dimensions / float(nats.std()))
    state.knows_last = model_denoises(state, data, noise[1].to(data), cond)
    state.start_averages()


def model_denoises(state: FinetuneState, data: Tensor, noise: Tensor, cond: Cond) -> bool:
    """Whether the pretrained model takes off some of the noise (b, *d) that the last step leaves on the data (b, *d).

    A schedule may end at noisier levels than the model has learned, and the model's cleanest may be noisier than that noise.
    """
    r, t = float(state.sampler.last_std), state.model_times[-1]
    if state.model is None or not r:
        return False
    x0 = state.model(broadcast(state.model.path.alpha(t), data) * (data + r * noise), t, cond)
    return float((x0 - data).square().mean()) < r**2


@torch.no_grad()
def roll_out(sampler: Sampler, start: Tensor, noise: Tensor, cond: Cond) -> Tensor:
    """All states from start (b, *d) by noise (N, b, *d): (N+1, b, *d)."""
    states = [start]
    for i in range(sampler.steps):
        states.append(sampler.step(states[-1], i, cond).at(noise[i]))
    return torch.stack(states)


@torch.no_grad()
def with_density(value: Value, states: Tensor, cond: Cond) -> Rollouts:
    """Rollouts of states (N+1, b, *d), with the density of each if the value has one."""
    if value.density_net is None:
        return Rollouts(states, cond, None)
    levels, b = states.shape[:2]
    i = torch.arange(levels, device=states.device).repeat_interleave(b)
    density = value.density(states.flatten(0, 1), i, joined([cond] * levels))
    return Rollouts(states, cond, density.reshape(levels, b))


def iterate(state: FinetuneState, goal: Goal, processes: Processes = ALONE) -> dict[str, float]:
    """One iteration: of the density, or rollout, value and energy, sampler, averages. Each process takes its share."""
    config, sampler, steps = state.config, state.sampler, state.sampler.steps
    done, b, n = state.step - config.density_iterations, config.batch_size, config.critic_steps
    if done < 0:
        return density_step(state, goal, processes)
    served = max(1, steps // n)  # iterations, so that N steps of the critic see a rollout, however many there are in each
    fresh = state.rollouts is None or done % served == 0 or state.step % LOOK_EVERY == 0
    rows = goal.rows(n * b, state.generator).reshape(n, -1)
    # of an iteration the redrawn states and the data's, of a rollout its start and steps
    noise = torch.randn(1 + n + fresh * (1 + steps), b, *goal.data.shape[1:], generator=state.generator)
    rows, noise = processes.share(rows, 1), processes.share(noise, 1).to(goal.data)
    data, conds = goal.data[rows.to(goal.data.device)], [condition(goal, part) for part in rows]

    groups = state.sampler_optimiser.param_groups + state.value_optimiser.param_groups
    for group, lr in zip(groups, (state.pace * config.lr, config.lr_std, config.lr_value), strict=True):
        group["lr"] = lr * state.left
    again, last, of_rollouts = noise[0], noise[1 : 1 + n], noise[1 + n :]
    in_half = torch.autocast(data.device.type, torch.bfloat16, enabled=config.bf16)
    if fresh:
        with in_half:
            found = roll_out(sampler, sampler.start_from(of_rollouts[0]), of_rollouts[1:], conds[0])
        state.rollouts = with_density(state.value, found, conds[0])
        if state.velocity_decay < 1:  # as much as its iterations would
            i = torch.arange(steps, device=data.device).repeat_interleave(found.shape[1])
            squared = squared_velocity(state, i, found[:-1].flatten(0, 1), found[1:].flatten(0, 1)).reshape(steps, -1)
            state.back_variance.lerp_(processes.average(squared.mean(1)), 1 - state.velocity_decay**served)
    assert state.rollouts is not None
    states, cond, _ = state.rollouts

    smoothed = data + float(sampler.last_std) * last
    i = processes.share((torch.arange(b) * steps // b + done) % steps).to(data.device)  # as many of each step
    metrics = value_step(state, goal, list(zip(smoothed, conds, strict=True)), state.rollouts, i, processes)
    x = states[i, torch.arange(len(i), device=data.device)]
    with in_half:
        law = sampler.step(x, i, cond)
    metrics |= sampler_step(state, goal, i, x, law, again, cond, processes)
    state.average()
    metrics |= processes.mean({"sample_std": float(states[-1].std())})
    return metrics | {f"step_noise_{k}": float(std) for k, std in enumerate(sampler.std().detach())}
