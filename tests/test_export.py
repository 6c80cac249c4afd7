"""Every row of what a runtime accepts, against diffusers itself: the levels that stand in it are the schedule's, to 1e-6."""

import ast
import inspect
import json
import math
import re
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from fewstep.adapters import from_diffusers
from fewstep.export import (
    FILE,
    ROWS,
    apply,
    attach,
    attached,
    comfyui_node,
    export,
    sub_range,
    to_a1111,
    to_comfyui,
    to_diffusers,
    to_json,
    to_k_diffusion,
    using,
)
from fewstep.export.schedulers import INSTEAD
from fewstep.path import Linear, Tabulated
from fewstep.schedule import Schedule, cosine, from_costs, karras, kl_optimal, linear, log_linear
from fewstep.solvers import solve

diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")  # of numpy, in its schedulers

STEPS = [4, 7, 20]
on_steps = pytest.mark.parametrize("steps", STEPS)
# the tables of Stable Diffusion and of DDPM, and a v model of the former without terminal signal
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DDPM = {"beta_schedule": "linear"}
ZERO_SNR = SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def uneven(sigma_min: float, sigma_max: float) -> Schedule:
    """A curve with few knots and no formula, as one learned from a model is."""
    sigma = torch.logspace(math.log10(sigma_max), math.log10(sigma_min), 23, dtype=torch.float64)
    costs = torch.rand(22, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.05
    return from_costs(torch.atan(sigma), costs, name="uneven", provenance={"model": 'a "tiny" one'})


FINITE = {
    "karras": karras(0.03, 14.6),
    "log_linear": log_linear(0.0292, 14.0),
    "uneven": uneven(0.031, 13.0),
    "part": sub_range(karras(0.03, 14.6), strength=0.6),
    "to data": replace(uneven(0.031, 13.0), to_data=True),
    "refined": replace(uneven(0.031, 13.0), grids={n: torch.atan(torch.linspace(12.0, 0.1, n) ** 1.05) for n in (4, 20)}),
}
PURE = {"linear": linear(), "cosine": cosine(0.01), "marked": replace(uneven(0.002, 80.0), pure_noise=True)}
on_finite = pytest.mark.parametrize("schedule", FINITE.values(), ids=FINITE)
on_pure = pytest.mark.parametrize("schedule", PURE.values(), ids=PURE)
on_all = pytest.mark.parametrize("schedule", [*FINITE.values(), *PURE.values()], ids=[*FINITE, *PURE])


def make(name: str, **settings):
    return getattr(diffusers, name)(**settings)


def follow(advice: str, scheduler):
    """The scheduler that the line of code in an error message makes."""
    name = advice.split(".")[0]
    return eval(advice, {name: getattr(diffusers, name), "scheduler": scheduler})


def lands(scheduler, wanted: torch.Tensor) -> None:
    """The scheduler holds the levels, in float32, to 1e-6."""
    assert scheduler.sigmas.dtype == torch.float32
    np.testing.assert_allclose(scheduler.sigmas.double().numpy(), wanted.numpy(), rtol=1e-6, atol=0)


def flow(theta: torch.Tensor) -> torch.Tensor:
    """The linear path's t at the angles, by the path itself."""
    return Linear().time(theta)


def log_sigma_index(scheduler, sigma: torch.Tensor) -> np.ndarray:
    """The fractional indices of levels, linear in log sigma, as k-diffusion has them."""
    abar = scheduler.alphas_cumprod.double()
    table = (((1 - abar) / abar).log() / 2).numpy()
    return np.interp(sigma.log().numpy(), table, np.arange(len(table)))


# --- diffusers: what takes levels -------------------------------------------------------------------------------------


@on_finite
@on_steps
@pytest.mark.parametrize("table", [SD, DDPM], ids=["scaled_linear", "linear"])
@pytest.mark.parametrize(
    "settings", [{}, {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}, {"timestep_spacing": "leading"}], ids=str
)
def test_euler_takes_all_levels_and_the_zero_verbatim(schedule, steps, table, settings):
    scheduler = make("EulerDiscreteScheduler", **table, **settings)
    wanted = torch.tan(schedule.angles(steps))
    kwargs = to_diffusers(schedule, scheduler, steps)
    assert list(kwargs) == ["sigmas"]
    assert len(kwargs["sigmas"]) == steps + 1
    scheduler.set_timesteps(**kwargs)
    lands(scheduler, wanted)
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == steps
    np.testing.assert_allclose(scheduler.timesteps.numpy(), log_sigma_index(scheduler, wanted[:-1]), rtol=1e-4, atol=1e-3)


def test_euler_without_the_zero_would_lose_a_step():
    scheduler = make("EulerDiscreteScheduler", **SD)
    scheduler.set_timesteps(sigmas=to_diffusers(FINITE["karras"], scheduler, 7)["sigmas"][:-1])
    assert len(scheduler.timesteps) == 6


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@on_pure
@on_steps
def test_pure_noise_is_the_stand_in_that_a_zero_snr_scheduler_writes_for_it(name, schedule, steps):
    scheduler = make(name, **ZERO_SNR)
    wanted = torch.tan(schedule.angles(steps))
    wanted[0] = math.sqrt(2**24 - 1)
    assert apply(schedule, scheduler, steps).steps == steps
    lands(scheduler, wanted)
    assert scheduler.timesteps[0] == 999
    assert (scheduler.timesteps.diff() < 0).all() or schedule is PURE["marked"]  # of which the last levels are told index 0


@pytest.mark.parametrize("settings", [SD, DDPM, ZERO_SNR], ids=["scaled_linear", "linear", "zero SNR"])
def test_the_network_is_told_what_from_diffusers_tells_it_also_within_the_last_cell(settings):
    scheduler = make("DPMSolverMultistepScheduler", **settings)
    path = from_diffusers((unet(), scheduler)).path
    schedule = karras(0.03, 3000.0) if settings is ZERO_SNR else FINITE["karras"]  # 3000: between the last two entries
    apply(schedule, scheduler, 7)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), path.index(schedule.times(path, 7)[:-1]).numpy(), rtol=1e-6)


