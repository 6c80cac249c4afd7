"""What do the parts of the fine-tuning give?   8 x 8 digits, one part taken away or changed at a time.

    fewstep train --data digits --iterations 4000 --sigma-min 0.2 --sigma-max 10 --out RUN
    python benchmarks/ablations.py RUN             three seeds; writes benchmarks/ablations.json
    python benchmarks/ablations.py RUN --quick     in miniature, into --rows; says nothing but that it runs

Every fine-tuning has any number of x as its density (--density scalar), the default when these were measured, and else the
default configuration, but for what its row says; its levels are learned for ancestral sampling
from the data's Gaussian, which is what a sampler begins as (one fit for all seeds; the published objective's from noise).
Other levels: Karras' with rho 7 and 4, and quadratic ones in the time of the linear-beta VP path, as the paper picks them by
hand; learned for DPM++ 2M, no verdict. The last iteration is judged, but in the row whose test digits are held out: there the
best state, which they chose. Each is judged by 2,000 samples: Frechet distance in pixels and sliced Wasserstein distance to
all training data, precision and recall; its energy by the AUROC of the test digits against uniform noise and against its own
samples. Of the first, two more things are judged that
need no training: value guidance, and other numbers of steps (`fewstep sample --steps`). Finished rows are kept in --rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import models
from fewstep.commands import generate
from fewstep.config import FinetuneConfig
from fewstep.data import Data, load_data
from fewstep.denoiser import Denoiser
from fewstep.dxmi import FinetuneState, make_state
from fewstep.finetuning import finetune
from fewstep.goal import make_goal
from fewstep.learn import learn_schedule
from fewstep.levels import learn_levels
from fewstep.metrics import auroc, frechet_distance, precision_recall, sliced_wasserstein
from fewstep.path import VP
from fewstep.run import read_lines, write_json
from fewstep.sampler import Sampler, in_steps, start_where_data_are
from fewstep.schedule import karras
from fewstep.start import gaussian_of
from schedules import append
from tables import ablations

HERE = Path(__file__).parent
REFERENCE = "reference"
FREE = {"trust": 1e9}
PUBLISHED = {"density_iterations": 0, "velocity_decay": 0.99} | FREE


def ends(model: Denoiser) -> tuple[float, float]:
    return model.path.sigma_min, model.path.sigma_max


def quadratic(model: Denoiser, steps: int) -> Tensor:
    """Levels at the squares of evenly spaced times of the linear-beta VP path."""
    clock = VP()
    first = clock.time(torch.tensor(math.atan(model.path.sigma_max), dtype=torch.float64))
    return model.path.time(clock.angle(first * torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 2))


def learned_for(solver: str) -> Callable[[Denoiser, int], Tensor]:
    def levels(model: Denoiser, n: int) -> Tensor:
        g = torch.Generator().manual_seed(0)
        return learn_schedule(model, solver=solver, steps=[n], generator=g).times(model.path, n)

    return cache(levels)


@cache
def own(model: Denoiser, n: int, density: bool) -> Tensor:
    """As `fewstep finetune` learns them for itself, with a density or without."""
    config = FinetuneConfig() if density else FinetuneConfig(density_iterations=0)
    return learn_levels(model, n, make_goal(load_data("digits").train), config).times(model.path, n)


LEVELS: dict[str, Callable[[Denoiser, int], Tensor]] = {
    "Karras' levels": lambda model, n: karras(*ends(model)).times(model.path, n),
    "levels of rho 4": lambda model, n: karras(*ends(model), rho=4.0).times(model.path, n),
    "quadratic levels": quadratic,
    "levels learned for DPM++ 2M": learned_for("dpmpp_2m"),
}
TRAINED: dict[str, tuple[int, dict[str, Any]]] = {
    REFERENCE: (4, {}),
    **{name: (4, {}) for name in LEVELS},
    "the density's score": (4, {"score": "density"}),
    "any number of x as the density": (4, {"density": "scalar"}),
    "any number of x, and its score": (4, {"density": "scalar", "score": "density"}),
    "step noises as they start": (4, {"lr_std": 0.0}),
    "no trust region": (4, FREE),
    "tau 0": (4, {"tau": 0.0}),
    "published objective, a value per step": (4, PUBLISHED),
    "published objective, shared value, sigmoid time cost": (4, PUBLISHED | {"value": "shared", "time_cost": "sigmoid"}),
    "published objective, shared value, linear time cost": (4, PUBLISHED | {"value": "shared", "time_cost": "linear"}),
    "published objective, shared value, no time cost": (4, PUBLISHED | {"value": "shared", "time_cost": "none"}),
    "2 steps": (2, {}),
    "2 steps, digits held out": (2, {}),
    "1 step": (1, {}),
}
HELD_OUT = {"2 steps, digits held out"}  # the run is held against the test digits, and the best state is judged
GUIDANCE = (0.5, 2.0, 8.0)
OTHER_STEPS = (1, 2, 3, 6, 8, 10)
COUNT = 2000


def drawn(sampler: Sampler, data: Data, count: int, seed: int) -> Tensor:
    return generate(sampler, sampler.times, count, data.shape, "", 1000 + seed)[0]


def first(denoiser: Denoiser, times: Tensor, data: Data) -> Sampler:
    """What a sampler on these levels begins as: ancestral, from the data's Gaussian."""
    sampler = Sampler(denoiser, times)
    start_where_data_are(sampler, gaussian_of(data.train))
    return sampler


