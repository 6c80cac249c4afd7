"""A schedule learned while the model trains (Algorithm 2 of Williams et al. 2024) against fixed log-normal levels.

    python benchmarks/adaptive.py                          three seeds; writes benchmarks/adaptive.json and its pictures
    python benchmarks/adaptive.py --fashion FOLDER         and one seed of Fashion-MNIST, whose idx files lie in FOLDER
    python benchmarks/adaptive.py --only PART              one part of these, the others stay in the JSON
    python benchmarks/adaptive.py --draw                   only the pictures, from the JSON

One dimension: a bimodal density, and the third level of Cantor's set, its 8 intervals smoothed to Gaussians; there exact
scores say what the schedule should be. Images: the same network and iterations under both kinds of levels, Euler steps on
Karras and on the learned schedule: the one that training left, or for fixed levels the one learned afterwards.
variation: of the step lengths of a 41-level grid, standard deviation over mean. A killed benchmark continues.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from fewstep import commands, models
from fewstep.config import Source, TrainConfig
from fewstep.denoiser import Denoiser
from fewstep.evaluation import judge
from fewstep.learn import learn_schedule, step_costs
from fewstep.metrics import sliced_wasserstein
from fewstep.mixture import Mixture
from fewstep.path import VE
from fewstep.report import COLOURS  # and the style of our pictures
from fewstep.run import read_lines, write_json
from fewstep.schedule import Schedule

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
GRID = 41
STEPS = (10, 40)
LEVELS = ("fixed", "adaptive")
PARTS = ("one dimension", "digits", "fashion-mnist")
ONE_D = {"width": 128, "depth": 3, "sigma_min": 0.01, "sigma_max": 40.0, "schedule": "adaptive", "schedule_every": 50}
ITERATIONS = {"bimodal": 2000, "cantor": 4000}
DIGITS = {"iterations": 2000, "sigma_min": 0.2, "sigma_max": 10.0, "schedule_every": 50}
FASHION = {"iterations": 1500, "batch_size": 64, "network": "unet", "width": 16, "depth": 3, "sigma_min": 0.02}
FASHION |= {"sigma_max": 40.0, "schedule_every": 50}


def cantor(level: int = 3) -> Mixture:
    """The 2^level intervals of Cantor's set, each as a Gaussian of half its length, scaled to about unit variance."""
    length = 3.0**-level
    left = [
        sum(2 * digit / 3 ** (k + 1) for k, digit in enumerate(digits)) for digits in itertools.product((0, 1), repeat=level)
    ]
    centres = (torch.tensor(left, dtype=torch.float64) + length / 2 - 0.5) * 8**0.5  # Cantor's measure has variance 1/8
    return Mixture(centres[:, None], 8**0.5 * length / 2, path=VE(ONE_D["sigma_min"], ONE_D["sigma_max"]))


def bimodal() -> Mixture:
    return Mixture([[-1.0], [1.0]], 0.1, path=VE(ONE_D["sigma_min"], ONE_D["sigma_max"]))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def few_digits(numbers) -> list[float]:
    return [float(f"{float(x):.4g}") for x in numbers]


def about(denoiser: Denoiser, data: torch.Tensor, schedule: Schedule) -> dict:
    """A schedule's levels on the grid, the costs of its steps, and how much their lengths vary."""
    costs = step_costs(denoiser, data, schedule, GRID, generator=seeded(5))
    lengths = costs.sqrt()
    variation = float(lengths.std() / lengths.mean())
    return {"sigmas": few_digits(schedule.sigmas(GRID)[:-1]), "costs": few_digits(costs), "variation": variation}


def trained(source: Source, folder: Path, config: TrainConfig, data: torch.Tensor) -> tuple[Denoiser, Schedule, list]:
    """The model of a run, its schedule, from training or learned afterwards, and how that went: (step, Lambda, variation)."""
    commands.train(source, folder, config)
    denoiser = models.load_denoiser(str(folder))
    if config.schedule == "adaptive":
        logged = [row for row in read_lines(folder / "metrics.jsonl") if "Lambda" in row]
        history = [few_digits((row["step"], row["Lambda"], row["cost_variation"])) for row in logged]
        return denoiser, Schedule.load(folder / commands.SCHEDULE), history
    return denoiser, learn_schedule(denoiser, data, generator=seeded(4)), []


