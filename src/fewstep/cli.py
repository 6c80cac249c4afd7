"""The command line: parsing, progress bars, devices and one-line errors. What the commands do is in commands.py.

Nothing heavy is imported until a command runs, so that --help answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path as File
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from fewstep.config import (
    Condition,
    Count,
    FinetuneConfig,
    LearnConfig,
    Machine,
    Positive,
    PreferenceConfig,
    Share,
    Solver,
    Source,
    TrainConfig,
)

if TYPE_CHECKING:
    from fewstep.processes import Processes

Flat = Parameter(name="*")
Target = Literal["diffusers", "k-diffusion", "comfyui", "comfyui-node", "a1111", "json"]

Model = Annotated[str, Parameter(help="A folder of `fewstep train`, a diffusers folder or hub id, or file.py:function.")]
Out = Annotated[File, Parameter(help="The run folder to make, or to continue.")]
TensorBoard = Annotated[bool, Parameter(help="Log to OUT/tensorboard as well.", negative=())]
ScheduleName = Annotated[
    str,
    Parameter(
        help="karras, log_linear, kl_optimal, linear, cosine, beta, dmn, a schedule file, or a folder of `fewstep schedule`."
    ),
]

app = App(
    name="fewstep",
    default_parameter=Parameter(negative_iterable=()),
    help="Few-step sampling for any diffusion or flow model: learn where the steps go, and learn what each step does.",
    help_epilogue="Start with `fewstep demo`. Repeat a killed command to finish it.",
)


@app.command(sort_key=0)
def demo(
    *,
    out: Out = File("demo"),
    seed: Annotated[int, Parameter(help="Seed of everything.")] = 0,
    quick: Annotated[bool, Parameter(help="A smoke run of seconds: the same parts, with numbers that mean nothing.")] = False,
) -> None:
    """The whole story on 1,797 real 8x8 digits, in minutes: train, learn the schedule, fine-tune 4 steps, compare."""
    _on(Machine(threads=1))
    from fewstep.demo import run_demo

    summary, page = run_demo(out, seed, quick, track, meter)
    for line in summary[:-1]:
        print(line)
    print(f"{summary[-1]} Look at {page}")


@app.command(sort_key=1)
def train(
    *,
    source: Annotated[Source, Flat],
    out: Out,
    tensorboard: TensorBoard = False,
    machine: Annotated[Machine, Flat] = Machine(),
    config: Annotated[TrainConfig, Flat] = TrainConfig(),
) -> None:
    """Train a small diffusion model on a data set."""
    device = _on(machine)
    from fewstep import commands
    from fewstep.show import show as show_folder

    folder = commands.train(source, out, config, device, track, tensorboard)
    show_folder(folder)
    print(f"The model is in {folder}; next: fewstep schedule --model {folder} --solver dpmpp_2m --steps 6 --out SCHEDULE")


@app.command(sort_key=2)
def schedule(
    *,
    model: Model,
    out: Out | None = None,
    source: Annotated[Source | None, Flat] = None,
    check: Annotated[
        str | None, Parameter(help="Fit nothing: does this schedule file, or its folder, still suit the model? Exit 3: refit.")
    ] = None,
    condition: Annotated[Condition, Flat] = Condition(),
    shape: Annotated[list[int] | None, Parameter(help="One sample's shape, where neither the model nor data say it.")] = None,
    machine: Annotated[Machine, Flat] = Machine(),
    config: Annotated[LearnConfig, Flat] = LearnConfig(),
) -> None:
    """Learn where a model's steps go: one small file for every number of steps, with a verdict on unseen noises.

    By default for a solver, by how far it ends from where it should: no data, no back-propagation. For image to image from
    the level --start on. Data are for the published costs, and taken from the model itself where none are given. The verdict
    compares with every free schedule, with two learned curves and with the model's own levels; where the levels that were
    fitted to the solver do not win, the file keeps the best free or learned one.
    """
    device = _on(machine)
    from fewstep import fit
    from fewstep.show import show as show_folder
    from fewstep.verdict import sentences

    form = tuple(shape) if shape else None
    if check is not None:
        if out is not None or source is not None:
            raise ValueError("--check fits nothing and writes nothing: leave --out and --data out")
        if config.steps or config.solver != LearnConfig().solver:
            raise ValueError("--check judges what the file was judged for: leave --solver and --steps out")
        verdict, lines = fit.check(check, model, config, condition, form, device, meter)
        print("\n".join(lines))
        sys.exit(3 if verdict["refit"] else 0)
    if out is None:
        raise ValueError("give --out, the folder for the schedule, or --check, a schedule to hold against the model")
    folder, learned = fit.fit(model, source, out, config, condition, form, device, track, meter)
    show_folder(folder)
    about = learned.provenance
    print("\n".join(sentences(about["verdict"])))
    print(
        f"{folder / fit.SCHEDULE}: split-half error of the curve {about['split_half_error']:.1%}; evaluations of the network: "
        f"curve {about['evaluations']:,}"
        + "".join(f", {n} steps {each['evaluations']:,}" for n, each in about.get("refined", {}).items())
        + f", verdict {about['verdict']['evaluations']:,}"
    )


@app.command(sort_key=3)
def finetune(
    *,
    model: Model,
    source: Annotated[Source, Flat],
    out: Out,
    steps: Annotated[Count, Parameter(help="Evaluations of the network per sample.")] = 4,
    schedule: Annotated[
        str, Parameter(help="learned, for this model in this number of steps, or as for `sample`: karras, a schedule file, ..")
    ] = "learned",
    reward: Annotated[
        str | None,
        Parameter(help="file.py:function from samples to numbers, higher = better, or a folder of `fewstep prefer`."),
    ] = None,
    reward_weight: Annotated[float, Parameter(help="The aim is p(x) exp(weight reward).")] = 1.0,
    energy: Annotated[
        str | None,
        Parameter(
            help="file.py:function that makes an nn.Module from samples to numbers, like an autoencoder's reconstruction "
            "error: the structure of the energy with --density-iterations 0, else of what corrects the density. Of order 1, so "
            "a mean over dimensions, not a sum; without dropout and batch statistics."
        ),
    ] = None,
    tensorboard: TensorBoard = False,
    machine: Annotated[Machine, Flat] = Machine(),
    config: Annotated[FinetuneConfig, Flat] = FinetuneConfig(),
) -> None:
    """Learn what each step does: a few-step sampler jointly with an energy (DxMI).

    First where the steps go, then the density of the data, then sampler and energy together. On several GPUs: torchrun
    --nproc_per_node 2 -m fewstep.cli finetune ..
    """
    device = _on(machine)
    processes = _processes(device)
    if processes.accelerator is not None:
        device = str(processes.accelerator.device)
    from fewstep import commands, tune
    from fewstep.finetuning import doubt
    from fewstep.run import read_lines
    from fewstep.show import show as show_folder

    bar = track if processes.index == 0 else commands.silent
    folder = tune.finetune(
        model,
        source,
        out,
        steps,
        config,
        schedule,
        device,
        bar,
        meter if processes.index == 0 else commands.unmetered,
        reward=reward,
        reward_weight=reward_weight,
        processes=processes,
        tensorboard=tensorboard,
        energy=energy,
    )
    if processes.index == 0:
        show_folder(folder)
        if said := doubt(read_lines(folder / "metrics.jsonl")):
            print(said)
        print(f"The sampler and its energy are in {folder}; next: fewstep sample --model {folder} --out SAMPLES")
    processes.leave()


@app.command(sort_key=4)
def sample(
    *,
    model: Annotated[str, Parameter(help="As for `schedule`, or a folder of `fewstep finetune`.")],
    out: Out,
    steps: Annotated[Count | None, Parameter(help="Steps of the solver, or of the fine-tuned sampler, if not its own.")] = None,
    count: Annotated[Count, Parameter(help="Samples to draw.")] = 64,
    schedule: ScheduleName | None = None,
    solver: Annotated[
        Solver | None, Parameter(help="What the schedule file was learned for if not given; of named schedules, euler.")
    ] = None,
    shape: Annotated[list[int] | None, Parameter(help="One sample's shape, where the model does not say it.")] = None,
    label: Annotated[
        list[int] | None, Parameter(help="A class, for a model of `train --labels` or a DiT; several take turns.")
    ] = None,
    guidance: Annotated[
        Positive | None, Parameter(help="Scale of classifier-free guidance towards the label; doubles the evaluations.")
    ] = None,
    seed: Annotated[int, Parameter(help="Of the noise: the same one gives the same samples.")] = 0,
    machine: Annotated[Machine, Flat] = Machine(),
) -> None:
    """Draw samples into samples.npz and samples.png: by default 10 steps of euler on karras, or a fine-tuned sampler's own."""
    device = _on(machine)
    from fewstep import commands

    folder = commands.sample(model, out, steps, count, schedule, solver, shape, seed, device, track, label or (), guidance)
    print(f"{folder / 'samples.npz'} (key x{', labels y' if label else ''}) and {folder / 'samples.png'}")


