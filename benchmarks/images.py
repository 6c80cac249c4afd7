"""Real images: what few evaluations give, by levels, by solvers and by fine-tuned steps.

    python benchmarks/images.py --digits RUN                            8 x 8 digits
    python benchmarks/images.py --mnist DATA --classifier FILE          the third-party network of examples/mnist_slim.py
    python benchmarks/images.py --fashion RUN --fashion-data DATA       Fashion-MNIST
    python benchmarks/images.py ... --list                              the cells, and which of them are finished
    python benchmarks/images.py ... --only "mnist_slim ancestral"       cells whose name, as listed, holds a match of this
    python benchmarks/images.py --draw                                  only the JSON, the table and the pictures, from the rows

RUN: folders of `fewstep train`; that of the digits was trained with --iterations 4000 --sigma-min 0.2 --sigma-max 10. DATA:
folders with idx files. FILE: mnist_classifier.pth of ccexam. A cell is a model, a method, a number of steps and a seed; rows
of finished cells are kept in --rows, with the learned schedules, fine-tuned samplers and classifiers that they need, so that a
killed or repeated command continues. A row knows its settings and weights, not the code: after a change of the method, remove
the rows and folders that it changes. Of two commands at once, each needs cells of its own, and the schedules are best learned
before (`--only schedule`).

Writes benchmarks/images.json, and docs/pictures/images_<model>.png: every method from the same noises.

fd: Frechet distance to all training data, precision and recall against as many of them, both in `features`: the 128 numbers
before the last layer of a classifier of these data ("FD-classifier"; of MNIST third-party, of Fashion-MNIST trained here),
or the 64 pixels of the digits. coverage: share of the ten classes that get at least half of a tenth of the samples, by the
classifier. Each at --few samples, which every cell has, and at --count, which those of up to 10 evaluations have, and all of
the digits'.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from fewstep import models, report
from fewstep.commands import SCHEDULE, generate, load, unmetered
from fewstep.config import FinetuneConfig, LearnConfig, Source
from fewstep.data import Data
from fewstep.denoiser import Denoiser
from fewstep.fit import fit
from fewstep.goal import make_goal
from fewstep.metrics import class_coverage, frechet_distance, precision_recall
from fewstep.path import Tabulated
from fewstep.run import fingerprint, load_tree, read_config, read_lines, save_tree, write_json
from fewstep.sampler import Sampler, start_where_data_are
from fewstep.schedule import Schedule, karras, kl_optimal
from fewstep.start import gaussian_of
from fewstep.tune import LEARNED, finetune, levels_for
from schedules import append
from tables import images

HERE = Path(__file__).parent
PICTURES = HERE.parent / "docs" / "pictures"
BATCH = 128  # samples per call of the network: twice as fast per sample as 500 on a CPU, for its caches
SHORT = 10  # evaluations up to which a cell has --count samples
SHOWN = 32  # samples in a picture, of seed 0

# All that is chosen for the learned ones; the rest is fewstep's default, or was, as MNIST's and Fashion-MNIST's density.
LEARN = LearnConfig(solver="dpmpp_2m", steps=(4, 10), verdict_doublings=1, batch_size=BATCH)
SHORT_RUN = FinetuneConfig(iterations=1000, density_iterations=600, batch_size=32)
PER_STEP = 75  # iterations of MNIST's for each of its steps, whose transitions take turns
TUNED = "fine-tuned"
ALIKE = "fine-tuned alike"  # MNIST and Fashion-MNIST with one setting, SHORT_RUN: the digits' but for length, batch and density
FINETUNE = {
    "digits": FinetuneConfig(),
    "mnist_slim": SHORT_RUN,
    "fashion": replace(SHORT_RUN, iterations=300, critic_steps=4, lr_value=3e-4),
}
MOVED = "ancestral from the data's Gaussian"  # what a sampler begins as
QUICK_LEARN = replace(LEARN, noises=64, budget=7000, verdict_noises=32, verdict_doublings=0)


@dataclass(frozen=True)
class Cell:
    """solver: of `fewstep sample`, TUNED, ALIKE or MOVED. levels: own, karras, or learned: by `fewstep schedule` for DPM++ 2M,
    else as `fewstep finetune` learns them."""

    solver: str
    levels: str
    steps: int
    seed: int = 0

    @property
    def method(self) -> str:
        return f"{self.solver}, {self.levels} levels"

    @property
    def tuned(self) -> bool:
        return self.solver in (TUNED, ALIKE)

    def __str__(self) -> str:
        return f"{self.method}, {self.steps} steps, seed {self.seed}"


def cells(full: int, moved: bool, alike: bool) -> Iterator[Cell]:
    for steps in (4, 10, 50, full):
        yield Cell("ancestral", "own", steps)
        if moved or steps <= SHORT:
            yield Cell(MOVED, "learned" if steps <= SHORT else "own", steps)
    for steps in (4, 10):
        yield Cell("ddim", "own", steps)
        yield Cell("ancestral", "karras", steps)
        for levels in ("karras", "learned"):
            yield Cell("dpmpp_2m", levels, steps)
            for seed in range(3):
                yield Cell(TUNED, levels, steps, seed)
    for steps in (1, 2, 4, 10) if alike else ():
        for seed in range(3):
            yield Cell(ALIKE, "learned", steps, seed)


# --- features and classes -----------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """ccexam's MNIST classifier, for other sides too; the names of its parts are its file's."""

    def __init__(self, side: int = 28):
        super().__init__()
        first, second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.side = side
        self.features = nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(nn.Linear(64 * (side // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, 10))

    def hidden(self, x: Tensor) -> Tensor:
        """Images (b, 1, h, h) in [-1, 1] to the 128 numbers before the last layer."""
        if x.shape[-1] != self.side:
            x = interpolate(x, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
        return self.classifier[:2](self.features(((x + 1) / 2 - 0.1307) / 0.3081).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier[2](self.hidden(x))


def train_classifier(data: Data, epochs: int) -> Classifier:
    """Adam with a rate that falls to 0 along a cosine, batches of 128."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Classifier(data.shape[-1])
    assert data.train_labels is not None
    optimiser, g = torch.optim.Adam(net.parameters(), 1e-3), torch.Generator().manual_seed(0)
    batches = [rows for _ in range(epochs) for rows in torch.randperm(len(data.train), generator=g).split(128)]
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, len(batches))
    for rows in batches:
        optimiser.zero_grad()
        cross_entropy(net(data.train[rows]), data.train_labels[rows]).backward()
        optimiser.step()
        decay.step()
    return net