@on_finite
@on_steps
@pytest.mark.parametrize("table", [SD, DDPM], ids=["scaled_linear", "linear"])
def test_heun_takes_fractional_indices_that_give_the_levels_and_doubles_them(schedule, steps, table):
    scheduler = make("HeunDiscreteScheduler", **table)
    sigma = torch.tan(schedule.angles(steps))
    kwargs = to_diffusers(schedule, scheduler, steps)
    assert len(kwargs["timesteps"]) == steps
    scheduler.set_timesteps(**kwargs)
    lands(scheduler, torch.cat([sigma[:1], sigma[1:-1].repeat_interleave(2), sigma[-1:]]))
    told = scheduler.timesteps[torch.tensor([0, *range(1, 2 * steps - 1, 2)])]
    np.testing.assert_allclose(told.numpy(), log_sigma_index(scheduler, sigma[:-1]), atol=0.1)  # linear in sigma instead
    assert apply(schedule, scheduler, steps).steps == steps


@on_finite
@on_steps
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"])
@pytest.mark.parametrize("table", [SD, DDPM], ids=["scaled_linear", "linear"])
def test_dpm_solver_rounds_so_its_levels_and_what_the_network_is_told_are_written_over(schedule, steps, name, table):
    scheduler = make(name, **table, lower_order_final=True)
    wanted = torch.tan(schedule.angles(steps))
    kwargs = to_diffusers(schedule, scheduler, steps)
    scheduler.set_timesteps(**kwargs)
    off = (scheduler.sigmas.double() / wanted - 1)[:-1].abs().max()
    assert 1e-4 < off < 0.2  # what rounding alone does; the worst is the cell between indices 0 and 1
    landed = apply(schedule, scheduler, steps)
    lands(scheduler, wanted)
    assert torch.equal(landed.sigmas, scheduler.sigmas)
    assert (landed.steps, landed.lost, landed.kwargs) == (steps, 0, kwargs)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), log_sigma_index(scheduler, wanted[:-1]), rtol=1e-4, atol=1e-3)


@on_all
@pytest.mark.parametrize("steps", [4, 20, 200])
@pytest.mark.parametrize(("name", "last"), [("DDPMScheduler", 0), ("LCMScheduler", 0), ("TCDScheduler", 1)])
def test_schedulers_of_whole_indices_get_the_nearest_and_say_what_is_lost(schedule, steps, name, last):
    scheduler = make(name, **(ZERO_SNR if schedule.angles(1)[0] > 1.57 else SD))
    nearest = log_sigma_index(scheduler, torch.tan(schedule.angles(steps)[:-1])).round().clip(min=last)
    nearest = sorted(set(nearest.astype(int).tolist()), reverse=True)
    kwargs = to_diffusers(schedule, scheduler, steps)
    landed = apply(schedule, scheduler, steps)
    given = kwargs["timesteps"]
    assert scheduler.timesteps.tolist() == given
    assert all(type(t) is int for t in given)
    assert (np.diff(given) < 0).all()
    if schedule in FINITE.values():  # in the last cell of a zero-SNR table the index is linear in the angle instead
        assert given == nearest
    assert (landed.steps, landed.lost) == (len(given), steps - len(given))
    assert steps < 200 or landed.lost > 0
    abar = scheduler.alphas_cumprod.double()[[*given, 0]]
    levels = ((1 - abar) / abar).sqrt()
    if name != "TCDScheduler":  # whose last step goes to index 0
        levels[-1] = 0
    torch.testing.assert_close(landed.sigmas.double(), levels, rtol=1e-6, atol=0)


SHIFTS = {
    "shift 1": ({"shift": 1.0}, None),
    "shift 3": ({"shift": 3.0}, None),
    "shift 17": ({"shift": 17.0}, None),
    "mu 1.15": ({"use_dynamic_shifting": True}, 1.15),
    "mu -0.5": ({"use_dynamic_shifting": True, "shift": 3.0}, -0.5),
    "linear mu": ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 2.5),
}
on_shifts = pytest.mark.parametrize(("settings", "mu"), SHIFTS.values(), ids=SHIFTS)


@on_all
@on_steps
@on_shifts
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_flow_schedulers_shift_back_to_the_levels(schedule, steps, settings, mu, name):
    scheduler = make(name, **settings)
    wanted = flow(schedule.angles(steps))
    kwargs = to_diffusers(schedule, scheduler, steps, mu)
    assert len(kwargs["sigmas"]) == steps
    scheduler.set_timesteps(**kwargs)
    lands(scheduler, wanted)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), 1000 * wanted[:-1].numpy(), rtol=1e-6)
    assert torch.equal(apply(schedule, scheduler, steps, mu).sigmas, scheduler.sigmas)


