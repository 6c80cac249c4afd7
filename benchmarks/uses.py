"""Schedules in the other uses: solvers that draw noise, flow models that start from pure noise, image to image.

    python benchmarks/uses.py                     exact mixtures, three seeds; writes benchmarks/uses.json
    python benchmarks/uses.py --digits RUN        and a network: a folder of `fewstep train --data digits`
    python benchmarks/uses.py --draw              only the JSON and its table, from the rows

A cell is a use, model, solver, number of steps and seed (of the fit and of the noises); finished ones are kept in --rows,
so that a killed or repeated command continues. Ours is what `fewstep schedule` leaves in its file, verdict and all.

stochastic: sliced Wasserstein distance of samples to data (of the digits: to the model's own, solved in 96 levels), 10,000
of each (4,000). The best free schedule is chosen on other samples than those that all are reported on: the smallest of
thirteen noisy distances would be too small. corrector: the published curve, which knows no solver.
flow: the same mixtures on the linear path, from pure noise; the endpoint error on 8,192 fresh noises.
image to image: data with noise of level sigma, brought back along the ODE; the endpoint error on 8,192 fresh ones. Ours was
learned for that start, from the model alone; "cut" is what the curve from noise gives, cut at sigma (`export.sub_range`).
"""

from __future__ import annotations

import argparse
import datetime
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fewstep.config import LearnConfig
from fewstep.data import load_data
from fewstep.denoiser import Denoiser
from fewstep.endpoint import Midway, Reference, reference
from fewstep.export import sub_range
from fewstep.fit import judged_afresh, unmetered
from fewstep.learn import learn_by_cost
from fewstep.metrics import sliced_wasserstein
from fewstep.mixture import Mixture, ring
from fewstep.models import load_denoiser
from fewstep.path import Linear
from fewstep.run import read_lines, write_json
from fewstep.schedule import Schedule, log_linear
from fewstep.solvers import STOCHASTIC, solve
from fewstep.tailor import draw_noise, tailor
from fewstep.verdict import entrants, guard, squares_of
from schedules import append, modes64, seeded, spectrum
from tables import uses

STEPS, IMAGE_STEPS = (4, 6, 8, 10, 20), (3, 5, 8)
SOLVERS = ("dpmpp_2m", "euler")
SIGMAS = (1.0, 3.0)  # where image to image begins
UNSEEN = 8192
Cell = tuple[str, str, str, int, int]  # use, model, solver, steps, seed


MIXTURES: dict[str, Callable[[], Mixture]] = {"ring": ring, "modes64": modes64, "spectrum": spectrum}


class Models:
    """Denoisers with data to fit and to compare with, made when they are first asked for."""

    def __init__(self, digits: str | None):
        self.digits = digits
        self.names = ("ring", "modes64", "spectrum", *(("digits",) if digits else ()))

    @cache  # noqa: B019
    def denoiser(self, name: str, flow: bool) -> Denoiser:
        if name == "digits":
            return load_denoiser(str(self.digits))
        model = MIXTURES[name]()
        if flow:
            model.path = Linear(0.002)
        return model

    @cache  # noqa: B019
    def data(self, name: str) -> Tensor:
        model = self.denoiser(name, False)
        return load_data("digits").train if name == "digits" else model.sample(4000, seeded(1))

    @cache  # noqa: B019
    def target(self, name: str, draw: int) -> Tensor:
        """What samples are compared with."""
        model = self.denoiser(name, False)
        if name != "digits":
            return model.sample(10_000, seeded(50 + draw))
        return reference(model, torch.randn(4000, *model.shape, generator=seeded(50 + draw)), levels=96).ends


def cells(models: Models) -> Iterator[Cell]:
    for seed in range(3):
        for name in models.names:
            few = [n for n in STEPS if n <= 10 or name != "digits"]
            yield from (("stochastic", name, solver, n, seed) for solver in sorted(STOCHASTIC) for n in few)
            if name != "digits":
                yield from (("flow", name, solver, n, seed) for solver in SOLVERS for n in few)
            for sigma in SIGMAS:
                use = f"image to image from {sigma:g}"
                yield from ((use, name, solver, n, seed) for solver in SOLVERS for n in IMAGE_STEPS)


@cache
def fitted(
    models: Models, flow: bool, name: str, solver: str, seed: int, steps: tuple[int, ...], start: float | None = None
) -> Schedule:
    return tailor(models.denoiser(name, flow), solver, steps, start=start, generator=seeded(seed))


def guarded(denoiser: Denoiser, schedule: Schedule, solver: str, steps: int, seed: int) -> Schedule:
    """With what `fewstep schedule` keeps for this number of steps."""
    form, about = tuple(denoiser.shape), {"cond": None, "batch_size": 512}
    grids = entrants(schedule, [steps])
    ends = schedule.made_for()
    verdict = judged_afresh(denoiser, ends, grids, solver, LearnConfig(seed=seed), form, about, "cpu", unmetered)
    return guard(schedule, verdict)