@torch.no_grad()
def seen(net: Classifier, x: Tensor, pixels: bool) -> tuple[Tensor, Tensor]:
    """Features (n, f) and labels (n,) of images x."""
    hidden = torch.cat([net.hidden(part) for part in x.split(500)])
    return x.flatten(1) if pixels else hidden, net.classifier[2](hidden).argmax(1)


def measures(features: Tensor, labels: Tensor, data: Tensor) -> dict[str, float]:
    equal = min(len(features), len(data))
    precision, recall = precision_recall(features[:equal], data[:equal])
    found = {"fd": frechet_distance(features, data), "precision": precision, "recall": recall}
    return {k: float(f"{v:.5g}") for k, v in (found | {"coverage": class_coverage(labels, 10)}).items()}


# --- models -------------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A model, its data, and what judges its samples. low: the cleanest level, or None for the model's own."""

    name: str
    model: str
    source: Source
    classifier: Path | int  # a file of weights, or the epochs of one that is trained here
    about: str  # the classifier, in words
    args: argparse.Namespace
    low: float | None = None
    moved: bool = False  # the noisiest level shows the data

    @property
    def rows(self) -> Path:
        return self.args.rows

    @property
    def pixels(self) -> bool:
        return self.name == "digits"

    @cached_property
    def data(self) -> Data:
        return load(self.source)

    @cached_property
    def denoiser(self) -> Denoiser:
        return models.load_denoiser(self.model, self.args.device).to(memory_format=torch.channels_last)

    @cached_property
    def range(self) -> tuple[float, float]:
        return self.low or self.denoiser.path.sigma_min, self.denoiser.path.sigma_max

    @cached_property
    def full(self) -> int:
        """Steps of the model's whole chain; 200 for one that is continuous in time."""
        path = self.denoiser.path
        return int(path.index(1.0)) if isinstance(path, Tabulated) else 200

    def cells(self) -> list[Cell]:
        return list(cells(20 if self.args.quick else self.full, self.moved, FINETUNE[self.name] != FinetuneConfig()))

    @cached_property
    def net(self) -> Classifier:
        net = Classifier(28 if isinstance(self.classifier, Path) else self.data.shape[-1])
        if isinstance(self.classifier, Path):
            net.load_state_dict(torch.load(self.classifier, map_location="cpu", weights_only=True))
            return net.eval()
        file = self.rows / f"classifier-{self.name}.safetensors"
        if not file.exists():
            models.save_weights(train_classifier(self.data, self.classifier).state_dict(), file)
        models.load_weights(net, file)
        return net.eval()

    @cached_property
    def reference(self) -> Tensor:
        """Features of the training data; on the way, what the JSON says of the model is kept."""
        file = self.rows / f"features-{self.name}.safetensors"
        if not file.exists():
            train, _ = seen(self.net, self.data.train, self.pixels)
            features, labels = seen(self.net, self.data.test, self.pixels)
            counts = {min(n, len(features)) for n in (self.args.few, self.args.count)}
            assert self.data.test_labels is not None
            about = {
                "features": "pixels" if self.pixels else "classifier",
                "classifier": self.about,
                "accuracy": float(f"{(labels == self.data.test_labels).double().mean():.4f}"),
                "data": len(train),
                "range": self.range,
                "held_out": {str(n): measures(features[:n], labels[:n], train) for n in sorted(counts)},
            }
            write_json(self.rows / f"about-{self.name}.json", about)
            save_tree(file, {"train": train})
        return load_tree(file)["train"]

    def key(self, cell: Cell) -> dict:
        """What tells a finished row from those of other cells, settings and weights."""
        settings = asdict(self.finetune_config(cell)) if cell.tuned else None
        count = self.args.count if cell.steps <= SHORT or self.pixels else self.args.few
        about = {"count": count, "few": self.args.few, "fingerprint": fingerprint(self.denoiser.state_dict().values())}
        return {"model": self.name} | asdict(cell) | about | {"settings": settings}

    def learn_config(self) -> LearnConfig:
        return replace(QUICK_LEARN if self.args.quick else LEARN, sigma_min=self.range[0], sigma_max=self.range[1])

    def finetune_config(self, cell: Cell) -> FinetuneConfig:
        config = replace(SHORT_RUN if cell.solver == ALIKE else FINETUNE[self.name], seed=cell.seed)
        if cell.solver == TUNED and self.name == "mnist_slim":
            config = replace(config, iterations=PER_STEP * cell.steps)
        return replace(config, iterations=10, density_iterations=10, batch_size=16) if self.args.quick else config

    def karras(self) -> Path:
        file = self.rows / f"karras-{self.name}.json"
        karras(*self.range).save(file)
        return file

    @cached_property
    def fitted(self) -> Schedule:
        """The one learned for DPM++ 2M, with its verdict."""
        return fit(self.model, None, self.rows / f"schedule-{self.name}", self.learn_config(), device=self.args.device)[1]

    def for_ancestral(self, cell: Cell) -> Schedule:
        """The one that fine-tuning learns for itself in so many steps."""
        folder = self.rows / f"levels-{self.name}-{cell.steps}"
        config, about = self.finetune_config(cell), (self.args.device, unmetered)
        found = levels_for(self.denoiser, cell.steps, folder, make_goal(self.data.train), config, *about)
        folder.mkdir(exist_ok=True)
        found.save(folder / SCHEDULE)
        return found

    def times(self, cell: Cell) -> Tensor:
        if cell.levels == "own":
            return own_times(self.denoiser, cell.steps)
        if cell.levels == "karras":
            return Schedule.load(self.karras()).times(self.denoiser.path, cell.steps)
        found = self.fitted if cell.solver == "dpmpp_2m" else self.for_ancestral(cell)
        return found.times(self.denoiser.path, cell.steps)

    def sampler(self, cell: Cell) -> Sampler:
        """The fine-tuned one, trained when it is first asked for."""
        out = self.rows / f"{cell.solver}-{self.name}-{cell.levels}-{cell.steps}-{cell.seed}"
        config = self.finetune_config(cell)
        if not (out / models.VALUE).exists():
            levels = LEARNED if cell.levels == "learned" else str(self.karras())
            finetune(self.model, self.source, out, cell.steps, config, levels, self.args.device)
        if models.config_of(FinetuneConfig, read_config(out)["config"]) != config:
            raise SystemExit(f"{out} was made with other settings; remove it")
        return models.load_sampler(out, self.args.device)[0].to(memory_format=torch.channels_last)

    def ready(self, cell: Cell) -> tuple[Denoiser | Sampler, str, Tensor]:
        """What a cell is sampled with: a model with its solver, or a sampler, and the times."""
        if cell.tuned:
            sampler = self.sampler(cell)
            return sampler, "", sampler.times.cpu()
        times = self.times(cell)
        if cell.solver != MOVED:
            return self.denoiser, cell.solver, times
        sampler = Sampler(self.denoiser, times).to(self.args.device)
        start_where_data_are(sampler, gaussian_of(self.data.train))
        return sampler, "", times


