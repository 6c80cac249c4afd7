"""Eight Gaussians in two dimensions, five evaluations: who has both a good sampler and an accurate energy?

    python benchmarks/gaussians8.py                    all rows; five seeds, three of the peers
    python benchmarks/gaussians8.py --only fewstep     some rows; --list names them
    python benchmarks/gaussians8.py --quick            everything in miniature, kept apart; says nothing but that it runs
    python benchmarks/gaussians8.py --draw             only the JSON, from the rows

A cell is a row of the table and a seed; finished cells are kept in --rows, so that a killed or repeated command
continues, unless the row's settings have changed. Writes benchmarks/gaussians8.json.

start: an MLP denoiser of 50,000 points, its five-step ancestral sampler on Karras' levels; fewstep learns its own, as its
default is, but in the rows that say so and from an untrained start. paper's start: betas from 1e-4 to .02 in five
steps, the schedule of 1,000 steps not rescaled, as in the paper's own table. The published algorithm: published.py.
torchebm: torchebm2d.py, where that library is installed.

All are judged on their last iterate. sw: sqrt(mean over 1,000 directions of W_2^2), 50,000 samples, the mean over five
disjoint reference sets; floor: the same between real sets. auroc: the energy, 50,000 data against 50,000 uniform points
on (-4, 4)^2. correlation: of -E with log p over the uniform points where the density is at least that of the data's lowest
percentile. std_within: root mean square distance, per dimension, to the mean of the samples nearest to the same centre;
masses: their shares. ideal: the same of the exact energy and of real data. Seconds are of the CPU, on one thread, without
the start's, which has its own row.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import published
import torchebm2d
from fewstep.config import FinetuneConfig, TrainConfig
from fewstep.denoiser import OnPath
from fewstep.dxmi import make_state
from fewstep.finetuning import finetune
from fewstep.goal import make_goal
from fewstep.levels import learn_levels
from fewstep.metrics import auroc, sliced_wasserstein
from fewstep.mixture import ring
from fewstep.path import Tabulated
from fewstep.run import read_lines, write_json, write_lines
from fewstep.sampler import Sampler
from fewstep.schedule import karras
from fewstep.training import TrainState, train
from tables import gaussians8

HERE = Path(__file__).parent
STEPS = 5
DATA = 50_000
TRAIN = TrainConfig(iterations=4000, batch_size=512, network="mlp", width=128, depth=2, sigma_min=0.15, sigma_max=10.0)
FINETUNE = FinetuneConfig()
DENSITY = FinetuneConfig(score="density")
PAPERS_BETAS = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
LAST_STD = 0.02  # of the starts' last steps; `Sampler.sample` leaves it out

Energy = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Scale:
    """How much is run and how finely it is judged. shrink divides all numbers of iterations."""

    samples: int = 50_000
    references: int = 5
    directions: int = 1000
    shrink: int = 1

    def iterations(self, full: int) -> int:
        return max(1, full // self.shrink)


QUICK = Scale(samples=2000, references=2, directions=50, shrink=100)


# --- what is judged -----------------------------------------------------------------------------------------------


def quality(sampler, n: int, references: int, directions: int, seed: int = 77) -> float:
    """Sliced Wasserstein distance of n samples, the mean over disjoint reference sets."""
    g = torch.Generator().manual_seed(seed)
    return distance(sampler.sample(sampler.start(n, (2,), g), g), n, references, directions, g)


def distance(samples: Tensor, n: int, references: int, directions: int, g: torch.Generator) -> float:
    return sum(sliced_wasserstein(samples, ring().sample(n, g), directions, g) for _ in range(references)) / references


def energy_quality(energy: Energy, n: int = DATA, seed: int = 78) -> dict[str, float]:
    exact, g = ring(), torch.Generator().manual_seed(seed)
    data, uniform = exact.sample(n, g), torch.rand(n, 2, generator=g) * 8 - 4
    with torch.no_grad():
        dense = exact.energy(uniform) < exact.energy(data).quantile(0.99)
        both = torch.stack([energy(uniform[dense]).double(), exact.energy(uniform[dense]).double()])
        return {"auroc": auroc(energy(data), energy(uniform)), "correlation": float(torch.corrcoef(both)[0, 1])}


def modes(samples: Tensor) -> dict:
    """The spread within the modes, and their shares, of samples (n, 2)."""
    centres = ring().means.to(samples)
    nearest = torch.cdist(samples, centres).argmin(1)
    counts = torch.bincount(nearest, minlength=len(centres))
    means = torch.zeros_like(centres).index_add_(0, nearest, samples) / counts.clamp(min=1)[:, None]
    masses = counts.double() / len(samples)
    return {
        "std_within": float((samples - means[nearest]).square().mean().sqrt()),
        "mass_error": float((masses * len(centres) - 1).abs().max()),
        "masses": [round(float(m), 4) for m in masses],
    }


def judge(scale: Scale, samples: Tensor, energy: Energy | None, g: torch.Generator) -> dict:
    row = {"sw": distance(samples, scale.samples, scale.references, scale.directions, g)} | modes(samples)
    return row | (energy_quality(energy, scale.samples) if energy else {})


# --- starts -------------------------------------------------------------------------------------------------------


class FromStandardNormal(Tabulated):
    """A table of alpha-bar whose sampler starts at N(0, I) although its noisiest level is far from pure noise."""

    def start_from(self, noise, t=1.0):
        return noise


@functools.cache
def trained(config: TrainConfig) -> tuple[OnPath, Tensor]:
    """A denoiser of 50,000 points, and these points."""
    data = ring().sample(DATA, torch.Generator().manual_seed(config.seed))
    state = TrainState((2,), config)
    for _ in train(state, data):
        pass
    return state.averaged.module, data


def five_steps(denoiser: OnPath) -> Sampler:
    return Sampler(denoiser, karras(TRAIN.sigma_min, TRAIN.sigma_max).times(denoiser.path, STEPS), last_std=LAST_STD)


def pretrain(seed: int, iterations: int = TRAIN.iterations) -> tuple[Sampler, Tensor]:
    """The start: a five-step ancestral sampler of a denoiser trained on 50,000 points, and these points."""
    denoiser, data = trained(dataclasses.replace(TRAIN, seed=seed, iterations=iterations))
    return five_steps(denoiser), data


def untrained(seed: int, _: int) -> tuple[Sampler, Tensor]:
    """The same with weights that have seen nothing."""
    data = ring().sample(DATA, torch.Generator().manual_seed(seed))
    return five_steps(TrainState((2,), dataclasses.replace(TRAIN, seed=seed)).denoiser), data


def papers(seed: int, iterations: int) -> tuple[Sampler, Tensor]:
    """The paper's start: five levels of which the noisiest is sigma/alpha .23, entered with pure noise."""
    path = FromStandardNormal(torch.cumprod(1 - PAPERS_BETAS, 0))
    low, high = path.sigma_min, path.sigma_max
    levels = {"sigma_min": low, "sigma_max": high, "level_mean": -2.8, "level_std": 0.8}  # log(.06), within the table
    denoiser, data = trained(dataclasses.replace(TRAIN, seed=seed, iterations=iterations, **levels))
    return Sampler(OnPath(denoiser.denoiser, path), torch.linspace(1, 0, STEPS + 1, dtype=torch.float64), LAST_STD), data