@app.command(sort_key=5)
def evaluate(
    *,
    source: Annotated[Source, Flat],
    out: Out,
    model: Annotated[str | None, Parameter(help="As for `schedule`.")] = None,
    sampler: Annotated[list[str] | None, Parameter(help="A folder of `fewstep finetune`; may be repeated.")] = None,
    steps: Annotated[list[Count], Parameter(help="Steps of the solver; may be repeated.")] = [4, 6, 8, 10, 20],  # noqa: B006
    schedule: Annotated[list[str], Parameter(help="As for `sample`; may be repeated.")] = ["karras", "log_linear"],  # noqa: B006
    solver: Annotated[
        list[Solver] | None,
        Parameter(help="May be repeated; what the schedule files were learned for if not given, else euler."),
    ] = None,
    count: Annotated[Count, Parameter(help="Samples per cell.")] = 2000,
    seeds: Annotated[Count, Parameter(help="Repetitions of every cell.")] = 3,
    features: Annotated[str | None, Parameter(help="file.py:function from samples to features (n, f); pixels if none.")] = None,
    sampler_steps: Annotated[
        list[Count] | None, Parameter(help="Steps of the fine-tuned samplers, if not their own; may be repeated.")
    ] = None,
    guidance: Annotated[
        Positive | None, Parameter(help="Scale of the model's classifier-free guidance; doubles its evaluations.")
    ] = None,
    labels: Annotated[bool, Parameter(help="Tell class-conditional ones the data's labels.")] = True,
    machine: Annotated[Machine, Flat] = Machine(),
) -> None:
    """Measure quality against the number of evaluations, for schedules, solvers and fine-tuned samplers.

    Models and samplers that know classes (of `train --labels`, DiTs) are told the data's labels, drawn once at random.
    """
    device = _on(machine)
    from fewstep import evaluation
    from fewstep.show import show as show_folder

    if model is None and not sampler:
        raise ValueError("nothing to evaluate: give --model, --sampler, or both")
    folder, rows, floor = evaluation.evaluate(
        model,
        source,
        out,
        steps,
        schedule,
        solver or [],
        sampler or [],
        count,
        seeds,
        features,
        device,
        track,
        sampler_steps or (),
        guidance,
        labels,
    )
    show_folder(folder)
    _print_table(evaluation.table_of(rows))
    print(f"held-out data against training data: {', '.join(f'{k} {v:.3f}' for k, v in floor.items())}")
    print(f"{folder / evaluation.ROWS} and {folder / 'quality.png'}")


