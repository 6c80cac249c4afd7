"""Ours and LD3 with as many evaluations as each other, beside what each takes by default and everybody else, cell by cell.

    python benchmarks/budget.py --digits RUN     mixtures and digits, three seeds; writes benchmarks/budget.json

As `schedules.py`, whose rows and JSON it needs for everybody's errors, in both directions:

- ours with LD3's evaluations: the curve and each refinement fitted to 1,024 noises within 131,000 evaluations, what LD3 takes
  in the mean on mixtures beside its gradients: `fewstep schedule --noises 1024 --budget 131000`, and the default verdict;
- LD3 with ours: 30,000 evaluations, those of our curve and refinement together, and its gradients on top. It learns on 32
  noises instead of 100, holds out as many, and has as many epochs as that leaves. (With 50 and a teacher of half as many levels
  the teacher's own error spoils its many steps.)

Finished cells are kept in --rows.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fewstep import baselines
from fewstep.endpoint import Runs, mean_square, reference
from fewstep.run import read_lines, write_json
from fewstep.schedule import NAMED
from fewstep.tailor import LEVELS, draw_noise, fit_curve, refine_steps
from schedules import Model, angles, append, available, problem_of, seeded
from schedules_summary import OURS, geometric, key, row_of, shortfall

HERE = Path(__file__).parent
NOISES, BUDGET, SEEDS = 1024, 131_000, 3
LD3_BUDGET, LD3_NOISES, LD3_TEACHER = 30_000, 32, 64
MODELS = ("ring", "modes64", "spectrum", "digits")


def ours(model: Model, seed: int, solver: str, steps: list[int]) -> Iterator[tuple[int, Tensor, dict]]:
    """For each number of steps the angles that are kept, and what was spent."""
    about = {"levels": LEVELS, "sigma_min": model.low, "sigma_max": model.high}
    known = reference(model.denoiser, draw_noise(NOISES, model.shape, seeded(1000 * seed + 1)), **about)
    curve = fit_curve(model.denoiser, solver, known, budget=BUDGET)
    for n in steps:
        found = refine_steps(model.denoiser, curve, n, known, budget=BUDGET)
        kept = model.guarded(found, solver, n, seed)
        spent = curve.provenance["evaluations"] + found.provenance["refined"][str(n)]["evaluations"]
        yield n, kept.angles(n)[:-1], {"kept": kept.provenance["verdict"]["kept"][str(n)], "evaluations": spent}


def ld3(model: Model, seed: int, solver: str, steps: list[int]) -> Iterator[tuple[int, Tensor, dict]]:
    """As `ours`, of LD3. A run of Heun's method takes 2 n - 1 evaluations, of the other solvers n."""
    for n in steps:
        a_run = 2 * n - 1 if solver == "heun" else n
        left = LD3_BUDGET - 2 * LD3_NOISES * (2 * LD3_TEACHER - 1) - LD3_NOISES * len(NAMED) * a_run
        epochs = min(40, left // (2 * LD3_NOISES * a_run))
        peer = partial(baselines.ld3, noises=LD3_NOISES, epochs=epochs, batch=8, teacher=LD3_TEACHER)
        fit = baselines.fit(peer, problem_of(model, solver, n, seed))
        yield n, angles(fit.sigmas.tolist()), {"evaluations": fit.evaluations, "gradients": fit.gradients}


METHODS = {OURS: ours, "ld3": ld3}


def run(args: argparse.Namespace) -> None:
    made = available(args)
    before = {key(cell): row_of(cell) for cell in json.loads(args.schedules.read_text())["cells"]}
    done = {(*key(row), row["method"]) for row in every_row(args.rows)}
    for name, seed in itertools.product((name for name in MODELS if name in made), range(SEEDS)):
        model = made[name]()
        unseen = model.reference(seed, "test")
        for (method, find), solver in itertools.product(METHODS.items(), model.plan.solvers):
            wanted = [n for n in model.plan.steps if (name, solver, n, seed, method) not in done]
            if not wanted:
                continue
            for n, theta, about in find(model, seed, solver, wanted):
                runs = Runs(model.denoiser, solver, unseen.noise, batch_size=model.plan.batch_size)
                error = math.sqrt(mean_square(runs, theta, unseen.ends))
                row = {
                    "model": name,
                    "solver": solver,
                    "steps": n,
                    "seed": seed,
                    "method": method,
                    "rmse": float(f"{error:.5g}"),
                }
                append(args.rows / "budget" / f"{name}.jsonl", row | about)
                usual = before[key(row)]["methods"]
                print(*key(row), f"{method} {error:.4g}, {error / usual[method]['rmse']:.3f} of its usual error", flush=True)


def every_row(folder: Path) -> list[dict]:
    return [row for file in sorted((folder / "budget").glob("*.jsonl")) for row in read_lines(file)]


def summarise(rows: list[dict], before: Mapping[tuple, dict]) -> dict:
    """By model, with the usual budgets and with that of each raised or lowered to the other's: our errors over LD3's, over the
    best other's, and the share of cells that are best or within 2 %."""
    result = {}
    found = {(*key(row), row["method"]): row["rmse"] for row in rows}
    for name in (*MODELS, "all"):
        cells = [cell for cell in {k[:-1] for k in found} if name in (cell[0], "all")]
        result[name] = {"cells": len(cells)}
        for label, changed in (("usual", None), ("ours with LD3's evaluations", OURS), ("LD3 with ours", "ld3")):
            judged = []
            for cell in cells:
                other = {changed: {"rmse": found[(*cell, changed)]}} if changed else {}
                judged.append({"methods": before[cell]["methods"] | other})
            result[name][label] = {
                "of_ld3": geometric(cell["methods"][OURS]["rmse"] / cell["methods"]["ld3"]["rmse"] for cell in judged),
                "of_best": geometric(shortfall(cell)[0] for cell in judged),
                "best_or_within_2_percent": round(statistics.mean(shortfall(cell)[0] <= 1.02 for cell in judged), 3),
            }
    return result


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", metavar="RUN", help="folder of `fewstep train --data digits`")
    parser.add_argument("--rows", type=Path, default=HERE.parent / "runs" / "schedules", help="those of schedules.py")
    parser.add_argument("--schedules", type=Path, default=HERE / "schedules.json", help="the JSON of schedules.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    args.mnist = args.fashion = args.compile = None
    (args.rows / "budget").mkdir(parents=True, exist_ok=True)
    run(args)
    rows = every_row(args.rows)
    before = {key(cell): row_of(cell) for cell in json.loads(args.schedules.read_text())["cells"]}
    about = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "noises": NOISES, "budget": BUDGET}
    about |= {"ld3_noises": LD3_NOISES, "ld3_budget": LD3_BUDGET}
    result = about | {"summary": summarise(rows, before), "cells": rows}
    write_json(args.out, result)
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