def test_the_shift_that_counts_is_the_one_that_is_set_now():
    scheduler = make("FlowMatchEulerDiscreteScheduler", shift=3.0)
    scheduler.set_shift(5.0)
    scheduler.set_timesteps(**to_diffusers(linear(), scheduler, 7))
    lands(scheduler, flow(linear().angles(7)))


@on_all
@on_steps
@pytest.mark.parametrize(
    ("settings", "mu"),
    [({}, None), ({"flow_shift": 3.0}, None), ({"use_dynamic_shifting": True}, 0.8)],
    ids=["shift 1", "shift 3", "mu"],
)
def test_unipc_of_flow_takes_an_array_and_keeps_the_levels_fractional(schedule, steps, settings, mu):
    scheduler = make("UniPCMultistepScheduler", **FLOW_SIGMAS, **settings)
    wanted = flow(schedule.angles(steps)).clamp(max=1 - 1e-6)  # where its logarithms would be infinite
    kwargs = to_diffusers(schedule, scheduler, steps, mu)
    assert isinstance(kwargs["sigmas"], np.ndarray)
    scheduler.set_timesteps(**kwargs)
    lands(scheduler, wanted)
    assert scheduler.timesteps.dtype == torch.int64
    apply(schedule, scheduler, steps, mu)
    lands(scheduler, wanted)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), 1000 * wanted[:-1].numpy(), rtol=1e-6)


@on_finite
@on_steps
@pytest.mark.parametrize("settings", [{}, {"rho": 3.0}, {"sigma_min": 0.01, "sigma_max": 100.0, "sigma_data": 1.0}], ids=str)
def test_edm_euler_takes_the_ramp_that_gives_the_levels(schedule, steps, settings):
    scheduler = make("EDMEulerScheduler", **settings)
    wanted = torch.tan(schedule.angles(steps))
    scheduler.set_timesteps(**to_diffusers(schedule, scheduler, steps))
    lands(scheduler, wanted)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), wanted[:-1].log().numpy() / 4, rtol=1e-5, atol=1e-6)
    scheduler.set_timesteps(sigmas=wanted[:-1])
    assert not torch.allclose(scheduler.sigmas.double(), wanted, rtol=0.5)  # the levels themselves would be garbage


# --- diffusers: what does not -----------------------------------------------------------------------------------------

REFUSED = {
    "DDIMScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "DEISMultistepScheduler": {},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "IPNDMScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "SASolverScheduler": {},
    "UniPCMultistepScheduler": {},
    "EDMDPMSolverMultistepScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},
    "DPMSolverMultistepScheduler": FLOW_SIGMAS | {"flow_shift": 3.0},
    "DPMSolverSinglestepScheduler": FLOW_SIGMAS,
}


@pytest.mark.parametrize(("name", "settings"), REFUSED.items(), ids=REFUSED)
def test_a_scheduler_that_takes_no_levels_is_refused_with_one_that_does(name, settings):
    scheduler = make(name, **settings)
    for deliver in (to_diffusers, apply):
        with pytest.raises(ValueError, match=name) as error:
            deliver(FINITE["karras"], scheduler, 7)
    (line,) = re.findall(r"use (\w+\.from_config\(scheduler\.config\))", str(error.value))
    other = follow(line, scheduler)
    apply(FINITE["karras"], other, 7)
    theta = FINITE["karras"].angles(7)
    lands(other, flow(theta) if "Flow" in line else torch.tan(theta))
    assert ("Flow" in line) == ("Flow" in name or "use_flow_sigmas" in settings)
    assert ("EDM" in line) == ("EDM" in name)


@pytest.mark.parametrize("thing", [3, "karras", object(), torch.nn.Linear(2, 2)], ids=lambda t: type(t).__name__)
def test_what_is_no_scheduler_is_refused(thing):
    with pytest.raises((ValueError, OSError)):
        to_diffusers(FINITE["karras"], thing, 7)


def test_a_scheduler_of_none_of_the_three_kinds_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"CMStochasticIterativeScheduler .* EulerDiscreteScheduler"):
        apply(FINITE["karras"], make("CMStochasticIterativeScheduler"), 7)


FLAGS = ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]
SETTINGS = [
    *((name, {flag: True}) for flag in FLAGS for name, row in ROWS.items() if flag in row.needs),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.02}),
    ("FlowMatchLCMScheduler", {"shift_terminal": 0.02}),
    ("UniPCMultistepScheduler", {"shift_terminal": 0.02}),
    ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverSinglestepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("EDMEulerScheduler", {"sigma_schedule": "exponential"}),
    ("EDMEulerScheduler", {"final_sigmas_type": "sigma_min"}),
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_a_setting_that_would_change_the_levels_is_refused_with_the_way_out(name, settings):
    scheduler = make(name, **(FLOW_SIGMAS if name.startswith("UniPC") else {}), **settings)
    for deliver in (to_diffusers, apply):
        with pytest.raises(ValueError, match=next(iter(settings))) as error:
            deliver(FINITE["karras"], scheduler, 7)
    (line,) = re.findall(r"use (\w+\.from_config\(.*\))", str(error.value))
    apply(FINITE["karras"], follow(line, scheduler), 7)


def test_those_settings_do_change_the_levels():
    scheduler = make("FlowMatchEulerDiscreteScheduler", shift_terminal=0.02)
    scheduler.set_timesteps(sigmas=flow(linear().angles(7))[:-1].tolist())
    assert not torch.allclose(scheduler.sigmas.double(), flow(linear().angles(7)), rtol=0.1)


