"""From any denoiser on any path, and with labels: 8 x 8 digits, 4 steps on the levels that they learn, all by default.

    fewstep train --data digits --iterations 4000 --sigma-min 0.2 --sigma-max 10 --out RUN
    fewstep train --data digits --iterations 4000 --sigma-min 0.2 --sigma-max 10 --labels --out LABELLED
    python benchmarks/starts.py RUN LABELLED             three seeds; writes benchmarks/starts.json
    python benchmarks/starts.py RUN LABELLED --quick     in miniature, into --rows; says nothing but that it runs

Levels are learned as `fewstep finetune` does, for ancestral sampling, one fit for all seeds. The same network is taken for a
denoiser on the variance-exploding and on the linear (flow-matching) path: other scales of x. With labels, sampler and energy
are told the class, in the data's shares.
start: ancestral sampling on the same levels, which is what a sampler begins as. fd: Frechet distance in pixels of 2,000
samples to all training digits. obeyed: share of samples that a classifier (98.7 % right on held-out digits) takes for the class
that was asked for. energy_right: share of held-out digits whose energy is lowest with their own label of the ten. Finished
rows are kept in --rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import time
from pathlib import Path

import torch
from torch import Tensor

from ablations import COUNT, first, judge
from fewstep import models
from fewstep.config import FinetuneConfig
from fewstep.data import Data, load_data
from fewstep.denoiser import Cond, Denoiser, OnPath
from fewstep.dxmi import make_state
from fewstep.energy import Value
from fewstep.finetuning import finetune
from fewstep.goal import make_goal
from fewstep.levels import learn_levels
from fewstep.path import Linear
from fewstep.run import read_lines, write_json
from fewstep.sampler import Sampler
from images import Classifier, seen, train_classifier
from schedules import append
from tables import starts

HERE = Path(__file__).parent
STEPS = 4
LABELS = "with labels"


def denoisers(run: str, labelled: str) -> dict[str, Denoiser]:
    plain = models.load_denoiser(run)
    return {
        "variance exploding": plain,
        "linear (flow)": OnPath(plain, Linear(plain.path.sigma_min, plain.path.sigma_max)),
        LABELS: models.load_denoiser(labelled),
    }


def drawn(sampler: Sampler, data: Data, count: int, seed: int, asked: Tensor | None) -> Tensor:
    g = torch.Generator().manual_seed(1000 + seed)
    return sampler.sample(sampler.start(count, data.shape, g), g, told(asked))


def told(labels: Tensor | None) -> Cond:
    return None if labels is None else {"class_labels": labels}


def judged(x: Tensor, data: Data, asked: Tensor | None, net: Classifier, value: Value | None = None) -> dict[str, float]:
    found = judge(x, data, value.energy if value is not None and asked is None else None)
    if asked is None:
        return found
    found["obeyed"] = float((seen(net, x, True)[1] == asked).double().mean())
    if value is not None:
        with torch.no_grad():
            each = [value.energy(data.test, told(torch.full((len(data.test),), k))) for k in range(10)]
        found["energy_right"] = float((torch.stack(each).argmin(0) == data.test_labels).double().mean())
    return found


def run(args: argparse.Namespace, file: Path) -> None:
    data, count = load_data("digits"), 100 if args.quick else COUNT
    assert data.train_labels is not None
    net = train_classifier(data, 2 if args.quick else 30)
    known = denoisers(args.model, args.labelled)
    learned: dict[str, Tensor] = {}
    for seed in range(args.seeds):
        for name, denoiser in known.items():
            if any((row["row"], row["seed"]) == (name, seed) for row in read_lines(file)):
                continue
            labels = data.train_labels if name == LABELS else None
            goal = make_goal(data.train, labels)
            if name not in learned:
                learned[name] = learn_levels(denoiser, STEPS, goal, FinetuneConfig()).times(denoiser.path, STEPS)
            asked = (
                labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).repeat(2)[:count]]
                if labels is not None
                else None
            )
            config = FinetuneConfig(seed=seed)
            if args.quick:
                config = dataclasses.replace(config, iterations=10, density_iterations=10)
            start = judged(drawn(first(denoiser, learned[name], data), data, count, seed, asked), data, asked, net)
            began = time.process_time()
            state = make_state(denoiser, learned[name], config, data.shape)
            for _ in finetune(state, goal):
                pass
            seconds = round(time.process_time() - began, 1)
            x = drawn(state.averaged.module, data, count, seed, asked)
            tuned = judged(x, data, asked, net, state.averaged_value.module)
            append(file, {"row": name, "seed": seed, "start": start, "fine-tuned": tuned, "cpu_seconds": seconds})
            print(f"{name}, seed {seed}: {start} -> {tuned}, {seconds} s", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN", help="folder of `fewstep train --data digits`")
    parser.add_argument("labelled", metavar="LABELLED", help="the same with --labels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a check that everything runs")
    parser.add_argument("--rows", type=Path, help="the file of finished rows; default runs/starts.jsonl")
    args = parser.parse_args()
    file = args.rows or HERE.parent / "runs" / ("starts_quick.jsonl" if args.quick else "starts.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    run(args, file)
    result = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "samples": COUNT, "rows": read_lines(file)}
    write_json(file.with_suffix(".json") if args.quick else Path(__file__).with_suffix(".json"), result)
    print(starts(result))


if __name__ == "__main__":
    main()
