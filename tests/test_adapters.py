"""Adapters are held to the exact mixture, and to what diffusers' own schedulers make of the same network output."""

import json
import math

import pytest
import torch
from torch import nn

from fewstep.adapters import FLIPPED, TOLD_T, from_diffusers, from_sigma, from_velocity
from fewstep.denoiser import Guided, OnPath, to_velocity
from fewstep.mixture import ring
from fewstep.path import VE, Linear
from fewstep.solvers import solve

BATCH = 2


def unet(seed=0, **settings):
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    given = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(**{**given, **blocks, "add_attention": False, **settings}).eval().requires_grad_(False)


def text_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    return (
        UNet2DConditionModel(
            sample_size=(8, 4),
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
        .eval()
        .requires_grad_(False)
    )


def dit(out_channels=2):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(2)
    return (
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=2,
            out_channels=out_channels,
            num_layers=1,
            sample_size=8,
            norm_num_groups=2,
            num_embeds_ada_norm=10,
        )
        .eval()
        .requires_grad_(False)
    )


def sd3():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(3)
    return (
        SD3Transformer2DModel(
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
        .eval()
        .requires_grad_(False)
    )


def noise(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


def at_index(index, size=1000):
    return (index + 1) / size


# --- functions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1.0, 0.6, 0.05])
def test_from_sigma_is_the_mixture(t):
    mixture = ring(path=VE(0.01, 40.0))
    told = []

    def edm(x, sigma):
        told.append(sigma)
        return mixture(x, mixture.path.time(torch.atan(sigma)))

    denoiser = from_sigma(edm, 0.01, 40.0, shape=(2,))
    x = 3 * noise(5, 2, dtype=torch.float64)
    torch.testing.assert_close(denoiser(x, t), mixture(x, t), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(told[0], mixture.path.sigma(t).expand(5), rtol=1e-12, atol=0)
    assert (denoiser.shape, denoiser.path.sigma_min, denoiser.path.sigma_max) == ((2,), 0.01, 40.0)


@pytest.mark.parametrize("reversed_time", [False, True])
@pytest.mark.parametrize("t", [1.0, 0.7, 0.1])
def test_from_velocity_is_the_mixture(reversed_time, t):
    mixture = ring(path=Linear())

    def velocity(x, t):
        return to_velocity(mixture(x, t), x, mixture.path, t)

    def from_noise_to_data(x, r):  # r = 1 - t, so dx/dr = -dx/dt
        return -velocity(x, 1 - r)

    denoiser = from_velocity(from_noise_to_data if reversed_time else velocity, reversed_time=reversed_time)
    x = noise(5, 2, dtype=torch.float64)
    torch.testing.assert_close(denoiser(x, t), mixture(x, t), rtol=1e-6, atol=1e-6)
    each = torch.tensor([1.0, 0.9, 0.5, 0.3, 0.1], dtype=torch.float64)  # one time per sample
    torch.testing.assert_close(denoiser(x, each), mixture(x, each), rtol=1e-6, atol=1e-6)


def test_a_module_stays_trainable_and_its_condition_arrives():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x, t, shift):
            return self.scale * x + shift

    x = torch.ones(3, 2)
    for denoiser, sign in ((from_velocity(Net()), 1), (from_velocity(Net(), reversed_time=True), -1)):
        assert len(list(denoiser.parameters())) == 1
        want = x - 0.5 * sign * (2 * x + 1)
        torch.testing.assert_close(denoiser(x, 0.5, {"shift": torch.ones(3, 1)}), want)
        with pytest.raises(TypeError, match="shfit"):
            denoiser(x, 0.5, {"shfit": 1})


# --- diffusers, discrete time -------------------------------------------------------------------------------------


def discrete_cases():
    return ["epsilon", "v_prediction", "sample", "learned variance", "class", "text", "DiT", "zero SNR"]


def discrete(case):
    """(network, scheduler, cond, shape)."""
    from diffusers import DDIMScheduler, DDPMScheduler

    plain = {"clip_sample": False}
    text = {"encoder_hidden_states": noise(BATCH, 3, 8)}
    labels = {"class_labels": torch.tensor([1, 4])}
    table = {
        "epsilon": lambda: (unet(), DDPMScheduler(**plain), None, (3, 8, 8)),
        "v_prediction": lambda: (unet(), DDIMScheduler(prediction_type="v_prediction", **plain), None, (3, 8, 8)),
        "sample": lambda: (unet(), DDPMScheduler(prediction_type="sample", **plain), None, (3, 8, 8)),
        "learned variance": lambda: (
            unet(out_channels=6),
            DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2", **plain),
            None,
            (3, 8, 8),
        ),
        "class": lambda: (unet(num_class_embeds=5), DDPMScheduler(beta_schedule="scaled_linear", **plain), labels, (3, 8, 8)),
        "text": lambda: (text_unet(), DDIMScheduler(prediction_type="v_prediction", **plain), text, (4, 8, 4)),
        "DiT": lambda: (dit(4), DDPMScheduler(variance_type="learned_range", **plain), labels, (2, 8, 8)),
        "zero SNR": lambda: (
            unet(),
            DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, **plain),
            None,
            (3, 8, 8),
        ),
    }
    return table[case]()


@pytest.mark.parametrize("case", discrete_cases())
def test_x0_is_what_the_scheduler_makes_of_the_same_output(case):
    network, scheduler, cond, shape = discrete(case)
    denoiser = from_diffusers((network, scheduler))
    assert denoiser.shape == shape
    scheduler.set_timesteps(1000)
    x = noise(BATCH, *shape)
    indices = [2, 300, 999] if case == "zero SNR" else [2, 300, 900]
    for index in indices:
        # positional where the networks agree on the order, so that a wrong keyword of ours cannot pass
        y = network(x, torch.full((BATCH,), index), return_dict=False, **(cond or {}))[0]
        want = scheduler.step(y, index, x).pred_original_sample
        got = denoiser(x, at_index(index), cond)
        assert float((got - want).abs().max() / want.abs().max()) < 1e-4
        if cond is not None:  # and the condition matters
            other = {name: value.flip(0) for name, value in cond.items()}
            assert float((denoiser(x, at_index(index), other) - want).abs().max()) > 1e-4 * float(want.abs().max())


def test_zero_snr_is_pure_noise_whichever_scheduler_stands_for_it():
    from diffusers import DDPMScheduler, EulerDiscreteScheduler

    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    paths = [from_diffusers((unet(), kind(**settings))).path for kind in (DDPMScheduler, EulerDiscreteScheduler)]
    assert all(path.ends_in_pure_noise() for path in paths)
    t = torch.linspace(0.001, 1, 37, dtype=torch.float64)
    torch.testing.assert_close(paths[0].angle(t), paths[1].angle(t), rtol=0, atol=1e-6)
    denoiser = from_diffusers((unet(), DDPMScheduler(**settings)))
    x = noise(BATCH, 3, 8, 8)
    y = unet()(x, 999, return_dict=False)[0]
    torch.testing.assert_close(denoiser(x, 1.0), -y)  # v = alpha eps - sigma x_0 at alpha = 0


def test_levels_between_the_indices_are_those_of_diffusers_euler():
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler()
    denoiser = from_diffusers((unet(), scheduler))
    sigmas = torch.tensor([12.3, 3.21, 0.777, 0.1, 0.0], dtype=torch.float64)
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    told = denoiser.clock(denoiser.path.time(torch.atan(sigmas[:-1])))
    assert float((told - scheduler.timesteps.double()).abs().max()) < 1e-2  # of 1000; theirs is in float32
    assert float((told - told.round()).abs().min()) > 0.01  # fractional, not rounded

    x = noise(BATCH, 3, 8, 8) * sigmas[0].float()
    times = denoiser.path.time(torch.atan(sigmas))
    ours = solve(denoiser, x * denoiser.path.alpha(times[0]).float(), times).x
    for t in scheduler.timesteps:
        y = denoiser.net.model(scheduler.scale_model_input(x, t), t, return_dict=False)[0]
        x = scheduler.step(y, t, x).prev_sample
    assert float((ours - x).abs().max() / x.abs().max()) < 1e-4


def test_guidance_runs_both_conditions_in_one_batch():
    network, scheduler, cond, shape = discrete("class")
    denoiser = from_diffusers((network, scheduler))
    x, nothing = noise(BATCH, *shape), {"class_labels": torch.tensor([0])}
    with_cond, without = denoiser(x, 0.5, cond), denoiser(x, 0.5, {"class_labels": torch.zeros(BATCH, dtype=torch.long)})
    got = Guided(denoiser, 3.0, nothing)(x, 0.5, cond)
    torch.testing.assert_close(got, without + 3 * (with_cond - without), rtol=1e-4, atol=1e-4)


def test_a_half_precision_network_is_told_the_exact_index():
    from diffusers import DDPMScheduler

    network = unet().to(torch.bfloat16)
    told = []
    network.time_proj.register_forward_pre_hook(lambda module, given: told.append(given[0].clone()))
    x = noise(BATCH, 3, 8, 8)
    x0 = from_diffusers((network, DDPMScheduler()))(x, at_index(901.25))
    assert x0.dtype == torch.float32  # the state keeps its own
    torch.testing.assert_close(told[0], torch.full((BATCH,), 901.25), rtol=0, atol=1e-3)  # bfloat16 has 900 and 904


# --- diffusers, flow matching and EDM -----------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1.0, 0.7, 0.1])
@pytest.mark.parametrize("kind", ["SD3", "DiT"])
def test_flow_x0_is_one_euler_step_of_the_scheduler_to_data(kind, level):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    if kind == "SD3":
        network, cond = sd3(), {"encoder_hidden_states": noise(BATCH, 3, 8), "pooled_projections": noise(BATCH, 8)}
    else:
        network, cond = dit(), {"class_labels": torch.tensor([1, 4])}
    denoiser = from_diffusers((network, scheduler))
    assert denoiser.shape == ((4, 8, 8) if kind == "SD3" else (2, 8, 8))
    x = noise(BATCH, *denoiser.shape)
    scheduler.set_timesteps(sigmas=[level])  # one step, from this level to 0
    told = scheduler.timesteps[0]
    v = network(hidden_states=x, timestep=told.expand(BATCH), **cond).sample
    want = scheduler.step(v, told, x).prev_sample
    torch.testing.assert_close(denoiser(x, level, cond), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(want, x - level * v, rtol=1e-5, atol=1e-5)


def test_a_dit_says_its_classes_and_no_class_is_the_one_after_its_last():
    from diffusers import DDPMScheduler

    denoiser, x = from_diffusers((dit(4), DDPMScheduler())), noise(BATCH, 2, 8, 8)
    assert denoiser.classes == 10
    none = denoiser(x, 0.5, {"class_labels": torch.full((BATCH,), 10)})
    assert torch.equal(denoiser(x, 0.5), none)
    assert not torch.allclose(denoiser(x, 0.5, {"class_labels": torch.full((BATCH,), 9)}), none)
    assert (
        from_diffusers((unet(num_class_embeds=5), DDPMScheduler())).classes is None
    )  # whether it has a "no class" is not said


def test_flow_prediction_of_a_multistep_scheduler():
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_timesteps(4)
    scheduler._step_index, level = 1, float(scheduler.sigmas[1])
    network, cond = dit(), {"class_labels": torch.tensor([1, 4])}
    x = noise(BATCH, 2, 8, 8)
    v = network(x, torch.full((BATCH,), 1000 * level), return_dict=False, **cond)[0]
    want = scheduler.convert_model_output(v, sample=x)
    torch.testing.assert_close(from_diffusers((network, scheduler))(x, level, cond), want, rtol=1e-4, atol=1e-4)


def test_flux_is_told_t_because_it_multiplies_by_1000_itself():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    torch.manual_seed(4)
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    told = []
    network.time_text_embed.time_proj.register_forward_pre_hook(lambda module, given: told.append(given[0].clone()))
    cond = {
        "encoder_hidden_states": noise(BATCH, 3, 8),
        "pooled_projections": noise(BATCH, 8),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    denoiser = from_diffusers((network, FlowMatchEulerDiscreteScheduler()))
    assert denoiser(noise(BATCH, 16, 4), 0.7, cond).shape == (BATCH, 16, 4)
    torch.testing.assert_close(told[0], torch.full((BATCH,), 700.0))
    assert denoiser.shape is None  # tokens; the configuration has no size


def test_the_named_transformers_exist():
    import diffusers

    assert [name for name in TOLD_T | FLIPPED if not hasattr(diffusers, name)] == []


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_preconditioning_is_the_schedulers(kind, prediction_type):
    import diffusers

    scheduler = getattr(diffusers, kind)(sigma_min=0.01, sigma_max=20.0, sigma_data=0.7, prediction_type=prediction_type)
    network = unet()
    denoiser = from_diffusers((network, scheduler))
    assert (denoiser.path.sigma_min, denoiser.path.sigma_max) == (0.01, 20.0)
    for sigma in torch.tensor([20.0, 0.9, 0.011]):
        x = noise(BATCH, 3, 8, 8) * (sigma**2 + 0.7**2).sqrt()
        told = scheduler.precondition_noise(sigma).expand(BATCH)
        y = network(scheduler.precondition_inputs(x, sigma), told, return_dict=False)[0]
        want = scheduler.precondition_outputs(x, y, sigma)
        got = denoiser(x, denoiser.path.time(torch.atan(sigma.double())))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# --- the levels that a pipeline visits today ----------------------------------------------------------------------


def schedulers():
    """name -> (network, scheduler) whose own grid of N steps asks the network at N levels."""
    import diffusers

    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    eps = {
        "DDPM": diffusers.DDPMScheduler(),
        "DDIM, trailing": diffusers.DDIMScheduler(timestep_spacing="trailing"),
        "DDIM, zero SNR": diffusers.DDIMScheduler(**zero),
        "Euler, fractional": diffusers.EulerDiscreteScheduler(use_karras_sigmas=True),
        "Euler, zero SNR": diffusers.EulerDiscreteScheduler(**zero),
        "DPM, zero SNR": diffusers.DPMSolverMultistepScheduler(**zero),
        "UniPC": diffusers.UniPCMultistepScheduler(),
        "LCM": diffusers.LCMScheduler(),
        "Heun": diffusers.HeunDiscreteScheduler(),
        "PNDM": diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
    }
    flows = {
        "flow Euler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "flow Heun": diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
        "flow UniPC": diffusers.UniPCMultistepScheduler(**flow),
    }
    return {k: (unet(), s) for k, s in eps.items()} | {k: (dit(), s) for k, s in flows.items()}


SCHEDULERS = ["DDPM", "DDIM, trailing", "DDIM, zero SNR", "Euler, fractional", "Euler, zero SNR", "DPM, zero SNR", "UniPC"]
SCHEDULERS += ["LCM", "Heun", "PNDM", "flow Euler", "flow Heun", "flow UniPC"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_default_levels_ask_the_network_what_the_scheduler_asks(name):
    network, scheduler = schedulers()[name]
    denoiser = from_diffusers((network, scheduler))
    before = dict(scheduler.config)
    for steps in (1, 6, 10):
        if (name, steps) == ("PNDM", 1):
            continue
        levels = denoiser.default_levels(steps)
        assert levels.shape == (steps,)
        assert levels.dtype == torch.float64
        assert bool((levels.diff() < 0).all())
        told = denoiser.clock(denoiser.path.time(levels))
        copy = type(scheduler).from_config(scheduler.config)
        copy.set_timesteps(steps)
        want = torch.unique(copy.timesteps.double()).flip(0)
        torch.testing.assert_close(told.double(), want, rtol=0, atol=1e-6)
    assert dict(scheduler.config) == before
    if "zero SNR" in name:
        assert float(denoiser.default_levels(6)[0]) == pytest.approx(math.pi / 2, abs=1e-9)


def test_default_levels_of_edm_are_its_sigmas():
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.01, sigma_max=20.0)
    levels = from_diffusers((unet(), scheduler)).default_levels(7)
    scheduler.set_timesteps(7)
    torch.testing.assert_close(torch.tan(levels), scheduler.sigmas[:7].double(), rtol=1e-9, atol=0)


def test_no_default_levels_where_a_scheduler_has_no_such_grid():
    import diffusers

    for network, scheduler in (
        (unet(), diffusers.KDPM2DiscreteScheduler()),  # asks between its levels as well
        (unet(), diffusers.PNDMScheduler()),  # warms up with Runge-Kutta
        (dit(), diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),  # depends on the picture's size
    ):
        assert from_diffusers((network, scheduler)).default_levels(6) is None
    assert from_sigma(math.sin, 0.1, 2.0).default_levels is None


def test_wrapping_keeps_the_default_levels():
    denoiser = from_diffusers(discrete("class")[:2])
    want = denoiser.default_levels(5)
    for wrapped in (Guided(denoiser, 2.0, {"class_labels": torch.tensor([0])}), OnPath(denoiser, VE(0.01, 40.0))):
        assert torch.equal(wrapped.default_levels(5), want)


# --- folders, the hub, pipelines ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from diffusers import DDPMPipeline, DDPMScheduler

    folder = tmp_path_factory.mktemp("hub") / "models--fewstep--tiny" / "snapshots" / ("0" * 40)
    pipeline = DDPMPipeline(unet(), DDPMScheduler(beta_schedule="scaled_linear"))
    pipeline.save_pretrained(folder)
    refs = folder.parents[1] / "refs"  # the layout of the hub's cache
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    return pipeline, folder


def test_a_folder_a_pipeline_and_a_pair_are_one_model(saved):
    pipeline, folder = saved
    x = noise(BATCH, 3, 8, 8)
    want = from_diffusers((pipeline.unet, pipeline.scheduler))(x, 0.4)
    for source in (pipeline, folder, str(folder)):
        assert torch.equal(from_diffusers(source)(x, 0.4), want)


def test_a_hub_id(saved, monkeypatch):
    import huggingface_hub

    pipeline, folder = saved
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder.parents[2]))
    x = noise(BATCH, 3, 8, 8)
    want = from_diffusers(pipeline)(x, 0.4)
    assert torch.equal(from_diffusers("fewstep/tiny")(x, 0.4), want)
    with pytest.raises(ValueError, match=r"no folder here, and the hub gave no model_index.json for it \(\w+\)$"):
        from_diffusers("fewstep/absent")


def test_only_the_network_and_the_scheduler_of_a_folder_are_read(saved, tmp_path):
    _, folder = saved
    for part in ("unet", "scheduler"):
        (tmp_path / part).symlink_to(folder / part)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"]}  # and no such files
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert from_diffusers(tmp_path).shape == (3, 8, 8)


def write_index(folder, **entries):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "SomePipeline", **entries}))
    return folder