Start = Callable[[int, int], tuple[Sampler, Tensor]]


# --- rows ---------------------------------------------------------------------------------------------------------


def of_start(start: Start, seed: int, scale: Scale) -> dict:
    """The sampler that the others start from."""
    iterations = scale.iterations(TRAIN.iterations)
    trained.cache_clear()  # its time is taken here
    began = time.process_time()
    sampler, _ = start(seed, iterations)
    seconds = time.process_time() - began
    g = torch.Generator().manual_seed(77)
    samples = sampler.sample(sampler.start(scale.samples, (2,), g), g)
    return clock(iterations, seconds) | judge(scale, samples, None, g)


def at_scale(config: FinetuneConfig, seed: int, scale: Scale) -> FinetuneConfig:
    """With all of its numbers of iterations divided."""
    counts = {name: n for name, n in dataclasses.asdict(config).items() if name.endswith("iterations") and n}
    return dataclasses.replace(config, seed=seed, **{name: scale.iterations(n) for name, n in counts.items()})


def of_fewstep(start: Start, config: FinetuneConfig, learned: bool, seed: int, scale: Scale) -> dict:
    """On the levels that it learns for itself, whose seconds count, or on the start's."""
    first, data = start(seed, scale.iterations(TRAIN.iterations))
    config, times, goal = at_scale(config, seed, scale), first.times, make_goal(data)
    began = time.process_time()
    if learned:
        times = learn_levels(first.denoiser, STEPS, goal, config).times(first.denoiser.path, STEPS)
    state = make_state(first.denoiser, times, config, (2,))
    iterations = sum(1 for _ in finetune(state, goal))
    seconds = time.process_time() - began
    g, sampler = torch.Generator().manual_seed(77), state.averaged.module
    samples = sampler.sample(sampler.start(scale.samples, (2,), g), g)
    row = clock(iterations, seconds) | judge(scale, samples, state.averaged_value.module.energy, g)
    return row | {"step_noise": [round(float(s), 4) for s in sampler.std().detach()]}


