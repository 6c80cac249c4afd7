"""Can a four-step sampler be taught what somebody likes, and what does that cost?

    python benchmarks/preferences.py           three seeds; writes benchmarks/preferences.json and docs/pictures/preferences.png
    python benchmarks/preferences.py --quick   a smoke run, with numbers that mean nothing

Two things that can be measured on a digit stand for a taste: how far it is slanted (the shear of its ink's moments) and how
thick it is (its mean ink), each in standard deviations of the training digits. Each is followed (i) as it is and (ii) as a
preference learned from 300 choices between the model's own samples, of which 10 % are flipped and the close ones are ties.
A sampler of four steps, on levels that it learns, is fine-tuned with each, at weight w = 1 (--weights: at others), and without
any (w = 0).

The target of weight w is the data times exp(w r), which moves the taste by itself: `ideal` is that target among the training
digits, by importance. Quality is measured against the data, which a taste must leave, and against the target's own digits
(drawn again in proportion to exp(w r); `effective` says how many there are). Variety: a classifier's classes among 2,000
samples, as entropy/ln 10 (1: all ten equally often) and the smallest share of a class.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.stats import spearmanr
from sklearn.svm import SVC
from torch import Tensor

from fewstep.commands import generate
from fewstep.config import FinetuneConfig, PreferenceConfig, TrainConfig
from fewstep.data import Data, load_data
from fewstep.denoiser import Denoiser
from fewstep.dxmi import make_state
from fewstep.finetuning import finetune
from fewstep.goal import make_goal
from fewstep.levels import learn_levels
from fewstep.metrics import frechet_distance, sliced_wasserstein
from fewstep.prefer import draw_pairs
from fewstep.preference import CHOICES, learn_preference
from fewstep.run import write_json
from fewstep.sampler import Sampler
from fewstep.schedule import karras
from fewstep.training import TrainState, train

Reward = Callable[[Tensor], Tensor]

STEPS, WEIGHTS, PAIRS, FLIPPED, CLOSE = 4, (1.0,), 300, 0.1, 0.1
TRAIN = TrainConfig(iterations=4000, sigma_min=0.2, sigma_max=10.0)
FINETUNE = FinetuneConfig()
SAMPLES = 2000
HERE = Path(__file__).parent


def ink(x: Tensor) -> Tensor:
    """(b, 1, 8, 8) in [-1, 1] -> (b, 8, 8), 0 where nothing is written."""
    return ((x[:, 0] + 1) / 2).clamp(min=0)


def thick(x: Tensor) -> Tensor:
    """Mean ink: (b,)."""
    return ink(x).mean((1, 2))


def slanted(x: Tensor) -> Tensor:
    """How far the top leans to the right: minus the covariance of column and row, over the row's variance: (b,)."""
    mass = ink(x) + 1e-6
    mass = mass / mass.sum((1, 2), keepdim=True)
    place = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
    column, row = place[None, None, :], place[None, :, None]
    column, row = (each - (mass * each).sum((1, 2), keepdim=True) for each in (column, row))
    return -(mass * column * row).sum((1, 2)) / (mass * row**2).sum((1, 2))


def standardised(measure: Reward, data: Tensor) -> Reward:
    mean, std = measure(data).mean(), measure(data).std()
    return lambda x: (measure(x) - mean) / std


def pretrain(data: Data, seed: int, iterations: int) -> Denoiser:
    state = TrainState(data.shape, dataclasses.replace(TRAIN, iterations=iterations, seed=seed))
    for _ in train(state, data.train):
        pass
    return state.averaged.module


def taught(denoiser: Denoiser, data: Data, config: FinetuneConfig, reward: Reward | None, weight: float) -> Sampler:
    """A sampler on the levels that it learns, fine-tuned with a reward of this weight: the state that is best on held-out
    digits, tilted as the goal is, as `fewstep finetune` keeps it."""
    goal = make_goal(data.train, reward=reward, weight=weight)
    times = learn_levels(denoiser, STEPS, goal, config).times(denoiser.path, STEPS)
    state = make_state(denoiser, times, config, data.shape)
    for _ in finetune(state, goal, make_goal(data.test, reward=reward, weight=weight, least=1.0)):
        pass
    state.restore_best()
    return state.averaged.module


