"""A learned schedule for ComfyUI: put this file into ComfyUI/custom_nodes/ and restart.

The node "fewstep" (sampling/custom_sampling/schedulers) gives SIGMAS for SamplerCustom and SamplerCustomAdvanced. It needs
nothing but what ComfyUI itself needs. Written by `fewstep export --to comfyui-node`.
"""

import json
import math

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator

DOCUMENT = json.loads("{}")
NAME = DOCUMENT.get("name", "no schedule")
PURE = math.pi / 2 - 1e-12


def angles(steps, denoise):
    """atan2(sigma, alpha) of `steps` levels from the share `denoise` of the curve on, and a trailing 0: (steps + 1,)."""
    if denoise == 1 and str(steps) in DOCUMENT["grids"]:  # levels of its own, refined for this number of steps
        return np.append(DOCUMENT["grids"][str(steps)], 0.0)
    theta = np.array(DOCUMENT["theta"], dtype=np.float64)
    curve = PchipInterpolator(np.array(DOCUMENT["u"], dtype=np.float64), np.log(np.tan(theta / 2)))
    u = np.linspace(1 - denoise, 1, steps + DOCUMENT["to_data"])[:steps]
    levels = 2 * np.arctan(np.exp(curve(u)))
    levels[u == 0], levels[u == 1] = theta[0], theta[-1]
    if denoise == 1 and DOCUMENT["pure_noise"]:
        levels[0] = math.pi / 2
    return np.append(levels, 0.0)


class FewstepSchedule:
    """steps, denoise, flow -> SIGMAS."""

    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "sigmas"
    CATEGORY = "sampling/custom_sampling/schedulers"
    DESCRIPTION = f"The noise levels of the fewstep schedule {NAME!r}"

    @classmethod
    def INPUT_TYPES(cls):
        pure = bool(angles(1, 1)[0] > PURE)
        return {
            "required": {
                "steps": ("INT", {"default": 8, "min": 1, "max": 10000}),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
                "flow": ("BOOLEAN", {"default": pure, "tooltip": "on for Flux, SD3, Wan, Qwen .."}),
            }
        }

    def sigmas(self, steps, denoise=1.0, flow=False):
        if denoise <= 0:
            return (torch.FloatTensor([]),)
        theta = angles(steps, denoise)
        if flow:
            return (torch.FloatTensor(np.sin(theta) / (np.sin(theta) + np.cos(theta))),)
        if theta[0] > PURE:
            raise ValueError(f"{NAME!r} starts from pure noise, where sigma is infinite; it is for flow models: turn `flow` on")
        return (torch.FloatTensor(np.tan(theta)),)


NODE_CLASS_MAPPINGS = {f"fewstep {NAME}": FewstepSchedule}
NODE_DISPLAY_NAME_MAPPINGS = {f"fewstep {NAME}": f"fewstep: {NAME}"}