def test_a_mu_is_wanted_exactly_where_it_has_a_meaning():
    with pytest.raises(ValueError, match="give mu="):
        to_diffusers(linear(), make("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True), 7)
    for scheduler in (make("FlowMatchEulerDiscreteScheduler"), make("EulerDiscreteScheduler")):
        with pytest.raises(ValueError, match=r"mu=0\.5 has no meaning"):
            to_diffusers(FINITE["karras"], scheduler, 7, mu=0.5)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.unit == "table"])
@pytest.mark.parametrize("schedule", [karras(0.03, 80.0), linear(0.03)], ids=["80", "pure noise"])
def test_levels_noisier_than_the_table_are_refused_with_a_way_that_works(name, schedule):
    scheduler = make(name, **SD)
    with pytest.raises(ValueError, match=r"noisiest level is 14\.6146") as error:
        to_diffusers(schedule, scheduler, 7)
    (line,) = re.findall(r"sub_range\(.*?\)", str(error.value))
    part = eval(line, {"sub_range": sub_range, "schedule": schedule})
    assert float(apply(part, scheduler, 7).sigmas[0]) == pytest.approx(14.6146, rel=1e-4)


def test_the_noisiest_level_of_an_edm_model_is_its_sigma_max():
    with pytest.raises(ValueError, match="noisiest level is 80"):
        to_diffusers(karras(0.002, 81.0), make("EDMEulerScheduler"), 7)
    with pytest.raises(ValueError, match="noisiest level is 80"):
        to_diffusers(linear(), make("EDMEulerScheduler"), 7)


def test_levels_cleaner_than_the_table_are_refused_by_heun_and_told_index_0_by_euler():
    schedule = karras(0.002, 14.6)
    with pytest.raises(ValueError, match=r"none below 0\.0291.*EulerDiscreteScheduler"):
        to_diffusers(schedule, make("HeunDiscreteScheduler", **SD), 7)
    scheduler = make("EulerDiscreteScheduler", **SD)
    apply(schedule, scheduler, 7)
    lands(scheduler, torch.tan(schedule.angles(7)))
    assert scheduler.timesteps[-1] == 0


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_start_below_the_table_where_diffusers_would_skip_a_step_is_refused(name):
    with pytest.raises(ValueError, match=r"skip one of them.*sigma_min >= 0\.0291"):
        apply(karras(0.001, 0.02), make(name, **SD), 4)


def test_a_level_that_does_not_land_is_an_error(monkeypatch):
    scheduler = make("EulerDiscreteScheduler", **SD)
    own = type(scheduler).set_timesteps

    def sloppy(self, **kwargs):
        own(self, **kwargs)
        self.sigmas = self.sigmas * (1 + 3e-6)

    monkeypatch.setattr(type(scheduler), "set_timesteps", sloppy)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler made level 0 14"):
        apply(FINITE["karras"], scheduler, 7)


def test_an_edm_v_model_in_euler_is_told_a_logarithm_and_has_no_table():
    scheduler = make("EulerDiscreteScheduler", timestep_type="continuous", prediction_type="v_prediction", sigma_max=700.0)
    schedule = karras(0.002, 700.0)
    apply(schedule, scheduler, 7)
    lands(scheduler, torch.tan(schedule.angles(7)))
    np.testing.assert_allclose(scheduler.timesteps.numpy(), schedule.sigmas(7)[:-1].log().numpy() / 4, rtol=1e-5)


# --- diffusers: end to end --------------------------------------------------------------------------------------------


def unet():
    torch.manual_seed(0)
    given = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return diffusers.UNet2DModel(**given, **blocks, add_attention=False).eval().requires_grad_(False)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def run(scheduler, network, x: torch.Tensor) -> torch.Tensor:
    """The loop of a pipeline."""
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    return x


LOOPS = {
    "Euler, eps": ("EulerDiscreteScheduler", SD, "euler", 1e-4),
    "Euler, v": ("EulerDiscreteScheduler", SD | {"prediction_type": "v_prediction"}, "euler", 1e-4),
    # 4096 for pure noise
    "Euler, v without terminal signal": ("EulerDiscreteScheduler", ZERO_SNR, "euler", 2e-3),
    "Heun": ("HeunDiscreteScheduler", SD, "heun", 2e-3),  # its indices are linear in sigma
    "DPM++ 2M": ("DPMSolverMultistepScheduler", SD, "dpmpp_2m", 1e-4),
}


