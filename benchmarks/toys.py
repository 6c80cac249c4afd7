"""Two moons, a pinwheel and a checkerboard, with the settings of the 8 Gaussians: five evaluations, and a density.

    python benchmarks/toys.py            three seeds; writes benchmarks/toys.json and docs/pictures/toys.png
    python benchmarks/toys.py --quick    in miniature, into --out's folder; says nothing but that it runs

Each set has mean 0 and a mean square of 1 per dimension before it is scaled to 2, about the size of the 8 Gaussians. Per
set and seed: an MLP denoiser, its five-step ancestral sampler on Karras' levels, and one fine-tuned with its energy on the
levels that it learns, last iterate. sw,
auroc: as in gaussians8.py, uniform points on the square of the pictures; sw_floor: real against real.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from torch import Tensor

from fewstep.dxmi import make_state
from fewstep.energy import Value
from fewstep.finetuning import finetune
from fewstep.goal import make_goal
from fewstep.levels import learn_levels
from fewstep.metrics import auroc, sliced_wasserstein
from fewstep.run import write_json
from fewstep.sampler import Sampler
from fewstep.training import TrainState, train
from gaussians8 import DATA, FINETUNE, QUICK, STEPS, TRAIN, Scale, at_scale, five_steps
from tables import toys

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "toys.png"
HALF = 5.0  # half-width of the square that is shown, and that uniform points are drawn from
SHOWN = 4000
GRID = 200


# --- sets: n and a generator to (n, 2) ------------------------------------------------------------------------------


def two_moons(n: int, g: torch.Generator) -> Tensor:
    # scikit-learn has a random state of its own, and puts the moons' middle at (.5, .25)
    points, _ = make_moons(n, noise=0.08, random_state=int(torch.randint(2**31 - 1, (), generator=g)))
    return torch.from_numpy(points).float() - torch.tensor([0.5, 0.25])


def pinwheel(n: int, g: torch.Generator, arms: int = 5) -> Tensor:
    """Flat Gaussians on a circle, twisted the more the farther out."""
    arm = torch.randint(arms, (n,), generator=g)
    radius, across = 1 + 0.3 * torch.randn(n, generator=g), 0.1 * torch.randn(n, generator=g)
    angle = 2 * math.pi * arm / arms + 0.25 * radius.exp()
    return torch.stack([radius * angle.cos() - across * angle.sin(), radius * angle.sin() + across * angle.cos()], 1)


def checkerboard(n: int, g: torch.Generator) -> Tensor:
    """The black fields of a board of 4 x 4."""
    column, half = torch.randint(4, (n,), generator=g), torch.randint(2, (n,), generator=g)
    return torch.stack([column, 2 * half + column % 2], 1) + torch.rand(n, 2, generator=g) - 2


SETS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "two moons": two_moons,
    "pinwheel": pinwheel,
    "checkerboard": checkerboard,
}


def draws(name: str, n: int, g: torch.Generator) -> Tensor:
    """n points of a set, of root mean square 2 per dimension: the same scale for every draw."""
    size = SETS[name](DATA, torch.Generator().manual_seed(999)).square().mean().sqrt()
    return 2 * SETS[name](n, g) / size


# --- one set ------------------------------------------------------------------------------------------------------


def sampled(sampler: Sampler, n: int) -> Tensor:
    g = torch.Generator().manual_seed(77)
    return sampler.sample(sampler.start(n, (2,), g), g)


def distance(name: str, samples: Tensor, scale: Scale) -> float:
    """To disjoint reference sets, their mean."""
    g, n = torch.Generator().manual_seed(78), scale.samples
    each = [sliced_wasserstein(samples, draws(name, n, g), scale.directions, g) for _ in range(scale.references)]
    return sum(each) / len(each)


def learned(name: str, seed: int, scale: Scale) -> tuple[dict, Sampler, Sampler, Value]:
    """The row, the start, the fine-tuned sampler and its value."""
    data = draws(name, DATA, torch.Generator().manual_seed(seed))
    state = TrainState((2,), dataclasses.replace(TRAIN, seed=seed, iterations=scale.iterations(TRAIN.iterations)))
    for _ in train(state, data):
        pass
    start = five_steps(state.averaged.module)
    config, goal = at_scale(FINETUNE, seed, scale), make_goal(data)
    began = time.process_time()
    times = learn_levels(start.denoiser, STEPS, goal, config).times(start.denoiser.path, STEPS)
    tuned = make_state(start.denoiser, times, config, (2,))
    for _ in finetune(tuned, goal):
        pass
    seconds = time.process_time() - began
    sampler, value = tuned.averaged.module, tuned.averaged_value.module
    g = torch.Generator().manual_seed(79)
    unseen, uniform = draws(name, scale.samples, g), HALF * (2 * torch.rand(scale.samples, 2, generator=g) - 1)
    with torch.no_grad():
        seen = auroc(value.energy(unseen), value.energy(uniform))
    row = {
        "seed": seed,
        "sw_start": distance(name, sampled(start, scale.samples), scale),
        "sw": distance(name, sampled(sampler, scale.samples), scale),
        "sw_floor": distance(name, unseen, scale),
        "auroc": seen,
        "cpu_seconds": round(seconds, 2),
    }
    return row, start, sampler, value


# --- the picture ----------------------------------------------------------------------------------------------------


def density(value: Value, data: Tensor) -> Tensor:
    """exp(-E/T) on the square, its sum 1: (GRID, GRID), rows upwards. T is the temperature under which data are likeliest."""
    axis = torch.linspace(-HALF, HALF, GRID)
    with torch.no_grad():
        energy = value.energy(torch.cartesian_prod(axis, axis)).double()
        of_data = value.energy(data).double().mean()
    inverse = torch.logspace(-1, 4, 201, dtype=torch.float64)
    likelihood = -inverse * of_data - torch.stack([(-b * energy).logsumexp(0) for b in inverse])
    return (-inverse[likelihood.argmax()] * energy).softmax(0).reshape(GRID, GRID).T


def draw_row(axes, name: str, start: Sampler, sampler: Sampler, value: Value) -> None:
    clouds = {
        "data": draws(name, SHOWN, torch.Generator().manual_seed(80)),
        "start, 5 evaluations": sampled(start, SHOWN),
        "fine-tuned, 5 evaluations": sampled(sampler, SHOWN),
    }
    for axis, (title, points) in zip(axes, clouds.items(), strict=False):
        axis.scatter(*points.T, s=0.5, lw=0, color="black")
        axis.set_title(title, fontsize=9)
    axes[3].imshow(density(value, clouds["data"]), origin="lower", extent=(-HALF, HALF, -HALF, HALF), cmap="magma")
    axes[3].set_title("exp(-E/T)", fontsize=9)
    axes[0].set_ylabel(name)
    for axis in axes:
        axis.set(xlim=(-HALF, HALF), ylim=(-HALF, HALF), xticks=[], yticks=[], aspect="equal")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="in miniature, one seed, to see that all of it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    scale, seeds = (QUICK, 1) if args.quick else (Scale(), args.seeds)
    if args.quick and (args.out.parent == Path(__file__).parent or args.picture == PICTURE):
        raise SystemExit("--quick wants an --out and a --picture of its own: its numbers mean nothing")
    result = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        **dataclasses.asdict(scale),
        "config": json.loads(json.dumps(dataclasses.asdict(FINETUNE))),
        "sets": {name: [] for name in SETS},
    }
    figure, axes = plt.subplots(len(SETS), 4, figsize=(9, 2.3 * len(SETS)))
    for seed in range(seeds):
        for row_of_axes, name in zip(axes, SETS, strict=True):
            row, start, sampler, value = learned(name, seed, scale)
            result["sets"][name].append(row)
            write_json(args.out, result)
            print(
                f"{name}, seed {seed}: SW {row['sw_start']:.3f} -> {row['sw']:.3f} (floor {row['sw_floor']:.3f}), AUROC "
                f"{row['auroc']:.3f}, {row['cpu_seconds']:.1f} CPU s",
                flush=True,
            )
            if seed == 0:
                draw_row(row_of_axes, name, start, sampler, value)
    figure.tight_layout()
    figure.savefig(args.picture, dpi=120)
    print(toys(result))


if __name__ == "__main__":
    main()
