"""Networks for the small case: an MLP for vectors and tiny images, U-Net and DiT from diffusers, and values built like them.

A denoising network is called as net(x, t) with t in [0, 1] of shape (b,) and returns x's shape; a value is called as
value(x, i) with the step index i and returns (b,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fewstep.config import NetworkKind

MLP_UP_TO = 256  # numbers per sample; beyond that "auto" takes a U-Net


def features_of_time(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of t at periods from 2 down to 1/16, log-spaced: (b,) -> (b, width).

    Faster ones would let the network's score jitter between neighbouring levels, and a schedule learn the jitter.
    """
    log_frequency = torch.linspace(math.log(math.pi), math.log(32 * math.pi), width // 2, device=t.device, dtype=t.dtype)
    angle = t[:, None] * log_frequency.exp()
    return torch.cat([angle.sin(), angle.cos()], 1)


class MLP(nn.Module):
    """Residual MLP from a vector and a conditioning vector to a vector. No normalisation: an energy must see scale."""

    def __init__(self, inputs: int, condition: int, outputs: int, width: int, depth: int):
        super().__init__()
        self.enter = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.conditions = nn.ModuleList(nn.Linear(condition, width) for _ in range(depth))
        self.leave = nn.Linear(width, outputs)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.enter(x)
        for block, scale in zip(self.blocks, self.conditions, strict=True):
            h = h + block(nn.functional.silu(h + scale(condition)))
        return self.leave(nn.functional.silu(h))


class MLPDenoiser(nn.Module):
    """net(x, t) for samples of any shape, flattened."""

    def __init__(self, shape: tuple[int, ...], width: int = 256, depth: int = 3, time_features: int = 64):
        super().__init__()
        self.time_features = time_features
        self.mlp = MLP(math.prod(shape), time_features, math.prod(shape), width, depth)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.mlp(x.flatten(1), features_of_time(t, self.time_features)).reshape(x.shape)


class UNetDenoiser(nn.Module):
    """net(x, t) around diffusers' UNet2DModel; width: channels at full resolution, depth: number of resolutions."""

    def __init__(self, shape: tuple[int, ...], width: int = 32, depth: int = 2):
        super().__init__()
        from diffusers.models.unets.unet_2d import UNet2DModel

        if len(shape) != 3 or any(side % 2 ** (depth - 1) for side in shape[1:]):
            raise ValueError(
                f"a U-Net of depth {depth} needs images (c, h, w) with sides divisible by {2 ** (depth - 1)}, got {shape}; "
                "resize the data (--size) or choose another depth"
            )
        self.unet = UNet2DModel(
            sample_size=shape[1:],
            in_channels=shape[0],
            out_channels=shape[0],
            layers_per_block=1,
            block_out_channels=tuple(width * 2**i for i in range(depth)),
            down_block_types=("DownBlock2D",) * depth,
            up_block_types=("UpBlock2D",) * depth,
            norm_num_groups=8,
            add_attention=False,
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, 1000 * t, return_dict=False)[0]


class DiTDenoiser(nn.Module):
    """net(x, t) around diffusers' DiTTransformer2DModel, with one class; width: channels, depth: number of blocks."""

    def __init__(self, shape: tuple[int, ...], width: int = 128, depth: int = 4):
        super().__init__()
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

        if len(shape) != 3 or shape[1] != shape[2] or shape[1] % 2 or width % 32:
            raise ValueError(
                f"a DiT needs square images (c, h, h), h even, and a width divisible by 32; got {shape} and {width}"
            )
        self.dit = DiTTransformer2DModel(
            num_attention_heads=width // 32,
            attention_head_dim=32,
            in_channels=shape[0],
            out_channels=shape[0],
            num_layers=depth,
            sample_size=shape[1],
            patch_size=2,
            num_embeds_ada_norm=1,
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        one_class = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.dit(x, 1000 * t, class_labels=one_class, return_dict=False)[0]


def make_denoising_net(
    shape: tuple[int, ...], kind: NetworkKind, width: int | None = None, depth: int | None = None
) -> nn.Module:
    """The network of `train` for samples of this shape; "auto" takes an MLP up to 256 numbers, else a U-Net."""
    if kind == "auto":
        kind = "mlp" if math.prod(shape) <= MLP_UP_TO else "unet"
    given = {k: v for k, v in (("width", width), ("depth", depth)) if v is not None}
    return {"mlp": MLPDenoiser, "unet": UNetDenoiser, "dit": DiTDenoiser}[kind](shape, **given)