def choose(truth: Reward, items: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pairs of items and what somebody chose who likes what `truth` measures, but is careless."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.tensor(draw_pairs(len(items), count, seed))
    first, second = truth(items)[pairs].unbind(1)
    chosen = (first > second).float()
    flipped = torch.rand(count, generator=generator) < FLIPPED
    return pairs, torch.where((first - second).abs() < CLOSE, CHOICES["tie"], torch.where(flipped, 1 - chosen, chosen))


def variety(classes: Tensor, weights: Tensor | None = None) -> dict[str, float]:
    """Entropy of the classes 0..9 over ln 10, and the share of the rarest; weighted where weights are given."""
    share = torch.bincount(classes, weights, minlength=10).double()
    share = share / share.sum()
    return {"entropy": float(torch.special.entr(share).sum()) / math.log(10), "rarest": float(share.min())}


def judge(x: Tensor, truth: Reward, followed: Reward | None, weight: float, data: Data, classifier: SVC, seed: int) -> dict:
    """A sampler's samples x under the taste that it was (or, at weight 0, was not) taught."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tilt = torch.softmax(weight * (followed or truth)(data.train), 0)
    target = data.train[torch.multinomial(tilt, len(data.train), True, generator=generator)]
    labels = data.train_labels
    assert labels is not None
    row = {
        "truth": float(truth(x).mean()),
        "truth_ideal": float((tilt * truth(data.train)).sum()),
        "followed": float(followed(x).detach().mean()) if followed else 0.0,
        "effective": float(1 / (tilt**2).sum()),
        "fd": frechet_distance(x, data.train),
        "fd_target": frechet_distance(x, target),
        "fd_ideal": frechet_distance(target, data.train),
        "sw": sliced_wasserstein(x, data.train, 500, generator),
        "sw_target": sliced_wasserstein(x, target, 500, generator),
    }
    row |= variety(torch.from_numpy(classifier.predict(x.flatten(1).numpy())))
    return row | {f"{name}_ideal": value for name, value in variety(labels, tilt).items()}


def one_seed(seed: int, weights: tuple[float, ...], pretraining: int, config: FinetuneConfig) -> tuple[list, list, dict]:
    """The rows, how well each preference agrees with the truth, and samples to look at."""
    data = load_data("digits")
    classifier = SVC(gamma="scale", C=10).fit(data.train.flatten(1).numpy(), data.train_labels)
    print(
        f"the classifier is right on {classifier.score(data.test.flatten(1).numpy(), data.test_labels):.1%} of held-out digits"
    )
    denoiser = pretrain(data, seed, pretraining)
    slow = karras(TRAIN.sigma_min, TRAIN.sigma_max).times(denoiser.path, 20)
    items, _ = generate(denoiser, slow, 600, data.shape, "dpmpp_2m", seed + 1)
    rows, agreements, shown = [], [], {}

    def samples(reward: Reward | None, weight: float) -> tuple[Tensor, float]:
        clock = time.process_time()
        sampler = taught(denoiser, data, dataclasses.replace(config, seed=seed), reward, weight)
        seconds = time.process_time() - clock
        return generate(sampler, sampler.times, SAMPLES, data.shape, "", seed + 2)[0], seconds

    plain, seconds = samples(None, 0.0)
    shown["without"] = plain
    for name, measure in (("slanted", slanted), ("thick", thick)):
        truth = standardised(measure, data.train)
        pairs, chosen = choose(truth, items, PAIRS, seed)
        preference, known = learn_preference(items, pairs, chosen, PreferenceConfig(seed=seed))
        found = spearmanr(preference(data.test), truth(data.test)).statistic
        agreements.append({"seed": seed, "taste": name, "rank_correlation": float(found)} | known)
        print(f"seed {seed}, {name}: {agreements[-1]}", flush=True)
        about = {"seed": seed, "taste": name}
        base = judge(plain, truth, None, 0.0, data, classifier, seed)
        rows.append(about | {"reward": "none", "weight": 0.0, "cpu_seconds": seconds} | base)
        for kind, reward in (("measured", truth), ("learned", preference)):
            for weight in weights:
                x, seconds = samples(reward, weight)
                row = judge(x, truth, reward, weight, data, classifier, seed)
                rows.append(about | {"reward": kind, "weight": weight, "cpu_seconds": seconds} | row)
                shown[f"{name}, {kind}, w = {weight:g}"] = x
                print(
                    f"seed {seed}, {name}, {kind}, w = {weight:g}: {row['truth'] - base['truth']:+.2f} sd (ideal "
                    f"{row['truth_ideal']:+.2f}), FD-pixels {base['fd']:.2f} -> {row['fd']:.2f} (to its target "
                    f"{row['fd_target']:.2f}), entropy {row['entropy']:.2f} (ideal {row['entropy_ideal']:.2f})",
                    flush=True,
                )
    return rows, agreements, shown


def picture(file: Path, rows: list[dict], shown: dict[str, Tensor]) -> None:
    """Samples without and with each taste at the middle weight, and what was gained against what it cost."""
    from fewstep import report
    from fewstep.report import plt

    weights = sorted({row["weight"] for row in rows} - {0.0})
    middle = weights[len(weights) // 2]
    names = ["without", *(f"{t}, {k}, w = {middle:g}" for t in ("slanted", "thick") for k in ("measured", "learned"))]
    figure, axes = plt.subplots(2, 5, figsize=(13, 5.6), height_ratios=(1.1, 1))
    for axis, name in zip(axes[0], names, strict=True):
        axis.imshow(report.tile(shown[name][:48], 8), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.axis("off")
        axis.set_title(name, fontsize=8)
    panels = (("truth", "taste (sd of the data)"), ("fd", "FD-pixels to the data"), ("fd_target", "FD-pixels to the target"))
    panels += (("sw_target", "sliced Wasserstein to the target"), ("entropy", "entropy of the classes / ln 10"))
    for axis, (metric, label) in zip(axes[1], panels, strict=True):
        for colour, taste in (("C0", "slanted"), ("C3", "thick")):
            for style, kind in (("o-", "measured"), ("s--", "learned")):
                own = [r for r in rows if r["taste"] == taste and r["reward"] in ("none", kind)]
                points = [[r[metric] for r in own if r["weight"] == w] for w in (0.0, *weights)]
                means = [sum(p) / len(p) for p in points]
                axis.plot((0.0, *weights), means, style, color=colour, ms=4, lw=1.2, label=f"{taste}, {kind}")
                if f"{metric}_ideal" in own[0] and kind == "measured":
                    ideal = [[r[f"{metric}_ideal"] for r in own if r["weight"] == w] for w in (0.0, *weights)]
                    axis.plot((0.0, *weights), [sum(p) / len(p) for p in ideal], ":", color=colour, lw=1)
        axis.set(xlabel="weight of the reward (nats per sd)", title=label)
        axis.title.set_fontsize(8)
    axes[1, 0].plot([], [], ":", color="0.4", label="the target itself")
    axes[1, 0].legend(frameon=False, fontsize=6)
    figure.tight_layout()
    figure.savefig(file, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of FinetuneConfig")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--picture", default=str(HERE.parent / "docs" / "pictures" / "preferences.png"))
    args = parser.parse_args()
    config = dataclasses.replace(FINETUNE, **dict(pair.split("=", 1) for pair in args.set))
    weights, pretraining = tuple(args.weights), TRAIN.iterations
    if args.quick:
        weights, pretraining = (1.0,), 200
        config = dataclasses.replace(config, iterations=30, density_iterations=30)
    result: dict = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "samples": SAMPLES,
        "pairs": PAIRS,
        "flipped": FLIPPED,
        "config": dataclasses.asdict(config),
        "agreements": [],
        "rows": [],
    }
    first: dict[str, Tensor] = {}
    for seed in range(args.seeds):
        rows, agreements, shown = one_seed(seed, weights, pretraining, config)
        first = first or shown
        result["rows"] += rows
        result["agreements"] += agreements
        write_json(args.out, result)
        picture(Path(args.picture), result["rows"], first)


if __name__ == "__main__":
    main()
