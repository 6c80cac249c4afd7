"""The main job on real data, small but true in every part: 8x8 digits, four evaluations per sample.

Train a diffusion model, learn its schedule, fine-tune a four-step sampler with its energy, and put all of it beside the
free schedules, from the same noise. Each part is a run folder of its own, made as its command makes it by default, so a
killed demo continues.
"""

from __future__ import annotations

import json
import time
from pathlib import Path as File
from typing import Any

import torch

from fewstep import commands, evaluation, models, report
from fewstep.config import FinetuneConfig, LearnConfig, Solver, Source, TrainConfig
from fewstep.energy import mean_energy
from fewstep.fit import fit
from fewstep.metrics import auroc
from fewstep.run import open_run, write_json
from fewstep.tune import finetune
from fewstep.verdict import sentences

STEPS = 4
SLOW = 50
SOLVER: Solver = "dpmpp_2m"
SOURCE = Source("digits")


def run_demo(
    out: File, seed: int, quick: bool, track: commands.Track = commands.silent, meter: commands.Meter = commands.unmetered
) -> tuple[list[str], File]:
    """Everything into the folder `out`; returns the lines that say what was gained, and the page."""
    clock = time.perf_counter()
    open_run(out, "demo", {"seed": seed, "quick": quick})
    train_config = TrainConfig(iterations=100 if quick else 4000, sigma_min=0.2, sigma_max=10.0, seed=seed)
    finetune_config = FinetuneConfig(iterations=40, density_iterations=20, seed=seed) if quick else FinetuneConfig(seed=seed)
    model, fitted, tuned = out / "model", out / "schedule", out / "sampler"

    commands.train(SOURCE, model, train_config, track=track)
    small: dict[str, Any] = {"noises": 64, "budget": 7000, "verdict_noises": 32, "verdict_doublings": 0} if quick else {}
    learn_config = LearnConfig(solver=SOLVER, steps=(STEPS,), seed=seed, **small)
    _, learned = fit(str(model), None, fitted, learn_config, track=track, meter=meter)
    finetune(str(model), SOURCE, tuned, STEPS, finetune_config, track=track, meter=meter)
    _, rows, floor = evaluation.evaluate(
        str(model),
        SOURCE,
        out / "evaluation",
        (STEPS, 10) if quick else (STEPS, 6, 10, 20, SLOW),
        ("karras", "log_linear", str(fitted)),
        (SOLVER,),
        (str(tuned),),
        count=300 if quick else 2000,
        seeds=1 if quick else 3,
        track=track,
    )
    facts = pictures(out, seed)
    facts |= {"seed": seed, "learned": learned.provenance, "floor": floor, "rows": rows}
    return write_report(out, rows, floor, facts, clock)


def pictures(out: File, seed: int) -> dict[str, Any]:
    """All PNGs but quality.png; returns the figures behind them."""
    data = commands.load(SOURCE)
    denoiser = models.load_denoiser(str(out / "model"))
    sampler, value = models.load_sampler(out / "sampler")
    learned = commands.find_schedule(str(out / "schedule"), denoiser)
    schedules = commands.baselines(learned) | {"learned": learned}

    def draw(model, times):
        return commands.generate(model, times, 300, data.shape, SOLVER, seed)[0]

    slow = draw(denoiser, schedules["karras"].times(denoiser.path, SLOW))
    sets = {f"the model, {SLOW} evaluations": slow}
    sets |= {f"{name}, {STEPS}": draw(denoiser, s.times(denoiser.path, STEPS)) for name, s in schedules.items()}
    sets |= {f"fine-tuned, {STEPS}": draw(sampler, sampler.times)}
    report.samples_figure(out / "samples.png", sets, columns=8, rows=8)

    noise = torch.rand(len(data.test), *data.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    kinds = {"held-out digits": data.test, "generated digits": sets[f"fine-tuned, {STEPS}"], "uniform noise": noise}
    energies = {name: mean_energy(value, x, float(sampler.last_std)) for name, x in kinds.items()}
    reference = energies["held-out digits"]
    aurocs = {name: auroc(reference, e) for name, e in energies.items() if name != "held-out digits"}
    report.energy_figure(out / "energy.png", energies, aurocs)
    return {"auroc": aurocs}


def write_report(
    out: File, rows: list[dict[str, Any]], floor: dict[str, float], facts: dict[str, Any], clock: float
) -> tuple[list[str], File]:
    def mean(method: str, steps: int) -> float:
        values = [row["fd"] for row in rows if row["method"] == method and row["steps"] == steps]
        return sum(values) / len(values)

    slow = max(row["steps"] for row in rows)
    free = {name: mean(f"{name}, {SOLVER}", STEPS) for name in ("karras", "log-linear")}
    best, tuned = min(free.values()), mean("fine-tuned", STEPS)
    gained = (
        f"At {STEPS} evaluations, Fréchet distance in pixels (FD-pixels): DPM++ 2M on Karras' levels {free['karras']:.2f}, "
        f"log-linear {free['log-linear']:.2f}, learned {mean(f'learned, {SOLVER}', STEPS):.2f}; fine-tuned {tuned:.2f}, "
        f"{tuned / best:.2f} of the best free one's. The model at {slow} evaluations (DPM++ 2M, Karras): "
        f"{mean(f'karras, {SOLVER}', slow):.2f}; held-out digits: {floor['fd']:.2f}."
    )
    verdict = " ".join(f"{line}." for line in sentences(facts["learned"]["verdict"]))
    energy = (
        f"Energy, held-out digits against uniform noise: AUROC {facts['auroc']['uniform noise']:.3f}; against generated digits "
        f"{facts['auroc']['generated digits']:.3f} (0.5: cannot be told apart)."
    )
    seconds = time.perf_counter() - clock
    short = (
        f"Done in {seconds:.0f} s: FD-pixels at {STEPS} evaluations {tuned:.2f} fine-tuned, {free['karras']:.2f} with DPM++ 2M "
        "on Karras' levels."
    )
    write_json(out / "results.json", facts | {"seconds": round(seconds, 1)})
    sections = [
        report.section(
            "Samples from the same noise",
            f"The slow model takes {SLOW} evaluations, all others {STEPS}; all but the fine-tuned under DPM++ 2M.",
            out / "samples.png",
        ),
        report.section(
            "Where the steps go",
            f"The learned curve serves every number of steps; {STEPS} steps have refined levels of their own.",
            out / "schedule" / "curve.png",
        ),
        report.section(
            "Does the schedule help?",
            verdict,
            out / "schedule" / "verdict.png",
        ),
        report.section(
            "Quality against evaluations",
            "Fréchet distance in pixels to the training digits (not an FID), mean and range over seeds.",
            out / "evaluation" / "quality.png",
            evaluation.table_of(rows),
        ),
        report.section(
            "The energy",
            "Learned with the sampler; low is plausible. Held-out digits were seen by neither.",
            out / "energy.png",
        ),
    ]
    page = out / "report.html"
    said = [gained, verdict, energy]
    report.write_page(page, "fewstep demo: 8x8 digits in 4 evaluations", said, sections, json.dumps(facts, indent=1))
    return [*said, short], page
