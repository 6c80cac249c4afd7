"""What more evaluations buy: ours with as many as LD3 takes, beside the default and everybody else, cell by cell.

    python benchmarks/budget.py --digits RUN     mixtures and digits, three seeds; writes benchmarks/budget.json

As `schedules.py`, whose rows and JSON it needs (the others' errors, and ours with 15,000 evaluations), with the curve and each
refinement fitted to 1,024 noises within 131,000 evaluations, what LD3 takes in the mean on mixtures beside its gradients:
`fewstep schedule --noises 1024 --budget 131000`. The verdict is the default one. Finished cells are kept in --rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch

from fewstep.endpoint import Runs, mean_square, reference
from fewstep.run import write_json
from fewstep.tailor import LEVELS, draw_noise, fit_curve, refine_steps
from schedules import append, available, rows_in, seeded
from schedules_summary import OURS, geometric, key, row_of, shortfall

HERE = Path(__file__).parent
NOISES, BUDGET = 1024, 131_000
MODELS = ("ring", "modes64", "spectrum", "digits")


def run(args: argparse.Namespace) -> None:
    made = available(args)
    default = {key(cell): row_of(cell) for cell in json.loads(args.schedules.read_text())["cells"]}
    done = {key(row) for row in rows_in(args.rows / "budget")}
    for name in (name for name in MODELS if name in made):
        model = made[name]()
        about = {"levels": LEVELS, "sigma_min": model.low, "sigma_max": model.high}
        for seed in range(model.plan.seeds):
            known = reference(model.denoiser, draw_noise(NOISES, model.shape, seeded(1000 * seed + 1)), **about)
            unseen = model.reference(seed, "test")
            for solver in model.plan.solvers:
                wanted = [n for n in model.plan.steps if (name, solver, n, seed) not in done]
                if not wanted:
                    continue
                curve = fit_curve(model.denoiser, solver, known, budget=BUDGET)
                for n in wanted:
                    found = refine_steps(model.denoiser, curve, n, known, budget=BUDGET)
                    kept = model.guarded(found, solver, n, seed)
                    runs = Runs(model.denoiser, solver, unseen.noise, batch_size=model.plan.batch_size)
                    error = math.sqrt(mean_square(runs, kept.angles(n)[:-1], unseen.ends))
                    row = {"model": name, "solver": solver, "steps": n, "seed": seed, "rmse": float(f"{error:.5g}")}
                    row |= {"kept": kept.provenance["verdict"]["kept"][str(n)]}
                    row |= {"evaluations": curve.provenance["evaluations"] + found.provenance["refined"][str(n)]["evaluations"]}
                    append(args.rows / "budget" / f"{name}.jsonl", row)
                    rival = default[key(row)]["methods"]["ld3"]["rmse"]
                    print(*key(row), f"{error:.4g}, {error / rival:.3f} of LD3's", flush=True)


def summarise(rows: list[dict], default: Mapping[tuple, dict]) -> dict:
    """By model: with this budget and with the default one, the errors over LD3's, over the best other's, and the share of cells
    that are best or within 2 %."""
    result = {}
    for name in (*MODELS, "all"):
        found = {}
        for label in ("default", "large"):
            ours = []
            for row in (row for row in rows if name in (row["model"], "all")):
                cell = default[key(row)]
                methods = cell["methods"] if label == "default" else cell["methods"] | {OURS: {"rmse": row["rmse"]}}
                ours.append({"methods": methods})
            found[label] = {
                "of_ld3": geometric(cell["methods"][OURS]["rmse"] / cell["methods"]["ld3"]["rmse"] for cell in ours),
                "of_best": geometric(shortfall(cell)[0] for cell in ours),
                "best_or_within_2_percent": round(statistics.mean(shortfall(cell)[0] <= 1.02 for cell in ours), 3),
            }
        result[name] = {"cells": len(ours)} | found
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
    rows = rows_in(args.rows / "budget")
    default = {key(cell): row_of(cell) for cell in json.loads(args.schedules.read_text())["cells"]}
    about = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "noises": NOISES, "budget": BUDGET}
    result = about | {"summary": summarise(rows, default), "cells": rows}
    write_json(args.out, result)
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
