"""Our levels against everybody else's: the endpoint error of a solver on the levels that each method chooses.

    python benchmarks/schedules.py                                      exact mixtures, three seeds
    python benchmarks/schedules.py --digits RUN --mnist DATA --fashion RUN --fashion-data DATA      and networks
    python benchmarks/schedules.py --add ...                            only cells that the JSON lacks; its others stay
    python benchmarks/schedules.py --add --again ...                    all cells, but the peers' errors from the JSON
    python benchmarks/schedules.py --add --fill ...                     only the peers that cells of the JSON lack
    python benchmarks/schedules.py --add --judge ...                    finished rows of fewer noises judged on this plan's
    python benchmarks/schedules.py --draw                               only the summary and the figure, from the rows

RUN: folders of `fewstep train --data digits`, with its defaults, and of `--data fashion-mnist`. DATA: folders with idx
files; --mnist stands for the third-party network of examples/mnist_slim.py. Writes benchmarks/schedules.json, prints its
summary and draws docs/pictures/schedules.png. A cell is a model, solver, number of steps and seed; the rows of finished
cells are kept in --rows, so that a killed or repeated command continues, and two commands with different --models or
--solvers can share the work.

rmse: root mean square, per dimension, of the solver's end against the converged one from the same noise, on noises that no
method has seen; median: of the same over the noises, which the few that end in another mode do not decide. sw: sliced
Wasserstein distance to data; fd: Frechet distance to data in pixels (of 28 x 28 and 32 x 32 images in means of 4 x 4
pixels). evaluations, gradients, seconds: spent on choosing the levels; those of `fewstep` are the curve's, which serves all
numbers of steps, and the refinement's. Its verdict, on 256 to 1,024 more noises, decides whether the file keeps them, and is
counted apart.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from fewstep import baselines
from fewstep.config import LearnConfig
from fewstep.data import load_data
from fewstep.denoiser import Denoiser, OnPath
from fewstep.endpoint import Reference, Runs, reference, squared_errors
from fewstep.metrics import frechet_distance, sliced_wasserstein
from fewstep.mixture import Mixture, ring
from fewstep.models import load_denoiser
from fewstep.noises import POINTS, reference_on_arcs
from fewstep.path import VE
from fewstep.run import load_tree, read_lines, save_tree
from fewstep.schedule import Schedule
from fewstep.tailor import LEVELS, NOISES, fit_curve, refine_steps
from fewstep.verdict import Squares, entrants, guard, ratio, settle, squares_of
from schedules_summary import (
    CURVE,
    FREE,
    GUARDED,
    OURS,
    PICTURE,
    SOLVERS,
    STANDARD,
    document,
    draw,
    key,
    rounded,
    row_of,
    write_document,
)
from tables import schedules

HERE = Path(__file__).parent

COSTS = ("entropic", "entropic_rescaled", "corrector", "predictor")
BLIND = (*COSTS, *(f"{name}_to_data" for name in COSTS), "ays", "gits_l1", "gits_l2", "oss")  # they know no solver

LEARN = LearnConfig()
REDUCED: dict[str, baselines.Peer] = {  # for convolutions on a CPU: at most about 10,000 evaluations each
    "entropic": partial(baselines.entropic, probes=50, draws=32),
    "entropic_rescaled": partial(baselines.entropic, rescaled=True, probes=50, draws=32),
    "corrector": partial(baselines.score_optimal, probes=50, draws=32),
    "corrector_to_data": baselines.to_data(partial(baselines.score_optimal, probes=50, draws=32)),
    "ays": partial(baselines.ays, draws=8),
    "gits_l1": partial(baselines.gits, norm=1, noises=64),
    "gits_l2": partial(baselines.gits, norm=2, noises=64),
    "oss": partial(baselines.oss, levels=40, noises=16),
    "ld3": partial(baselines.ld3, noises=24, epochs=8, batch=8, teacher=32),
}


@dataclass(frozen=True)
class Plan:
    """What is run on a kind of model."""

    solvers: tuple[str, ...]
    steps: tuple[int, ...]
    tests: int
    converged: int  # levels of the solve that all are held to
    batch_size: int


MIXTURES = Plan(SOLVERS, (4, 5, 6, 8, 10, 15, 20), 16_384, 300, 128)
DIGITS = Plan(SOLVERS, (4, 5, 6, 8, 10), 1024, 300, 128)
NETWORKS = Plan(("dpmpp_2m", "unipc", "euler", "ipndm", "heun"), (6, 8, 4, 5, 10), 256, 96, 32)


class Model:
    """A denoiser, data to fit to and to compare with, and the range of levels."""

    def __init__(
        self,
        name: str,
        plan: Plan,
        denoiser: Denoiser,
        train: Tensor,
        test: Tensor,
        folder: Path,
        sigma_min: float | None = None,
    ):
        self.folder = folder
        self.known: dict[tuple[int, str], Reference] = {}
        self.name, self.plan, self.denoiser, self.train, self.test = name, plan, denoiser, train, test
        self.low, self.high = sigma_min or denoiser.path.sigma_min, denoiser.path.sigma_max
        own = isinstance(denoiser.path, VE) and sigma_min is None
        self.on_ve = denoiser if own else OnPath(denoiser, VE(self.low, self.high))
        assert denoiser.shape is not None
        self.shape = denoiser.shape

    def reference(self, seed: int, purpose: str, k: int = 0, verdict_noises: int = 0) -> Reference:
        """From noises that belong to this seed and purpose, and of a verdict to its round k."""
        plan = self.plan
        count, levels, number = {
            "fit": (NOISES, LEVELS, 1),
            "verdict": (verdict_noises, 96, 100 + k),
            "test": (plan.tests, plan.converged, 3),
        }[purpose]
        on_arcs, name = purpose == "verdict", f"verdict{k}-{count}" if purpose == "verdict" else purpose
        if (seed, name) not in self.known:
            file = self.folder / f"{self.name}-{seed}-{name}.safetensors"
            if not file.exists():
                g, about = seeded(1000 * seed + number), {"levels": levels, "sigma_min": self.low, "sigma_max": self.high}
                size = (count // POINTS, 2) if on_arcs else (count,)
                draw = partial(reference_on_arcs, generator=g) if on_arcs else reference
                noise = torch.randn(*size, *self.shape, generator=g)
                found = draw(self.denoiser, noise, batch_size=plan.batch_size, **about)
                save_tree(file, found._asdict())
            stored = load_tree(file)
            self.known[seed, name] = Reference(**stored | {"bending": tuple(stored["bending"])})
        return self.known[seed, name]

    def guarded(self, found: Schedule, solver: str, steps: int, seed: int, config: LearnConfig = LEARN) -> Schedule:
        """With what the verdict keeps for this number of steps."""

        def squares(k: int, count: int, grids: Mapping[int, Mapping[str, Tensor]]) -> tuple[Squares, int]:
            unseen = self.reference(seed, "verdict", k, count)
            found_there, spent = squares_of(self.denoiser, solver, grids, unseen, batch_size=self.plan.batch_size)
            return found_there, unseen.evaluations + spent

        verdict = settle(entrants(found, [steps]), squares, solver, config.verdict_noises, config.verdict_doublings)
        return guard(found, verdict)

    def features(self, x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, 4) if x.shape[-1] > 8 else x


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- models -------------------------------------------------------------------------------------------------------


def modes64() -> Mixture:
    return Mixture(torch.randn(10, 64, generator=seeded(64), dtype=torch.float64), 0.3)


def spectrum() -> Mixture:
    """Four modes in 64 dimensions whose spread, within and between, falls like that of natural images' frequencies."""
    k = torch.arange(1, 65, dtype=torch.float64)
    return Mixture(2 * torch.randn(4, 64, generator=seeded(4), dtype=torch.float64) / k, (1 / k).expand(4, 64))


