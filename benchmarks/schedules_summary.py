"""What the cells of `schedules.py` come to: the summary, the JSON and the figure."""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullFormatter

from fewstep.report import COLOURS  # and the style of our pictures
from fewstep.tailor import LEARNED_CURVES

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "schedules.png"

OURS, CURVE = "fewstep", "fewstep curve"
STANDARD = ("karras", "karras3", "log_linear", "kl_optimal", "linear", "beta", "dmn")  # free, as they are published
TO_DATA = tuple(f"{name}_to_data" for name in STANDARD if name != "dmn")  # the same curves in our reading
FREE = STANDARD + TO_DATA
GUARDED = ("karras", "log_linear", "kl_optimal")
SOLVERS = ("dpmpp_2m", "unipc", "euler", "ipndm", "deis", "heun")
MEASURES = ("rmse", "median", "sw", "fd")
FEW = 8  # "few steps" of the summary: up to here


def rounded(x: float) -> float:
    return float(f"{x:.5g}")


def geometric(values: Iterable[float]) -> float | None:
    logs = [math.log(max(v, 1e-300)) for v in values]
    return rounded(math.exp(sum(logs) / len(logs))) if logs else None


def kind_of(model: str) -> str:
    return "mixtures" if model in ("ring", "modes64", "spectrum") else "images"


def summarise(rows: list[dict]) -> dict:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["model"], []).append(row)
    for kind in ("mixtures", "images"):
        if chosen := [row for row in rows if kind_of(row["model"]) == kind]:
            groups[kind] = chosen
    return {name: one_summary(group) for name, group in groups.items()} | {"all": one_summary(rows)}


def one_summary(rows: list[dict]) -> dict:
    few = [row for row in rows if row["steps"] <= FEW]
    standing = Counter(leader(row) for row in rows)
    worse = [
        {k: row[k] for k in ("model", "solver", "steps", "seed")} | {"than": name} | row["against"][name]
        for row in rows
        for name in GUARDED
        if row["against"][name]["low"] > 1
    ]
    ours = [row["ours"] for row in rows]
    return {
        "cells": len(rows),
        "few": {
            "cells": len(few),
            "of_best_standard": geometric(row["against"]["standard"]["ratio"] for row in few),
            "of_best_free": geometric(row["against"]["free"]["ratio"] for row in few),
            "curve_of_best_standard": geometric(
                row["methods"][CURVE]["rmse"] / min(row["methods"][n]["rmse"] for n in STANDARD) for row in few
            ),
            "of_best_standard_by_solver": {
                s: geometric(r["against"]["standard"]["ratio"] for r in few if r["solver"] == s)
                for s in SOLVERS
                if any(r["solver"] == s for r in few)
            },
            "median_of_best_standard": geometric(
                row["methods"][OURS]["median"] / min(row["methods"][n]["median"] for n in STANDARD)
                for row in few
                if "median" in row["methods"][OURS]
            ),
            "median_of_best_free": geometric(
                row["methods"][OURS]["median"] / min(row["methods"][n]["median"] for n in FREE)
                for row in few
                if "median" in row["methods"][OURS]
            ),
            "sw_of_best_standard": geometric(
                row["methods"][OURS]["sw"] / min(row["methods"][n]["sw"] for n in STANDARD) for row in few
            ),
        },
        "of_best_standard": geometric(row["against"]["standard"]["ratio"] for row in rows),
        "of_best_free": geometric(row["against"]["free"]["ratio"] for row in rows),
        "best_or_within_2_percent": rounded(sum(shortfall(row)[0] <= 1.02 for row in rows) / max(len(rows), 1)),
        "the_same_but_for_ld3": rounded(sum(shortfall(row, "ld3")[0] <= 1.02 for row in rows) / max(len(rows), 1)),
        "strictly_best": dict(standing.most_common()),
        "worse_than_guarded": worse,
        "kept_a_free_grid": sum(each["kept"] not in ("learned", *LEARNED_CURVES) for each in ours),
        "evaluations": {k: max((each[f"{k}_evaluations"] for each in ours), default=0) for k in ("curve", "refine", "verdict")},
        "seconds": {
            k: rounded(sum(each[f"{k}_seconds"] for each in ours) / max(len(ours), 1)) for k in ("curve", "refine", "verdict")
        },
    }


def leader(row: dict) -> str:
    """The method with the strictly smallest error, ours as one; "tie" where a file keeps the best free levels."""
    errors = {name: cell["rmse"] for name, cell in row["methods"].items() if name != CURVE}
    first, second = sorted(errors, key=lambda name: errors[name])[:2]
    return first if errors[first] < errors[second] * (1 - 1e-6) else "tie"


def shortfall(row: dict, but_for: str = "") -> tuple[float, str]:
    """Our error over the best other method's, and its name."""
    rival = min((n for n in row["methods"] if n not in (OURS, CURVE, but_for)), key=lambda n: row["methods"][n]["rmse"])
    return row["methods"][OURS]["rmse"] / row["methods"][rival]["rmse"], rival


def lost(rows: list[dict]) -> list[dict]:
    found = []
    for row in rows:
        factor, rival = shortfall(row)
        if factor > 1.02:
            cell = {k: row[k] for k in ("model", "solver", "steps", "seed")}
            found.append(cell | {"to": rival, "factor": rounded(factor), "kept": row["ours"]["kept"]})
    return sorted(found, key=lambda cell: -cell["factor"])


