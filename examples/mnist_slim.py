"""A diffusion model that somebody else trained, told to fewstep: the slim MNIST DDPM (HendricSch/Slim-Diffusion, MIT).

It predicts eps on 200 levels; x in [-1, 1] of shape (1, 32, 32). Two things to know. Index 0 was never trained, so the
clock stops at 1. And the path ends early: alpha-bar(1) = 0.1335, so x_1 should still hold 0.37 of an image, under noise of
std 0.93. The model's own sampler starts from N(0, I) all the same; `path.start` draws 0.93 eps. Ancestral sampling forgets
the difference; deterministic sampling carries the surplus noise of N(0, I) into the picture's background.

    fewstep schedule --model examples/mnist_slim.py:denoiser --data mnist --data-folder DATA --size 32 --sigma-min 0.05 --out s
    fewstep sample --model examples/mnist_slim.py:denoiser --schedule s --solver ancestral --steps 10 --out x

(sigma_min because the model is poor at the lowest levels, where the data is clean to the eye.)
"""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.denoiser import Denoiser, Pretrained
from fewstep.path import Tabulated

WEIGHTS = Path(__file__).parents[1] / "../shared/data/pretrained/slim_mnist_ddpm.pt"
STEPS = 200


class DoubleConv(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.first_conv, self.second_conv = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.first_norm, self.second_norm = (nn.GroupNorm(8, channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.silu(self.first_norm(self.first_conv(x)))
        return nn.functional.silu(x + self.second_norm(self.second_conv(h)))


class Resample(nn.Module):
    """Half or double the side, then a convolution; the name `layer` is the file's."""

    def __init__(self, resize: nn.Module, convolution: nn.Module):
        super().__init__()
        self.layer = nn.Sequential(resize, convolution)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class SlimUNet(nn.Module):
    def __init__(self):
        super().__init__()
        widths = (16, 32, 64)
        self.first_conv = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(8, 16), nn.SiLU())
        self.encoder_double_conv = nn.ModuleList(DoubleConv(w) for w in widths)
        self.encoder_conv_down = nn.ModuleList(Resample(nn.PixelUnshuffle(2), nn.Conv2d(4 * w, 2 * w, 1)) for w in widths)
        self.bottleneck = DoubleConv(128)
        self.decoder_conv_up = nn.ModuleList(
            Resample(nn.Upsample(scale_factor=2), nn.Conv2d(2 * w, w, 3, padding=1)) for w in reversed(widths)
        )
        self.decoder_double_conv = nn.ModuleList(DoubleConv(w) for w in reversed(widths))
        self.last_conv = nn.Sequential(nn.Conv2d(16, 1, 3, padding=1), nn.SiLU(), nn.Conv2d(1, 1, 3, padding=1))
        self.time_embendding = nn.Embedding(STEPS, 1)  # the file's spelling

    def time(self, index: Tensor) -> Tensor:
        """The table's scalar at a fractional index (b,), between its neighbours: (b, 1, 1, 1)."""
        low = index.floor().clamp(0, STEPS - 2).long()
        table = self.time_embendding.weight[:, 0]
        return torch.lerp(table[low], table[low + 1], index - low).reshape(-1, 1, 1, 1)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        h, time, skips = self.first_conv(x), self.time(index), []
        for block, down in zip(self.encoder_double_conv, self.encoder_conv_down, strict=True):
            skips.append(block(h + time))
            h = down(skips[-1])
        h = self.bottleneck(h)
        for up, block in zip(self.decoder_conv_up, self.decoder_double_conv, strict=True):
            h = block(up(h) + skips.pop())
        return self.last_conv(h)


def denoiser() -> Denoiser:
    """The model, with the weights from the file that the environment variable SLIM_MNIST names."""
    file = Path(os.environ.get("SLIM_MNIST", WEIGHTS))
    if not file.is_file():
        raise FileNotFoundError(f"no weights at {file}: set SLIM_MNIST to slim_mnist_ddpm.pt of HendricSch/Slim-Diffusion")
    weights = torch.load(file, map_location="cpu", weights_only=True)
    net = SlimUNet()
    net.load_state_dict({k: v for k, v in weights.items() if not k.startswith("encoder_double_conv.3.")})  # never used
    beta = 1e-4 + (0.02 - 1e-4) * torch.arange(STEPS, dtype=torch.float64) / STEPS
    path = Tabulated(torch.cumprod(1 - beta, 0))
    return Pretrained(net.eval(), path, "eps", lambda t: path.index(t).clamp(min=1), (1, 32, 32))