def own_times(denoiser: Denoiser, steps: int) -> Tensor:
    """The levels that the model is sampled at without us: its default ones, evenly spaced indices of a discrete model, or
    the cosine path's, on which `fewstep train` learns: uniform in the angle."""
    path = denoiser.path
    default = denoiser.default_levels(steps) if denoiser.default_levels else None
    if default is not None:
        return torch.cat([path.time(default), torch.zeros(1, dtype=torch.float64)])
    if isinstance(path, Tabulated):
        last = int(path.index(1.0))
        index = torch.linspace(last, 1, steps, dtype=torch.float64).round()  # the slim network never learned index 0
        return torch.cat([(index + 1) / (last + 1), torch.zeros(1, dtype=torch.float64)])
    return kl_optimal(path.sigma_min, path.sigma_max).times(path, steps)


def available(args: argparse.Namespace) -> list[Subject]:
    made = []
    if args.digits:
        about = "a small convolutional network, trained here for 30 epochs"
        made.append(Subject("digits", args.digits, Source("digits"), 30, about, args))
    if args.mnist:
        slim = f"{HERE.parent / 'examples' / 'mnist_slim.py'}:denoiser"
        about = "ccexam's, third-party; images in 28 x 28"
        made.append(Subject("mnist_slim", slim, Source("mnist", args.mnist, 32), args.classifier, about, args, 0.05, True))
    if args.fashion:
        about = "a small convolutional network, trained here for 2 epochs"
        made.append(Subject("fashion", args.fashion, Source("fashion-mnist", args.fashion_data), 2, about, args))
    return made


