"""Is the schedule of a guided model its own? Of one class? Of a copy with other weights?

    python benchmarks/guidance.py                    three seeds, 2 minutes of CPU; writes guidance.json and its picture
    python benchmarks/guidance.py --model FOLDER     and how far copies of a trained model drift: bfloat16, int8, noise
    python benchmarks/guidance.py --model FOLDER --drift     only that; the rest stays in the JSON
    python benchmarks/guidance.py --labelled FOLDER  both of a network of `train --data digits --labels`; 10 minutes
    python benchmarks/guidance.py --draw             only the picture, from the JSON

Guidance: a ring of 8 Gaussians, whose classes are 4 pairs of neighbours of unequal weights and of stds 0.05 to 0.5, with
its exact conditional and unconditional denoisers. Per seed, solver, guidance scale and class: refined levels for 6 and 10
steps. Then every schedule is used on every model. cells: the endpoint error, on 4,096 fresh noises, of the schedule of the
row on the model of the column, relative to that of the model's own; "best free": the best of the free schedules, chosen on
the same noises, relative to it. "all" is one schedule for all classes at once. Geometric means over seeds. Of a network the
same, with the default budget and on 1,024 noises; neither has met a verdict.

Drift: a schedule is learned for the model with `fewstep schedule`, and held by `--check` against copies of it. noise p: a
normal perturbation of every tensor, p of its std. against refit: the schedule's error on the copy relative to that of a
schedule learned on the copy, on the check's noises.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep import fit
from fewstep.commands import guided, label_cond
from fewstep.config import LearnConfig
from fewstep.denoiser import Cond, Denoiser, Guided, shape_of
from fewstep.endpoint import Runs, deal, mean_square, reference
from fewstep.free import free_schedules
from fewstep.mixture import ring
from fewstep.models import load_denoiser
from fewstep.path import VE
from fewstep.report import COLOURS  # and the style of our pictures
from fewstep.run import write_json
from fewstep.schedule import Schedule
from fewstep.tailor import tailor

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "guidance.png"
SOLVERS, STEPS, SCALES = ("dpmpp_2m", "euler"), (6, 10), (1.0, 2.0, 4.0, 8.0)
KINDS = ("scales", "classes", "scales of digits", "classes of digits")
PATH = VE(0.02, 40.0)
CLASSES, STDS, SHARES = 4, (0.05, 0.1, 0.2, 0.5), (0.5, 0.7, 0.9, 0.5)
DRIFT_STEPS = (6, 10)


@dataclasses.dataclass(frozen=True)
class Effort:
    """noises: that a schedule is fitted to. budget: calls of the schedule's own model, per fit; a guided one, of two
    evaluations, counts as one here. judged, levels: noises that all are compared on, and the levels of their reference."""

    noises: int
    budget: int
    judged: int
    levels: int


EXACT = Effort(512, 160_000, 4096, 192)  # of fewer noises the few between two modes decide
NETWORK = Effort(LearnConfig.noises, LearnConfig.budget, 1024, 96)


class Classes(Denoiser):
    """E[x_0 | x, label] of the ring whose modes 2i and 2i + 1 are class i; the label CLASSES stands for none."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.shape = PATH, (2,)
        self.means = ring().means
        self.variances = torch.tensor(STDS, dtype=torch.float64).repeat_interleave(2) ** 2
        shares = torch.tensor(SHARES, dtype=torch.float64)
        self.weights = torch.stack([shares, 1 - shares], 1).flatten() / CLASSES
        own = torch.arange(2 * CLASSES) // 2
        allowed = own[None] == torch.arange(CLASSES + 1)[:, None]
        allowed[CLASSES] = True
        self.mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -math.inf)

    def forward(self, x: Tensor, t: Tensor | float, cond: Cond = None) -> Tensor:
        a, s = (torch.as_tensor(c).to(x).reshape(-1, 1, 1) for c in (self.path.alpha(t), self.path.sigma(t)))
        means, own = self.means.to(x), self.variances.to(x)[:, None]
        variance, difference = a**2 * own + s**2, x[:, None] - a * means
        log = self.weights.to(x).log() - (difference**2 / variance + variance.log()).sum(-1) / 2
        log = log + self.mask.to(x)[cond["label"] if cond else CLASSES]
        return (log.softmax(-1)[..., None] * (means + a * own * difference / variance)).sum(1)


def labels(*which: int) -> dict[str, Tensor]:
    return {"label": torch.tensor(which)}


def scales_models() -> dict[str, tuple[Denoiser, dict[str, Tensor]]]:
    model = Classes()
    return {f"{s:g}": (Guided(model, s, labels(CLASSES)), labels(*range(CLASSES))) for s in SCALES}


def class_models() -> dict[str, tuple[Denoiser, dict[str, Tensor]]]:
    model = Classes()
    return {f"{k}": (model, labels(k)) for k in range(CLASSES)} | {"all": (model, labels(*range(CLASSES)))}