@pytest.mark.parametrize(("name", "settings", "solver", "tolerance"), LOOPS.values(), ids=LOOPS)
@on_steps
def test_diffusers_own_loop_on_the_grid_is_solve_on_the_schedule(name, settings, solver, tolerance, steps):
    network, scheduler = unet(), make(name, **settings)
    schedule = uneven(0.031, 80.0) if "rescale_betas_zero_snr" in settings else FINITE["uneven"]
    if "rescale_betas_zero_snr" in settings:
        schedule = replace(schedule, pure_noise=True)
    denoiser = from_diffusers((network, scheduler))
    times = schedule.times(denoiser.path, steps)
    noise = draw(2, 3, 8, 8)
    ours = solve(denoiser, noise * denoiser.path.sigma(times[0]).float(), times, solver).x
    apply(schedule, scheduler, steps)
    sigma = scheduler.sigmas[0]
    scaled = noise * (sigma if name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler") else sigma / (1 + sigma**2).sqrt())
    theirs = run(scheduler, network, scaled)
    error = (ours - theirs).norm() / ours.norm()
    assert error < tolerance
    apply(karras(0.03, 14.0), scheduler, steps)  # on other levels it would not be
    other = run(scheduler, network, scaled)
    assert (ours - other).norm() / ours.norm() > 5 * tolerance


PIPELINES = {
    "DDPM": ("DDPMScheduler", SD | {"clip_sample": False}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", SD),
    "flow, shift 3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow, LCM": ("FlowMatchLCMScheduler", {}),
}


@pytest.mark.parametrize(("name", "settings"), PIPELINES.values(), ids=PIPELINES)
def test_a_pipeline_that_takes_no_levels_gets_them_and_gives_its_scheduler_back(name, settings):
    network, scheduler = unet(), make(name, **settings)
    pipeline = diffusers.DDPMPipeline(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    schedule, own = FINITE["uneven"], type(scheduler).set_timesteps

    def images(steps):
        noises = torch.Generator().manual_seed(0)
        return pipeline(batch_size=2, generator=noises, output_type="np", num_inference_steps=steps).images

    with using(schedule, pipeline):
        for steps in (4, 7):
            got, timesteps = images(steps), scheduler.timesteps
            assert torch.equal(timesteps, timesteps.sort(descending=True).values)
            assert len(timesteps) == steps
    assert scheduler.set_timesteps.__func__ is own
    plain = images(7)
    assert not np.allclose(got, plain, atol=1e-3)
    # the pipeline's loop by hand
    apply(schedule, scheduler, 7)
    assert torch.equal(scheduler.timesteps, timesteps)
    noises = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=noises)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).sample, t, x, generator=noises).prev_sample
    np.testing.assert_allclose(got, (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "asked", [{"num_inference_steps": 7}, {"sigmas": np.linspace(1, 0.1, 7)}, {"timesteps": list(range(7, 0, -1))}], ids=str
)
def test_however_a_pipeline_asks_for_its_steps_it_gets_as_many_of_the_schedules(asked):
    """As retrieve_timesteps does: it looks at the signature first, and hands on mu and device by keyword."""
    scheduler = make("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    own = inspect.signature(scheduler.set_timesteps)
    with using(linear(), scheduler):
        assert inspect.signature(scheduler.set_timesteps) == own
        scheduler.set_timesteps(**asked, device="cpu", mu=0.9)
    lands(scheduler, flow(linear().angles(7)))


def text_pipeline(scheduler):
    pytest.importorskip("transformers", reason="diffusers has no text pipelines without it")
    torch.manual_seed(1)
    network = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, unet=network, scheduler=scheduler, **parts, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_stable_diffusion_runs_on_the_grid_by_its_own_argument_and_by_using(name):
    schedule = FINITE["uneven"]
    scheduler = make(name, **SD)
    pipeline = text_pipeline(scheduler)
    call = {"prompt_embeds": draw(1, 5, 8), "guidance_scale": 1.0, "output_type": "latent", "latents": draw(1, 4, 8, 8)}
    with using(schedule, pipeline):
        within = pipeline(**call, num_inference_steps=7).images
    lands(scheduler, torch.tan(schedule.angles(7)))
    told = log_sigma_index(scheduler, torch.tan(schedule.angles(7)[:-1]))
    np.testing.assert_allclose(scheduler.timesteps.numpy(), told, rtol=1e-4, atol=1e-3)
    by_argument = pipeline(**call, **to_diffusers(schedule, scheduler, 7)).images
    plain = pipeline(**call, num_inference_steps=7).images
    assert torch.isfinite(within).all()
    if name == "EulerDiscreteScheduler":  # the other one rounds
        assert torch.equal(within, by_argument)
    assert (within - by_argument).norm() < 0.2 * (within - plain).norm()


def flow_pipeline(scheduler):
    pytest.importorskip("transformers", reason="diffusers has no text pipelines without it")
    torch.manual_seed(3)
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=4,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    parts = dict.fromkeys(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))
    pipeline = diffusers.StableDiffusion3Pipeline(transformer=network, scheduler=scheduler, vae=vae, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("settings", [{"shift": 3.0}, {"use_dynamic_shifting": True}], ids=["shift 3", "its own mu"])
def test_stable_diffusion_3_runs_on_the_grid_and_that_is_solve_on_the_linear_path(settings):
    schedule = linear()
    scheduler = make("FlowMatchEulerDiscreteScheduler", **settings)
    pipeline = flow_pipeline(scheduler)
    call = {"prompt_embeds": draw(1, 5, 8), "pooled_prompt_embeds": draw(1, 8), "guidance_scale": 1.0, "output_type": "latent"}
    call |= {"latents": draw(1, 4, 8, 8), "height": 8, "width": 8}
    with using(schedule, pipeline):
        within = pipeline(**call, num_inference_steps=7).images
    lands(scheduler, flow(schedule.angles(7)))
    if "shift" in settings:
        assert torch.equal(within, pipeline(**call, **to_diffusers(schedule, scheduler, 7)).images)
    denoiser = from_diffusers((pipeline.transformer, scheduler))
    cond = {"encoder_hidden_states": call["prompt_embeds"], "pooled_projections": call["pooled_prompt_embeds"]}
    with torch.no_grad():
        ours = solve(denoiser, call["latents"], schedule.times(denoiser.path, 7), cond=cond).x
    torch.testing.assert_close(within, ours, rtol=1e-4, atol=1e-4)


def test_using_takes_what_the_pipelines_of_consistency_models_give():
    scheduler = make("LCMScheduler", **SD)
    with using(FINITE["karras"], scheduler):
        scheduler.set_timesteps(4, "cpu", original_inference_steps=50)
    assert scheduler.timesteps.tolist() == to_diffusers(FINITE["karras"], scheduler, 4)["timesteps"]


def test_whatever_happens_within_using_the_scheduler_is_given_back():
    scheduler = make("EulerDiscreteScheduler", **SD)
    with pytest.raises(RuntimeError, match="out of memory"), using(FINITE["karras"], scheduler):
        raise RuntimeError("out of memory")
    scheduler.set_timesteps(7)
    assert not torch.allclose(scheduler.sigmas.double(), torch.tan(FINITE["karras"].angles(7)), rtol=1e-3)


def test_the_inner_of_two_schedules_is_used():
    scheduler = make("EulerDiscreteScheduler", **SD)
    with using(FINITE["karras"], scheduler):
        with using(FINITE["uneven"], scheduler):
            scheduler.set_timesteps(7)
            lands(scheduler, torch.tan(FINITE["uneven"].angles(7)))
        scheduler.set_timesteps(7)
        lands(scheduler, torch.tan(FINITE["karras"].angles(7)))
    assert "set_timesteps" not in vars(scheduler)


# --- part of a schedule -----------------------------------------------------------------------------------------------

CURVES = {**FINITE, **PURE, "kl_optimal": kl_optimal(), "two knots": Schedule([0.0, 1.0], [1.5, 0.01])}
on_curves = pytest.mark.parametrize("schedule", CURVES.values(), ids=CURVES)


def shares(schedule: Schedule, start: float, steps: int) -> torch.Tensor:
    """The angles of `steps` levels from a share of the curve on."""
    return schedule.at(torch.linspace(start, 1, steps + schedule.to_data, dtype=torch.float64))[:steps]


@on_curves
@pytest.mark.parametrize("strength", [0.97, 0.6, 0.25, 0.01])
@on_steps
def test_a_part_reads_the_same_curve_from_its_share_on(schedule, strength, steps):
    part = sub_range(schedule, strength=strength)
    expected = shares(schedule, 1 - strength, steps)
    torch.testing.assert_close(torch.tan(part.angles(steps)[:-1]), torch.tan(expected), rtol=1e-6, atol=0)
    assert part.angles(steps)[-1] == 0
    assert part.provenance["of"] == schedule.provenance


@on_curves
@pytest.mark.parametrize("sigma", [2.0, 0.5, 0.05])
@on_steps
def test_a_part_from_a_level_starts_there_and_lies_on_the_curve(schedule, sigma, steps):
    part = sub_range(schedule, sigma=sigma)
    levels = part.sigmas(steps)
    assert float(levels[0]) == pytest.approx(sigma, rel=1e-9)
    assert schedule.to_data or float(levels[-2]) == pytest.approx(math.tan(schedule.theta[-1]), rel=1e-9)
    start = 1 - part.provenance["sub_range"]["strength"]
    expected = torch.tan(shares(schedule, start, steps))
    torch.testing.assert_close(levels[:-1], expected, rtol=1e-6, atol=0)


def test_the_whole_is_a_part():
    assert sub_range(FINITE["karras"], strength=1.0) is FINITE["karras"]
    assert sub_range(FINITE["karras"], sigma=14.6).sigmas(7).tolist() == pytest.approx(FINITE["karras"].sigmas(7).tolist())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "either strength or sigma"),
        ({"strength": 0.5, "sigma": 1.0}, "either strength or sigma"),
        ({"strength": 0.0}, r"\(0, 1\]"),
        ({"strength": 1.1}, r"\(0, 1\]"),
        ({"strength": math.nan}, r"\(0, 1\]"),
        ({"sigma": 15.0}, "from sigma/alpha = 14.6 to 0.03"),
        ({"sigma": 0.03}, "from sigma/alpha = 14.6 to 0.03"),
        ({"sigma": -1.0}, "from sigma/alpha = 14.6 to 0.03"),
        ({"sigma": math.nan}, "from sigma/alpha = 14.6 to 0.03"),
    ],
    ids=str,
)
def test_what_is_no_part_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        sub_range(FINITE["karras"], **given)


