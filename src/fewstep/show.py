"""What does a run folder hold?   A table for the terminal, and a page with pictures."""

from __future__ import annotations

import json
from pathlib import Path as File

import torch

from fewstep import report
from fewstep.commands import SCHEDULE
from fewstep.evaluation import ROWS, table_of
from fewstep.finetuning import doubt
from fewstep.models import PREFERENCE
from fewstep.prefer import read_known
from fewstep.run import read_config, read_lines
from fewstep.schedule import Schedule
from fewstep.scoring import TABLE, read_table
from fewstep.scoring import table_of as scores_table
from fewstep.verdict import sentences


def levels(schedule: Schedule, steps: int) -> str:
    """A grid as sigma/alpha, for people; from pure noise on, where that is infinite."""
    ratios = torch.tan(schedule.angles(steps)).tolist()
    return ", ".join("inf" if ratio > 1e9 else f"{ratio:.4g}" for ratio in ratios)


def show(folder: File) -> tuple[list[list[str]], File]:
    """What a run folder holds, as a table, and its page report.html, made from its files."""
    run, metrics = read_config(folder), read_lines(folder / "metrics.jsonl")
    settings = run["config"]
    table = [["setting", "value"], ["command", run["command"]], *([k, f"{v}"[:100]] for k, v in settings.items())]
    if metrics:
        table += [[f"{k} (last)", f"{v:.5g}"] for k, v in metrics[-1].items()]
    sections = []
    if run["command"] in ("train", "finetune") and metrics:
        names = ["loss"] if run["command"] == "train" else ["energy_gap", "value_loss", "sample_std", "held_out_sw"]
        report.loss_figure(folder / "metrics.png", metrics, names)
        text = "Means over 20 iterations; docs/metrics.md defines them."
        if said := doubt(metrics):
            text = f"{text} {said}"
        sections.append(report.section("Metrics", text, folder / "metrics.png"))
    pictures = {"schedule": "curve.png", "sample": "samples.png", "evaluate": "quality.png", "prefer": "preference.png"}
    pictures |= {"score": "scores.png"}
    if (name := pictures.get(run["command"])) and (folder / name).exists():
        sections.append(report.section(run["command"].capitalize(), "", folder / name))
    if (folder / TABLE).exists():
        known = read_table(folder)
        table = scores_table(known["rows"])
        text = f"Score: {known['score']}, higher = stranger; flagged above {known['threshold']:.4g}."
        strangest = folder / "strangest.png"
        sections.append(report.section("Strangest", text, strangest if strangest.exists() else None, table))
    if (folder / PREFERENCE).exists():
        table += [[k, f"{v:.5g}" if isinstance(v, float) else f"{v}"] for k, v in read_known(folder).items()]
    if (folder / SCHEDULE).exists():
        schedule = Schedule.load(folder / SCHEDULE)
        about = schedule.provenance
        table += [[f"levels of {n} steps", levels(schedule, n)] for n in sorted(schedule.grids)]
        table += [["verdict", line] for line in sentences(about["verdict"])] if "verdict" in about else []
        if (folder / "verdict.png").exists():
            sections.append(report.section("Verdict", " ".join(sentences(about["verdict"])), folder / "verdict.png"))
        sections.append(report.section("Provenance", "", None, [["what", "value"], *([k, f"{v}"] for k, v in about.items())]))
    if rows := read_lines(folder / ROWS):
        sections.append(report.section("Table", "Mean ± standard deviation over seeds.", None, table_of(rows)))
        table = table_of(rows)
    if run["command"] == "demo":
        if not (folder / "report.html").exists():
            raise ValueError(f"the demo in {folder} has not finished; repeat its command to continue it")
        return table, folder / "report.html"
    report.write_page(folder / "report.html", f"fewstep {run['command']}", [], sections, json.dumps(settings, indent=1))
    return table, folder / "report.html"
