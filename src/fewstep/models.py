"""Which model does a name mean?   A run folder, a diffusers folder or hub id, or file.py:function.

A finished `train` leaves model.safetensors, a finished `finetune` sampler.safetensors and value.safetensors: averaged
weights, without the optimiser. A `prefer` that was given choices leaves preference.safetensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path as File
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.config import FinetuneConfig, TrainConfig
from fewstep.denoiser import Denoiser
from fewstep.energy import Value, make_value
from fewstep.preference import Preference
from fewstep.run import NotARun, read_config
from fewstep.sampler import Sampler
from fewstep.training import make_denoiser

MODEL, SAMPLER, VALUE = "model.safetensors", "sampler.safetensors", "value.safetensors"
PREFERENCE = "preference.safetensors"


C = TypeVar("C", TrainConfig, FinetuneConfig)


def config_of(kind: type[C], settings: dict[str, Any]) -> C:
    """A command's settings out of a run's, which hold the data's as well; one that an older run lacks has its default."""
    return kind(**{field.name: settings[field.name] for field in fields(kind) if field.name in settings})


def save_weights(weights: Mapping[str, Tensor], file: File) -> None:
    """A module's state_dict()."""
    draft = File(f"{file}.part")
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}, draft)
    os.replace(draft, file)


def load_weights(module: nn.Module, file: File) -> None:
    if not file.exists():
        raise ValueError(f"{file.parent} holds no {file.name}: that run has not finished; repeat its command to continue it")
    try:
        module.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{file} is damaged, or belongs to another model ({first}); repeat the run that wrote it") from error


def load_function(spec: str) -> Callable:
    """The function that `file.py:function` names; raises ValueError where the file cannot be imported or lacks it."""
    file, _, name = spec.rpartition(":")
    if not File(file).is_file():
        raise ValueError(f"{spec}: there is no file {file}")
    module_spec = importlib.util.spec_from_file_location(f"fewstep_user_{File(file).stem}", file)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"{spec}: {file} is not a python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{spec}: importing {file} failed with {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{spec}: {file} has no function {name!r}")
    return function


def load_denoiser(name: str, device: str = "cpu") -> Denoiser:
    """The model that a name means, for use without training: run folder, diffusers folder or hub id, file.py:function."""
    if ".py:" in name:
        make = load_function(name)
        try:
            denoiser = make()
        except Exception as error:
            raise ValueError(f"{name} failed with {type(error).__name__}: {error}") from error
        if not isinstance(denoiser, Denoiser):
            raise ValueError(f"{name} returned {type(denoiser).__name__}, not a fewstep Denoiser; wrap it in Pretrained(...)")
    elif (File(name) / "config.json").exists() and read_config_or_none(name):
        denoiser = _trained(File(name))
    elif File(name).exists() or name.count("/") == 1:
        from fewstep.adapters import from_diffusers

        denoiser = from_diffusers(name)
    else:
        raise ValueError(f"no model {name!r}: give a run folder, a diffusers folder or hub id, or file.py:function")
    return denoiser.to(device).eval().requires_grad_(False)


def read_config_or_none(name: str) -> dict[str, Any] | None:
    """A run's configuration; None where the folder's config.json is not a run's (a diffusers model has one too)."""
    try:
        return read_config(name)
    except NotARun:
        return None


def _trained(folder: File) -> Denoiser:
    run = read_config(folder)
    if run["command"] != "train":
        raise ValueError(f"{folder} is a `fewstep {run['command']}` folder; a model is a folder of `fewstep train`")
    settings = run["config"]
    denoiser = make_denoiser(tuple(settings["shape"]), config_of(TrainConfig, settings), settings.get("classes"))
    load_weights(denoiser, folder / MODEL)
    return denoiser


def is_sampler(name: str) -> bool:
    run = read_config_or_none(name) if (File(name) / "config.json").exists() else None
    return run is not None and run["command"] == "finetune"


def load_sampler(folder: str | File, device: str = "cpu") -> tuple[Sampler, Value]:
    """The fine-tuned sampler and its value, whose energy(x) is the energy, from a folder of `fewstep finetune`."""
    folder, run = File(folder), read_config(folder)
    if run["command"] != "finetune":
        raise ValueError(f"{folder} is a `fewstep {run['command']}` folder; a sampler is a folder of `fewstep finetune`")
    settings = run["config"]
    model = settings["model"]
    denoiser = load_denoiser(str((folder / model).resolve()) if settings["model_is_local"] else model)
    sampler = Sampler(denoiser, torch.tensor(settings["times"], dtype=torch.float64), settings["last_std"])
    energy = None
    if "energy" in settings:
        energy, found = load_energy(str((folder / settings["energy"]).resolve()))
        if found != settings["energy_fingerprint"]:
            raise ValueError(f"{settings['energy']} is not the file any more that {folder} learned with; restore it")
    config = config_of(FinetuneConfig, {"density": "scalar"} | settings)  # older folders' settings do not name it
    value = make_value(sampler, tuple(settings["shape"]), config, energy)
    load_weights(sampler, folder / SAMPLER)
    load_weights(value, folder / VALUE)
    return sampler.to(device).eval().requires_grad_(False), value.to(device).eval().requires_grad_(False)


def load_reward(name: str, device: str = "cpu") -> Callable[[Tensor], Tensor]:
    """A reward x (b, *d) -> (b,), higher = better: what `file.py:function` names, or a folder of `fewstep prefer`."""
    if ".py:" in name:
        return load_function(name)
    if (File(name) / PREFERENCE).exists():
        return load_preference(name, device)
    raise ValueError(
        f"no reward {name!r}: give file.py:function, from samples (b, *d) to (b,), or a folder of `fewstep prefer`"
    )


def load_energy(name: str) -> tuple[nn.Module, str]:
    """What `file.py:function` makes without arguments, an nn.Module from samples (b, *d) to (b,), and its fingerprint."""
    if ".py:" not in name:
        raise ValueError(f"no energy {name!r}: give file.py:function, which makes an nn.Module from samples (b, *d) to (b,)")
    made, file = load_function(name), File(name.rpartition(":")[0])
    try:
        return made(), hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except TypeError as error:
        raise ValueError(f"{name} makes an nn.Module and takes no arguments: {error}") from error


def relative_to(name: str, folder: File) -> tuple[str, bool]:
    """A model's name as a run folder keeps it: a local one relative to the folder, so that both can move together."""
    file, mark, function = name.rpartition(":") if ".py:" in name else (name, "", "")
    if not File(file).exists():
        return name, False
    return os.path.relpath(os.path.realpath(file), os.path.realpath(folder)) + mark + function, True


def load_preference(folder: str | File, device: str = "cpu") -> Preference:
    """The reward r(x) that a folder of `fewstep prefer --choices` holds: (b, *d) -> (b,), differentiable in x."""
    folder, run = File(folder), read_config(folder)
    if run["command"] != "prefer":
        raise ValueError(f"{folder} is a `fewstep {run['command']}` folder; a preference is a folder of `fewstep prefer`")
    if not (folder / PREFERENCE).exists():
        raise ValueError(f"{folder} holds no {PREFERENCE}: its pairs wait for choices; give them to `fewstep prefer --choices`")
    preference = Preference(tuple(run["config"]["shape"]), run["config"]["width"])
    load_weights(preference, folder / PREFERENCE)
    return preference.to(device).eval().requires_grad_(False)
