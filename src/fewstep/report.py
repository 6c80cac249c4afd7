"""The pictures of a run, and the one page that shows them."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path as File
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from jinja2 import Template
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor

from fewstep.schedule import Schedule
from fewstep.tailor import learned_on_the_way

plt.rcParams.update({"figure.dpi": 130, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
COLOURS = {"karras": "C0", "log-linear": "C1", "learned": "C2", "fine-tuned": "C3", "slow": "0.3"}


def tile(images: Tensor, columns: int) -> np.ndarray:
    """Images (n, c, h, w) in [-1, 1] as one array (rows h, columns w) or (rows h, columns w, 3), with a thin gap."""
    x = ((images.detach().float().cpu().clamp(-1, 1) + 1) / 2).numpy()
    n, c, h, w = x.shape
    rows, gap = math.ceil(n / columns), max(1, h // 16)
    canvas = np.ones((rows * (h + gap) - gap, columns * (w + gap) - gap, c))
    for k in range(n):
        top, left = k // columns * (h + gap), k % columns * (w + gap)
        canvas[top : top + h, left : left + w] = x[k].transpose(1, 2, 0)
    return canvas[..., 0] if c == 1 else canvas[..., :3]


def is_images(x: Tensor) -> bool:
    return x.ndim == 4 and x.shape[1] in (1, 3)


def samples_figure(file: File, sets: dict[str, Tensor], columns: int = 10, rows: int = 4) -> None:
    """Samples of several methods side by side: images as grids, vectors as a scatter of their first two coordinates."""
    width = 6.0 if len(sets) == 1 else 3.1
    figure, axes = plt.subplots(1, len(sets), figsize=(width * len(sets), width * rows / columns + 0.4), squeeze=False)
    for axis, (name, x) in zip(axes[0], sets.items(), strict=True):
        if is_images(x):
            axis.imshow(tile(x[: columns * rows], columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.axis("off")
        else:
            flat = x.flatten(1)[:2000].cpu()
            axis.scatter(flat[:, 0], flat[:, min(1, flat.shape[1] - 1)], s=2, alpha=0.4)
            axis.set_aspect("equal", adjustable="datalim")
        axis.set_title(name, fontsize=8)
    _save(figure, file)


def curve_figure(file: File, schedules: dict[str, Schedule], steps: Sequence[int]) -> None:
    """Where the levels of each schedule lie: sigma/alpha against the share of the steps, the last curve with its grids."""
    figure, axis = plt.subplots(figsize=(5.6, 3.4))
    u = torch.linspace(0, 1, 400, dtype=torch.float64)
    for name, schedule in schedules.items():
        axis.semilogy(u, torch.tan(schedule.at(u)), label=name, color=COLOURS.get(name))
    name, schedule = list(schedules.items())[-1]
    for n, marker, size in zip(steps, "os^v", (8, 4, 4, 4), strict=False):
        levels = torch.tan(schedule.angles(n)[:-1].clamp(max=schedule.theta[0]))  # pure noise is beyond every picture
        style = {"color": COLOURS.get(name), "ms": size, "mfc": "none" if size == 8 else None}
        at, how = torch.linspace(0, 1, n + schedule.to_data)[:n], "refined" if n in schedule.grids else "its"
        axis.semilogy(at, levels, marker, label=f"{how} {n} levels", **style)
    axis.set(xlabel="share of the steps u (0 = noise, 1 = cleanest level before data)", ylabel="noise level sigma/alpha")
    axis.legend(frameon=False, fontsize=8)
    _save(figure, file)


def verdict_figure(file: File, verdict: dict[str, Any]) -> None:
    """A verdict's errors against the number of steps: the schedule, the model's default, the learned curves, every free one."""
    figure, axis = plt.subplots(figsize=(5.6, 4.0))
    rows = {  # the errors of those that were given up are of other noises
        int(n): {name: error for name, error in row["errors"].items() if name not in row.get("given_up", {})}
        for n, row in verdict["steps"].items()
    }
    entered = list(dict.fromkeys(name for errors in rows.values() for name in errors))
    colours = {"learned": "C2", "default": "k"} | {name: "yellowgreen" for name in entered if learned_on_the_way(name)}
    others = iter(["C0", "C1", "C3", "C4", "C5", "C6", "C9", "C7", "C8"])
    for name in entered:
        family = name if learned_on_the_way(name) else name.removesuffix(" to data")
        new = family not in colours
        if new:
            colours[family] = next(others, "0.7")
        free, line = family not in ("learned", "default"), "v-" if name.endswith("to data") or name == "dmn" else "o-"
        style: dict[str, Any] = {"color": colours[family], "ms": 4, "lw": 1, "alpha": 0.6 if free else 1.0}
        axis.loglog(list(rows), [errors.get(name) or math.nan for errors in rows.values()], line, **style)
        if new or not free:
            axis.plot([], [], line, **style, label=family)
    if any(map(learned_on_the_way, entered)):
        axis.plot([], [], "o-", color="yellowgreen", ms=4, lw=1, label="learned on the way")
    axis.plot([], [], "ko", ms=4, label="down to sigma_min and then data")
    axis.plot([], [], "kv", ms=4, label="to data")
    axis.set_xticks(list(rows), [f"{n}" for n in rows])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel=f"steps of {verdict['solver']}", ylabel=f"{verdict['measure']}, up to {verdict['noises']} unseen noises")
    axis.legend(frameon=False, fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(-0.12, 1))
    _save(figure, file)


def quality_figure(file: File, rows: list[dict[str, Any]], metric: str, label: str, floor: float | None = None) -> None:
    """Quality against the number of evaluations: one line per method, mean and range over seeds."""
    figure, axis = plt.subplots(figsize=(5.6, 3.4))
    for method in dict.fromkeys(row["method"] for row in rows):
        points: dict[int, list[float]] = {}
        for row in rows:
            if row["method"] == method:
                points.setdefault(row["evaluations"], []).append(row[metric])
        x = sorted(points)
        mean = [float(np.mean(points[n])) for n in x]
        below = [m - min(points[n]) for n, m in zip(x, mean, strict=True)]
        above = [max(points[n]) - m for n, m in zip(x, mean, strict=True)]
        base = next((colour for key, colour in COLOURS.items() if key in method), None)
        style = "*" if len(x) == 1 else ("--o" if "euler" in method else "-o")
        size = 11 if style == "*" else 4
        axis.errorbar(x, mean, [below, above], fmt=style, color=base, label=method, ms=size, capsize=2, lw=1.2)
    if floor is not None:
        axis.axhline(floor, color="0.6", lw=1, ls=":", label="held-out data")
    axis.set(xscale="log", yscale="log", xlabel="evaluations of the network per sample", ylabel=label)
    ticks = sorted({row["evaluations"] for row in rows})
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.legend(frameon=False, fontsize=7, ncols=2)
    _save(figure, file)


def energy_figure(
    file: File, energies: dict[str, Tensor], aurocs: dict[str, float], label: str = "energy", threshold: float | None = None
) -> None:
    """Histograms of the energy, or another score, on several kinds of samples; the first is the reference."""
    figure, axis = plt.subplots(figsize=(5.6, 3.0))
    everything = torch.cat(list(energies.values())).cpu()
    bins = np.linspace(float(everything.quantile(0.002)), float(everything.quantile(0.998)), 60).tolist()
    for name, energy in energies.items():
        known = name if name not in aurocs else f"{name} (AUROC {aurocs[name]:.3f})"
        axis.hist(energy.cpu().numpy(), bins, density=True, alpha=0.55, label=known)
    if threshold is not None:
        axis.axvline(threshold, color="0.3", lw=1, ls=":", label="flagged above")
    axis.set(xlabel=f"{label} (low = plausible)", ylabel="density")
    axis.legend(frameon=False, fontsize=8)
    _save(figure, file)


def loss_figure(file: File, metrics: list[dict[str, float]], names: Sequence[str]) -> None:
    """Logged metrics against iterations."""
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 2.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        known = [(row["step"], row[name]) for row in metrics if name in row]
        axis.plot(*zip(*known, strict=True) if known else ([], []), lw=1)
        axis.set(title=name, xlabel="iteration")
    _save(figure, file)


def _save(figure, file: File) -> None:
    figure.savefig(file, bbox_inches="tight")
    plt.close(figure)


PAGE = Template(
    """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
