"""Networks for the small case: an MLP for vectors and tiny images, U-Net and DiT from diffusers, and values built like them.

A denoising network is called as net(x, t) with t in [0, 1] of shape (b,) and returns x's shape; a value is called as
value(x, i) with the step index i and returns (b,). A network of K classes also takes class_labels (b,), int64 in 0 .. K:
index K means "no class", and is what it is told where no labels are given.
"""

from __future__ import annotations

import math
from itertools import pairwise

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


def labels_told(classes: int | None, class_labels: Tensor | None, x: Tensor) -> Tensor | None:
    """The labels (b,) that a network of so many classes is told, "no class" where none are given; None if it has none."""
    if classes is None and class_labels is not None:
        raise ValueError("this network has no classes: leave class_labels out, or train one with labels")
    if classes is None or class_labels is not None:
        return class_labels
    return torch.full((len(x),), classes, device=x.device)


class MLPDenoiser(nn.Module):
    """net(x, t, class_labels) for samples of any shape, flattened."""

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int = 256,
        depth: int = 3,
        time_features: int = 64,
        classes: int | None = None,
    ):
        super().__init__()
        self.time_features, self.classes = time_features, classes
        self.mlp = MLP(math.prod(shape), time_features, math.prod(shape), width, depth)
        if classes is not None:
            self.of_class = nn.Embedding(classes + 1, time_features)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        condition, labels = features_of_time(t, self.time_features), labels_told(self.classes, class_labels, x)
        if labels is not None:
            condition = condition + self.of_class(labels)
        return self.mlp(x.flatten(1), condition).reshape(x.shape)


class UNetDenoiser(nn.Module):
    """net(x, t, class_labels) around diffusers' UNet2DModel; width: channels at full resolution, depth: of resolutions."""

    def __init__(self, shape: tuple[int, ...], width: int = 32, depth: int = 2, classes: int | None = None):
        super().__init__()
        from diffusers.models.unets.unet_2d import UNet2DModel

        if len(shape) != 3 or any(side % 2 ** (depth - 1) for side in shape[1:]):
            raise ValueError(
                f"a U-Net of depth {depth} needs images (c, h, w) with sides divisible by {2 ** (depth - 1)}, got {shape}; "
                "resize the data (--size) or choose another depth"
            )
        self.classes = classes
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
            num_class_embeds=None if classes is None else classes + 1,
        )

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.unet(x, 1000 * t, labels_told(self.classes, class_labels, x), return_dict=False)[0]