def available(args: argparse.Namespace) -> dict[str, Callable[[], Model]]:
    def mixture(name: str, denoiser: Mixture) -> Model:
        return Model(name, MIXTURES, denoiser, denoiser.sample(4000, seeded(1)), denoiser.sample(4000, seeded(2)), args.rows)

    def network(name: str, plan: Plan, run: str, data: str, folder: str | None, size=None, sigma_min=None) -> Model:
        images, denoiser = load_data(data, folder, size), load_denoiser(run)
        if name == "mnist_slim":
            denoiser = denoiser.to(memory_format=torch.channels_last)  # a sixth faster
        if args.compile and plan is NETWORKS:
            next(m for m in denoiser.modules() if not isinstance(m, Denoiser)).compile(dynamic=False)
        return Model(name, plan, denoiser, images.train, images.test[:2000], args.rows, sigma_min)

    made: dict[str, Callable[[], Model]] = {
        "ring": lambda: mixture("ring", ring()),
        "modes64": lambda: mixture("modes64", modes64()),
        "spectrum": lambda: mixture("spectrum", spectrum()),
    }
    if args.digits:
        made["digits"] = lambda: network("digits", DIGITS, args.digits, "digits", None)
    if args.mnist:
        slim = f"{HERE.parent / 'examples' / 'mnist_slim.py'}:denoiser"
        made["mnist_slim"] = lambda: network("mnist_slim", NETWORKS, slim, "mnist", args.mnist, 32, 0.05)
    if args.fashion:
        made["fashion"] = lambda: network("fashion", NETWORKS, args.fashion, "fashion-mnist", args.fashion_data)
    return made