img{max-width:100%;display:block;margin:.6rem 0}table{border-collapse:collapse;margin:.6rem 0}
td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}
.gain{background:#f2f7f2;padding:.6rem 1rem;border-left:4px solid #4a4}pre{background:#f6f6f6;padding:.6rem;overflow:auto}
figcaption{color:#555}</style></head><body><h1>{{ title }}</h1>
{% for line in summary %}<p class="gain">{{ line }}</p>{% endfor %}
{% for section in sections %}<h2>{{ section.title }}</h2><p>{{ section.text }}</p>
{% if section.image %}<img alt="{{ section.title }}" src="data:image/png;base64,{{ section.image }}">{% endif %}
{% if section.table %}<table><tr>{% for h in section.table[0] %}<th>{{ h }}</th>{% endfor %}</tr>
{% for row in section.table[1:] %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>{% endif %}
{% endfor %}{% if details %}<details><summary>All settings and figures</summary><pre>{{ details }}</pre></details>{% endif %}
</body></html>
""",
    autoescape=True,
)


def section(title: str, text: str, image: File | None = None, table: list[list[str]] | None = None) -> dict[str, Any]:
    """One part of the page; table: rows of cells, the head first."""
    encoded = base64.b64encode(image.read_bytes()).decode() if image else None
    return {"title": title, "text": text, "image": encoded, "table": table}


def write_page(file: File, title: str, summary: list[str], sections: list[dict[str, Any]], details: str = "") -> None:
    """One self-contained HTML page, pictures inside."""
    page = PAGE.render(title=title, summary=summary, sections=sections, details=details)
    file.write_text(page, encoding="utf-8")