# --- cells --------------------------------------------------------------------------------------------------------


def run_cell(subject: Subject, cell: Cell) -> dict:
    args, key = subject.args, subject.key(cell)
    model, solver, times = subject.ready(cell)

    def drawn(count: int, seed: int) -> tuple[Tensor, int]:
        return generate(model, times, count, subject.data.shape, solver, seed, args.device, BATCH)

    start = time.perf_counter()
    x, evaluations = drawn(key["count"], 1000 + cell.seed)
    seconds = time.perf_counter() - start
    features, labels = seen(subject.net, x, subject.pixels)
    at = {n: measures(features[:n], labels[:n], subject.reference) for n in sorted({args.few, len(x)})}
    if cell.seed == 0:
        save_tree(subject.rows / f"picture-{picture_key(key)}.safetensors", {"x": drawn(SHOWN, 0)[0]})
    row = key | {"method": cell.method, "evaluations": evaluations, "at": at, "seconds": round(seconds, 1)}
    if cell.steps <= SHORT:
        row["sigmas"] = [float(f"{float(sigma):.5g}") for sigma in model.path.ratio(times)]
    if (cell.levels, cell.solver) == ("learned", "dpmpp_2m"):
        row["kept"] = subject.fitted.provenance["verdict"]["kept"][str(cell.steps)]
    return row


def picture_key(row: dict) -> str:
    return "-".join(str(row[k]) for k in ("model", "solver", "levels", "steps"))


def rows_in(folder: Path) -> list[dict]:
    """The last row of every cell. A setting that is younger than a row has there what had been the only choice."""
    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in read_lines(file)]
    for row in (row for row in rows if row["settings"]):
        row["settings"] = asdict(FinetuneConfig(density="scalar")) | row["settings"]
    return list({(row["model"], *cell_key(row)): row for row in rows}.values())


def add_cell(subject: Subject, cell: Cell) -> None:
    append(subject.rows / f"{subject.name}.jsonl", run_cell(subject, cell))


def run(args: argparse.Namespace) -> None:
    args.rows.mkdir(parents=True, exist_ok=True)
    wanted = re.compile(args.only or "")
    for subject in available(args):
        if not (args.list or (panel := args.rows / f"picture-{subject.name}-data.safetensors").exists()):
            save_tree(panel, {"x": subject.data.test[:SHOWN]})
        todo: list[tuple[str, bool, Callable[[], object]]] = [
            (f"{subject.name} schedule", False, partial(getattr, subject, "fitted")),
            (f"{subject.name} classifier", False, partial(getattr, subject, "reference")),
        ]
        finished = rows_in(args.rows)
        for cell in subject.cells():
            done = any(all(row.get(k) == v for k, v in subject.key(cell).items()) for row in finished)
            todo.append((f"{subject.name} {cell}", done, partial(add_cell, subject, cell)))
        for name, done, work in todo:
            if not wanted.search(name):
                continue
            start = time.perf_counter()
            if not (done or args.list):
                work()
            print(
                f"{name}: {'finished' if done else 'to do' if args.list else f'{time.perf_counter() - start:.0f} s'}",
                flush=True,
            )


# --- results ------------------------------------------------------------------------------------------------------


