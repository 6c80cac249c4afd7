"""Several processes, one batch: each takes its share of every batch, and the gradients are averaged.

All processes draw the same random numbers and keep their share of them, so that the result does not depend on how many
there are, up to the order of sums. What talks between them is accelerate's.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class Processes:
    """The processes of an Accelerator; without one, just this one."""

    def __init__(self, accelerator: Accelerator | None = None):
        self.accelerator = accelerator if accelerator is not None and accelerator.num_processes > 1 else None
        self.count = self.accelerator.num_processes if self.accelerator else 1
        self.index = self.accelerator.process_index if self.accelerator else 0
        if self.accelerator:
            atexit.register(self.accelerator.end_training)  # threads of a process group that is left open abort the exit

    def share(self, whole: Tensor, dim: int = 0) -> Tensor:
        """Every count-th entry along dim, which must divide evenly."""
        if whole.shape[dim] % self.count:
            raise ValueError(f"a batch of {whole.shape[dim]} cannot be shared evenly by {self.count} processes")
        return whole if self.count == 1 else whole.transpose(0, dim)[self.index :: self.count].transpose(0, dim)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def leave(self) -> None:
        """Ends this process, if it is one of several, once all is written: torch now and then aborts the usual end."""
        if self.accelerator is not None:
            self.accelerator.end_training()
            sys.stdout.flush()
            os._exit(0)

    def average(self, tensor: Tensor) -> Tensor:
        """The mean over processes."""
        if self.accelerator is None:
            return tensor
        found = self.accelerator.reduce(tensor.clone(), "mean")
        assert isinstance(found, Tensor)
        return found

    def mean(self, metrics: dict[str, float]) -> dict[str, float]:
        """The mean over processes of each."""
        if self.accelerator is None:
            return metrics
        where = self.accelerator.device
        values = self.average(torch.tensor(list(metrics.values()), dtype=torch.float64).to(where)).tolist()
        return dict(zip(metrics, values, strict=True))

    def same(self, numbers: Tensor) -> Tensor:
        """Numbers on the CPU that every process has computed, alike but for rounding: the first one's, in all."""
        if self.accelerator is None:
            return numbers
        from accelerate.utils import broadcast

        return broadcast(numbers.to(self.accelerator.device)).to(numbers.device)

    def average_gradients(self, optimiser: torch.optim.Optimizer) -> None:
        """In place, over all parameters of the optimiser that have one."""
        if self.accelerator is None:
            return
        gradients = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        whole = self.average(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


ALONE = Processes()