def cost_of_peers(rows: list[dict]) -> dict:
    """By kind of model: the mean cost of a fit of the fitted ones."""
    result: dict[str, dict] = {}
    for row in rows:
        for name, cell in row["methods"].items():
            if cell["evaluations"] and name not in (OURS, CURVE):
                result.setdefault(row["model"], {}).setdefault(name, []).append(cell)
    return {
        model: {
            name: {k: rounded(sum(c[k] for c in cells) / len(cells)) for k in ("evaluations", "gradients", "seconds")}
            for name, cells in peers.items()
        }
        for model, peers in result.items()
    }


def document(rows: list[dict], before: dict | None = None) -> dict:
    """The JSON of these rows; before: an earlier one, whose other cells are kept, and what its peers cost."""
    if before:
        known = {key(row) for row in rows}
        rows = [row_of(cell) for cell in before["cells"] if key(cell) not in known] + rows
    old, new = (before or {}).get("cost_of_peers", {}), cost_of_peers(rows)
    costs = {model: old.get(model, {}) | new.get(model, {}) for model in old | new}
    about = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    summary = {"summary": summarise(rows), "lost": lost(rows), "cost_of_peers": costs}
    return about | summary | {"cells": [cell_of(row) for row in rows]}


def key(row: dict) -> tuple:
    return tuple(row[k] for k in ("model", "solver", "steps", "seed"))


def cell_of(row: dict) -> dict:
    """What the JSON keeps of a row: by measure and method instead of by method and measure, and of levels only ours."""
    head = {k: row[k] for k in ("model", "solver", "steps", "seed", "noises")}
    measures = {k: {n: c[k] for n, c in row["methods"].items() if k in c} for k in MEASURES if k in row["methods"][OURS]}
    return head | {"ours": row["ours"], "sigmas": row["methods"][OURS]["sigmas"], "against": row["against"]} | measures


def row_of(cell: dict) -> dict:
    """The other way round; what the peers' fits took is not in a cell."""
    methods: dict[str, dict] = {n: {"evaluations": 0} for n in cell["rmse"]}
    for measure in (k for k in MEASURES if k in cell):
        for n, value in cell[measure].items():
            methods[n][measure] = value
    methods[OURS]["sigmas"] = cell["sigmas"]
    return {k: v for k, v in cell.items() if k not in (*MEASURES, "sigmas")} | {"methods": methods}


def write_document(file: Path, doc: dict) -> None:
    """One line for a cell, so that the file can be read and compared."""
    cells = ",\n".join(" " + json.dumps(cell) for cell in doc["cells"])
    head = json.dumps({k: v for k, v in doc.items() if k != "cells"}, indent=1)
    draft = file.with_suffix(".part")
    draft.write_text(head[:-2] + ',\n "cells": [\n' + cells + "\n ]\n}\n")
    draft.replace(file)


# --- figure -------------------------------------------------------------------------------------------------------

SHOWN = {
    "karras": ("karras", COLOURS["karras"], "-"),
    "log_linear": ("log-linear", COLOURS["log-linear"], "-"),
    "kl_optimal": ("kl-optimal", "C4", "-"),
    "dmn": ("DMN", "C5", "-"),
    "ays": ("AYS", "C6", ":"),
    "gits_l2": ("GITS (L2)", "C9", ":"),
    "oss": ("OSS", "C8", ":"),
    "ld3": ("LD3", "C3", ":"),
    CURVE: ("fewstep, curve alone", COLOURS["learned"], "--"),
    OURS: ("fewstep", COLOURS["learned"], "-"),
}
TITLES = {
    "ring": "8 modes, 2-D",
    "modes64": "10 modes, 64-D",
    "spectrum": "image-like spectrum, 64-D",
    "digits": "digits 8 x 8",
    "mnist_slim": "MNIST DDPM 32 x 32",
    "fashion": "Fashion-MNIST 28 x 28",
}


def draw(doc: dict, file: Path, solvers: tuple[str, ...] = ("dpmpp_2m", "unipc")) -> None:
    """Endpoint error against the number of steps: a row for a solver, a column for a model, means over seeds."""
    models = [m for m in TITLES if any(c["model"] == m for c in doc["cells"])]
    figure, axes = plt.subplots(
        len(solvers), len(models), figsize=(2.6 * len(models) + 0.4, 2.5 * len(solvers) + 0.6), squeeze=False
    )
    handles: dict[str, object] = {}
    for i, solver in enumerate(solvers):
        for j, model in enumerate(models):
            axis = axes[i, j]
            cells = [c for c in doc["cells"] if c["model"] == model and c["solver"] == solver]
            if not cells:
                axis.axis("off")
                continue
            for name, (label, colour, style) in SHOWN.items():
                steps = sorted({c["steps"] for c in cells if name in c["rmse"]})
                errors = [geometric(c["rmse"][name] for c in cells if c["steps"] == n and name in c["rmse"]) for n in steps]
                ours = name in (OURS, CURVE)
                mark = "o" if ours or len(steps) < 4 else None
                look = {"lw": 2.2 if name == OURS else 1.1, "ms": 3.5, "zorder": 3 if ours else 2}
                (line,) = axis.plot(steps, errors, color=colour, ls=style, marker=mark, label=label, **look)
                handles.setdefault(label, line)
            ticks = sorted({c["steps"] for c in cells})
            axis.set(xscale="log", yscale="log")
            axis.set_xticks([t for t in ticks if t != 5], [str(t) for t in ticks if t != 5])
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.xaxis.set_minor_locator(plt.NullLocator())
            axis.yaxis.set_minor_formatter(NullFormatter())
            if j == 0:
                axis.set_ylabel(f"{solver}: endpoint error")
            if i == 0:
                axis.set_title(TITLES[model], fontsize=9)
            if i == len(solvers) - 1:
                axis.set_xlabel("steps")
    figure.tight_layout(rect=(0, 0.11 if len(solvers) > 1 else 0.2, 1, 1))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)
