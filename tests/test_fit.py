"""`fewstep schedule`: real pipelines, true counts, kill -9, `--check`, the guard, and what a user's mistakes give."""

import dataclasses
import json
import math
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep import cli, fit, models
from fewstep.config import LearnConfig
from fewstep.endpoint import Midway, Reference, deal
from fewstep.free import free_schedules
from fewstep.mixture import ring
from fewstep.run import load_tree, save_tree
from fewstep.schedule import Schedule
from fewstep.tailor import LEARNED_CURVES, LEVELS, refined_others
from fewstep.verdict import REPETITIONS
from test_adapters import dit, sd3, text_unet, unet

SMALL = ("--noises", 64, "--budget", 7000, "--verdict-noises", 32, "--threads", 1)
MODELS = """
from fewstep.mixture import Mixture, ring
from fewstep.path import VE

def exact():
    return ring(path=VE(0.05, 20.0))

def moved():
    return Mixture([[0.0, 0.0], [6.0, 1.0]], [0.05, 1.0], path=VE(0.05, 20.0))

def narrower():
    return ring(path=VE(0.05, 10.0))

def shapeless():
    model = exact()
    model.shape = None
    return model
"""


class Meter:
    """Samples that a network was given, and the largest batch."""

    def __init__(self):
        self.samples, self.largest = 0, 0

    def watch(self, network):
        network.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, network, args, kwargs):
        x = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        self.samples, self.largest = self.samples + len(x), max(self.largest, len(x))


@pytest.fixture
def seen(monkeypatch):
    """What the networks that `fit` loads are given."""
    meter, load = Meter(), models.load_denoiser

    def watched(name, device="cpu"):
        denoiser = load(name, device)
        meter.watch(denoiser.net.model if hasattr(denoiser, "net") else denoiser)
        return denoiser

    monkeypatch.setattr(models, "load_denoiser", watched)
    return meter


@pytest.fixture
def mine(tmp_path):
    """-> the model of a function in a file."""
    (tmp_path / "mine.py").write_text(MODELS)
    return lambda name="exact": f"{tmp_path / 'mine.py'}:{name}"


def fewstep(capsys, *arguments, expect=0):
    """Run a command in this process; returns its stdout and stderr."""
    code = 0
    try:
        cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code or 0
    said = capsys.readouterr()
    assert code == expect, said.err
    return said.out, said.err


def schedule(capsys, model, out, *more, expect=0, small=SMALL):
    return fewstep(capsys, "schedule", "--model", model, "--out", out, *small, *more, expect=expect)


def spent(about):
    refined = sum(each["evaluations"] for each in about.get("refined", {}).values())
    return about["evaluations"] + refined + about["verdict"]["evaluations"]


def numbers(node):
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from numbers(child)
    elif isinstance(node, int | float):
        yield node


def files(folder):
    return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts}


# --- pipelines of diffusers ---------------------------------------------------------------------------------------