class DiTDenoiser(nn.Module):
    """net(x, t, class_labels) around diffusers' DiTTransformer2DModel; width: channels, depth: number of blocks.

    A DiT always has classes: without any it is a DiT of one, which is what it is always told.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 128, depth: int = 4, classes: int | None = None):
        super().__init__()
        from diffusers.models.embeddings import LabelEmbedding
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

        if len(shape) != 3 or shape[1] != shape[2] or shape[1] % 2 or width % 32:
            raise ValueError(
                f"a DiT needs square images (c, h, h), h even, and a width divisible by 32; got {shape} and {width}"
            )
        self.classes = classes
        self.dit = DiTTransformer2DModel(
            num_attention_heads=width // 32,
            attention_head_dim=32,
            in_channels=shape[0],
            out_channels=shape[0],
            num_layers=depth,
            sample_size=shape[1],
            patch_size=2,
            num_embeds_ada_norm=1 if classes is None else classes,  # diffusers adds a row for "no class"
        )
        for part in self.dit.modules():
            if isinstance(part, LabelEmbedding):
                part.dropout_prob = 0.0  # its own draws, block by block and from the global generator, would not resume

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        labels = labels_told(self.classes, class_labels, x)
        if labels is None:
            labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.dit(x, 1000 * t, class_labels=labels, return_dict=False)[0]


def make_denoising_net(
    shape: tuple[int, ...],
    kind: NetworkKind,
    width: int | None = None,
    depth: int | None = None,
    classes: int | None = None,
) -> nn.Module:
    """The network of `train` for samples of this shape; "auto" takes an MLP up to 256 numbers, else a U-Net."""
    if kind == "auto":
        kind = "mlp" if math.prod(shape) <= MLP_UP_TO else "unet"
    given = {k: v for k, v in (("width", width), ("depth", depth)) if v is not None}
    return {"mlp": MLPDenoiser, "unet": UNetDenoiser, "dit": DiTDenoiser}[kind](shape, classes=classes, **given)


class ScalarMLP(nn.Module):
    """f(x, condition): (b, *d), (b, c) -> (b,), on flattened samples."""

    def __init__(self, shape: tuple[int, ...], condition: int, width: int = 128, depth: int = 2):
        super().__init__()
        self.mlp = MLP(math.prod(shape), condition, 1, width, depth)
        self.last = self.mlp.leave

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.mlp(x.flatten(1), condition)[:, 0]


def halvings(shape: tuple[int, ...], width: int) -> list[tuple[int, int]]:
    """Channels before and after each halving of an image (c, h, w), down to 4 to 7 pixels."""
    count = max(1, int(math.log2(min(shape[1:]) / 4)))
    return list(pairwise([shape[0], *(width * min(2**k, 4) for k in range(count))]))


class Halving(nn.Module):
    """Residual convolutions that halve an image down to 4 to 7 pixels.

    Nothing runs at full resolution: four times as fast, and the density's second derivatives are what fine-tuning waits for.
    """

    def __init__(self, shape: tuple[int, ...], condition: int, width: int = 32):
        super().__init__()
        pairs = halvings(shape, width)
        self.halve = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in pairs)
        self.blocks = nn.ModuleList(nn.Conv2d(b, b, 3, padding=1) for _, b in pairs)
        self.conditions = nn.ModuleList(nn.Linear(condition, b) for _, b in pairs)

    def maps(self, x: Tensor, condition: Tensor) -> list[Tensor]:
        """The image and what it is after each halving."""
        found = [x]
        for halve, block, scale in zip(self.halve, self.blocks, self.conditions, strict=True):
            h = halve(found[-1])
            found.append(nn.functional.silu(h + block(nn.functional.silu(h + scale(condition)[:, :, None, None]))))
        return found


class ScalarConv(Halving):
    """f(x, condition): (b, c, h, w), (b, c) -> (b,)."""

    def __init__(self, shape: tuple[int, ...], condition: int, width: int = 32):
        super().__init__(shape, condition, width)
        with torch.no_grad():
            pixels = math.prod(self.maps(torch.zeros(1, *shape), torch.zeros(1, condition))[-1].shape[1:])
        self.last = nn.Linear(pixels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.last(self.maps(x, condition)[-1].flatten(1))[:, 0]


class ConvAutoencoder(Halving):
    """g(x, condition): (b, c, h, w), (b, c) -> (b, c, h, w), down and up again, each size seeing what was there on the way."""

    def __init__(self, shape: tuple[int, ...], condition: int, width: int = 32):
        super().__init__(shape, condition, width)
        self.widen = nn.ModuleList(nn.ConvTranspose2d(b, a, 4, 2, 1) for a, b in halvings(shape, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        found = self.maps(x, condition)
        h = found.pop()
        for k, before in reversed(list(enumerate(found))):
            h = self.widen[k](h, output_size=before.shape[-2:])
            if k:
                h = nn.functional.silu(h) + before
        return h


class Reconstruction(nn.Module):
    """exp(s(condition)) |x - g(x, condition)|^2 / 2 with an autoencoder g: (b, *d), (b, c) -> (b,).

    The form that a denoiser gives to an energy (Salimans & Ho 2021): the slope comes from as many numbers as x has, and what g
    has not learned to keep costs its square.
    """

    def __init__(self, shape: tuple[int, ...], condition: int):
        super().__init__()
        size = math.prod(shape)
        self.flat = not for_convolutions(shape)
        self.autoencoder = MLP(size, condition, size, 128, 2) if self.flat else ConvAutoencoder(shape, condition)
        self.log_scale = nn.Linear(condition, 1)
        nn.init.zeros_(self.log_scale.weight)
        nn.init.zeros_(self.log_scale.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x.flatten(1) if self.flat else x
        left = (x - self.autoencoder(x, condition)).square().flatten(1).sum(1)
        return self.log_scale(condition)[:, 0].exp() * left / 2


def for_convolutions(shape: tuple[int, ...]) -> bool:
    """Whether samples of this shape are images of at least 4 x 4 and more than 256 numbers."""
    return len(shape) == 3 and min(shape[1:]) >= 4 and math.prod(shape) > MLP_UP_TO


def scalar_net(shape: tuple[int, ...], condition: int, width: int | None = None) -> ScalarMLP | ScalarConv:
    """An MLP up to 256 numbers per sample and for vectors, convolutions for larger images of at least 4 x 4.

    width: hidden units of the MLP (128), or channels after the first halving (32).
    """
    given = () if width is None else (width,)
    return ScalarConv(shape, condition, *given) if for_convolutions(shape) else ScalarMLP(shape, condition, *given)