def network_scales(folder: Path) -> dict[str, tuple[Denoiser, dict[str, Tensor]]]:
    model = load_denoiser(str(folder))
    return {f"{s:g}": (guided(model, s), label_cond(str(folder), model, range(10))) for s in SCALES}


def network_classes(folder: Path) -> dict[str, tuple[Denoiser, dict[str, Tensor]]]:
    model = load_denoiser(str(folder))
    asked = {f"{k}": [k] for k in range(10)} | {"all": list(range(10))}
    return {name: (model, label_cond(str(folder), model, which)) for name, which in asked.items()}


def exchanged(
    models: dict[str, tuple[Denoiser, dict[str, Tensor]]], solver: str, seed: int, effort: Effort = EXACT
) -> list[dict]:
    """The endpoint errors of every model's schedule, and of the free ones, on every model."""
    learned = {
        name: tailor(
            model,
            solver,
            STEPS,
            cond=cond,
            noises=effort.noises,
            budget=effort.budget * model.evaluations,
            generator=torch.Generator().manual_seed(seed),
        )
        for name, (model, cond) in models.items()
    }
    generator = torch.Generator().manual_seed(10_000 + seed)
    rows = []
    for name, (model, cond) in models.items():
        free = free_schedules(model.path.sigma_min, model.path.sigma_max)
        noise = torch.randn(effort.judged, *shape_of(model), generator=generator)
        known = reference(model, noise, cond, levels=effort.levels, batch_size=len(noise))
        runs = Runs(model, solver, known.noise, deal(cond, torch.arange(len(noise))), batch_size=len(noise))
        for n in STEPS:

            def error(schedule: Schedule, n=n, runs=runs, known=known) -> float:
                return math.sqrt(mean_square(runs, schedule.angles(n)[:-1], known.ends))

            rows.append(
                {
                    "solver": solver,
                    "steps": n,
                    "seed": seed,
                    "model": name,
                    "errors": {k: error(s) for k, s in learned.items()},
                    "curves": {k: error(dataclasses.replace(s, grids={})) for k, s in learned.items()},
                    "free": {k: error(s) for k, s in free.items()},
                    "levels": learned[name].sigmas(n)[:-1].tolist(),
                }
            )
    return rows


def matrix(rows: list[dict], solver: str, steps: int, kind: str = "errors") -> dict[str, dict[str, float]]:
    """schedule -> model -> error relative to the model's own schedule; geometric means over seeds."""
    mine = [row for row in rows if (row["solver"], row["steps"]) == (solver, steps)]
    names = list(dict.fromkeys(row["model"] for row in mine))

    def mean_ratio(model: str, other: Callable[[dict], float]) -> float:
        logs = [math.log(other(row) / row["errors"][row["model"]]) for row in mine if row["model"] == model]
        return math.exp(sum(logs) / len(logs))

    cells = {a: {b: mean_ratio(b, lambda row, a=a: row[kind][a]) for b in names} for a in names}
    return cells | {"best free": {b: mean_ratio(b, lambda row: min(row["free"].values())) for b in names}}


