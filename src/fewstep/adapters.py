"""What are the three facts (path, what the output means, clock) of the models that people have?

    model                            path                predicts               is told
    EDM, k-diffusion                 VE                  x0                     sigma
    flow matching                    linear              dx/dt                  t
    torchcfm, flow_matching          linear              -dx/dt                 1 - t (their data is at 1)
    diffusers, with alphas_cumprod   tabulated           eps, v or x0           the fractional index
    diffusers, flow matching         linear              dx/dt                  K t, with K = num_train_timesteps
    diffusers, EDM schedulers        VE                  x0, preconditioned     log(sigma)/4

EDM's preconditioning turns a raw network F into E[x_0 | x] (Karras et al. 2022, Table 1), with d = sigma_data:

    d^2/(sigma^2 + d^2) x + sigma d/sqrt(sigma^2 + d^2) F(x/sqrt(sigma^2 + d^2), log(sigma)/4)
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.config import Prediction
from fewstep.denoiser import Pretrained
from fewstep.path import VE, Linear, Path, Tabulated, broadcast

PREDICTION_TYPES: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}

# Flow transformers whose pipelines divide the scheduler's timestep by K: they multiply by 1000 themselves
TOLD_T = frozenset(
    f"{name}Transformer2DModel"
    for name in ("AuraFlow", "BriaFibo2", "Chroma", "Flux", "Flux2", "Flux3", "Krea2", "LongCatImage", "OvisImage", "QwenImage")
)
# and those whose pipelines flip the sign of the output, most of them the time too
FLIPPED = frozenset(
    ("HiDreamImageTransformer2DModel", "Lumina2Transformer2DModel", "LuminaNextDiT2DModel", "NucleusMoEImageTransformer2DModel")
)


class Negated(nn.Module):
    """-fn(x, clock): a velocity whose time runs the other way."""

    def __init__(self, fn: Callable[..., Tensor]):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, clock: Tensor, **cond: Any) -> Tensor:
        return -self.fn(x, clock, **cond)


class Preconditioned(nn.Module):
    """EDM's denoiser around a raw network: the formula above. sign: -1 for a network that returns -F."""

    def __init__(self, raw: Callable[..., Tensor], sigma_data: float, sign: float = 1.0):
        super().__init__()
        self.raw, self.sigma_data, self.sign = raw, float(sigma_data), sign

    def forward(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        s, d = broadcast(sigma, x), self.sigma_data
        norm = (s**2 + d**2).sqrt()
        return (d / norm) ** 2 * x + self.sign * s * d / norm * self.raw(x / norm, sigma.log() / 4, **cond)


class DiffusersNetwork(nn.Module):
    """A network of diffusers as net(x, clock, **cond), in its own precision, without the channels of a learned variance.

    The state and the clock stay in x's precision: half precision cannot tell one index of a thousand from the next.
    classes: K of a DiT, whose table of classes has "no class" at its end; None of others, which do not say whether theirs has.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        names = inspect.signature(model.forward).parameters
        inputs = [name for name in ("sample", "hidden_states") if name in names]
        if not inputs or not {"timestep", "return_dict"} <= set(names):
            raise ValueError(
                f"{type(model).__name__}.forward takes ({', '.join(names)}); from_diffusers wants sample or hidden_states, "
                "timestep and return_dict. Describe another network with fewstep.Pretrained(net, path, predicts, clock)"
            )
        self.model, self.input = model, inputs[0]
        config: Any = getattr(model, "config", {})
        self.classes: int | None = config["num_embeds_ada_norm"] if type(model).__name__ == "DiTTransformer2DModel" else None

    def forward(self, x: Tensor, clock: Tensor, **cond: Any) -> Tensor:
        if self.classes is not None:
            cond = {"class_labels": torch.full((len(x),), self.classes, device=x.device)} | cond
        given = {self.input: x.to(getattr(self.model, "dtype", x.dtype)), "timestep": clock, "return_dict": False}
        y = self.model(**given, **cond)[0].to(x.dtype)
        return y[:, : x.shape[1]] if y.shape[1] == 2 * x.shape[1] else y


def from_sigma(
    fn: Callable[..., Tensor], sigma_min: float, sigma_max: float, shape: tuple[int, ...] | None = None
) -> Pretrained:
    """A denoiser D(x, sigma) -> E[x_0 | x] of EDM or k-diffusion, x = x_0 + sigma eps of shape (b, *d), sigma of shape (b,)."""
    _require_callable(fn, "D(x, sigma)")
    path = VE(sigma_min, sigma_max)
    return Pretrained(fn, path, "x0", path.ratio, shape)


def from_velocity(
    fn: Callable[..., Tensor],
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    shape: tuple[int, ...] | None = None,
    reversed_time: bool = False,
) -> Pretrained:
    """A velocity fn(x, t) = dx/dt on the linear path, x of shape (b, *d), t of shape (b,), with noise at t = 1.

    reversed_time: fn's own time has its data at 1, as in torchcfm and flow_matching (both call their model as (t, x) or by
    keyword: swap the arguments first). sigma_min and sigma_max bound the levels, as sigma/alpha, that a schedule is learned on.
    """
    _require_callable(fn, "v(x, t)")
    path = Linear(sigma_min, sigma_max)
    if reversed_time:
        return Pretrained(Negated(fn), path, "flow", lambda t: 1 - t, shape)
    return Pretrained(fn, path, "flow", None, shape)


def from_diffusers(model: Any) -> Pretrained:
    """The denoiser in a pipeline of diffusers: a folder, a hub id "owner/name", a loaded pipeline, or (network, scheduler).

    Of a folder or a hub id only the network and the scheduler are read, in float32: no text encoder, no autoencoder, so x
    is a latent where the pipeline has one. Condition by cond = the keyword arguments of the network's forward:
    {"class_labels": ..}, {"encoder_hidden_states": ..}; a DiT that is told no class is told its "no class". What a scheduler
    adds while sampling (its grid and its shift, clip_sample, thresholding) is no part of the model and is left out. Raises
    ValueError for what it cannot read.
    """
    if isinstance(model, (str, os.PathLike)):
        network, scheduler = _load(os.fspath(model))
    elif isinstance(model, tuple) and len(model) == 2:
        network, scheduler = model
    elif hasattr(model, "scheduler"):
        parts = {name: part for name, part in vars(model).items() if isinstance(part, nn.Module)}
        network, scheduler = parts[_network_name(parts, type(model).__name__)], model.scheduler
    else:
        raise ValueError(
            f"from_diffusers wants a folder, a hub id, a pipeline or (network, scheduler), got {type(model).__name__}"
        )
    if not isinstance(network, nn.Module) or not hasattr(scheduler, "config"):
        raise ValueError(f"want (network, scheduler), got ({type(network).__name__}, {type(scheduler).__name__})")

    net, kind, settings, shape = DiffusersNetwork(network), type(scheduler).__name__, scheduler.config, _shape(network)
    prediction_type = settings.get("prediction_type", "flow_prediction" if kind.startswith("FlowMatch") else None)
    if kind.startswith("EDM"):
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"{kind} has prediction_type {prediction_type!r}; want epsilon or v_prediction")
        path: Path = VE(settings["sigma_min"], settings["sigma_max"])
        sign = 1.0 if prediction_type == "epsilon" else -1.0
        precise = Preconditioned(net, settings["sigma_data"], sign)

        def edm_levels(n: int) -> Tensor:
            return torch.atan(_grid(scheduler, n).sigmas[:n].double())

        return Pretrained(precise, path, "x0", path.ratio, shape, edm_levels, net.classes)
    if kind.startswith("FlowMatch") or prediction_type == "flow_prediction":
        name = type(network).__name__
        if settings.get("invert_sigmas") or name in FLIPPED:
            raise ValueError(f"{name} with {kind} runs its time or its output backwards; use from_velocity(fn, ..)")
        told = 1 if name in TOLD_T else settings["num_train_timesteps"]
        linear, count = Linear(), settings["num_train_timesteps"]

        def levels(n: int) -> Tensor | None:
            if settings.get("use_dynamic_shifting"):  # by the picture's size, which nobody says here
                return None
            found = torch.unique(_grid(scheduler, n).timesteps.double()).flip(0)  # Heun's come in pairs
            return None if len(found) != n else linear.angle(found / count)

        return Pretrained(net, linear, "flow", lambda t: told * t, shape, levels, net.classes)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{kind} has no alphas_cumprod, nor is it of flow matching or EDM; describe it with fewstep.Pretrained"
        )
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"{kind} has prediction_type {prediction_type!r}; want one of {', '.join(PREDICTION_TYPES)}")
    table = scheduler.alphas_cumprod.detach().cpu().double()
    if settings.get("rescale_betas_zero_snr"):
        if prediction_type == "epsilon":
            raise ValueError(f"{kind} has rescale_betas_zero_snr, and eps says nothing of x_0 in pure noise; want v_prediction")
        table[-1] = 0  # some schedulers put 2^-24 for it; the model is the same
    tabulated = Tabulated(table)
    predicts, index = PREDICTION_TYPES[prediction_type], tabulated.index
    return Pretrained(net, tabulated, predicts, index, shape, lambda n: _spaced(scheduler, tabulated, n), net.classes)


def _grid(scheduler: Any, steps: int) -> Any:
    """A copy of the scheduler with its own grid of this many steps set."""
    copied = type(scheduler).from_config(scheduler.config)
    copied.set_timesteps(steps)
    return copied


def _spaced(scheduler: Any, path: Tabulated, steps: int) -> Tensor | None:
    """The angles (steps,) of the timesteps at which a scheduler of a discrete-time model asks the network, if so many."""
    indices = torch.unique(_grid(scheduler, steps).timesteps.double().cpu()).flip(0)  # Heun's come in pairs
    return None if len(indices) != steps else path.angle((indices + 1) / len(scheduler.alphas_cumprod))


def _require_callable(fn: Any, form: str) -> None:
    if not callable(fn):
        raise ValueError(f"want a function {form} of a batch and one number per sample, got {type(fn).__name__}")


def _shape(network: nn.Module) -> tuple[int, ...] | None:
    """One sample's shape, where the network's configuration has it: images, and sequences of a UNet1DModel."""
    config, name = getattr(network, "config", {}), type(network).__name__
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels is None or size is None or not ("2D" in name or "1D" in name):
        return None
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size,) * (2 if "2D" in name else 1)
    return (channels, *sides)


def _network_name(names: Collection[str], source: str) -> str:
    """Which of a pipeline's parts is the denoising network."""
    experts = [name for name in names if name.startswith(("unet_", "transformer_"))]
    if experts:
        raise ValueError(f"{source} has a second network, {experts[0]}; give (network, scheduler) for the one you mean")
    found = [name for name in ("unet", "transformer") if name in names]
    if not found:
        raise ValueError(f"{source} has neither a unet nor a transformer, only {', '.join(names)}; give (network, scheduler)")
    return found[0]