# --- other runtimes ---------------------------------------------------------------------------------------------------


@on_finite
@on_steps
def test_k_diffusion_gets_all_levels_in_float32(schedule, steps):
    sigmas = to_k_diffusion(schedule, steps)
    assert (sigmas.dtype, sigmas.shape, sigmas[-1]) == (torch.float32, (steps + 1,), 0)
    assert (sigmas.diff() < 0).all()
    torch.testing.assert_close(sigmas.double(), torch.tan(schedule.angles(steps)), rtol=1e-6, atol=0)


@on_finite
@on_steps
def test_k_diffusions_euler_on_them_is_ours(schedule, steps):
    network, scheduler = unet(), make("EulerDiscreteScheduler", **SD)
    denoiser = from_diffusers((network, scheduler))
    path, sigmas = denoiser.path, to_k_diffusion(schedule, steps)
    x = start = draw(2, 3, 8, 8) * sigmas[0]
    for sigma, cleaner in pairwise(sigmas):  # k_diffusion.sampling.sample_euler without churn
        denoised = denoiser(x / (1 + sigma**2).sqrt(), path.time(torch.atan(sigma.double())))
        x = x + (x - denoised) / sigma * (cleaner - sigma)
    times = schedule.times(path, steps)
    ours = solve(denoiser, start / (1 + sigmas[0] ** 2).sqrt(), times).x
    torch.testing.assert_close(x, ours, rtol=1e-4, atol=1e-4)