def copies(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The model's weights, as a copy might have them."""
    g = torch.Generator().manual_seed(0)

    def int8(w: Tensor) -> Tensor:
        step = w.abs().max() / 127
        return (w / step).round() * step if step > 0 else w

    def noisy(share: float) -> dict[str, Tensor]:
        spread = {k: float(w.std()) if w.numel() > 1 else 0.0 for k, w in weights.items()}
        return {k: w + share * spread[k] * torch.randn(w.shape, generator=g) for k, w in weights.items()}

    return {
        "the same": weights,
        "bfloat16": {k: w.bfloat16().float() for k, w in weights.items()},
        "int8 per tensor": {k: int8(w) for k, w in weights.items()},
    } | {f"noise {share:.0%}": noisy(share) for share in (0.01, 0.05, 0.2, 0.5)}


def drift(model: Path, seed: int = 0) -> list[dict]:
    """What `fewstep schedule --check` says of copies of a model of `fewstep train`, and whether a refit would help."""
    weights, rows = load_file(model / "model.safetensors"), []
    config = LearnConfig(steps=DRIFT_STEPS, seed=seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        _, learned = fit.fit(str(model), None, root / "schedule", config)
        for name, changed in copies(weights).items():
            folder = root / name
            folder.mkdir()
            shutil.copy(model / "config.json", folder)
            save_file({k: w.contiguous() for k, w in changed.items()}, folder / "model.safetensors")
            started = time.process_time()
            found, said = fit.check(root / "schedule", str(folder), config)
            seconds = time.process_time() - started
            _, refitted = fit.fit(str(folder), None, root / f"{name} refit", config)
            was, again = learned.provenance["verdict"], refitted.provenance["verdict"]
            steps = {}
            for n, row in found["steps"].items():
                before = was["steps"][n]["errors"][was["kept"][n]]
                own = again["steps"][n]["errors"][again["kept"][n]]
                error = row["errors"]["learned"]
                steps[n] = {"error": error, "against_before": error / before, "against_refit": error / own}
                steps[n]["best_free_against_refit"] = row["errors"][row["best_free"]] / own
            rows.append(
                {"copy": name, "seed": seed, "refit": found["refit"], "steps": steps}
                | {"evaluations": found["evaluations"], "cpu_seconds": round(seconds, 1), "said": said[-1]}
            )
            print(name, said[-1], {n: {k: round(v, 3) for k, v in cell.items()} for n, cell in steps.items()}, flush=True)
    return rows


def draw(result: dict, file: Path) -> None:
    """A matrix for each number of steps of dpmpp_2m, for scales and for classes; beside them where the levels lie."""
    figure, axes = plt.subplots(2, 3, figsize=(12.5, 7.2), gridspec_kw={"width_ratios": [1, 1, 1.1]})
    for row, (key, what) in zip(axes, (("scales", "guidance scale"), ("classes", "class")), strict=True):
        rows = result[key]
        for axis, steps in zip(row, STEPS, strict=False):
            cells = matrix(rows, "dpmpp_2m", steps)
            columns = list(cells["best free"])
            shown = [[math.log(cells[a][b]) for b in columns] for a in cells]
            axis.imshow(shown, cmap="RdYlGn_r", vmin=-math.log(6), vmax=math.log(6), aspect="auto")
            for i, a in enumerate(cells):
                for j, b in enumerate(columns):
                    ink = "white" if abs(shown[i][j]) > math.log(4) else "black"
                    axis.text(j, i, f"{cells[a][b]:.2f}", ha="center", va="center", fontsize=8, color=ink)
            axis.set_xticks(range(len(columns)), columns)
            axis.set_yticks(range(len(cells)), cells)
            axis.set(xlabel=f"used at {what}", ylabel=f"schedule of {what}", title=f"by {what}, {steps} steps: error / own")
            axis.spines[:].set_visible(False)
        axis = row[2]
        mine = [r for r in rows if (r["solver"], r["steps"]) == ("dpmpp_2m", 10)]
        names = list(dict.fromkeys(r["model"] for r in mine))
        for k, name in enumerate(names):
            for r in (r for r in mine if r["model"] == name):
                label, colour = name if r["seed"] == mine[0]["seed"] else None, plt.cm.viridis(k / max(1, len(names) - 1) * 0.9)
                if name == "all":
                    colour = COLOURS["slow"]
                axis.semilogy(range(10), r["levels"], ".-", lw=0.9, ms=4, color=colour, label=label)
        axis.set(title=f"10 levels by {what}, one line per seed", xlabel="step", ylabel="sigma")
        axis.legend(title=what, frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a folder of `fewstep train`, for the drift of its copies")
    parser.add_argument("--labelled", type=Path, metavar="FOLDER", help="a model with classes; the rest stays in the JSON")
    parser.add_argument("--drift", action="store_true", help="only the copies of --model; the rest stays in the JSON")
    parser.add_argument("--draw", action="store_true", help="only the picture")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    if args.drift and (args.labelled or not args.model):
        parser.error("--drift needs --model, and goes without --labelled")
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    if not args.draw:
        result |= {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
        if args.model:
            result["drift"] = {"model": json.loads((args.model / "config.json").read_text())["config"]["data"]}
            result["drift"]["rows"] = drift(args.model)
            write_json(args.out, result)
        wanted = {} if args.drift or args.labelled else {"scales": (scales_models(), EXACT), "classes": (class_models(), EXACT)}
        if args.labelled:
            wanted["scales of digits"] = network_scales(args.labelled), NETWORK
            wanted["classes of digits"] = network_classes(args.labelled), NETWORK
        for key, (models, effort) in wanted.items():
            started = time.process_time()
            each = (exchanged(models, solver, seed, effort) for solver in SOLVERS for seed in range(args.seeds))
            result[key] = [row for rows in each for row in rows]
            result["cpu_seconds"] = result.get("cpu_seconds", {}) | {key: round(time.process_time() - started)}
            write_json(args.out, result)
    for key in (key for key in KINDS if key in result):
        for solver in SOLVERS:
            for steps in STEPS:
                print(f"{key}, {solver}, {steps} steps (rows: schedule of; columns: used at)")
                for name, row in matrix(result[key], solver, steps).items():
                    print(f"{name:>10}", *(f"{b}: {v:5.2f}" for b, v in row.items()))
    if {"scales", "classes"} <= result.keys():  # else --drift or --labelled has filled a new file
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(result, args.picture)


if __name__ == "__main__":
    main()