def of_published(start: Start, settings: published.Settings, seed: int, scale: Scale) -> dict:
    first, data = start(seed, scale.iterations(TRAIN.iterations))
    began = time.process_time()
    short = dataclasses.replace(settings, seed=seed, iterations=scale.iterations(settings.iterations))
    run = published.Run.of(first.denoiser, first.times, short)
    iterations = sum(1 for _ in published.learn(run, data))
    seconds = time.process_time() - began
    g, chain = torch.Generator().manual_seed(77), run.chain
    samples = chain.sample(chain.start(scale.samples, (2,), g), g)
    row = clock(iterations, seconds) | judge(scale, samples, run.value.energy, g)
    return row | {"step_noise": [round(float(s), 4) for s in chain.log_stds().detach().exp()]}


def of_torchebm(settings: torchebm2d.Settings, seed: int, scale: Scale) -> dict:
    data = ring().sample(DATA, torch.Generator().manual_seed(seed))
    short = dataclasses.replace(
        settings, iterations=scale.iterations(settings.iterations), joint=settings.joint and scale.iterations(settings.joint)
    )
    began = time.process_time()
    energy = torchebm2d.learn(short, data, seed)
    seconds = time.process_time() - began
    step_size = torchebm2d.best_step_size(settings, energy, data, STEPS, min(10_000, scale.samples))
    g = torch.Generator().manual_seed(77)
    samples = torchebm2d.sample(settings, energy, scale.samples, STEPS, step_size, g)
    return clock(short.iterations + short.joint, seconds) | judge(scale, samples, energy, g) | {"step_size": step_size}


def clock(iterations: int, seconds: float) -> dict:
    return {
        "iterations": iterations,
        "cpu_seconds": round(seconds, 2),
        "ms_per_iteration": round(1000 * seconds / iterations, 3),
    }


@dataclass(frozen=True)
class Row:
    """settings: what a finished cell must have been run with to count."""

    name: str
    seeds: int
    settings: dict
    run: Callable[[int, Scale], dict]


def rows() -> list[Row]:
    start = dataclasses.asdict(TRAIN)

    def fewstep(name: str, begin: Start, config: FinetuneConfig = FINETUNE, learned: bool = False) -> Row:
        settings = {"start": start, "config": dataclasses.asdict(config), "learned_levels": learned}
        return Row(name, 5, settings, functools.partial(of_fewstep, begin, config, learned))

    def peer(name: str, begin: Start, tau: float) -> Row:
        settings = published.Settings(tau=tau)
        known = {"start": start, "config": dataclasses.asdict(settings)}
        return Row(name, 3, known, functools.partial(of_published, begin, settings))

    def torchebm(name: str, settings: torchebm2d.Settings) -> Row:
        return Row(f"torchebm, {name}", 3, dataclasses.asdict(settings), functools.partial(of_torchebm, settings))

    return [
        Row("start", 5, {"start": start}, functools.partial(of_start, pretrain)),
        fewstep("fewstep", pretrain, learned=True),
        fewstep("fewstep, the density's score", pretrain, DENSITY, learned=True),
        fewstep("fewstep, the start's levels", pretrain),
        *(peer(f"published, tau {tau:g}", pretrain, tau) for tau in (0.1, 0.01, 0.0, 1.0)),
        fewstep("fewstep, untrained start", untrained),  # such a model has no score worth following
        fewstep("fewstep, the density's score, untrained start", untrained, DENSITY),
        peer("published, tau 0.1, untrained start", untrained, 0.1),
        Row("paper's start", 5, {"start": start}, functools.partial(of_start, papers)),
        fewstep("fewstep, paper's levels", papers),  # it starts where the data are
        *(peer(f"published, tau {tau:g}, paper's start", papers, tau) for tau in (0.1, 0.01, 0.0, 1.0)),
        *(torchebm(name, settings) for name, settings in torchebm2d.ROWS.items()),
    ]