def manual_sigmas(text: str) -> torch.Tensor:
    """ComfyUI's ManualSigmas."""
    return torch.FloatTensor([float(number) for number in re.findall(r"[-+]?(?:\d*\.*\d+)", text)])


@on_all
@on_steps
@pytest.mark.parametrize("is_flow", [False, True], ids=["eps", "flow"])
def test_comfyuis_parser_reads_the_levels(schedule, steps, is_flow):
    theta = schedule.angles(steps)
    if not is_flow and theta[0] > 1.57:
        with pytest.raises(ValueError, match="pure noise"):
            to_comfyui(schedule, steps)
        return
    text = to_comfyui(schedule, steps, flow=is_flow)
    assert not set(text) - set("0123456789., ")
    wanted = flow(theta) if is_flow else torch.tan(theta)
    torch.testing.assert_close(manual_sigmas(text).double(), wanted, rtol=1e-6, atol=0)


def test_the_smallest_levels_have_no_exponent_either():
    text = to_comfyui(log_linear(1e-9, 1e6), 5)
    assert "e" not in text
    torch.testing.assert_close(manual_sigmas(text).double(), log_linear(1e-9, 1e6).sigmas(5), rtol=1e-6, atol=0)


def a1111(n: int, sigmas: list[float]) -> torch.Tensor:
    """get_align_your_steps_sigmas of A1111's sd_schedulers.py, after its constants."""

    def loglinear_interp(t_steps, num_steps):
        xs = np.linspace(0, 1, len(t_steps))
        ys = np.log(t_steps[::-1])
        return np.exp(np.interp(np.linspace(0, 1, num_steps), xs, ys))[::-1].copy()

    sigmas = np.append(loglinear_interp(sigmas, n), [0.0]) if n != len(sigmas) else [*sigmas, 0.0]
    return torch.FloatTensor(sigmas)


@on_finite
@on_steps
def test_a1111_appends_the_zero_itself(schedule, steps):
    assert len(to_a1111(schedule, steps)) == steps
    torch.testing.assert_close(a1111(steps, to_a1111(schedule, steps)), to_k_diffusion(schedule, steps), rtol=1e-6, atol=0)


@on_all
@on_steps
def test_json_has_the_grid_in_every_unit(schedule, steps):
    grid = json.loads(json.dumps(to_json(schedule, steps), allow_nan=False))
    theta = torch.tensor(grid["theta"], dtype=torch.float64)
    assert torch.equal(theta, schedule.angles(steps))
    np.testing.assert_allclose(grid["flow"], flow(theta), rtol=1e-12)
    first = int(grid["sigma"][0] is None)
    assert first == (theta[0] > 1.57)
    np.testing.assert_allclose(grid["sigma"][first:], torch.tan(theta)[first:], rtol=1e-12)
    assert (grid["schedule"], grid["steps"]) == (schedule.name, steps)


@pytest.mark.parametrize("give", [to_k_diffusion, to_comfyui, to_a1111])
def test_infinite_levels_are_refused_with_a_way_that_works(give):
    with pytest.raises(ValueError, match="pure noise") as error:
        give(linear(), 7)
    (line,) = re.findall(r"sub_range\(.*?\)", str(error.value))
    give(eval(line, {"sub_range": sub_range, "schedule": linear(), "sigma_max": 80.0}), 7)


# --- export -----------------------------------------------------------------------------------------------------------


def test_export_writes_what_each_function_gives():
    schedule, scheduler = FINITE["karras"], make("EulerDiscreteScheduler", **SD)
    assert json.loads(export(schedule, "diffusers", 7, scheduler=scheduler)) == to_diffusers(schedule, scheduler, 7)
    assert json.loads(export(schedule, "k-diffusion", 7)) == to_k_diffusion(schedule, 7).tolist()
    assert export(schedule, "comfyui", 7) == to_comfyui(schedule, 7)
    assert export(linear(), "comfyui", 7, flow=True) == to_comfyui(linear(), 7, flow=True)
    assert export(schedule, "comfyui-node", 7) == comfyui_node(schedule)
    assert json.loads(export(schedule, "a1111", 7)) == to_a1111(schedule, 7)
    assert json.loads(export(schedule, "json", 7)) == to_json(schedule, 7)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "EDMEulerScheduler"])
def test_arrays_and_tensors_are_written_as_lists(name):
    scheduler = make(name, **(FLOW_SIGMAS if name.startswith("UniPC") else {}))
    assert len(json.loads(export(FINITE["karras"], "diffusers", 7, scheduler=scheduler))["sigmas"]) == 7


def test_export_to_diffusers_reads_a_saved_pipelines_scheduler(tmp_path):
    scheduler = make("FlowMatchEulerDiscreteScheduler", shift=3.0)
    scheduler.save_pretrained(tmp_path / "pipeline" / "scheduler")
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "scheduler"):
        kwargs = json.loads(export(linear(), "diffusers", 7, scheduler=str(folder)))
        assert kwargs == to_diffusers(linear(), scheduler, 7)


def test_export_asks_for_what_it_lacks():
    with pytest.raises(ValueError, match="give scheduler="):
        export(FINITE["karras"], "diffusers", 7)
    with pytest.raises(ValueError, match="k-diffusion, comfyui"):
        export(FINITE["karras"], "automatic", 7)


# --- the node for ComfyUI ---------------------------------------------------------------------------------------------


