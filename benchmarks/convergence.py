"""Does equalising a grid's costs converge, from any start?   Algorithm 1 of Williams et al. 2024, round after round.

    python benchmarks/convergence.py --digits RUN              writes benchmarks/convergence.json and its picture
    python benchmarks/convergence.py --draw                    only the picture, from the JSON

RUN: a folder of `fewstep train --data digits`. A round estimates the cost of each of 40
steps (64 draws of its own), and puts the levels where all of them would cost the same. Starts: log-linear, Karras, linear,
and "crowded": nine tenths of the levels in the noisiest twentieth of the range of log sigma. uneven: standard deviation of
the steps' lengths cost^(1/order) over their mean, Monte Carlo noise included; apart: largest |difference| in log sigma
between the levels of the starts. Three seeds.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from fewstep.cost import CORRECTOR_ORDER, PREDICTOR_ORDERS, corrector_costs, data_moments, predictor_costs
from fewstep.data import load_data
from fewstep.denoiser import Denoiser, OnPath
from fewstep.mixture import Mixture, ring
from fewstep.models import load_denoiser
from fewstep.path import VE
from fewstep.report import COLOURS  # and the style of our pictures
from fewstep.run import write_json
from fewstep.schedule import Schedule, equalise, karras, linear, log_linear, step_lengths

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "convergence.png"
LEVELS, DRAWS, ROUNDS, SEEDS = 41, 64, 5, 3
COSTS = ("corrector", "predictor")
PROBES = 4  # of the predictor's trace, beyond 16 dimensions


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def crowded(sigma_min: float, sigma_max: float) -> Schedule:
    ends = log_linear(sigma_min, sigma_max)
    u = torch.tensor([0.0, 0.9, 1.0], dtype=torch.float64)
    return Schedule(u, ends.at(torch.tensor([0.0, 0.05, 1.0], dtype=torch.float64)), "crowded")


STARTS: dict[str, Callable[[float, float], Schedule]] = {
    "log-linear": log_linear,
    "karras": karras,
    "linear": linear,
    "crowded": crowded,
}


def rounds(denoiser: Denoiser, data: Tensor, cost: str, start: Schedule, seed: int) -> tuple[list[float], list[Tensor], int]:
    """How uneven the steps are before each round, the levels in log sigma (LEVELS,), and evaluations."""
    path = denoiser.path
    theta, g, small = start.angles(LEVELS)[:-1], seeded(seed), data[0].numel() <= 16
    order = PREDICTOR_ORDERS["euler"] if cost == "predictor" else CORRECTOR_ORDER
    uneven, levels, spent = [], [], 0
    for _ in range(ROUNDS + 1):
        levels.append(torch.tan(theta).log())
        times = path.time(theta)
        if cost == "predictor":
            found = predictor_costs(denoiser, data, times, DRAWS, 64, "euler", None if small else PROBES, generator=g)
            each, spent = found.each.mean(1).clamp(min=0), spent + found.evaluations
        else:
            each = corrector_costs(denoiser, data, times, DRAWS, 128, generator=g, moments=data_moments(data)).mean(1)
            each, spent = each.clamp(min=0), spent + 2 * (LEVELS - 1) * DRAWS
        lengths = step_lengths(each, order)
        uneven.append(float(lengths.std() / lengths.mean()))
        theta = equalise(theta, each, order=order)
    return uneven, levels, spent


def converged(denoiser: Denoiser, data: Tensor, cost: str, name: str) -> list[dict]:
    """A row for each seed."""
    found, low, high = [], denoiser.path.sigma_min, denoiser.path.sigma_max
    for seed in range(SEEDS):
        runs = {
            k: rounds(denoiser, data, cost, start(low, high), 100 * seed + i) for i, (k, start) in enumerate(STARTS.items())
        }
        apart = [
            max(float((a[k] - b[k]).abs().max()) for (_, a, _), (_, b, _) in combinations(runs.values(), 2))
            for k in range(ROUNDS + 1)
        ]
        row = {"seed": seed, "uneven": {k: rounded(uneven) for k, (uneven, _, _) in runs.items()}, "apart": rounded(apart)}
        found.append(row | {"evaluations": next(iter(runs.values()))[2]})
        print(f"{name}, {cost}, seed {seed}: uneven {row['uneven']}, apart {row['apart']}", flush=True)
    return found


def rounded(numbers: list[float]) -> list[float]:
    return [float(f"{x:.4g}") for x in numbers]


def models(args: argparse.Namespace) -> dict[str, Callable[[], tuple[Denoiser, Tensor]]]:
    def mixture(exact: Mixture) -> tuple[Denoiser, Tensor]:
        return exact, exact.sample(20_000, seeded(1))

    def digits() -> tuple[Denoiser, Tensor]:
        denoiser = load_denoiser(args.digits)
        return OnPath(denoiser, VE(denoiser.path.sigma_min, denoiser.path.sigma_max)), load_data("digits").train

    found: dict[str, Callable[[], tuple[Denoiser, Tensor]]] = {
        "bimodal, 1-D": lambda: mixture(Mixture([[-1.0], [1.0]], 0.1, path=VE(0.01, 40.0))),
        "8 Gaussians, 2-D": lambda: mixture(ring(path=VE(0.02, 40.0))),
    }
    if args.digits:
        found["digits, learned"] = digits
    return found


def draw(result: dict, file: Path) -> None:
    figure, axes = plt.subplots(2, len(result["models"]), figsize=(3.2 * len(result["models"]), 5.2), squeeze=False)
    for column, (name, costs) in zip(axes.T, result["models"].items(), strict=True):
        for axis, cost in zip(column, COSTS, strict=True):
            axis.set(title=f"{name}: {cost}", xlabel="round", yscale="log")
            for row in costs[cost]:
                for k, (start, uneven) in enumerate(row["uneven"].items()):
                    colour = COLOURS.get(start, f"C{k + 4}")
                    axis.plot(uneven, color=colour, lw=1, label=f"from {start}" if row["seed"] == 0 else None)
                axis.plot(
                    row["apart"], color="0.6", ls=":", lw=1, label="levels' largest distance" if row["seed"] == 0 else None
                )
    for axis in axes[:, 0]:
        axis.set_ylabel("costs' variation; distance (log sigma)", fontsize=8)
    axes[0, 0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", metavar="RUN", help="folder of `fewstep train --data digits`")
    parser.add_argument("--draw", action="store_true", help="only the picture")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    if args.draw:
        result = json.loads(args.out.read_text())
    else:
        result = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "levels": LEVELS, "draws": DRAWS}
        result["models"] = {}
        for name, make in models(args).items():
            denoiser, data = make()
            result["models"][name] = {cost: converged(denoiser, data, cost, name) for cost in COSTS}
            write_json(args.out, result)
    draw(result, args.picture)


if __name__ == "__main__":
    main()