def _load(source: str) -> tuple[nn.Module, Any]:
    """The network and the scheduler of a saved pipeline, from a folder or from the hub."""
    import diffusers

    try:
        entries = dict(json.loads(_index(source).read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{source}: its model_index.json is damaged ({error})") from error
    parts = {name: entry for name, entry in entries.items() if isinstance(entry, list) and len(entry) == 2 and entry[1]}

    def load(part: str) -> Any:
        library, kind = parts[part]
        if library != "diffusers" or not hasattr(diffusers, kind):
            raise ValueError(
                f"{source} has {library}.{kind} as {part}, not of diffusers; load it and give (network, scheduler)"
            )
        return getattr(diffusers, kind).from_pretrained(source, subfolder=part)

    if "scheduler" not in parts:
        found = ", ".join(parts) or "nothing"
        raise ValueError(f"{source} has no scheduler, only {found}; give (network, scheduler)")
    return load(_network_name(parts, source)), load("scheduler")


def _index(source: str) -> File:
    """The model_index.json of a folder, or of a pipeline on the hub."""
    file = File(source) / "model_index.json"
    if file.is_file():
        return file
    if File(source).is_file():
        raise ValueError(
            f"{source} is a file, which does not say what the model is: give file.py:function, which returns a fewstep Denoiser"
        )
    if (File(source) / "config.json").exists():
        raise ValueError(
            f"{source} is a network without its scheduler: save the whole pipeline, or give file.py:function, which returns "
            "from_diffusers((network, scheduler))"
        )
    if File(source).exists():
        raise ValueError(f"{source} is not a diffusers folder: it has no model_index.json; pipeline.save_pretrained makes one")
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"{source} does not exist; want a diffusers folder, or a hub id as owner/name")
    import huggingface_hub

    try:
        return File(huggingface_hub.hf_hub_download(source, "model_index.json"))
    except (OSError, ValueError) as error:
        fault = type(error).__name__  # its message has many lines
        raise ValueError(f"{source} is no folder here, and the hub gave no model_index.json for it ({fault})") from error