def run_cell(models: Models, cell: Cell) -> dict:
    use, name, solver, steps, seed = cell
    denoiser = models.denoiser(name, use == "flow")
    start = float(use.split()[-1]) if use.startswith("image") else None
    wanted = IMAGE_STEPS if start else tuple(n for n in STEPS if n <= 10)
    whole = fitted(models, use == "flow", name, solver, seed, wanted, start)
    kept = guarded(Midway(denoiser, start) if start else denoiser, whole, solver, steps, seed)
    about = {"kept": kept.provenance["verdict"]["kept"][str(steps)], "verdict": kept.provenance["verdict"]["evaluations"]}
    grids = entrants(kept, [steps])[steps] | {"curve": replace(whole, grids={}).angles(steps)[:-1]}
    grids["fewstep"] = grids.pop("learned")
    if use == "stochastic":
        published = learn_by_cost(denoiser, models.data(name), generator=seeded(seed))
        for label, curve in (("corrector", published), ("corrector to data", replace(published, to_data=True))):
            grids[label] = curve.angles(steps)[:-1]
        chosen, errors = ({k: distance(models, cell, theta, draw) for k, theta in grids.items()} for draw in (0, 1))
        return row_of(cell, errors, min(free_of(chosen), key=chosen.__getitem__), about)
    if start:
        grids["cut"] = sub_range(fitted(models, False, name, solver, seed, ()), sigma=start).angles(steps)[:-1]
        errors = from_pictures(models, cell, grids, start)
    else:
        squares, _ = squares_of(denoiser, solver, {steps: grids}, from_noise(models, name, seed))
        errors = {k: math.sqrt(float(each.mean())) for k, each in squares[steps].items()}
    return row_of(cell, errors, min(free_of(errors), key=errors.__getitem__), about)


def free_of(errors: dict[str, float]) -> list[str]:
    return [k for k in errors if k not in ("fewstep", "curve", "cut", "corrector", "corrector to data")]


def distance(models: Models, cell: Cell, theta: Tensor, draw: int) -> float:
    _, name, solver, _, seed = cell
    denoiser, target = models.denoiser(name, False), models.target(name, draw)
    g, times = seeded(70_000 + 10 * seed + draw), torch.cat([denoiser.path.time(theta), theta.new_zeros(1)])
    with torch.no_grad():
        try:
            x = solve(denoiser, denoiser.path.start(len(target), denoiser.shape, g, times[0]), times, solver, generator=g).x
        except ValueError:  # it overflows on these levels
            return math.inf
    return sliced_wasserstein(x, target, 200, seeded(draw))


@cache
def from_noise(models: Models, name: str, seed: int) -> Reference:
    denoiser = models.denoiser(name, True)
    return reference(denoiser, draw_noise(UNSEEN, denoiser.shape, seeded(90_000 + seed)), levels=300)


@cache
def pictures(models: Models, name: str, seed: int, start: float) -> tuple[Tensor, Tensor]:
    """Data with noise of this level, and where the ODE takes them."""
    denoiser, data, g = models.denoiser(name, False), models.data(name), seeded(80_000 + seed)
    data = data[torch.randint(len(data), (UNSEEN,), generator=g)]
    path, noise = denoiser.path, torch.randn(data.shape, generator=g, dtype=data.dtype)
    x = path.noised(data, noise, path.time(torch.tensor(math.atan(start), dtype=torch.float64)))
    return x, brought_back(denoiser, x, log_linear(path.sigma_min, start).angles(200)[:-1], "unipc")


def brought_back(denoiser: Denoiser, x: Tensor, theta: Tensor, solver: str) -> Tensor:
    with torch.no_grad():
        return solve(denoiser, x, torch.cat([denoiser.path.time(theta), theta.new_zeros(1)]), solver).x


def from_pictures(models: Models, cell: Cell, grids: dict[str, Tensor], start: float) -> dict[str, float]:
    _, name, solver, _, seed = cell
    denoiser, (x, truth) = models.denoiser(name, False), pictures(models, name, seed, start)
    ends = {k: brought_back(denoiser, x, theta, solver) for k, theta in grids.items()}
    return {k: math.sqrt(float((end - truth).double().square().mean())) for k, end in ends.items()}


def row_of(cell: Cell, errors: dict[str, float], best: str, about: dict) -> dict:
    head = dict(zip(("use", "model", "solver", "steps", "seed"), cell, strict=True))
    errors = {k: float(f"{v:.5g}") for k, v in errors.items()}
    return head | {"best_free": best, "ratio": round(errors["fewstep"] / errors[best], 4)} | about | {"errors": errors}


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", metavar="RUN", help="folder of `fewstep train --data digits`")
    parser.add_argument("--only", nargs="+", metavar="USE", help="only uses that begin so: stochastic, flow, image")
    parser.add_argument("--draw", action="store_true", help="only the JSON and its table, from the rows")
    here = Path(__file__).parent
    parser.add_argument("--rows", type=Path, default=here.parent / "runs" / "uses.jsonl", help="where finished cells are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    models = Models(args.digits)
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    for cell in cells(models) if not args.draw else ():
        done = {tuple(row[k] for k in ("use", "model", "solver", "steps", "seed")) for row in read_lines(args.rows)}
        if cell in done or (args.only and not cell[0].startswith(tuple(args.only))):
            continue
        row = run_cell(models, cell)
        append(args.rows, row)
        print(
            *cell, f"{row['errors']['fewstep']:.4g}, {row['ratio']:.3f} of {row['best_free']}", row.get("kept", ""), flush=True
        )
    rows = sorted(
        read_lines(args.rows), key=lambda row: [str(row[k]) for k in ("use", "model", "solver")] + [row["steps"], row["seed"]]
    )
    result = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "rows": rows}
    write_json(args.out, result)
    print(uses(result))


if __name__ == "__main__":
    main()
