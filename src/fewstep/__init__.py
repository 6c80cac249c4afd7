"""fewstep: few-step sampling for any diffusion or flow model.

Learn where the steps go (learn_schedule), learn what each step does (finetune). Names are imported when first used, so
that the command line answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fewstep.adapters import from_diffusers, from_sigma, from_velocity
    from fewstep.config import FinetuneConfig, LearnConfig, PreferenceConfig, TrainConfig
    from fewstep.data import load_data, load_samples
    from fewstep.denoiser import Denoiser, Guided, OnPath, Pretrained
    from fewstep.dxmi import FinetuneState, make_state
    from fewstep.energy import Value, denoising_error, mean_energy
    from fewstep.finetuning import finetune
    from fewstep.learn import learn_schedule
    from fewstep.levels import learn_levels
    from fewstep.metrics import auroc, energy_distance, frechet_distance, sliced_wasserstein
    from fewstep.mixture import Mixture
    from fewstep.models import load_denoiser, load_preference, load_sampler
    from fewstep.path import VE, VP, Cosine, Linear, Path, Tabulated
    from fewstep.preference import Preference, learn_preference
    from fewstep.sampler import Sampler, Transition
    from fewstep.schedule import Schedule, cosine, equalise, karras, kl_optimal, linear, log_linear
    from fewstep.solvers import solve
    from fewstep.training import TrainState, train

_HOME = {
    "adapters": "from_diffusers from_sigma from_velocity",
    "config": "FinetuneConfig LearnConfig PreferenceConfig TrainConfig",
    "data": "load_data load_samples",
    "denoiser": "Denoiser Guided OnPath Pretrained",
    "dxmi": "FinetuneState make_state",
    "energy": "Value denoising_error mean_energy",
    "finetuning": "finetune",
    "learn": "learn_schedule",
    "levels": "learn_levels",
    "metrics": "auroc energy_distance frechet_distance sliced_wasserstein",
    "mixture": "Mixture",
    "models": "load_denoiser load_preference load_sampler",
    "path": "VE VP Cosine Linear Path Tabulated",
    "preference": "Preference learn_preference",
    "sampler": "Sampler Transition",
    "schedule": "Schedule cosine equalise karras kl_optimal linear log_linear",
    "solvers": "solve",
    "training": "TrainState train",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = [*_MODULE_OF, "citation"]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    return getattr(import_module(f"fewstep.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def citation() -> str:
    """BibTeX of the two papers that fewstep implements."""
    return """@inproceedings{williams2024score,
  title={Score-Optimal Diffusion Schedules},
  author={Williams, Christopher and Campbell, Andrew and Doucet, Arnaud and Syed, Saifuddin},
  booktitle={Advances in Neural Information Processing Systems}, year={2024}}
@inproceedings{yoon2024maximum,
  title={Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based Models},
  author={Yoon, Sangwoong and Hwang, Himchan and Kwon, Dohyun and Noh, Yung-Kyun and Park, Frank C.},
  booktitle={Advances in Neural Information Processing Systems}, year={2024}}"""
