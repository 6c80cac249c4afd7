"""A denoiser that tells what it was asked."""

from fewstep.denoiser import Denoiser


class Counting(Denoiser):
    """Another denoiser, counting the samples that go through it, and the most at once."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser, self.path, self.shape, self.evaluations = denoiser, denoiser.path, denoiser.shape, denoiser.evaluations
        self.samples, self.most = 0, 0

    def forward(self, x, t, cond=None):
        self.samples, self.most = self.samples + len(x), max(self.most, len(x))
        return self.denoiser(x, t, cond)