# --- one cell -----------------------------------------------------------------------------------------------------


class Peers:
    """The peers' levels, each fitted once for whatever it depends on; those in finished rows are taken from there."""

    def __init__(self, rows: Iterable[dict]):
        self.fitted: dict[tuple, dict] = {}
        for row in rows:
            for name, cell in row["methods"].items():
                if name not in (OURS, CURVE) and "sigmas" in cell:  # else it is from the JSON
                    key = self.key(row["model"], row["solver"], row["seed"], name, row["steps"], row["range"])
                    self.fitted[key] = {k: cell[k] for k in ("evaluations", "gradients", "seconds", "sigmas")}

    @staticmethod
    def key(model: str, solver: str, seed: int, name: str, steps: int, ends: Iterable[float]) -> tuple:
        if name in FREE:
            return (name, steps, *ends)
        return (name, steps, model, seed) if name in BLIND else (name, steps, model, seed, solver)

    def names(self, plan: Plan) -> tuple[str, ...]:
        return (*FREE, *(n for n in (*BLIND, "ld3") if plan is not NETWORKS or n in REDUCED))

    def levels(self, model: Model, solver: str, steps: int, seed: int, name: str) -> dict:
        key = self.key(model.name, solver, seed, name, steps, (model.low, model.high))
        if key in self.fitted:
            return self.fitted[key]
        peer = REDUCED.get(name, name) if model.plan is NETWORKS else name
        start = time.perf_counter()
        fit = baselines.fit(peer, problem_of(model, solver, steps, seed))
        cell = {"evaluations": fit.evaluations, "gradients": fit.gradients, "seconds": round(time.perf_counter() - start, 2)}
        cell["sigmas"] = digits_of(fit.sigmas)
        self.fitted[key] = cell
        return cell


def problem_of(model: Model, solver: str, steps: int, seed: int) -> baselines.Problem:
    """What the peers are given."""
    noise = model.high * torch.randn(256, *model.shape, generator=seeded(1000 * seed + 4))
    g = seeded(1000 * seed + 5)
    return baselines.Problem(model.on_ve, solver, steps, model.train, noise, g, model.plan.batch_size)


def digits_of(numbers: Iterable) -> list[float]:
    return [float(f"{float(x):.6g}") for x in numbers]