@app.command(sort_key=6)
def score(
    *,
    model: Annotated[str, Parameter(help="A folder of `fewstep finetune`, or as for `schedule`.")],
    source: Annotated[Source, Flat],
    samples: Annotated[
        list[str],
        Parameter(
            help="What to score: a folder of images or of `fewstep sample`, or an .npz (key x) or .npy; may be repeated."
        ),
    ],
    out: Out,
    sigma: Annotated[
        Positive | None, Parameter(help="The level, as sigma/alpha, of a model's denoising error; 0.5 if not given.")
    ] = None,
    draws: Annotated[Count, Parameter(help="Draws of noise that a score is the mean of, each an evaluation.")] = 16,
    false_alarms: Annotated[Share, Parameter(help="Share of the held-out data that is flagged.")] = 0.05,
    machine: Annotated[Machine, Flat] = Machine(),
) -> None:
    """Say which samples are strange, to a model that has learned the normal ones of --data.

    A folder of `fewstep finetune` scores with its energy, any other model with its denoising error: noise a sample, denoise
    it, and see how far off it is. Try the second first: it needs no fine-tuning, and on digits it tells more
    (docs/results.md). The scores, higher = stranger, are held against those of the data's held-out part, and lie in
    scores.npz, one array for each --samples in its order.
    """
    device = _on(machine)
    from fewstep import scoring
    from fewstep.show import show as show_folder

    folder, rows = scoring.score(model, source, samples, out, sigma, draws, false_alarms, device, track)
    show_folder(folder)
    _print_table(scoring.table_of(rows))
    print(f"{folder / scoring.SCORES} and {folder / 'report.html'}")


@app.command(sort_key=7)
def prefer(
    *,
    samples: Annotated[str, Parameter(help="A folder of `fewstep sample`, or an .npz (key x) or .npy file of samples.")],
    out: Out,
    pairs: Annotated[
        Count | None, Parameter(help="Pairs on the page; 100 if not given. More of them keep earlier choices.")
    ] = None,
    choices: Annotated[
        File | None,
        Parameter(help="What the page saved, or .jsonl or .csv rows a, b (rows of the samples), prefer (a, b or tie)."),
    ] = None,
    machine: Annotated[Machine, Flat] = Machine(),
    config: Annotated[PreferenceConfig, Flat] = PreferenceConfig(),
) -> None:
    """Learn a reward from somebody's choices: first a page that asks for them, then, given the choices, the reward.

    Without --choices it writes pairs.html: open it in a browser, press a, b or t (tie), and save the choices. With them it
    learns how much a sample is liked, says how well that predicts choices it has not seen, and leaves a reward for
    `fewstep finetune --reward`: of mean 0 and variance 1 over the samples, so that the weight is in nats.
    """
    device = _on(machine)
    from fewstep import prefer as preferring
    from fewstep.show import show as show_folder

    if choices is None:
        page, count = preferring.ask(samples, out, pairs or 100, config)
        print(f"{page} asks for {count} choices; then: fewstep prefer --samples {samples} --choices CHOICES --out {out}")
        return
    if pairs is not None:
        raise ValueError("--pairs is for the page; leave it out where --choices are given")
    folder, known = preferring.learn(samples, choices, out, config, device, track)
    show_folder(folder)
    print("\n".join(preferring.sentences(known)))
    print(f"The reward is in {folder}; next: fewstep finetune --reward {folder} ..")


