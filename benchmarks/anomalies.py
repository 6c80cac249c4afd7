"""One digit is left out of all that is learned. How well does an energy tell it from the others?   8 x 8 digits

    python benchmarks/anomalies.py                     each of the ten in turn; writes benchmarks/anomalies.json
    python benchmarks/anomalies.py --digits 1 9        only these; rows of finished ones are kept in --rows
    python benchmarks/anomalies.py --quick             in miniature; says nothing but that it runs

auroc: share of pairs of a held-out digit of the nine and one of the tenth in which the tenth has the higher score. Scores:

    nearest neighbours, .., forest     scikit-learn's, on pixels
    denoising error                    mean square between a picture and what the model makes of it noised to sigma .5
    density                            A(x, N), that fine-tuning starts from, learned from the data alone
    energy                             of a four-step sampler fine-tuned with all defaults
    .., any number                     both with --density scalar
    autoencoder                        its reconstruction error, through 4 numbers
    autoencoder, fine-tuned            the same as the whole energy of a four-step sampler, as the paper detects anomalies

The diffusion model behind both samplers is trained on the nine digits. 4 was chosen among 2, 4 and 8, by this very number
(.966, .986, .979 in the mean), before any sampler was made; .5 among nine from .2 to 5, on the digits 1 and 9 alone.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from sklearn.ensemble import IsolationForest
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from torch import Tensor, nn

from fewstep.config import FinetuneConfig, TrainConfig
from fewstep.data import load_data
from fewstep.denoiser import Denoiser
from fewstep.dxmi import make_state
from fewstep.energy import Value, denoising_error
from fewstep.finetuning import finetune
from fewstep.goal import make_goal
from fewstep.levels import learn_levels
from fewstep.metrics import auroc
from fewstep.run import read_lines, write_json
from fewstep.training import TrainState, train
from schedules import append
from tables import anomalies

STEPS, NUMBERS, BATCH = 4, 4, 128
TRAIN = TrainConfig(iterations=4000, sigma_min=0.2, sigma_max=10.0)
SCALAR = FinetuneConfig(density="scalar")
FINETUNE = FinetuneConfig()  # of an autoencoder's error
STRUCTURED = FinetuneConfig(density_iterations=0, lr_value=1e-3)
FIT = 2000  # steps of Adam for the autoencoder
DENOISED_AT, DRAWS = 0.5, 32
HERE = Path(__file__).parent

Score = Callable[[Tensor], Tensor]  # (n, 1, 8, 8) to (n,), higher = less likely


class Autoencoder(nn.Module):
    """Its squared reconstruction error, mean per pixel."""

    def __init__(self, numbers: int = NUMBERS):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU(), nn.Linear(64, numbers))
        self.decode = nn.Sequential(nn.Linear(numbers, 64), nn.SiLU(), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return ((self.decode(self.encode(flat)) - flat) ** 2).mean(1)


def fitted(data: Tensor, noise: float, iterations: int, seed: int) -> Autoencoder:
    """On the data with the noise that the sampler's last step leaves on them."""
    torch.manual_seed(seed)
    found = Autoencoder()
    optimiser = torch.optim.Adam(found.parameters(), 1e-3)
    for _ in range(iterations):
        x = data[torch.randint(len(data), (BATCH,))]
        optimiser.zero_grad()
        found(x + noise * torch.randn_like(x)).mean().backward()
        optimiser.step()
    return found


def neighbours(data: Tensor, seed: int) -> dict[str, Score]:
    """What scikit-learn has, on pixels."""

    def flat(x: Tensor):
        return x.flatten(1).numpy()

    nearest, outlier = NearestNeighbors(n_neighbors=5).fit(flat(data)), LocalOutlierFactor(novelty=True).fit(flat(data))
    mixture = GaussianMixture(10, reg_covar=1e-2, random_state=seed).fit(flat(data))
    forest = IsolationForest(random_state=seed).fit(flat(data))
    return {
        "5 nearest neighbours": lambda x: torch.from_numpy(nearest.kneighbors(flat(x))[0][:, -1]),
        "local outlier factor": lambda x: -torch.from_numpy(outlier.score_samples(flat(x))),
        "10 Gaussians": lambda x: -torch.from_numpy(mixture.score_samples(flat(x))),
        "isolation forest": lambda x: -torch.from_numpy(forest.score_samples(flat(x))),
    }


def learned(denoiser: Denoiser, data: Tensor, config: FinetuneConfig, energy: nn.Module | None = None) -> Value:
    """Of a sampler on the levels that it learns."""
    goal = make_goal(data)
    times = learn_levels(denoiser, STEPS, goal, config).times(denoiser.path, STEPS)
    state = make_state(denoiser, times, config, tuple(data.shape[1:]), energy)
    for _ in finetune(state, goal):
        pass
    return state.averaged_value.module


def row_of(digit: int, seed: int, shrink: int) -> dict:
    data = load_data("digits")
    assert data.train_labels is not None
    assert data.test_labels is not None
    normal, unseen = data.train[data.train_labels != digit], data.test[data.test_labels != digit]
    strange = torch.cat([data.train[data.train_labels == digit], data.test[data.test_labels == digit]])
    row: dict = {"digit": digit, "seed": seed, "auroc": {}}

    @torch.no_grad()
    def judge(name: str, score: Score) -> None:
        found = auroc(score(unseen), score(strange))
        row["auroc"][name] = round(found, 4)
        print(f"without {digit}, seed {seed}, {name}: {found:.3f}", flush=True)

    def short(config):
        return replace(config, seed=seed, **{k: v // shrink for k, v in asdict(config).items() if k.endswith("iterations")})

    for name, score in neighbours(normal, seed).items():
        judge(name, score)
    autoencoder = fitted(normal, FINETUNE.last_std, FIT // shrink, seed)
    judge("autoencoder", autoencoder)
    state = TrainState(data.shape, short(TRAIN))
    for _ in train(state, normal):
        pass
    denoiser = state.averaged.module
    judge("denoising error", lambda x: denoising_error(denoiser, x, DENOISED_AT, DRAWS))
    for kind, config in ((", any number", SCALAR), ("", FINETUNE)):
        value = learned(denoiser, normal, short(config))
        judge(f"density{kind}", partial(value.density, i=STEPS))
        judge(f"energy{kind}", value.energy)
    judge("autoencoder, fine-tuned", learned(denoiser, normal, short(STRUCTURED), autoencoder).energy)
    return row


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=int, nargs="+", choices=range(10), default=list(range(10)))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a check that everything runs")
    parser.add_argument("--rows", type=Path, help="the file of finished rows; default runs/anomalies.jsonl")
    args = parser.parse_args()
    file = args.rows or HERE.parent / "runs" / ("anomalies_quick.jsonl" if args.quick else "anomalies.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for digit in args.digits:
            complete = [row for row in read_lines(file) if "energy, any number" in row["auroc"]]  # older ones are not
            if (digit, seed) not in {(row["digit"], row["seed"]) for row in complete}:
                append(file, row_of(digit, seed, 100 if args.quick else 1))
    result = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "train": asdict(TRAIN),
        "finetune": asdict(FINETUNE),
        "scalar": asdict(SCALAR),
        "structured": asdict(STRUCTURED),
        "rows": sorted(read_lines(file), key=lambda row: (row["seed"], row["digit"])),
    }
    write_json(file.with_suffix(".json") if args.quick else Path(__file__).with_suffix(".json"), result)
    print(anomalies(result))


if __name__ == "__main__":
    main()