def one_dimension(name: str, exact: Mixture, runs: Path, seeds: int) -> dict:
    """Exact scores, and networks that learn them and their schedule together, judged by the exact costs.

    w2: Wasserstein distance of 20,000 samples; own: variation by the network's own costs; off: the largest factor between
    a level of the grid and the exact optimum's.
    """
    data, bins = exact.sample(50_000, seeded(1)), np.linspace(-2, 2, 121)

    def quality(model: Denoiser, schedules: dict[str, Schedule], seed: int) -> dict:
        cells = {}
        for label, schedule in schedules.items():
            x, _ = commands.generate(model, schedule.times(model.path, 10), 20_000, (1,), "euler", seed)
            density = np.histogram(x.flatten(), bins)[0] / len(x) / (bins[1] - bins[0])
            row = {"w2": sliced_wasserstein(x, data, 1), "density": few_digits(density)}
            cells[label] = about(exact, data, schedule) | row
        return cells

    optimum = learn_schedule(exact, data, probes=200, draws=1024, generator=seeded(2))
    free = commands.baselines(optimum)
    grid = torch.linspace(-2, 2, 481, dtype=torch.float64)
    density = few_digits(exact.log_prob(grid[:, None]).exp())
    result = {"density": density, "floor": sliced_wasserstein(exact.sample(20_000, seeded(3)), data, 1)}
    result |= {"Lambda": optimum.provenance["Lambda"], "exact": quality(exact, free | {"learned": optimum}, 9), "seeds": []}
    file = runs / f"{name}.npy"
    np.save(file, data.numpy())
    for seed in range(seeds):
        config = TrainConfig(iterations=ITERATIONS[name], **ONE_D, seed=seed)
        model, learned, history = trained(Source(str(file)), runs / f"{name}-{seed}", config, data)
        off = float((learned.sigmas(GRID)[:-1] / optimum.sigmas(GRID)[:-1]).log().abs().max().exp())
        row = {"seed": seed, "history": history, "off": off, "own": about(model, data, learned)["variation"]}
        row["schedules"] = quality(model, free | {"learned": learned}, 9)
        result["seeds"].append(row)
        cells = ", ".join(f"{k} {v['w2']:.3f} (varies {v['variation']:.0%})" for k, v in row["schedules"].items())
        print(
            f"{name}, seed {seed}: levels within a factor {off:.2f} of the exact optimum; W2 at 10 steps: {cells}", flush=True
        )
    return result


def images(source: Source, settings: dict, runs: Path, seeds: int) -> dict:
    """Both kinds of training levels on one data set, each with its learned schedule beside Karras and log-linear."""
    data = commands.load(source)
    result: dict = {"config": settings, "floor": judge(data.test[:2000], data.train[:10_000], None), "runs": []}
    for seed, levels in itertools.product(range(seeds), LEVELS):
        folder = runs / f"{source.data}-{levels}-{seed}"
        config = TrainConfig(**settings, schedule=levels, seed=seed)
        denoiser, learned, history = trained(source, folder, config, data.train)
        row: dict = {"seed": seed, "levels": levels, "history": history, "schedules": {}}
        for label, schedule in (commands.baselines(learned) | {"learned": learned}).items():
            cell = about(denoiser, data.train, schedule)
            for steps in STEPS if label != "log-linear" else ():
                x, _ = commands.generate(denoiser, schedule.times(denoiser.path, steps), 2000, data.shape, "euler", 1000)
                cell[f"at_{steps}"] = judge(x, data.train[:10_000], None)
            row["schedules"][label] = cell
        result["runs"].append(row)
        ours, karras = row["schedules"]["learned"], row["schedules"]["karras"]
        fd = ", ".join(f"{n} steps: {ours[f'at_{n}']['fd']:.3f} against {karras[f'at_{n}']['fd']:.3f}" for n in STEPS)
        varies = f"{ours['variation']:.1%} against {karras['variation']:.1%}"
        print(
            f"{source.data}, seed {seed}, {levels}: learned against karras, lengths vary {varies}; FD-pixels {fd}", flush=True
        )
    return result


# --- pictures -----------------------------------------------------------------------------------------------------