def document(folder: Path, before: dict) -> dict:
    """What the JSON says; models stay as they were before, and cells without rows as well, if a solver's settings have."""
    rows, found = rows_in(folder), dict(before.get("models", {}))
    for file in sorted(folder.glob("about-*.json")):
        name = file.stem.removeprefix("about-")
        own = [row for row in rows if row["model"] == name]
        settings: dict[str, dict] = {}
        for row in (row for row in own if row["settings"]):
            told = {k: v for k, v in row["settings"].items() if k not in ("seed", "iterations")}  # which are in the rows
            if settings.setdefault(row["solver"], told) != told:
                raise SystemExit(f"{row['solver']} rows of {name} have different settings; run them again with one")
        kept = ("method", "solver", "levels", "steps", "seed", "iterations", "evaluations", "at", "kept", "sigmas", "seconds")
        own = [row | ({"iterations": row["settings"]["iterations"]} if row["settings"] else {}) for row in own]
        known = found.get(name, {"finetune": None, "rows": []})
        settings = (known["finetune"] or {}) | settings
        same = [row for row in known["rows"] if settings.get(row["solver"]) == (known["finetune"] or {}).get(row["solver"])]
        cells = {cell_key(row): row for row in [*same, *({k: row[k] for k in kept if k in row} for row in own)]}
        found[name] = json.loads(file.read_text()) | {"finetune": settings or None, "rows": list(cells.values())}
    return {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "models": found}


def cell_key(row: dict) -> tuple:
    return tuple(row[k] for k in ("solver", "levels", "steps", "seed"))


def draw(folder: Path, name: str, rows: list[dict], file: Path) -> None:
    """Samples of every method, seed 0, from the same noises: three grids to a row, by evaluations; and held-out data."""
    shown = {picture_key({"model": name} | row): row for row in rows if row["seed"] == 0}
    files = {folder / f"picture-{key}.safetensors": row for key, row in shown.items()}
    found = sorted((row["evaluations"], row["method"], f) for f, row in files.items() if f.exists())
    if not found:
        return
    panels = [(f"{evaluations}: {method}", f) for evaluations, method, f in found]
    panels += [("held-out data", f) for f in [folder / f"picture-{name}-data.safetensors"] if f.exists()]
    height = -(-len(panels) // 3)
    figure, axes = plt.subplots(height, 3, figsize=(9, 1.75 * height), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, panel) in zip(axes.flat, panels, strict=False):
        axis.imshow(report.tile(load_tree(panel)["x"], 8), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=7)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", metavar="RUN", help="folder of `fewstep train --data digits`")
    parser.add_argument("--mnist", metavar="DATA", help="where MNIST's idx files lie: adds examples/mnist_slim.py")
    parser.add_argument("--classifier", metavar="FILE", type=Path, help="ccexam's mnist_classifier.pth")
    parser.add_argument("--fashion", metavar="RUN", help="folder of `fewstep train --data fashion-mnist`")
    parser.add_argument("--fashion-data", metavar="DATA", help="where Fashion-MNIST's idx files lie")
    parser.add_argument("--only", metavar="REGEX", help="only the cells whose name, as --list shows it, holds a match")
    parser.add_argument("--list", action="store_true", help="only list the cells")
    parser.add_argument("--count", type=int, default=10_000, help=f"samples of cells of up to {SHORT} evaluations")
    parser.add_argument("--few", type=int, default=2000, help="samples of longer ones, and counts at which all are compared")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="a check that everything runs: all of it tiny, results in --rows")
    parser.add_argument("--rows", type=Path, help="where finished cells are kept; default runs/images")
    parser.add_argument("--draw", action="store_true", help="only the JSON, the table and the pictures")
    parser.add_argument("--no-draw", action="store_true", help="only the rows: another command is at work as well")
    parser.add_argument("--out", type=Path, help="default benchmarks/images.json")
    args = parser.parse_args()
    if args.mnist and not args.classifier:
        parser.error("--mnist needs --classifier")
    args.rows = args.rows or HERE.parent / "runs" / ("images_quick" if args.quick else "images")
    pictures = args.rows if args.quick else PICTURES
    if args.quick:
        args.count, args.few = min(args.count, 100), min(args.few, 50)
    if not args.draw:
        run(args)
    if args.list or args.no_draw:
        return
    out = args.out or (args.rows / "images.json" if args.quick else Path(__file__).with_suffix(".json"))
    doc = document(args.rows, json.loads(out.read_text()) if out.exists() else {})
    write_json(out, doc)
    for name, model in doc["models"].items():
        draw(args.rows, name, model["rows"], pictures / f"images_{name}.png")
    print(images(doc))


if __name__ == "__main__":
    main()