# --- all cells ----------------------------------------------------------------------------------------------------


def finished(folder: Path, row: Row, scale: Scale) -> dict[int, dict]:
    """The row's cells that were run with its present settings, by seed."""
    return {c["seed"]: c for c in read_lines(file_of(folder, row)) if c["settings"] == settings_of(row, scale)}


def file_of(folder: Path, row: Row) -> Path:
    return folder / f"{re.sub('[^a-z0-9.]+', '_', row.name)}.jsonl"


def settings_of(row: Row, scale: Scale) -> dict:
    return json.loads(json.dumps(row.settings | {"scale": dataclasses.asdict(scale)}))


def run(folder: Path, chosen: list[Row], scale: Scale, seeds: int | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(max(row.seeds for row in chosen) if seeds is None else seeds):
        for row in chosen:
            if (seeds is None and seed >= row.seeds) or seed in finished(folder, row, scale):
                continue
            cell = {"row": row.name, "seed": seed} | row.run(seed, scale) | {"settings": settings_of(row, scale)}
            write_lines(file_of(folder, row), [*read_lines(file_of(folder, row)), cell])
            print(line(cell), flush=True)


def line(cell: dict) -> str:
    energy = f"AUROC {cell['auroc']:.3f}, correlation {cell['correlation']:.3f}, " if "auroc" in cell else ""
    return (
        f"{cell['row']}, seed {cell['seed']}: SW {cell['sw']:.3f}, {energy}std {cell['std_within']:.3f}, masses within "
        f"{cell['mass_error']:.0%}; {cell['iterations']} iterations, {cell['cpu_seconds']:.1f} CPU s, "
        f"{cell['ms_per_iteration'] / 1000:.4f} s each"
    )


def ideal(scale: Scale) -> dict:
    """Real data, and the exact energy, by the same estimators; sw is the floor."""
    g = torch.Generator().manual_seed(79)
    return judge(scale, ring().sample(scale.samples, g), ring().energy, g)


def document(folder: Path, scale: Scale) -> dict:
    cells = [cell for row in rows() for _, cell in sorted(finished(folder, row, scale).items())]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        **dataclasses.asdict(scale),
        "ideal": ideal(scale),
        "rows": cells,
    }


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="only these rows")
    parser.add_argument("--list", action="store_true", help="the rows' names")
    parser.add_argument("--seeds", type=int, help="as many of each row; default five, and three of the peers")
    parser.add_argument("--quick", action="store_true", help="in miniature, to see that all of it runs")
    parser.add_argument("--draw", action="store_true", help="only the JSON, from the rows")
    parser.add_argument("--rows", type=Path, default=HERE.parent / "runs" / "gaussians8", help="where finished cells are kept")
    parser.add_argument("--out", type=Path, help="default benchmarks/gaussians8.json, with --quick beside the rows")
    args = parser.parse_args()
    known = rows()
    if args.list:
        print("\n".join(row.name for row in known))
        return
    unknown = set(args.only or ()) - {row.name for row in known}
    if unknown:
        raise SystemExit(f"no row {', '.join(sorted(unknown))}; --list names them")
    chosen = [row for row in known if not args.only or row.name in args.only]
    if not torchebm2d.installed():
        print("torchebm is not installed: its rows are left out")
        chosen = [row for row in chosen if not row.name.startswith("torchebm")]
    scale = QUICK if args.quick else Scale()
    folder = args.rows / "quick" if args.quick else args.rows
    if not args.draw and chosen:
        run(folder, chosen, scale, 1 if args.quick and args.seeds is None else args.seeds)
    result = document(folder, scale)
    write_json(args.out or (folder / "gaussians8.json" if args.quick else Path(__file__).with_suffix(".json")), result)
    print(gaussians8(result))


if __name__ == "__main__":
    main()
