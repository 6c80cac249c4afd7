"""A reward learned from choices: which of two samples did somebody prefer?

    P(a preferred over b) = sigmoid(u(a) - u(b))                  (Bradley & Terry 1952; a tie counts half for either)

u is the utility, in nats of log-odds, the mean of a few small networks; the reward is r = (u - mean)/sd over all items, so
that a reward's weight means the same whatever was learned: the nats of one standard deviation among the items.

The pairs are dealt into as many folds as there are networks. Network k learns from all but two folds, stops where fold
k + 1 says so, and is judged on fold k, which it has never met: every pair is judged once, by a network that did not see it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from fewstep.config import PreferenceConfig
from fewstep.networks import MLP_UP_TO, scalar_net

FOLDS = 5
EVERY = 5  # steps between two looks at the stopping pairs
LEAST = 4 * FOLDS  # pairs: four to judge each network by
CHOICES = {"a": 1.0, "tie": 0.5, "b": 0.0}  # the share of a pair that goes to a


class Preference(nn.Module):
    """r(x): (b, *shape) -> (b,), mean 0 and variance 1 over the items that it was learned from; `utility` is in log-odds."""

    centre: Tensor
    scale: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, ...], width: int = 64):
        super().__init__()
        self.shape = tuple(shape)
        self.nets = nn.ModuleList(_network(self.shape, width) for _ in range(FOLDS))
        for name, start in (("centre", 0.0), ("scale", 1.0), ("mean", 0.0), ("std", 1.0)):
            self.register_buffer(name, torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        return (self.utility(x) - self.mean) / self.std

    def utility(self, x: Tensor) -> Tensor:
        """u(x), whose differences are log-odds of being preferred: (b,), nats."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"this preference was learned on samples of shape {self.shape}, got {tuple(x.shape[1:])}")
        return torch.stack([self.member(k, x) for k in range(FOLDS)]).mean(0)

    def member(self, k: int, x: Tensor) -> Tensor:
        """The utility by network k alone: (b,)."""
        return self.nets[k]((x - self.centre) / self.scale, x.new_zeros(len(x), 1))


def _network(shape: tuple[int, ...], width: int) -> nn.Module:
    """(b, *shape) -> (b,): an MLP up to 256 numbers, else convolutions, of a quarter of the width after the first halving."""
    if math.prod(shape) <= MLP_UP_TO:
        return scalar_net(shape, 1, width)
    if len(shape) != 3:
        raise ValueError(
            f"a preference over more than {MLP_UP_TO} numbers is for images (c, h, w), got samples of shape {shape}"
        )
    return scalar_net(shape, 1, width // 4)


def learn_preference(
    items: Tensor,
    pairs: Tensor,
    choices: Tensor,
    config: PreferenceConfig = PreferenceConfig(),
    track: Callable[[Iterable, int, str], Iterable] = lambda loop, total, title: loop,
) -> tuple[Preference, dict[str, float]]:
    """The preference, and what is known of it, from choices (m,) between pairs (m, 2) of rows of items (n, *d).

    choices: 1 where the first was preferred, 0 where the second, 0.5 for a tie. Known: pairs and ties (counts), accuracy
    (over pairs without ties), log_loss (nats; ln 2 knows nothing), both by networks that did not see the pair, and
    strength, the standard deviation of the utility over all items (nats). Raises ValueError for what cannot be learned from.
    """
    _require_choices(len(items), pairs, choices)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        preference = Preference(tuple(items.shape[1:]), config.width).to(items.device)
        fold = torch.randperm(len(pairs)) % FOLDS
        preference.centre, preference.scale = items.mean(), items.std().clamp(min=1e-6)
        choices = choices.to(items)
        unseen = torch.empty_like(choices)
        for k in track(range(FOLDS), FOLDS, "preference"):
            judged, stops = fold == k, fold == (k + 1) % FOLDS
            _learn_member(preference, k, items, pairs, choices, ~(judged | stops), stops, config)
            with torch.no_grad():
                unseen[judged] = log_odds(preference, k, items, pairs[judged])
    preference.eval().requires_grad_(False)
    utility = torch.cat([preference.utility(part) for part in items.split(1000)])
    if not float(utility.std()) > 1e-6:
        raise ValueError("nothing was learned: every sample came out as good as any other; are they all the same?")
    preference.mean, preference.std = utility.mean(), utility.std()
    decided = choices != CHOICES["tie"]
    return preference, {
        "pairs": len(pairs),
        "ties": int((~decided).sum()),
        "accuracy": float(((unseen > 0) == (choices > 0.5))[decided].float().mean()),
        "log_loss": float(binary_cross_entropy_with_logits(unseen, choices)),
        "strength": float(preference.std),
    }


def log_odds(preference: Preference, k: int, items: Tensor, pairs: Tensor) -> Tensor:
    """u(a) - u(b) of pairs (m, 2), by network k alone: (m,)."""
    a, b = preference.member(k, items[pairs.flatten()]).reshape(-1, 2).unbind(1)
    return a - b


def _learn_member(
    preference: Preference,
    k: int,
    items: Tensor,
    pairs: Tensor,
    choices: Tensor,
    learned: Tensor,
    stops: Tensor,
    config: PreferenceConfig,
) -> None:
    """Network k from the `learned` pairs; keeps the weights at which the log-loss of the `stops` pairs was lowest."""
    net = preference.nets[k]
    optimiser = torch.optim.Adam(net.parameters(), lr=config.lr)
    rows, batch = learned.nonzero()[:, 0], min(config.batch_size, int(learned.sum()))
    best, reached, kept = math.inf, 0, copy.deepcopy(net.state_dict())
    for step in range(1, config.iterations + 1):
        draw = rows[torch.randperm(len(rows))[:batch]]
        loss = binary_cross_entropy_with_logits(log_odds(preference, k, items, pairs[draw]), choices[draw])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % EVERY == 0:
            with torch.no_grad():
                now = float(binary_cross_entropy_with_logits(log_odds(preference, k, items, pairs[stops]), choices[stops]))
            if now < best:
                best, reached, kept = now, step, copy.deepcopy(net.state_dict())
            elif step - reached >= config.patience:
                break
    net.load_state_dict(kept)


def _require_choices(count: int, pairs: Tensor, choices: Tensor) -> None:
    if pairs.ndim != 2 or pairs.shape[1] != 2 or choices.shape != pairs.shape[:1]:
        raise ValueError(f"give pairs (m, 2) and choices (m,), got {tuple(pairs.shape)} and {tuple(choices.shape)}")
    if len(pairs) < LEAST:
        raise ValueError(f"too few pairs: {len(pairs)}; at least {LEAST} are needed, some hundreds are better")
    if int(pairs.min()) < 0 or int(pairs.max()) >= count:
        raise ValueError(f"pairs name rows 0 to {count - 1}, got {int(pairs.min())} to {int(pairs.max())}")
    if not set(choices.tolist()) <= set(CHOICES.values()):
        raise ValueError("choices are 1 (the first of a pair), 0 (the second) and 0.5 (a tie)")
    for name, share in CHOICES.items():
        if bool((choices == share).all()):
            raise ValueError(f"one-sided: all {len(choices)} choices are {name!r}, so nothing tells the samples apart")