class Curve:
    """Ours, for a model, solver and seed: one curve, made when it is first asked for, and kept."""

    def __init__(self, model: Model, solver: str, seed: int):
        self.model, self.solver, self.seed = model, solver, seed

    @cached_property
    def schedule(self) -> Schedule:
        model = self.model
        file = model.folder / f"{model.name}-{self.seed}-{self.solver}.json"
        if not file.exists():
            known = model.reference(self.seed, "fit")
            start = time.perf_counter()
            made = fit_curve(model.denoiser, self.solver, known, batch_size=model.plan.batch_size)
            about = made.provenance | {"seconds": time.perf_counter() - start}
            replace(made, provenance=about).save(file)
        return Schedule.load(file)

    def refined(self, steps: int) -> tuple[Schedule, dict]:
        """The guarded schedule, and what it took."""
        model, batch_size = self.model, self.model.plan.batch_size
        start = time.perf_counter()
        known = model.reference(self.seed, "fit")
        found = refine_steps(model.denoiser, self.schedule, steps, known, batch_size=batch_size)
        refining = time.perf_counter() - start
        start = time.perf_counter()
        made = model.guarded(found, self.solver, steps, self.seed)
        judging = time.perf_counter() - start
        note = made.provenance["refined"][str(steps)]
        return made, {
            "curve_evaluations": made.provenance["evaluations"],
            "refine_evaluations": note["evaluations"],
            "verdict_evaluations": made.provenance["verdict"]["evaluations"],
            "curve_seconds": round(made.provenance["seconds"], 2),
            "refine_seconds": round(refining, 2),
            "verdict_seconds": round(judging, 2),
            "curve": made.provenance["curve"],
            "from": note["from"],
            "moved": note["moved"],
            "kept": made.provenance["verdict"]["kept"][str(steps)],
        }


def run_cell(model: Model, solver: str, steps: int, seed: int, curve: Curve, peers: Peers, before: dict | None) -> dict:
    """before: an earlier row, from which the peers' errors are taken."""
    plain = curve.schedule
    guarded, about = curve.refined(steps)
    spent = {"evaluations": about["curve_evaluations"], "gradients": 0, "seconds": about["curve_seconds"]}
    names = needed(before) if before else peers.names(model.plan)
    methods = {name: dict(peers.levels(model, solver, steps, seed, name)) for name in names}
    thetas = {name: angles(m["sigmas"]) for name, m in methods.items()}
    both = spent["evaluations"] + about["refine_evaluations"], spent["seconds"] + about["refine_seconds"]
    ours = {
        CURVE: (plain.angles(steps)[:-1], spent),
        OURS: (guarded.angles(steps)[:-1], {"evaluations": both[0], "gradients": 0, "seconds": round(both[1], 2)}),
    }
    for name, (theta, cost) in ours.items():
        thetas[name], methods[name] = theta, cost | {"sigmas": [*digits_of(torch.tan(theta)), 0.0]}

    squares = judge(model, solver, seed, methods, thetas)
    return {
        "model": model.name,
        "solver": solver,
        "steps": steps,
        "seed": seed,
        "range": [model.low, model.high],
        "noises": len(model.reference(seed, "test").noise),
        "ours": about,
        "against": rivals(squares),
        "methods": (before or {}).get("methods", {}) | methods,
    }


def needed(before: dict) -> tuple[str, ...]:
    """The peers that ours are compared with noise by noise, of an earlier row that has everybody's errors."""
    best = (min(names, key=lambda name: before["methods"][name]["rmse"]) for names in (STANDARD, FREE))
    return tuple(dict.fromkeys((*GUARDED, *best)))


def judge_cell(model: Model, peers: Peers, before: dict) -> dict:
    """An earlier row with all of its levels judged on this plan's noises, those of a fitted peer anew where they are lost."""
    solver, steps, seed = before["solver"], before["steps"], before["seed"]
    methods = {
        name: {k: cell[k] for k in ("evaluations", "gradients", "seconds", "sigmas")}
        if "sigmas" in cell
        else dict(peers.levels(model, solver, steps, seed, name))
        for name, cell in before["methods"].items()
    }
    squares = judge(model, solver, seed, methods, {name: angles(m["sigmas"]) for name, m in methods.items()})
    noises = len(model.reference(seed, "test").noise)
    return before | {"noises": noises, "against": rivals(squares), "methods": methods}


