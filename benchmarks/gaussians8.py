"""Eight Gaussians in two dimensions, five steps: does fine-tuning fix the sampler, and does the energy carry the density?

    python benchmarks/gaussians8.py            three seeds, about 6 minutes each; writes benchmarks/gaussians8.json

Per seed: train an MLP denoiser, take its five-step ancestral sampler as the start, fine-tune it with the energy, and
judge the last iterate's averaged weights. sw: sqrt(mean over 1,000 directions of W_2^2), 50,000 samples, the mean over
five disjoint reference sets; floor: the same between two real sets. auroc: the energy, data against uniform points on
(-4, 4)^2; ideal: with the exact energy. correlation: of -E with log p over uniform points where the density is at least
that of the data's lowest percentile.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import time
from pathlib import Path

import torch

from fewstep.config import FinetuneConfig, TrainConfig
from fewstep.dxmi import finetune, make_state
from fewstep.energy import Value
from fewstep.metrics import auroc, sliced_wasserstein
from fewstep.mixture import ring
from fewstep.sampler import Sampler
from fewstep.schedule import karras
from fewstep.training import TrainState, train

STEPS = 5
TRAIN = TrainConfig(iterations=4000, batch_size=512, network="mlp", width=128, depth=2, sigma_min=0.15, sigma_max=10.0)
FINETUNE = FinetuneConfig(
    iterations=4000, batch_size=128, lr=1e-4, lr_std=1e-2, lr_value=1e-3, tau=0.05, last_std=0.02, momentum=0.9
)
DATA = 50_000


def pretrain(seed: int, iterations: int = TRAIN.iterations) -> tuple[Sampler, torch.Tensor]:
    """The start: a five-step ancestral sampler of a denoiser trained on 50,000 points, and these points."""
    data = ring().sample(DATA, torch.Generator().manual_seed(seed))
    state = TrainState((2,), dataclasses.replace(TRAIN, seed=seed, iterations=iterations))
    for _ in train(state, data):
        pass
    denoiser = state.averaged.module
    return Sampler(denoiser, karras(TRAIN.sigma_min, TRAIN.sigma_max).times(denoiser.path, STEPS), last_std=0.02), data


def quality(sampler: Sampler, n: int, references: int, directions: int, seed: int = 77) -> float:
    """Sliced Wasserstein distance of n samples, the mean over disjoint reference sets."""
    g = torch.Generator().manual_seed(seed)
    samples = sampler.sample(sampler.start(n, (2,), g), g)
    return distance(samples, n, references, directions, g)


def distance(samples: torch.Tensor, n: int, references: int, directions: int, g: torch.Generator) -> float:
    return sum(sliced_wasserstein(samples, ring().sample(n, g), directions, g) for _ in range(references)) / references


def energy_quality(energy, n: int = 10_000, seed: int = 78) -> dict[str, float]:
    exact, g = ring(), torch.Generator().manual_seed(seed)
    data, uniform = exact.sample(n, g), torch.rand(n, 2, generator=g) * 8 - 4
    with torch.no_grad():
        dense = exact.energy(uniform) < exact.energy(data).quantile(0.99)
        both = torch.stack([energy(uniform[dense]).double(), exact.energy(uniform[dense]).double()])
        return {"auroc": auroc(energy(data), energy(uniform)), "correlation": float(torch.corrcoef(both)[0, 1])}


def one_seed(seed: int, config: FinetuneConfig, n: int, references: int, directions: int) -> dict:
    started = time.process_time()
    start, data = pretrain(seed)
    row = {"seed": seed, "pretraining_cpu_seconds": round(time.process_time() - started, 1)}
    row["sw_start"] = quality(start, n, references, directions)
    started = time.process_time()
    state = make_state(start.denoiser, start.times, dataclasses.replace(config, seed=seed), (2,))
    for _ in finetune(state, data):
        pass
    row["finetuning_cpu_seconds"] = round(time.process_time() - started, 1)
    value: Value = state.averaged_value.module
    row |= {"sw": quality(state.averaged.module, n, references, directions)} | energy_quality(value.energy)
    row["step_noise"] = [round(float(s), 4) for s in state.averaged.module.std().detach()]
    return row


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of FinetuneConfig")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".json")))
    args = parser.parse_args()
    config, references, directions = dataclasses.replace(FINETUNE, **dict(pair.split("=", 1) for pair in args.set)), 5, 1000

    g = torch.Generator().manual_seed(79)
    floor = distance(ring().sample(args.samples, g), args.samples, references, directions, g)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "samples": args.samples,
        "config": dataclasses.asdict(config),
        "sw_floor": floor,
        "ideal": energy_quality(ring().energy),
        "seeds": [],
    }
    print(f"floor {floor:.4f}, ideal AUROC {result['ideal']['auroc']:.4f}")
    for seed in range(args.seeds):
        row = one_seed(seed, config, args.samples, references, directions)
        result["seeds"].append(row)
        kept = (row["sw"] - floor) / (row["sw_start"] - floor)
        print(
            f"seed {seed}: SW {row['sw_start']:.3f} -> {row['sw']:.3f} ({kept:.0%} of the excess left), "
            f"AUROC {row['auroc']:.3f}, correlation {row['correlation']:.3f}, {row['finetuning_cpu_seconds']} s of CPU",
            flush=True,
        )
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
