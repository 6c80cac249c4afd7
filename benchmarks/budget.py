"""More evaluations and fewer: ours with as many as LD3 takes, LD3 with as many as ours, and ours in brief, cell by cell.

    python benchmarks/budget.py --digits RUN     mixtures and digits, three seeds; writes benchmarks/budget.json

As `schedules.py`, whose rows and JSON it needs for everybody's errors. Changed, one at a time:

- ours with LD3's evaluations: the curve and each refinement fitted to 1,024 noises within 131,000 evaluations, what LD3 takes
  in the mean on mixtures beside its gradients, for each: `fewstep schedule --noises 1024 --budget 131000`, default verdict;
- LD3 with ours: 30,000 evaluations, those of our curve and refinement together, and its gradients on top. It learns on 32
  noises instead of 100, holds out as many, and has as many epochs as that leaves. (With 50 and a teacher of half as many levels
  the teacher's own error spoils its many steps.)
- ours in brief, for models that are dear to ask: `--noises 64 --budget 7500 --verdict-noises 64 --verdict-doublings 0`, for
  Heun's method, which asks twice in a step, with the usual 15,000.

Finished cells are kept in --rows.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fewstep import baselines
from fewstep.config import LearnConfig
from fewstep.endpoint import Runs, mean_square, reference
from fewstep.run import read_lines, write_json
from fewstep.schedule import NAMED
from fewstep.tailor import LEVELS, draw_noise, fit_curve, refine_steps
from schedules import Model, angles, append, available, problem_of, seeded
from schedules_summary import FREE, OURS, geometric, key, row_of, shortfall

HERE = Path(__file__).parent
SEEDS = 3
LARGE = LearnConfig(noises=1024, budget=131_000)
BRIEF = LearnConfig(noises=64, budget=7500, verdict_noises=64, verdict_doublings=0)
LD3_BUDGET, LD3_NOISES, LD3_TEACHER = 30_000, 32, 64
MODELS = ("ring", "modes64", "spectrum", "digits")


def ours(config: LearnConfig, model: Model, seed: int, solver: str, steps: list[int]) -> Iterator[tuple[int, Tensor, dict]]:
    """For each number of steps the angles that are kept, and what was spent, on the verdict apart."""
    budget = max(config.budget, LearnConfig.budget) if solver == "heun" else config.budget
    about = {"levels": LEVELS, "sigma_min": model.low, "sigma_max": model.high}
    known = reference(model.denoiser, draw_noise(config.noises, model.shape, seeded(1000 * seed + 1)), **about)
    curve = fit_curve(model.denoiser, solver, known, budget=budget)
    for n in steps:
        found = refine_steps(model.denoiser, curve, n, known, budget=budget)
        kept = model.guarded(found, solver, n, seed, config)
        spent = {"evaluations": curve.provenance["evaluations"] + found.provenance["refined"][str(n)]["evaluations"]}
        spent |= {"verdict_evaluations": kept.provenance["verdict"]["evaluations"]}
        yield n, kept.angles(n)[:-1], {"kept": kept.provenance["verdict"]["kept"][str(n)]} | spent


def ld3(model: Model, seed: int, solver: str, steps: list[int]) -> Iterator[tuple[int, Tensor, dict]]:
    """As `ours`, of LD3. A run of Heun's method takes 2 n - 1 evaluations, of the other solvers n."""
    for n in steps:
        a_run = 2 * n - 1 if solver == "heun" else n
        left = LD3_BUDGET - 2 * LD3_NOISES * (2 * LD3_TEACHER - 1) - LD3_NOISES * len(NAMED) * a_run
        epochs = min(40, left // (2 * LD3_NOISES * a_run))
        peer = partial(baselines.ld3, noises=LD3_NOISES, epochs=epochs, batch=8, teacher=LD3_TEACHER)
        fit = baselines.fit(peer, problem_of(model, solver, n, seed))
        yield n, angles(fit.sigmas.tolist()), {"evaluations": fit.evaluations, "gradients": fit.gradients}


CHANGED: dict[str, tuple[str, Callable]] = {  # whose levels, and how they are found
    "ours with LD3's evaluations": (OURS, partial(ours, LARGE)),
    "LD3 with ours": ("ld3", ld3),
    "ours in brief": (OURS, partial(ours, BRIEF)),
}


def run(args: argparse.Namespace, before: Mapping[tuple, dict]) -> None:
    made = available(args)
    done = {(*key(row), row["changed"]) for row in every_row(args.rows)}
    for name, seed in itertools.product((name for name in MODELS if name in made), range(SEEDS)):
        model = made[name]()
        unseen = model.reference(seed, "test")
        for (changed, (method, find)), solver in itertools.product(CHANGED.items(), model.plan.solvers):
            wanted = [n for n in model.plan.steps if (name, solver, n, seed, changed) not in done]
            if not wanted:
                continue
            for n, theta, about in find(model, seed, solver, wanted):
                runs = Runs(model.denoiser, solver, unseen.noise, batch_size=model.plan.batch_size)
                error = math.sqrt(mean_square(runs, theta, unseen.ends))
                row = {"model": name, "solver": solver, "steps": n, "seed": seed, "changed": changed}
                append(args.rows / "budget" / f"{name}.jsonl", row | {"rmse": float(f"{error:.5g}")} | about)
                usual = before[key(row)]["methods"][method]["rmse"]
                print(*key(row), f"{changed}: {error:.4g}, {error / usual:.3f} of its usual error", flush=True)


def every_row(folder: Path) -> list[dict]:
    rows = [row for file in sorted((folder / "budget").glob("*.jsonl")) for row in read_lines(file)]
    return [row for row in rows if row.get("changed") in CHANGED]


def summarise(rows: list[dict], before: Mapping[tuple, dict]) -> dict:
    """By model, as usual and with each change: our error over LD3's, the best other's and the best free one's, the share of
    cells that are best or within 2 %, and of those worse than the best free one by more; evaluations, median."""
    result = {}
    found = {(*key(row), row["changed"]): row for row in rows}
    for name in (*MODELS, "all"):
        cells = [cell for cell in dict.fromkeys(k[:-1] for k in found) if name in (cell[0], "all")]
        result[name] = {"cells": len(cells)}
        for changed, (method, _) in (("usual", (OURS, None)), *CHANGED.items()):
            rows_of = [] if changed == "usual" else [found[(*cell, changed)] for cell in cells]
            judged = [{"methods": before[cell]["methods"]} for cell in cells]
            for cell, row in zip(judged, rows_of, strict=False):
                cell["methods"] = cell["methods"] | {method: row}
            errors = [{k: m["rmse"] for k, m in cell["methods"].items()} for cell in judged]
            over_free = [each[OURS] / min(each[k] for k in FREE) for each in errors]
            result[name][changed] = {
                "of_ld3": geometric(each[OURS] / each["ld3"] for each in errors),
                "of_best": geometric(shortfall(cell)[0] for cell in judged),
                "of_best_free": geometric(over_free),
                "best_or_within_2_percent": round(statistics.mean(shortfall(cell)[0] <= 1.02 for cell in judged), 3),
                "worse_than_free_by_2_percent": round(statistics.mean(ratio > 1.02 for ratio in over_free), 3),
            }
            for kind in ("evaluations", "verdict_evaluations"):
                if rows_of and kind in rows_of[0]:
                    result[name][changed][kind] = statistics.median(row[kind] for row in rows_of)
    return result


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", metavar="RUN", required=True, help="folder of `fewstep train --data digits`")
    parser.add_argument("--rows", type=Path, default=HERE.parent / "runs" / "schedules", help="those of schedules.py")
    parser.add_argument("--schedules", type=Path, default=HERE / "schedules.json", help="the JSON of schedules.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    args.mnist = args.fashion = args.compile = None
    (args.rows / "budget").mkdir(parents=True, exist_ok=True)
    before = {key(cell): row_of(cell) for cell in json.loads(args.schedules.read_text())["cells"]}
    run(args, before)
    rows = every_row(args.rows)
    about = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    result = about | {"summary": summarise(rows, before), "cells": rows}
    write_json(args.out, result)
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
