"""Devices and processes. The only module that imports accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from edgeprune.errors import EnvironmentLackError, missing_package

PRECISIONS = ("no", "fp16", "bf16")


def is_main_process() -> bool:
    """Return whether this process prints and writes; true without a launcher."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def start(mixed_precision: str = "no", *, cpu: bool = False, find_unused: bool = False) -> Iterator[Any]:
    """Yield the `accelerate.Accelerator` of this process; joins the others when a launcher started several.

    Args:
        mixed_precision: one of `PRECISIONS`.
        cpu: use no GPU even where there is one.
        find_unused: some parameters may have no gradient in a step.

    Raises:
        EnvironmentLackError: `package-missing`; `mixed-precision` when the device cannot do it.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise missing_package("accelerate", "train", "training") from error
    cpu = cpu or not torch.cuda.is_available()
    if mixed_precision == "fp16" and cpu:
        raise EnvironmentLackError(
            "--mixed-precision fp16 needs a GPU", code="mixed-precision", hint="use --mixed-precision no or bf16"
        )
    owner = not PartialState._shared_state
    AcceleratorState._reset_state()
    handler = DistributedDataParallelKwargs(find_unused_parameters=find_unused, broadcast_buffers=False)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=cpu, kwargs_handlers=[handler])
    try:
        yield accelerator
        accelerator.wait_for_everyone()
    finally:
        if owner and dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if processes() > 1 else 0


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total)
        return total / processes()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone().contiguous()
        dist.all_reduce(total)
        return total / processes()


def mean_over_processes(x: Tensor) -> Tensor:
    """Return the mean of `x` over all processes, differentiable; `x` itself when there is one.

    A loss that is no mean over images, such as |mean operations - budget|, takes its means with this. Together with
    the averaging of gradients over processes its gradient is then the one that a single process computes.
    """
    return x if processes() == 1 else _Mean.apply(x)


def sum_over_processes(x: Tensor) -> Tensor:
    """Return the sum of `x` over all processes, without gradient."""
    total = x.detach().clone()
    if processes() > 1:
        dist.all_reduce(total)
    return total
