"""What does an iteration of fine-tuning take, beside one of the published loop with the same networks?

    python benchmarks/iterations.py                                     8 Gaussians and an untrained network of the digits' size
    python benchmarks/iterations.py --mnist                             and the third-party network of examples/mnist_slim.py

One process, one thread, one batch size: blocks of iterations of each loop in turn, five rounds; CPU milliseconds, the median
over rounds, and the published loop's over ours, the median of the rounds' ratios with their range. published: published.py's
iteration, driven with our sampler's and value's networks; the time is all that counts here, not what is learned. A block is
a number of rollouts of ours, each of which serves N iterations; its value's networks, one for the density and one for the
correction, are evaluated as always.
Writes benchmarks/iterations.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import published
from fewstep.config import FinetuneConfig, TrainConfig
from fewstep.denoiser import Denoiser
from fewstep.dxmi import iterate, make_state, start_sampler
from fewstep.energy import Value
from fewstep.goal import make_goal
from fewstep.models import load_denoiser
from fewstep.run import write_json
from fewstep.sampler import Sampler
from fewstep.schedule import karras
from fewstep.training import make_denoiser

HERE = Path(__file__).parent
ROUNDS = 5


class Chain(published.Chain):
    """The published loop's view of a sampler of ours; samples are flat, (b, D)."""

    def __init__(self, sampler: Sampler, shape: tuple[int, ...]):
        torch.nn.Module.__init__(self)
        self.sampler, self.shape, self.net, self.log_std = sampler, shape, sampler.denoiser, sampler.log_std

    @property
    def steps(self) -> int:
        return self.sampler.steps

    def log_stds(self) -> Tensor:
        return self.sampler.std().log()

    def mean(self, x: Tensor, i: int | Tensor) -> Tensor:
        return self.sampler.step(x.reshape(-1, *self.shape), i).mean.flatten(1)

    def start(self, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return self.sampler.start(n, self.shape, generator).flatten(1)


class TimeValue(published.TimeValue):
    """The same of our value, which without a density is the paper's."""

    def __init__(self, value: Value, shape: tuple[int, ...]):
        torch.nn.Module.__init__(self)
        self.value, self.shape = value, shape

    def forward(self, x: Tensor, i: int | Tensor) -> Tensor:
        return self.value(x.reshape(-1, *self.shape), i)

    def energy(self, x: Tensor) -> Tensor:
        return self(x, self.value.steps)


def loops(denoiser: Denoiser, shape: tuple[int, ...], steps: int, batch_size: int) -> dict[str, Callable[[], object]]:
    """One iteration of each, to be called again and again."""
    data = 0.5 * torch.randn(1000, *shape, generator=torch.Generator().manual_seed(0))
    goal = make_goal(data)
    times = karras(max(denoiser.path.sigma_min, 0.05), denoiser.path.sigma_max).times(denoiser.path, steps)

    config = FinetuneConfig(density_iterations=1, batch_size=batch_size, velocity_decay=0.99)
    state = make_state(denoiser, times, config, shape)
    iterate(state, goal)
    state.step = 1
    start_sampler(state, goal)
    state.knows_last = True  # the dearer case: the pretrained model is asked at every step

    def ours() -> None:
        iterate(state, goal)
        state.step += 1

    settings = published.Settings(batch_size=batch_size)
    bare = make_state(denoiser, times, FinetuneConfig(density_iterations=0), shape)
    run = published.Run(Chain(bare.sampler, shape), TimeValue(bare.value, shape), settings)
    flat = data.flatten(1)[:batch_size]
    return {"published": lambda: published.iterate(run, flat), "fewstep": ours}


def measure(made: dict[str, Callable[[], object]], block: int) -> dict:
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for one in made.values():
        one()
    for _ in range(ROUNDS):
        for name, one in made.items():
            start = time.process_time()
            for _ in range(block):
                one()
            seconds[name].append((time.process_time() - start) / block)
    found: dict = {"ms": {name: round(1e3 * statistics.median(each), 1) for name, each in seconds.items()}}
    ratios = [a / b for a, b in zip(seconds["published"], seconds["fewstep"], strict=True)]
    return found | {"ratio": [round(x, 2) for x in (statistics.median(ratios), min(ratios), max(ratios))]}


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", action="store_true", help="with examples/mnist_slim.py, whose weights lie where it says")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    mlp = TrainConfig(network="mlp", width=128, depth=2, sigma_min=0.15, sigma_max=10.0)
    digits = TrainConfig(sigma_min=0.2, sigma_max=10.0)
    models: dict[str, tuple[Denoiser, tuple[int, ...], int, int]] = {
        "8 Gaussians": (make_denoiser((2,), mlp), (2,), 128, 40),
        "digits 8 x 8": (make_denoiser((1, 8, 8), digits), (1, 8, 8), 128, 20),
    }
    if args.mnist:
        slim = load_denoiser(f"{HERE.parent / 'examples' / 'mnist_slim.py'}:denoiser")
        models["MNIST DDPM 32 x 32"] = (slim, (1, 32, 32), 32, 20)
    rows = []
    for name, (denoiser, shape, batch_size, block) in models.items():
        for steps in (4, 5, 10) if math.prod(shape) == 2 else (4, 10):
            rows.append({"model": name, "steps": steps, "batch_size": batch_size})
            rows[-1] |= measure(loops(denoiser, shape, steps, batch_size), block)
            print(json.dumps(rows[-1]), flush=True)
    about = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "rounds": ROUNDS}
    write_json(args.out, about | {"rows": rows})


if __name__ == "__main__":
    main()