DDPM = ["diffusers", "DDPMScheduler"]
UNET = ["diffusers", "UNet2DModel"]
WAN = ["diffusers", "WanTransformer3DModel"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (None, "not a diffusers folder: it has no model_index.json"),
        ({"scheduler": DDPM, "prior": UNET}, "neither a unet nor a transformer, only scheduler, prior"),
        ({"scheduler": DDPM, "unet": [None, None]}, "neither a unet nor a transformer"),
        ({"unet": UNET}, "has no scheduler, only unet"),
        ({}, "has no scheduler, only nothing"),
        ({"scheduler": DDPM, "unet": ["my_models", "MyUNet"]}, r"my_models.MyUNet as unet, not of diffusers"),
        ({"scheduler": DDPM, "transformer": WAN, "transformer_2": WAN}, "second network, transformer_2"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path, entries, message):
    if entries is not None:
        write_index(tmp_path, **entries)
    with pytest.raises(ValueError, match=message) as caught:
        from_diffusers(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_not_quite_a_pipeline_says_what_it_is(tmp_path):
    network, damaged, weights = tmp_path / "network", tmp_path / "damaged", tmp_path / "sd.pt"
    unet().save_pretrained(network)
    damaged.mkdir()
    (damaged / "model_index.json").write_text('{"unet": [')
    weights.write_bytes(b"")
    for source, message in (
        (network, "a network without its scheduler"),
        (damaged, "model_index.json is damaged"),
        (weights, "give file.py:function"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            from_diffusers(source)
        assert "\n" not in str(caught.value)


def test_what_cannot_be_read(tmp_path):
    import diffusers

    pipeline = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler())
    pipeline.unet, pipeline.prior = None, nn.Linear(2, 2)
    for source, message in (
        (pipeline, "DDPMPipeline has neither a unet nor a transformer, only prior"),
        (str(tmp_path / "absent"), "does not exist"),
        ("stable-diffusion", "does not exist"),
        (3, "got int"),
        ((unet(), 3), "want .network, scheduler., got .UNet2DModel, int."),
        ((nn.Linear(2, 2), diffusers.DDPMScheduler()), "Linear.forward takes .input."),
        ((unet(), diffusers.ScoreSdeVeScheduler()), "no alphas_cumprod"),
        ((unet(), diffusers.DDPMScheduler(prediction_type="score")), "prediction_type 'score'; want one of epsilon"),
        ((unet(), diffusers.EDMEulerScheduler(prediction_type="sample")), "want epsilon or v_prediction"),
        ((unet(), diffusers.DDPMScheduler(rescale_betas_zero_snr=True)), "eps says nothing of x_0"),
        ((dit(), diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)), "backwards"),
        ((), "got tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            from_diffusers(source)
    for adapter in (from_velocity, lambda fn: from_sigma(fn, 0.1, 2.0)):
        with pytest.raises(ValueError, match="want a function"):
            adapter("net")
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        from_sigma(math.sin, 2.0, 1.0)