def draw_one_dimension(result: dict, file: Path) -> None:
    """Per density: where the levels lie, the samples of ten steps, and the costs before and after."""
    figure, axes = plt.subplots(len(result), 3, figsize=(12.5, 3.1 * len(result)))
    u, edges = np.linspace(0, 1, GRID), np.linspace(-2, 2, 121)
    for (where, density, cost), (name, part) in zip(axes, result.items(), strict=True):
        for label, cell in part["exact"].items():
            style = {"color": "0.3", "lw": 3, "alpha": 0.5} if label == "learned" else {"color": COLOURS[label]}
            where.semilogy(u, cell["sigmas"], label="learned, exact scores" if label == "learned" else label, **style)
        for row in part["seeds"]:
            label = f"learned while training, {len(part['seeds'])} seeds" if row["seed"] == 0 else None
            where.semilogy(u, row["schedules"]["learned"]["sigmas"], color=COLOURS["learned"], lw=1, label=label)
        where.set(title=f"{name}: where the levels lie", xlabel="share of the steps u", ylabel="sigma")
        density.plot(np.linspace(-2, 2, 481), part["density"], color="0.6", lw=1, label="data")
        first = part["seeds"][0]["schedules"]
        for label in ("karras", "learned"):
            w2 = np.mean([row["schedules"][label]["w2"] for row in part["seeds"]])
            text = f"{label}, W2 {w2:.3f}"
            density.stairs(first[label]["density"], edges, color=COLOURS[label], lw=1.2, label=text)
        density.set(title=f"{name}: samples of the trained model, 10 steps", xlabel="x", ylabel="density")
        for label, cell in first.items():
            text = f"{label} (lengths vary by {cell['variation']:.0%})"
            cost.stairs(cell["costs"], baseline=None, color=COLOURS[label], lw=1.4, label=text)
        cost.set(title=f"{name}: true cost of each of {GRID - 1} steps", xlabel="step, from noise to data")
        for axis in (where, density, cost):
            axis.legend(frameon=False, fontsize=7, loc="lower left" if axis is where else "upper center")
        for axis in (density, cost):
            axis.set_ylim(0, 1.35 * axis.get_ylim()[1])  # room for the legend
    save(figure, file)


def draw_images(name: str, result: dict, file: Path) -> None:
    """Where the levels lie, how they got there, and the costs before and after."""
    figure, (where, how, cost) = plt.subplots(1, 3, figsize=(12.5, 3.1))
    adaptive, fixed = ([row for row in result["runs"] if row["levels"] == kind] for kind in ("adaptive", "fixed"))
    u = np.linspace(0, 1, GRID)
    first = adaptive[0]["schedules"]
    for label in ("karras", "log-linear"):
        where.semilogy(u, first[label]["sigmas"], color=COLOURS[label], label=label)
    for rows, label, colour in ((fixed, "learned after fixed levels", "0.5"), (adaptive, "learned while training", "C2")):
        for row in rows:
            text = label if row["seed"] == 0 else None
            where.semilogy(u, row["schedules"]["learned"]["sigmas"], color=colour, lw=1, label=text)
    where.set(title=f"{name}: where the levels lie", xlabel="share of the steps u", ylabel="sigma")
    for row in adaptive:
        how.semilogy([h[0] for h in row["history"]], [h[2] for h in row["history"]], color="C2", lw=1)
    how.set(title="cost_variation, as training goes on", xlabel="iteration")
    for label, cell in first.items():
        text = f"{label} (lengths vary by {cell['variation']:.0%})"
        cost.stairs(cell["costs"], baseline=None, color=COLOURS[label], lw=1.4, label=text)
    cost.set(title=f"cost of each of {GRID - 1} steps, adaptive model", xlabel="step, from noise to data", ylim=(0, None))
    for axis in (where, cost):
        axis.legend(frameon=False, fontsize=7)
    save(figure, file)


def save(figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fashion", metavar="FOLDER", help="where Fashion-MNIST's idx files lie")
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "fewstep-adaptive", help="run folders, kept")
    parser.add_argument("--only", choices=PARTS, help="the other parts stay as they are in the JSON")
    parser.add_argument("--draw", action="store_true", help="only the pictures")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    densities = {"bimodal": bimodal(), "cantor": cantor()}
    made: dict[str, Callable[[], dict]] = {
        "one dimension": lambda: {k: one_dimension(k, exact, args.runs, args.seeds) for k, exact in densities.items()},
        "digits": lambda: images(Source("digits"), DIGITS, args.runs, args.seeds),
    }
    if args.fashion:
        made["fashion-mnist"] = lambda: images(Source("fashion-mnist", args.fashion), FASHION, args.runs, 1)
    if args.only and args.only not in made:
        parser.error("fashion-mnist needs --fashion")
    for part in () if args.draw else [args.only] if args.only else made:
        args.runs.mkdir(parents=True, exist_ok=True)
        result |= {"date": datetime.date.today().isoformat(), "torch": torch.__version__, part: made[part]()}
        write_json(args.out, result)
    PICTURES.mkdir(parents=True, exist_ok=True)
    if PARTS[0] in result:
        draw_one_dimension(result[PARTS[0]], PICTURES / "adaptive_1d.png")
    for name in PARTS[1:]:
        if name in result:
            draw_images(name, result[name], PICTURES / f"adaptive_{name}.png")


if __name__ == "__main__":
    main()