def rivals(squares: dict[str, Tensor]) -> dict[str, dict]:
    """Our errors against those of the levels that the guard knows, of the best published free ones and the best free ones."""
    against = {}
    for label, names in (*((name, (name,)) for name in GUARDED), ("standard", STANDARD), ("free", FREE)):
        rival = min((name for name in names if name in squares), key=lambda name: float(squares[name].mean()))
        against[label] = {"rival": rival} | {k: rounded(v) for k, v in ratio(squares[OURS], squares[rival]).items()}
    return against


def fill_cell(model: Model, peers: Peers, before: dict) -> dict | None:
    """An earlier row with the peers that it lacks, or None where it lacks none."""
    solver, steps, seed = before["solver"], before["steps"], before["seed"]
    names = [name for name in peers.names(model.plan) if name not in before["methods"]]
    if not names:
        return None
    methods = {name: dict(peers.levels(model, solver, steps, seed, name)) for name in names}
    judge(model, solver, seed, methods, {name: angles(m["sigmas"]) for name, m in methods.items()})
    return before | {"range": [model.low, model.high], "methods": before["methods"] | methods}


def angles(sigmas: list[float]) -> Tensor:
    return torch.atan(torch.tensor(sigmas[:-1], dtype=torch.float64))


def judge(model: Model, solver: str, seed: int, methods: dict[str, dict], thetas: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds the measures on these levels to the methods; returns the squared errors of the noises that none has seen."""
    unseen = model.reference(seed, "test")
    runs = Runs(model.denoiser, solver, unseen.noise, batch_size=model.plan.batch_size)
    first = None  # what the model says at the noisiest level, where nearly all of them start
    done: dict[tuple, tuple[Tensor, Tensor, float, float | None]] = {}
    squares = {}
    for name, theta in thetas.items():
        if abs(float(theta[0] / unseen.theta[0]) - 1) < 1e-5:
            theta = torch.cat([unseen.theta[:1], theta[1:]])
        same = tuple(theta.mul(1e7).round().tolist())
        if same not in done:
            x, log = runs(theta, first)
            first = first or log[:1]
            error = squared_errors(x, unseen.ends).nan_to_num(math.inf, posinf=math.inf)
            finite = bool(torch.isfinite(x).all())
            sw = sliced_wasserstein(x[: len(model.test)], model.test, 128, seeded(0)) if finite else math.inf
            images = finite and x.ndim == 4
            fd = frechet_distance(model.features(x), model.features(model.test)) if images else None
            done[same] = error, x, sw, fd
        squares[name], _, sw, fd = done[same]
        root = squares[name].sqrt()
        methods[name] |= {"rmse": rounded(math.sqrt(float(squares[name].mean()))), "median": rounded(float(root.median()))}
        methods[name] |= {"sw": rounded(sw)}
        methods[name] |= {} if fd is None else {"fd": rounded(fd)}
    return squares


# --- all cells ----------------------------------------------------------------------------------------------------


def rows_in(folder: Path) -> list[dict]:
    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in read_lines(file)]
    return list({key(row): row for row in rows}.values())


def run(args: argparse.Namespace) -> None:
    args.rows.mkdir(parents=True, exist_ok=True)
    made = available(args)
    names = args.models or list(made)
    unknown = [n for n in names if n not in made]
    if unknown:
        raise SystemExit(f"no model {', '.join(unknown)}: give its folders (see --help), or one of {', '.join(made)}")
    models: dict[str, Model] = {}
    before = {key(cell): row_of(cell) for cell in args.known.get("cells", ())}
    finished = {key(row): row for row in rows_in(args.rows)}
    peers = Peers(rows_in(args.rows) + (rows_in(args.peers) if args.peers else []))
    for seed in range(args.seeds):
        for name in names:
            if name not in models:
                models[name] = made[name]()
            model = models[name]
            for solver in (s for s in model.plan.solvers if not args.solvers or s in args.solvers):
                done = set() if args.judge else {key(row) for row in rows_in(args.rows)}
                done |= set() if args.again or args.fill or args.judge else before.keys()
                curve = Curve(model, solver, seed)
                for steps in (n for n in model.plan.steps if not args.steps or n in args.steps):
                    if (name, solver, steps, seed) in done:
                        continue
                    start = time.perf_counter()
                    known = before.get((name, solver, steps, seed))
                    if args.fill:
                        row = fill_cell(model, peers, known) if known else None
                    elif args.judge:
                        row = finished.get((name, solver, steps, seed))
                        row = judge_cell(model, peers, row) if row and row["noises"] < model.plan.tests else None
                    else:
                        row = run_cell(model, solver, steps, seed, curve, peers, known)
                    if row is None:
                        continue
                    append(args.rows / f"{name}.jsonl", row)
                    best, error = row["against"]["free"], row["methods"][OURS]["rmse"]
                    print(
                        f"{name} {solver} {steps} seed {seed}: {error:.4g}, {best['ratio']:.3f} of {best['rival']}, "
                        f"{row['against']['standard']['ratio']:.3f} of {row['against']['standard']['rival']} "
                        f"({time.perf_counter() - start:.0f} s)",
                        flush=True,
                    )


def append(file: Path, row: dict) -> None:
    """One line; a half-written one before it, of a killed command, is dropped."""
    if file.exists():
        whole = file.read_bytes()
        if not whole.endswith(b"\n"):
            file.write_bytes(whole[: whole.rfind(b"\n") + 1])
    with open(file, "a") as stream:
        stream.write(json.dumps(row) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", metavar="RUN", help="folder of `fewstep train --data digits`")
    parser.add_argument("--mnist", metavar="DATA", help="where MNIST's idx files lie: adds examples/mnist_slim.py")
    parser.add_argument("--fashion", metavar="RUN", help="folder of `fewstep train --data fashion-mnist`")
    parser.add_argument("--fashion-data", metavar="DATA", help="where Fashion-MNIST's idx files lie")
    parser.add_argument("--models", nargs="+", help="only these of ring, modes64, spectrum, digits, mnist_slim, fashion")
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, help="only these")
    parser.add_argument("--steps", nargs="+", type=int, help="only these")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=Path, default=HERE.parent / "runs" / "schedules", help="where finished cells are kept")
    parser.add_argument("--peers", type=Path, metavar="ROWS", help="take the peers' levels from these rows, made before")
    parser.add_argument("--add", action="store_true", help="cells of --out, if of the same models, count as finished and stay")
    parser.add_argument("--again", action="store_true", help="with --add: they are run again, but for the peers")
    parser.add_argument("--fill", action="store_true", help="with --add: only the peers that they lack")
    parser.add_argument("--judge", action="store_true", help="only finished rows of fewer noises, judged again on this plan's")
    parser.add_argument("--compile", action="store_true", help="the convolutions by torch.compile; needs a C++ compiler")
    parser.add_argument("--draw", action="store_true", help="only the summary and the figure")
    parser.add_argument("--no-draw", action="store_true", help="only the rows: another command is at work as well")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    if (args.again or args.fill) and not args.add:
        parser.error("--again and --fill go with --add")
    if args.again + args.fill + args.judge > 1:
        parser.error("--again runs cells anew, --fill adds peers to them, --judge judges their levels: give one of them")
    args.known = json.loads(args.out.read_text()) if args.add and args.out.exists() else {}
    if not args.draw:
        run(args)
    if not args.no_draw:
        rows = rows_in(args.rows)
        kept = json.loads(args.out.read_text())["cells"] if args.out.exists() and not args.add else []
        missing = {key(cell) for cell in kept} - {key(row) for row in rows}
        if missing:
            raise SystemExit(f"{args.out} has {len(missing)} cells that {args.rows} lacks; --add or another --out keeps them")
        doc = document(rows, args.known)
        write_document(args.out, doc)
        draw(doc, PICTURE)
        print(schedules(doc))


if __name__ == "__main__":
    main()