def save_parts(folder, **parts):
    """A pipeline's folder without the parts that fewstep does not read."""
    folder.mkdir()
    index = {
        "_class_name": "SomePipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = ["diffusers", type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def save_pipeline(name, folder):
    """The pipeline in folder/model, its conditions in folder/cond.safetensors: the options that it wants."""
    import diffusers

    model, cond = folder / "model", {}
    if name == "DDPM":
        diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(model)
    elif name == "DDIM":
        diffusers.DDIMPipeline(unet(out_channels=6), diffusers.DDIMScheduler(beta_schedule="scaled_linear")).save_pretrained(
            model
        )
    elif name == "DiT":
        save_parts(model, transformer=dit(4), scheduler=diffusers.DDIMScheduler())
        cond = {"class_labels": torch.tensor([1, 4, 7]), "unconditional.class_labels": torch.tensor([10])}
    elif name == "text":
        scheduler = diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )
        save_parts(model, unet=text_unet(), scheduler=scheduler)
        cond = {"encoder_hidden_states": rows(2, 3, 8), "unconditional.encoder_hidden_states": torch.zeros(1, 3, 8)}
    elif name == "SD3":
        save_parts(model, transformer=sd3(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
        cond = {"encoder_hidden_states": rows(2, 3, 8), "pooled_projections": rows(2, 8)}
        cond |= {f"unconditional.{k}": torch.zeros_like(v[:1]) for k, v in cond.items()}
    if not cond:
        return ()
    save_file(cond, folder / "cond.safetensors")
    return ("--cond", folder / "cond.safetensors")


PIPELINES = [
    ("DDPM", "dpmpp_2m", None, ()),
    ("DDIM", "euler", None, ()),
    ("DiT", "dpmpp_2m", 3.0, ()),
    ("text", "unipc", 2.0, ()),
    ("SD3", "euler", 4.0, ("--shape", 4, "--shape", 4, "--shape", 6)),
]


@pytest.mark.parametrize(("name", "solver", "guidance", "shape"), PIPELINES)
def test_a_pipeline_gets_its_schedule_with_a_verdict_and_true_counts(name, solver, guidance, shape, seen, tmp_path, capsys):
    options = [*save_pipeline(name, tmp_path), "--solver", solver, "--steps", 4, "--batch-size", 40, *shape]
    if guidance:
        options += ["--guidance", guidance, "--budget", 13_500]
    small = [v for k, v in zip(SMALL[::2], zip(SMALL[::2], SMALL[1::2], strict=True), strict=True) if k not in options]
    out, _ = schedule(capsys, tmp_path / "model", tmp_path / "out", *options, small=[v for pair in small for v in pair])
    learned = Schedule.load(tmp_path / "out" / "schedule.json")
    about = learned.provenance
    assert seen.samples == spent(about) + (2 if guidance else 1)  # one sample, to see whether the model takes it
    assert seen.largest == 40 * (2 if guidance else 1)  # guidance doubles the batch that the network sees
    row = about["verdict"]["steps"]["4"]
    entered = {"learned", "default", *free_schedules(1, 2, [4]), *LEARNED_CURVES, *refined_others(learned)}
    assert set(row["errors"]) == entered
    assert len(refined_others(learned)) == 2
    assert {"ratio", "low", "high"} == set(row["against_default"])
    assert all(math.isfinite(n) for n in numbers(learned.to_dict()))
    assert 4 in learned.grids
    assert learned.angles(10).isfinite().all()
    assert (about["guidance"], about["solver"]) == (guidance, solver)
    assert "4 steps of" in out
    assert "of the model's default's" in out
    denoiser = models.load_denoiser(str(tmp_path / "model"))
    assert learned.times(denoiser.path, 4)[-1] == 0  # the model has all of its levels
    pure = bool(denoiser.path.ends_in_pure_noise())
    assert learned.pure_noise == pure == (name in ("text", "SD3"))
    assert float(learned.grids[4][0]) == pytest.approx(math.pi / 2) or not pure


def test_a_model_with_the_default_options_and_guidance_is_not_too_dear(mine, tmp_path, capsys):
    """Two evaluations a call must not make the default budget too small."""
    save_file({"label": torch.arange(4), "unconditional.label": torch.zeros(1)}, tmp_path / "c.safetensors")
    schedule(capsys, mine(), tmp_path / "o", "--cond", tmp_path / "c.safetensors", "--guidance", 2, "--steps", 6, small=())


def test_a_saved_dit_is_sampled_judged_and_fine_tuned_by_class(tmp_path, capsys):
    save_pipeline("DiT", tmp_path)
    model, g = ("--model", tmp_path / "model"), torch.Generator().manual_seed(0)
    np.savez(tmp_path / "latents.npz", x=torch.randn(80, 2, 8, 8, generator=g).numpy(), y=np.arange(80) % 10)
    labels, data = ("--label", 3, "--label", 7, "--guidance", 2), ("--data", tmp_path / "latents.npz")
    fewstep(capsys, "sample", *model, *labels, "--steps", 3, "--count", 4, "--out", tmp_path / "s")
    assert np.load(tmp_path / "s" / "samples.npz")["y"].tolist() == [3, 7, 3, 7]
    few = ("--iterations", 2, "--density-iterations", 2, "--batch-size", 8, "--steps", 2)
    fewstep(capsys, "finetune", *model, *data, *few, "--out", tmp_path / "f")
    for name, folder in (("model", tmp_path / "model"), ("sampler", tmp_path / "f")):  # equal noises, other classes
        made = {}
        for label in (3, 9):
            out = tmp_path / f"{name}{label}"
            fewstep(capsys, "sample", "--model", folder, "--label", label, "--count", 2, "--out", out)
            made[label] = np.load(out / "samples.npz")["x"]
        assert abs(made[3] - made[9]).max() > 1e-4
    judge = ("--sampler", tmp_path / "f", "--steps", 2, "--count", 20, "--seeds", 1, "--schedule", "karras")
    fewstep(capsys, "evaluate", *model, *data, *judge, "--out", tmp_path / "e")
    assert "labels_fingerprint" in json.loads((tmp_path / "e" / "config.json").read_text())["config"]


# --- resume -------------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """As good as a kill, within a process."""


def stages(titles, stop=None, after=0):
    """A meter that notes the stages, and stops within the named one after some evaluations."""

    class Bar:
        def __init__(self, total, title):
            stage = title.partition(",")[0]  # a verdict may take several rounds
            titles.extend({stage} - {*titles})
            self.stops, self.done = stage == stop, 0

        def __enter__(self):
            self.tick(0)
            return self.tick

        def __exit__(self, *_):
            return False

        def tick(self, n):
            self.done += n
            if self.stops and self.done >= after:
                raise Stopped

    return Bar


TITLES = ["reference", "curve", "refining 3 steps", "refining 5 steps", "verdict"]


def test_a_stopped_fit_goes_on_with_its_stage_and_ends_with_the_same_file(mine, seen, tmp_path):
    config = LearnConfig(steps=(3, 5), noises=64, budget=8000, verdict_noises=32)
    titles = []
    fit.fit(mine(), None, tmp_path / "whole", config, meter=stages(titles))
    assert titles == TITLES
    about = Schedule.load(tmp_path / "whole" / "schedule.json").provenance
    whole, total = files(tmp_path / "whole"), seen.samples
    assert total == spent(about) + 1
    reference = 64 * LEVELS
    costs = [reference, about["evaluations"] - reference, *(about["refined"][n]["evaluations"] for n in "35")]
    costs.append(about["verdict"]["evaluations"])
    for k, title in enumerate(TITLES):
        out = tmp_path / f"at {title}"
        with pytest.raises(Stopped):
            fit.fit(mine(), None, out, config, meter=stages([], title, after=200))
        assert not (out / "schedule.json").exists()
        seen.samples, titles = 0, []
        fit.fit(mine(), None, out, config, meter=stages(titles))
        assert titles == TITLES[k:]
        assert seen.samples == sum(costs[k:]) + 1  # nothing that was done is done again
        assert {f.name: content for f, content in files(out).items()} == {f.name: c for f, c in whole.items()}
    seen.samples = 0
    _, again = fit.fit(mine(), None, tmp_path / "whole", config)
    assert seen.samples == 0
    assert again.provenance == about


@pytest.mark.timeout(600)  # three processes, each of which imports torch
def test_kill_9_at_a_random_moment_changes_nothing(mine, tmp_path):
    seed = random.randrange(1000)
    print("seed of the moment:", seed)
    chance = random.Random(seed)
    kind = chance.choice(["config.json", "reference.safetensors", "draft.json", '"5": ['])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = ("schedule", "--model", mine(), "--steps", 5, "--steps", 8, "--budget", 30_000, "--threads", 1)

    def start(out):
        command = [sys.executable, "-m", "fewstep.cli", *map(str, arguments), "--out", str(out)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def reached():
        draft = broken / "draft.json"
        return (broken / kind).exists() if "." in kind else draft.exists() and kind in draft.read_text()

    assert start(whole).wait() == 0
    process = start(broken)
    while process.poll() is None and not reached():
        time.sleep(0.001)
    time.sleep(chance.random() * 0.1)
    assert process.poll() is None, f"the run ended before it could be killed at {kind}"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "schedule.json").exists()
    assert start(broken).wait() == 0
    assert (broken / "schedule.json").read_bytes() == (whole / "schedule.json").read_bytes()
    assert {f.name for f in broken.iterdir()} == {f.name for f in whole.iterdir()}


def test_a_reference_that_an_older_version_left_is_made_again(mine, tmp_path, monkeypatch, capsys):
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    schedule(capsys, mine(), tmp_path / "whole", "--steps", 5)
    model = mine()
    with monkeypatch.context() as patch:
        patch.setattr(fit, "fit_curve", killed)
        with pytest.raises(Killed):
            schedule(capsys, model, tmp_path / "broken", "--steps", 5)
    file = tmp_path / "broken" / "reference.safetensors"
    save_tree(file, {k: v for k, v in load_tree(file).items() if k not in ("weight", "arc")})
    schedule(capsys, mine(), tmp_path / "broken", "--steps", 5)
    assert (tmp_path / "broken" / "schedule.json").read_bytes() == (tmp_path / "whole" / "schedule.json").read_bytes()


def test_other_conditions_under_the_same_name_are_noticed(mine, tmp_path, capsys):
    file = tmp_path / "c.safetensors"
    options = ("--cond", file, "--guidance", 2, "--budget", 13_500)
    small = (*SMALL[:2], *SMALL[4:])
    original = {"label": torch.arange(4), "unconditional.label": torch.zeros(1)}
    save_file(original, file)
    schedule(capsys, mine(), tmp_path / "o", *options, small=small)
    for changed in ({"label": torch.arange(4) + 1}, {"unconditional.label": torch.ones(1)}):
        save_file(original | changed, file)
        _, err = schedule(capsys, mine(), tmp_path / "o", *options, small=small, expect=2)
        assert "cond_fingerprint was" in err


# --- another checkpoint -------------------------------------------------------------------------------------------


def test_check_keeps_a_schedule_that_suits_and_asks_for_a_refit_where_it_does_not(mine, tmp_path, capsys):
    folder = tmp_path / "o"
    schedule(capsys, mine(), folder, "--steps", 5)
    before = files(tmp_path)

    def check(name, expect, file=folder):
        return fewstep(
            capsys, "schedule", "--model", mine(name), "--check", file, "--verdict-noises", 32, "--threads", 1, expect=expect
        )[0]

    out = check("exact", 0)
    assert "(1.00 times)" in out
    assert "keep: " in out
    assert out == check("exact", 0, folder / "schedule.json")
    assert "refit: " in check("moved", 3)
    assert "refit" not in check("exact", 0)
    assert files(tmp_path) == before


def test_check_compares_with_the_rivals_that_the_files_verdict_had(mine, tmp_path, capsys):
    schedule(capsys, mine(), tmp_path / "o", "--solver", "dpmpp_2m", "--steps", 4)
    file = tmp_path / "o" / "schedule.json"
    document = json.loads(file.read_text())
    for row in document["provenance"]["verdict"]["steps"].values():
        del row["errors"]["dmn"]
    file.write_text(json.dumps(document))
    old = set(next(iter(document["provenance"]["verdict"]["steps"].values()))["errors"])
    config = LearnConfig(steps=(4,), verdict_noises=32)
    found, _ = fit.check(file, mine(), config)
    assert set(found["steps"]["4"]["errors"]) == old
    assert "dmn" not in old


@pytest.mark.parametrize("solver", ["euler", "ancestral"])
def test_every_round_of_a_verdict_has_noises_of_its_own_and_goes_on_with_the_conditions(solver, monkeypatch):
    """The noises of a stochastic solver each have the next condition; of others every arc of 8 has."""
    met = []

    def asked(denoiser, noise, cond, **about):
        met.append((noise, deal(cond, torch.arange(len(noise)))["label"]))
        alike, each = torch.ones(len(noise)), torch.arange(len(noise))
        return Reference(noise, noise, torch.ones(2), (torch.ones(1, 1), torch.ones(1, 1)), 0, alike, each)

    seeds: list[int] = []

    def undecided(denoiser, solver, grids, known, **about):
        assert torch.equal(deal(about["cond"], torch.arange(len(known.noise)))["label"], met[-1][1])
        seeds.append(about["seed"])
        tails = torch.from_numpy(np.random.default_rng(len(met)).pareto(0.5, (2, len(known.noise))))
        return {n: {"learned": tails[0], "karras": tails[1]} for n in grids}, 0

    monkeypatch.setattr(fit, "reference" if solver == "ancestral" else "reference_on_arcs", asked)
    monkeypatch.setattr(fit, "squares_of", undecided)
    each, shape = (1, (2,)) if solver == "ancestral" else (8, (2, 2))  # noises for a condition, and what they are drawn from
    config = LearnConfig(verdict_noises=32 * each, verdict_doublings=3)
    about = {"cond": {"label": torch.arange(1000)}, "batch_size": 8}
    grids = {4: {"learned": torch.ones(4), "karras": torch.ones(4)}}
    verdict = fit.judged_afresh(ring(), (0.01, 10.0), grids, solver, config, (2,), about, "cpu", fit.unmetered)
    assert verdict["noises"] == 256 * each
    assert [noise.shape for noise, _ in met] == [(n, *shape) for n in (32, 32, 64, 128)]
    assert len(torch.cat([noise for noise, _ in met]).unique(dim=0)) == 256
    assert len(set(seeds)) == 4  # of what a stochastic solver draws
    assert torch.equal(torch.cat([label for _, label in met]), torch.arange(256))
    neighbour = dataclasses.replace(config, seed=1)
    before, met[:] = torch.cat([noise for noise, _ in met]), []
    fit.judged_afresh(ring(), (0.01, 10.0), grids, solver, neighbour, (2,), about, "cpu", fit.unmetered)
    assert len(torch.cat([before, *(noise for noise, _ in met)]).unique(dim=0)) == 512


def test_check_of_a_trained_model_whose_weights_were_changed(tmp_path, capsys):
    np.save(tmp_path / "points.npy", ring().sample(600, torch.Generator().manual_seed(0)).numpy())
    training = ("--iterations", 300, "--width", 32, "--depth", 2, "--threads", 1)
    fewstep(capsys, "train", "--data", tmp_path / "points.npy", "--out", tmp_path / "model", *training)
    schedule(capsys, tmp_path / "model", tmp_path / "o", "--steps", 5)
    weights, g = load_file(tmp_path / "model" / "model.safetensors"), torch.Generator().manual_seed(0)
    for share, expect in ((0.0, 0), (1e-3, 0), (1.0, 3)):
        changed = {k: w + share * w.std() * torch.randn(w.shape, generator=g) for k, w in weights.items()}
        save_file(changed, tmp_path / "model" / "model.safetensors")
        arguments = ("--model", tmp_path / "model", "--check", tmp_path / "o", "--verdict-noises", 32)
        out, _ = fewstep(capsys, "schedule", *arguments, expect=expect)
        assert ("keep: " if expect == 0 else "refit: ") in out


def test_check_of_a_guided_schedule_and_of_a_guarded_one(mine, tmp_path, capsys):
    save_pipeline("DiT", tmp_path)
    options = ("--cond", tmp_path / "cond.safetensors", "--guidance", 3)
    schedule(
        capsys, tmp_path / "model", tmp_path / "g", *options, small=(*SMALL[:2], "--budget", 13_500, "--verdict-noises", 32)
    )
    out, _ = fewstep(
        capsys, "schedule", "--model", tmp_path / "model", "--check", tmp_path / "g", *options, "--verdict-noises", 32
    )
    assert "keep: " in out
    schedule(capsys, mine(), tmp_path / "l", "--solver", "heun", "--cost", "corrector", "--probes", 10, "--draws", 8)
    out, _ = fewstep(capsys, "schedule", "--model", mine(), "--check", tmp_path / "l", "--verdict-noises", 32)
    assert out.count("(1.00 times)") == 2  # also where the file holds a free grid
    assert "keep: " in out


# --- the guard ----------------------------------------------------------------------------------------------------


def test_where_the_learned_curve_loses_the_file_holds_the_best_free_grid_and_says_so(mine, tmp_path, capsys):
    """A curve learned blind to the solver loses somewhere."""
    out, _ = schedule(capsys, mine(), tmp_path / "o", "--solver", "euler", "--cost", "corrector", "--probes", 10, "--draws", 8)
    learned = Schedule.load(tmp_path / "o" / "schedule.json")
    verdict, about = learned.provenance["verdict"], learned.provenance
    kept = verdict["kept"]
    assert set(kept) == {"6", "10"}
    losers = {n: name for n, name in kept.items() if name != "learned"}
    assert losers
    free = free_schedules(about["sigma_min"], about["sigma_max"], [6, 10])
    for n, name in losers.items():
        row = verdict["steps"][n]
        assert row["against_best_free"]["ratio"] > 1
        assert name == row["best_free"] == min(free, key=lambda k, row=row: row["errors"][k])
        assert torch.equal(learned.grids[int(n)], free[name].angles(int(n))[:-1])
        assert f"it does not win, so the file keeps {name}" in next(s for s in out.splitlines() if s.startswith(f"{n} steps"))
    assert all(int(n) not in learned.grids for n in set(kept) - set(losers))


# --- published costs and stochastic solvers -----------------------------------------------------------------------


@pytest.mark.parametrize("data", [False, True])
def test_a_stochastic_solver_is_judged_by_the_distribution_of_its_samples(data, mine, seen, tmp_path, capsys):
    np.save(tmp_path / "points.npy", ring().sample(300, torch.Generator().manual_seed(0)).numpy())
    options = ("--solver", "ancestral", "--cost", "corrector", "--probes", 10, "--draws", 16, "--batch-size", 100)
    options += ("--data", tmp_path / "points.npy") if data else ()
    out, _ = schedule(capsys, mine(), tmp_path / "o", *options, small=("--verdict-noises", 128, "--threads", 1))
    learned = Schedule.load(tmp_path / "o" / "schedule.json")
    about = learned.provenance
    assert (about["cost"], about["verdict"]["measure"]) == ("corrector", "energy distance")
    assert "energy distance" in out
    assert ("own_samples" in about) != data
    assert seen.samples == spent(about) + 1
    assert about["verdict"]["evaluations"] >= 128 * REPETITIONS * 13 * (6 + 10)
    assert all(math.isfinite(n) for n in numbers(learned.to_dict()))
    assert seen.largest <= 100
    about["verdict"]["measure"] = "sliced Wasserstein distance"  # an older fewstep's
    dataclasses.replace(learned, provenance=about).save(tmp_path / "o" / "schedule.json")
    _, err = fewstep(capsys, "schedule", "--check", tmp_path / "o", "--model", mine(), expect=2)
    assert "judged by the sliced Wasserstein distance" in err


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_predictors_cost(solver, mine, tmp_path, capsys):
    schedule(capsys, mine(), tmp_path / "o", "--solver", solver, "--cost", "predictor", "--probes", 10, "--draws", 8)
    about = Schedule.load(tmp_path / "o" / "schedule.json").provenance
    assert (about["cost"], about["solver"]) == ("predictor", solver)
    assert set(about["verdict"]["steps"]) == {"6", "10"}


# --- image to image -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["dpmpp_2m", "ancestral"])
def test_levels_for_image_to_image_begin_where_they_were_asked_to_and_are_checked_there(
    solver, mine, seen, tmp_path, capsys, monkeypatch
):
    options = ("--solver", solver, "--start", 1.5, "--steps", 3, "--sigma-max", 15)
    small = ("--noises", 64, "--budget", 8000, "--verdict-noises", 32)
    schedule(capsys, mine(), tmp_path / "o", *options, small=small)
    learned = Schedule.load(tmp_path / "o" / "schedule.json")
    about = learned.provenance
    assert [float(torch.tan(learned.angles(n)[0])) for n in (3, 7)] == pytest.approx([1.5, 1.5])
    assert seen.samples == spent(about) + 1
    assert "against_default" not in about["verdict"]["steps"]["3"]  # the model's own levels begin elsewhere
    starts = []
    monkeypatch.setattr(fit, "Midway", lambda *given: starts.append(Midway(*given)) or starts[-1])
    out, _ = fewstep(capsys, "schedule", "--check", tmp_path / "o", "--model", mine(), *SMALL)
    assert "keep" in out
    assert [each.noisiest for each in starts] == [15.0]
    from_noise = ("--schedule", tmp_path / "o", "--solver", solver, "--out", tmp_path / "s")
    _, err = fewstep(capsys, "sample", "--model", mine(), *from_noise, expect=2)
    assert "for image to image, from pictures with noise of 1.5" in err
    assert not (tmp_path / "s").exists()


# --- mistakes -----------------------------------------------------------------------------------------------------


def conditions(folder):
    equal = {"label": torch.arange(4), "text": torch.zeros(4, 2)}
    none = {"unconditional.label": torch.zeros(1), "unconditional.text": torch.zeros(1, 2)}
    for name, content in {
        "whole": equal | none,
        "no_none": equal,
        "half": equal | {"unconditional.label": torch.zeros(1)},
        "unequal": equal | {"text": torch.zeros(3, 2)} | none,
        "none_only": none,
        "no_rows": {"label": torch.zeros(0), "unconditional.label": torch.zeros(1)},
        "number": {"label": torch.tensor(3)},
    }.items():
        save_file(content, folder / f"{name}.safetensors")
    (folder / "junk.safetensors").write_bytes(b"nothing of the kind")


# name -> (function, wrong options, words of the message, the options that are right, or None where the mistake is found before
# anything else is looked at)
MISTAKES = {
    "steps of a published cost": ("exact", "--steps 4 --cost corrector", "leave --steps out", "--steps 4"),
    "guidance without conditions": ("exact", "--guidance 2", "guidance needs --cond", ""),
    "no such file of conditions": ("exact", "--cond absent.safetensors", "absent.safetensors", None),
    "a file that is none of conditions": ("exact", "--cond junk.safetensors", "not a .safetensors file", None),
    "conditions of unequal rows": ("exact", "--cond unequal.safetensors", "same number of rows", None),
    "conditions without rows": ("exact", "--cond no_rows.safetensors", "row", None),
    "a number for conditions": ("exact", "--cond number.safetensors", "row", None),
    "only what stands for none": ("exact", "--cond none_only.safetensors --guidance 2", "rows", None),
    "nothing that stands for none": (
        "exact",
        "--cond no_none.safetensors --guidance 2",
        "unconditional.label",
        "--cond no_none.safetensors",
    ),
    "half of what stands for none": ("exact", "--cond half.safetensors --guidance 2", "unconditional.text", None),
    "a scale of zero": ("exact", "--cond whole.safetensors --guidance 0", "greater than 0", None),
    "a budget that is too small": ("exact", "--budget 4000", "too few", ""),
    "too dear a number of steps": ("exact", "--steps 300", "too few to refine 300 steps", "--steps 3"),
    "an unknown solver": ("exact", "--solver rk45", "dpmpp_2m", None),
    "an unknown cost": ("exact", "--cost energy", "corrector", None),
    "the predictor of a multistep solver": ("exact", "--cost predictor", "euler, ddim, heun", ""),
    "too few noises": ("exact", "--noises 10", "64", None),
    "too few noises to judge": ("exact", "--verdict-noises 16", "32", None),
    "levels the wrong way round": ("exact", "--sigma-min 30", "sigma_min < sigma_max", None),
    "levels beyond the model": ("exact", "--sigma-max 200", "beyond the model's noisiest level", "--sigma-max 10"),
    "no shape": ("shapeless", "", "--shape", "--shape 2"),
    "another shape": ("exact", "--shape 3", "shape", "--shape 2"),
    "pictures that are noise": ("exact", "--start 100 --budget 8000", "starts between", ""),
    "pictures and a published cost": ("exact", "--start 1 --cost corrector", "leave --start out", "--cost corrector"),
    "no steps at all": ("exact", "--steps 0", "greater than or equal to 1", None),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_a_mistake_gives_one_line_and_writes_nothing_and_the_corrected_command_works(name, mine, tmp_path, monkeypatch, capsys):
    function, wrong, words, right = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    conditions(tmp_path)
    mine()
    before = files(tmp_path)
    small = [v for k, v in zip(SMALL[::2], SMALL[1::2], strict=True) if k not in wrong for v in (k, v)]
    out, err = schedule(capsys, f"mine.py:{function}", "o", *wrong.split(), expect=2, small=small)
    lines = [line for line in err.splitlines() if line.startswith("fewstep: error: ")]
    assert err.rstrip().splitlines()[-1:] == lines, err
    assert words in lines[0]
    assert "Traceback" not in err
    assert not out
    assert files(tmp_path) == before
    if right is not None:
        schedule(capsys, f"mine.py:{function}", "o", *right.split())
        assert (tmp_path / "o" / "schedule.json").exists()


def test_a_check_or_a_fit_that_lacks_something_says_what(mine, tmp_path, capsys):
    free_schedules(0.05, 20.0)["karras"].save(tmp_path / "k.json")
    (tmp_path / "text.json").write_text("hello")
    model = mine()
    before = files(tmp_path)
    for more, words in (
        (("--check", tmp_path / "k.json"), "no verdict"),
        (("--check", tmp_path / "absent.json"), "absent.json"),
        (("--check", tmp_path / "text.json"), "not JSON"),
        ((), "give --out"),
    ):
        _, err = fewstep(capsys, "schedule", "--model", model, *more, expect=2)
        assert err.startswith("fewstep: error: ")
        assert len(err.splitlines()) == 1
        assert words in err
        assert files(tmp_path) == before


def test_a_check_of_a_model_that_needs_conditions_asks_for_them(mine, tmp_path, capsys):
    schedule(capsys, mine(), tmp_path / "o")
    text = """

class Told(Denoiser):
    def __init__(self):
        super().__init__()
        self.inner = exact()
        self.path, self.shape = self.inner.path, self.inner.shape

    def forward(self, x, t, cond=None):
        return self.inner(x, t) + 0 * cond["y"][:, None]
"""
    (tmp_path / "mine.py").write_text("from fewstep.denoiser import Denoiser" + MODELS + text)
    _, err = fewstep(capsys, "schedule", "--model", mine("Told"), "--check", tmp_path / "o", *SMALL, expect=2)
    assert len(err.splitlines()) == 1
    assert "--cond" in err


def test_check_against_a_model_with_fewer_levels_is_one_line(mine, tmp_path, capsys):
    schedule(capsys, mine(), tmp_path / "o")
    _, err = fewstep(capsys, "schedule", "--model", mine("narrower"), "--check", tmp_path / "o", expect=2)
    assert "beyond the model's noisiest level" in err.splitlines()[-1]