@app.command(sort_key=8)
def export(
    *,
    schedule: Annotated[str, Parameter(help="A schedule file, or a folder of `fewstep schedule`.")],
    to: Annotated[
        Target, Parameter(help="Which runtime reads it; comfyui-node is a custom node that serves every number of steps.")
    ],
    steps: Annotated[Count, Parameter(help="Steps of the grid.")] = 10,
    scheduler: Annotated[
        str | None, Parameter(help="diffusers: the pipeline's folder or hub id, since each scheduler has its own form.")
    ] = None,
    mu: Annotated[float | None, Parameter(help="diffusers: the shift, for a scheduler with use_dynamic_shifting.")] = None,
    flow: Annotated[bool, Parameter(help="comfyui: for a flow model, whose sigmas lie in [0, 1].")] = False,
    strength: Annotated[float | None, Parameter(help="Image to image: keep this last share of the curve, in (0, 1].")] = None,
    out: Annotated[File | None, Parameter(help="Write it here instead of printing it.")] = None,
) -> None:
    """Hand a schedule to diffusers, k-diffusion, ComfyUI or A1111, so that exactly its levels are visited."""
    from fewstep import export as exporting
    from fewstep.commands import read_schedule

    found = read_schedule(schedule)
    if strength is not None:
        found = exporting.sub_range(found, strength=strength)
    text = exporting.export(found, to, steps, scheduler=scheduler, mu=mu, flow=flow)
    if out is None:
        print(text)
    else:
        if out.exists():
            raise ValueError(f"{out} exists; give another --out, or remove it")
        out.write_text(text + "\n")
        print(out)


@app.command(sort_key=9)
def show(folder: Annotated[File, Parameter(help="A run folder.")]) -> None:
    """Print what a run folder holds, and make its page report.html."""
    from fewstep.show import show as show_folder

    table, page = show_folder(folder)
    _print_table(table)
    print(page)


def track(iterable: Iterable, total: int, title: str) -> Iterator:
    """A progress bar with the time left, on a terminal; elsewhere one line when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        for item in iterable:
            yield item
            progress.advance(task)


@contextmanager
def meter(total: int, title: str) -> Iterator[Callable[[int], object]]:
    """A progress bar over evaluations of the network, of which there may be fewer."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TextColumn("{task.completed:,}/{task.total:,} evaluations"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda evaluations: progress.advance(task, evaluations)
        progress.update(task, total=progress.tasks[task].completed)


def _print_table(table: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(*table[0], box=None)
    for row in table[1:]:
        shown.add_row(*row)
    Console().print(shown)


def _on(machine: Machine) -> str:
    """The device to use; sets the number of threads."""
    import torch

    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    if machine.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=machine.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {machine.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return machine.device


def _processes(device: str) -> Processes:
    """Those that torchrun has started, or just this one. Raises ValueError where they cannot work together."""
    from fewstep.processes import ALONE, Processes

    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ValueError("several processes need accelerate: pip install fewstep[parallel]") from error
    processes = Processes(Accelerator(cpu=device.startswith("cpu")))  # else, without a GPU, each would work alone
    if processes.count != count:
        raise ValueError(f"torchrun has started {count} processes, but only {processes.count} of them found each other")
    return processes


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a user's mistake is one line on stderr and exit code 2, and nothing is overwritten."""
    try:
        app(
            sys.argv[1:] if arguments is None else arguments,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except CycloptsError as error:
        _fail(_in_words(error))
    except (ValueError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("fewstep: stopped; repeat the command to continue", file=sys.stderr)
        sys.exit(130)


def _in_words(error: CycloptsError) -> str:
    """What is wrong with the options; of pydantic, which talks to programmers, only its message."""
    from pydantic import ValidationError

    if not isinstance(error.__cause__, ValidationError):
        return str(error)
    first = error.__cause__.errors()[0]
    option = f"--{str(first['loc'][0]).replace('_', '-')} {first['input']}" if first["loc"] else str(error).partition(". ")[0]
    return f"{option}: {first['msg'].removeprefix('Input ')}"


def _fail(message: str) -> None:
    print(f"fewstep: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
