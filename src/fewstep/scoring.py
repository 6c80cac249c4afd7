"""Which samples are strange?   A score for each, higher = stranger, beside those of held-out data.

A fine-tuned sampler scores with its energy (`mean_energy`), any other model with its denoising error (`denoising_error`), which
needs no training beyond the model's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep import models, report
from fewstep.commands import Track, data_settings, load, model_settings, require_answer, require_shape, silent
from fewstep.config import Source
from fewstep.data import load_samples
from fewstep.denoiser import Denoiser
from fewstep.energy import SIGMA, denoising_error, mean_energy
from fewstep.metrics import auroc
from fewstep.run import fingerprint, open_run, require_free, write_json

SCORES, TABLE = "scores.npz", "scores.json"
HELD_OUT = "held_out"
BATCH = 500


def score(
    model: str,
    source: Source,
    samples: Sequence[str],
    out: File,
    sigma: float | None = None,
    draws: int = 16,
    false_alarms: float = 0.05,
    device: str = "cpu",
    track: Track = silent,
) -> tuple[File, list[dict[str, Any]]]:
    """The scores of samples, and of the source's held-out data, into out/scores.npz, in their order; and a row for each set.

    samples: as for `load_samples`. sigma: of the denoising error. A row: samples, count, mean score; flagged, the share above
    the threshold, which the share `false_alarms` of the held-out data exceeds; and but for these auroc, the share of pairs with
    one of these in which the sample is the stranger. The threshold is in scores.npz and scores.json.
    """
    data = load(source)
    settings: dict[str, Any] = data_settings(source, data) | {"draws": draws, "false_alarms": false_alarms}
    denoiser, strange, about = scorer(model, sigma, draws, device)
    require_shape(denoiser, data.shape)
    sets = {HELD_OUT: data.test} | {label: load_samples(name, source.size) for label, name in labelled(samples).items()}
    for label, x in sets.items():
        if tuple(x.shape[1:]) != data.shape:
            raise ValueError(f"{label} has samples of shape {tuple(x.shape[1:])}, the data of {data.shape}")
    settings |= about | model_settings(model, denoiser, out)
    settings |= {f"samples: {label}": fingerprint([x]) for label, x in sets.items() if label != HELD_OUT}
    folder = require_free(out, "score", settings)
    if (folder / TABLE).exists():
        return folder, read_table(folder)["rows"]
    require_answer(denoiser, data.shape, None, device)
    open_run(folder, "score", settings)
    todo = [(label, part) for label, x in sets.items() for part in x.split(BATCH)]
    found: dict[str, list[Tensor]] = {label: [] for label in sets}
    for label, part in track(todo, len(todo), "scoring"):
        found[label].append(strange(part.to(device)).double().cpu())
    scores = {label: torch.cat(parts) for label, parts in found.items()}
    threshold = float(scores[HELD_OUT].quantile(1 - false_alarms))
    rows: list[dict[str, Any]] = []
    for label, each in scores.items():
        rows.append({"samples": label, "count": len(each), "mean": float(each.mean())})
        rows[-1] |= {"flagged": float((each > threshold).double().mean())}
        if label != HELD_OUT:
            rows[-1] |= {"auroc": auroc(scores[HELD_OUT], each)}
    aurocs: dict[str, float] = {row["samples"]: row["auroc"] for row in rows if "auroc" in row}
    report.energy_figure(folder / "scores.png", scores, aurocs, settings["score"], threshold)
    if report.is_images(data.test):
        order = {label: each.argsort(descending=True) for label, each in scores.items()}
        sorted_sets = {f"{label}, strangest first": sets[label][first] for label, first in order.items()}
        report.samples_figure(folder / "strangest.png", sorted_sets)
    arrays: dict[str, Any] = {label: each.numpy() for label, each in scores.items()}
    np.savez(folder / "part.npz", threshold=threshold, **arrays)
    os.replace(folder / "part.npz", folder / SCORES)
    write_json(folder / TABLE, {"score": settings["score"], "threshold": threshold, "rows": rows})
    return folder, rows


def scorer(
    model: str, sigma: float | None, draws: int, device: str
) -> tuple[Denoiser, Callable[[Tensor], Tensor], dict[str, Any]]:
    """The model, what scores samples (b, *d) with it, (b,), and that in settings."""
    if models.is_sampler(model):
        if sigma is not None:
            raise ValueError(f"{model} scores with its energy, so leave --sigma out; it is for the denoising error of a model")
        sampler, value = models.load_sampler(model, device)
        about = {"score": "energy", "value_fingerprint": fingerprint(value.state_dict().values())}
        return sampler.denoiser, partial(mean_energy, value, std=float(sampler.last_std), draws=draws), about
    denoiser, sigma = models.load_denoiser(model, device), SIGMA if sigma is None else sigma
    low, high = denoiser.path.sigma_min, denoiser.path.sigma_max
    if not low <= sigma <= high:
        raise ValueError(f"--sigma must lie among the model's levels, {low:g} to {high:g}; got {sigma:g}")
    return denoiser, partial(denoising_error, denoiser, sigma=sigma, draws=draws), {"score": "denoising error", "sigma": sigma}


def read_table(folder: File) -> dict[str, Any]:
    """What a folder of scores says: which score, the threshold, and the rows."""
    return json.loads((folder / TABLE).read_text())


def table_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The rows for people, the head first."""
    head = ["samples", "count", "mean score", "AUROC against held-out", "flagged"]
    return [head] + [
        [
            row["samples"],
            f"{row['count']}",
            f"{row['mean']:.4g}",
            f"{row['auroc']:.3f}" if "auroc" in row else "",
            f"{row['flagged']:.1%}",
        ]
        for row in rows
    ]


def labelled(names: Sequence[str]) -> dict[str, str]:
    """label -> name of some samples: what their file or folder is called."""
    found = {File(name).stem: name for name in names}
    if len(found) < len(names) or {HELD_OUT, "threshold"} & set(found):
        raise ValueError(f"{', '.join(names)} cannot be told apart in a table; leave repetitions out, or rename them")
    return found