def guided(state: FinetuneState, data: Data, count: int, seed: int, guidance: float) -> Tensor:
    sampler, g = state.averaged.module, torch.Generator().manual_seed(1000 + seed)
    return sampler.sample(sampler.start(count, data.shape, g), g, None, state.averaged_value.module, guidance)


def judge(x: Tensor, data: Data, energy: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
    precision, recall = precision_recall(x.flatten(1), data.train.flatten(1))
    found = {"fd": frechet_distance(x.flatten(1), data.train.flatten(1)), "precision": precision, "recall": recall}
    found["sw"] = sliced_wasserstein(x, data.train, generator=torch.Generator().manual_seed(0))
    if energy is not None:
        noise = 2 * torch.rand(data.test.shape, generator=torch.Generator().manual_seed(1)) - 1
        with torch.no_grad():
            known = energy(data.test)
            found |= {"auroc_noise": auroc(known, energy(noise)), "auroc_samples": auroc(known, energy(x))}
    return {k: float(f"{v:.5g}") for k, v in found.items()}


def learned(
    denoiser: Denoiser, data: Data, times: Tensor, config: FinetuneConfig, held_out: bool
) -> tuple[FinetuneState, dict[str, float]]:
    """The state, of held-out data the best one, and what it took."""
    began = time.process_time()
    state = make_state(denoiser, times, config, data.shape)
    for _ in finetune(state, data.train, make_goal(data.test) if held_out else None):
        pass
    about = {
        "cpu_seconds": round(time.process_time() - began, 1),
        "pace": state.pace,
        "rolled_back": state.rolled_back + state.fallen,
    }
    if held_out:
        state.restore_best()
        about |= {"held_out_auroc": state.best["held_out_auroc"]}
    return state, about


def run(model: str, file: Path, seeds: int, quick: bool, only: list[str] | None) -> None:
    data, denoiser, count = load_data("digits"), models.load_denoiser(model), 100 if quick else COUNT
    for seed in range(seeds):
        finished = {row["row"] for row in read_lines(file) if row["seed"] == seed}

        def keep(row: str, steps: int, found: dict, seed: int = seed) -> None:
            append(file, {"row": row, "seed": seed, "steps": steps} | found)
            print(f"{row}, seed {seed}: {found}", flush=True)

        for name, (steps, changed) in TRAINED.items():
            if name in finished or (only and name not in only):
                continue
            config = FinetuneConfig(**changed, seed=seed)
            if quick:
                short = {k: min(10, getattr(config, k)) for k in ("iterations", "density_iterations")}
                config = dataclasses.replace(config, **short)
            made = LEVELS[name](denoiser, steps) if name in LEVELS else own(denoiser, steps, config.density_iterations > 0)
            try:
                state, about = learned(denoiser, data, made, config, name in HELD_OUT)
            except ValueError as error:  # not finite, collapsed or diverged, after all roll-backs
                keep(name, steps, {"failed": str(error)})
                continue
            sampler, value = state.averaged.module, state.averaged_value.module
            if name == REFERENCE:  # its own row is the last, so that a killed command leaves none of them out
                keep("ancestral", steps, judge(drawn(first(denoiser, sampler.times, data), data, count, seed), data))
                for scale in GUIDANCE:
                    keep(f"guidance {scale:g}", steps, judge(guided(state, data, count, seed, scale), data))
                for n in OTHER_STEPS:
                    other = in_steps(sampler, n)
                    keep(f"used in {n} steps", n, judge(drawn(other, data, count, seed), data))
                    plain = first(denoiser, other.times, data)
                    keep(f"ancestral in {n} steps", n, judge(drawn(plain, data, count, seed), data))
            if name in LEVELS:
                keep(f"ancestral, {name}", steps, judge(drawn(first(denoiser, sampler.times, data), data, count, seed), data))
            x = drawn(sampler, data, count, seed)
            keep(name, steps, judge(x, data, value.energy) | about)


def document(file: Path) -> dict:
    """What needs no training first, then the trained in their order."""
    rows, order = {(row["row"], row["seed"]): row for row in read_lines(file)}, ["", *TRAINED]
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "samples": COUNT,
        "changed": {name: changed for name, (_, changed) in TRAINED.items()},
        "rows": sorted(rows.values(), key=lambda row: order.index(row["row"] if row["row"] in TRAINED else "")),
    }


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN", help="folder of `fewstep train --data digits`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=TRAINED, metavar="ROW", help="only these rows of the trained ones")
    parser.add_argument("--quick", action="store_true", help="a check that everything runs")
    parser.add_argument("--rows", type=Path, help="the file of finished rows; default runs/ablations.jsonl")
    args = parser.parse_args()
    file = args.rows or HERE.parent / "runs" / ("ablations_quick.jsonl" if args.quick else "ablations.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    run(args.model, file, args.seeds, args.quick, args.only)
    result = document(file)
    write_json(file.with_suffix(".json") if args.quick else Path(__file__).with_suffix(".json"), result)
    print(ablations(result))


if __name__ == "__main__":
    main()