def node(source: str):
    """The node of a file, run as ComfyUI would, where nobody has fewstep."""
    imported = {a.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)}
    assert imported <= {"json", "math", "numpy", "torch", "scipy.interpolate"}
    space = {"__name__": "custom_nodes.fewstep"}
    exec(compile(source, "node.py", "exec"), space)
    ((key, kind),) = space["NODE_CLASS_MAPPINGS"].items()
    assert key in space["NODE_DISPLAY_NAME_MAPPINGS"]
    assert kind.RETURN_TYPES == ("SIGMAS",)
    return kind


def sigmas(kind, **inputs) -> torch.Tensor:
    assert set(inputs) <= set(kind.INPUT_TYPES()["required"])
    (levels,) = getattr(kind(), kind.FUNCTION)(**inputs)
    assert levels.dtype == torch.float32
    return levels.double()


@on_all
def test_the_node_gives_the_schedules_levels_for_any_number_of_steps(schedule, monkeypatch):
    source = comfyui_node(schedule)
    for name in [name for name in sys.modules if name.split(".")[0] == "fewstep"]:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it would fail
    kind = node(source)
    monkeypatch.undo()
    for steps in (1, 2, *STEPS, 50):
        theta = schedule.angles(steps)
        torch.testing.assert_close(sigmas(kind, steps=steps, flow=True), flow(theta), rtol=1e-6, atol=0)
        if theta[0] < 1.57:
            torch.testing.assert_close(sigmas(kind, steps=steps), torch.tan(theta), rtol=1e-6, atol=0)
        else:
            with pytest.raises(ValueError, match="pure noise"):
                sigmas(kind, steps=steps)
    assert kind.INPUT_TYPES()["required"]["flow"][1]["default"] is bool(schedule.angles(1)[0] > 1.57)


@on_all
@pytest.mark.parametrize("denoise", [0.8, 0.3])
def test_the_nodes_denoise_is_the_part_of_the_schedule(schedule, denoise):
    kind = node(comfyui_node(schedule))
    for steps in STEPS:
        wanted = sub_range(schedule, strength=denoise).sigmas(steps)
        torch.testing.assert_close(sigmas(kind, steps=steps, denoise=denoise), wanted, rtol=2e-6, atol=0)
    assert len(sigmas(kind, steps=7, denoise=0.0)) == 0  # as ComfyUI's own schedulers


def test_the_node_of_a_file_is_that_of_its_schedule(tmp_path):
    FINITE["uneven"].save(tmp_path / "mine.json")
    assert comfyui_node(tmp_path / "mine.json") == comfyui_node(FINITE["uneven"])


def test_a_schedule_with_any_name_makes_a_node():
    odd = replace(FINITE["karras"], name='it\'s "mine" \\ {x}\n', provenance={"by": "O'Neill \\n"})
    torch.testing.assert_close(sigmas(node(comfyui_node(odd)), steps=7), odd.sigmas(7), rtol=1e-6, atol=0)


# --- kept with a pipeline ---------------------------------------------------------------------------------------------


def same(a: Schedule | None, b: Schedule) -> bool:
    assert a is not None
    return a.to_dict() == b.to_dict()


@on_all
def test_a_schedule_stays_with_a_scheduler_that_is_saved_loaded_and_changed_into_another(schedule, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(diffusers.configuration_utils.logger, "warning", lambda *a, **k: warnings.append(a))
    scheduler = make("DDIMScheduler", **SD)
    assert attached(scheduler) is None
    attach(schedule, scheduler)
    assert same(attached(scheduler), schedule)
    scheduler.save_pretrained(tmp_path)
    loaded = diffusers.DDIMScheduler.from_pretrained(tmp_path)
    other = diffusers.EulerDiscreteScheduler.from_config(loaded.config)
    third = diffusers.DPMSolverMultistepScheduler.from_config(other.config)
    for holder in (loaded, other, third, tmp_path):
        assert same(attached(holder), schedule)
    assert not warnings
    assert other.config.beta_end == SD["beta_end"]
    before = diffusers.EulerDiscreteScheduler.from_config(make("DDIMScheduler", **SD).config)
    assert torch.equal(other.sigmas, before.sigmas)  # it does nothing by itself


def test_a_schedule_stays_with_a_pipeline_that_is_saved_and_loaded(tmp_path):
    pipeline = diffusers.DDPMPipeline(unet(), make("DDPMScheduler", **SD))
    attach(FINITE["uneven"], pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert same(attached(loaded), FINITE["uneven"])
    assert same(attached(str(tmp_path)), FINITE["uneven"])
    attach(FINITE["karras"], tmp_path)  # a file beside it, which comes first
    assert same(Schedule.load(tmp_path / FILE), FINITE["karras"])
    assert same(attached(tmp_path), FINITE["karras"])
    landed = apply(attached(loaded), diffusers.EulerDiscreteScheduler.from_config(loaded.scheduler.config), 7)
    torch.testing.assert_close(landed.sigmas.double(), FINITE["uneven"].sigmas(7), rtol=1e-6, atol=0)


def test_a_folder_without_a_scheduler_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"scheduler_config\.json"):
        attached(tmp_path)


def test_every_row_and_every_way_out_exists_in_diffusers():
    assert set(INSTEAD.values()) <= set(ROWS)
    assert all(hasattr(diffusers, name) for name in ROWS)
    assert isinstance(from_diffusers((unet(), make("EulerDiscreteScheduler", **SD))).path, Tabulated)
