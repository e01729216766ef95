"""Runs cases of the kernels on a device. As a program, a short set of them for compute-sanitizer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks._cuda import CudaError, Device
from benchmarks._kernels import Kernels
from tests.helpers.kernels import (
    POISON,
    SCORES,
    Case,
    gather_params,
    gathered,
    random_case,
    random_indices,
    random_tokens,
    scatter_params,
    scattered,
)

GUARD = 64  # poisoned bytes on both sides of an output


@dataclass(frozen=True)
class Runner:
    """Runs the kernels and holds every output, and the bytes around it, against what is expected."""

    device: Device
    kernels: Kernels
    stream: int

    def hold(self, case: Case, offset: int = 0) -> None:
        """Run a case; tokens and kept begin `offset` bytes behind an aligned address."""
        with self.buffers(case, offset) as pointers:
            self.kernels.topk_gather(case.params(), *pointers, stream=self.stream)
            self.check(case, pointers)

    @contextmanager
    def buffers(self, case: Case, offset: int = 0) -> Iterator[list[int]]:
        """Return the addresses of scores, tokens and the poisoned outputs."""
        kept, indices, count = case.outputs()
        with ExitStack() as stack:
            inputs = [self.put(stack, case.score_bytes(), 0), self.put(stack, case.tokens, offset)]
            outputs = [self.space(stack, array, at) for array, at in ((kept, offset), (indices, 0), (count, 0))]
            yield [*inputs, *outputs]

    def check(self, case: Case, pointers: list[int]) -> None:
        """Hold a case's outputs on the device against the reference."""
        outputs = case.outputs()
        for address, array in zip(pointers[2:], outputs, strict=True):
            self.get(address, array)
        case.check(*outputs)

    def hold_rows(self, rng: np.random.Generator, n: int, k: int, row_bytes: int, offset: int, awkward: bool) -> None:
        """Gather rows and scatter them back, with indices that may be repeated or out of range."""
        batch, prefix = int(rng.integers(1, 4)), int(rng.integers(0, 4))
        tokens, base = random_tokens(rng, batch, prefix + n, row_bytes), random_tokens(rng, batch, n, row_bytes)
        indices = random_indices(rng, batch, n, k, awkward=awkward)
        wanted = gathered(tokens, indices, prefix)
        rows = np.ascontiguousarray(wanted[:, prefix:])
        with ExitStack() as stack:
            inputs = [self.put(stack, tokens, offset), self.put(stack, indices, 0)]
            kept = self.space(stack, wanted, offset)
            self.kernels.gather_tokens(gather_params(tokens, indices, prefix), *inputs, kept, stream=self.stream)
            np.testing.assert_array_equal(self.get(kept, np.empty_like(wanted)), wanted)

            inputs = [self.put(stack, base, offset), self.put(stack, rows, offset), inputs[1]]
            out = self.space(stack, base, offset)
            self.kernels.scatter_tokens(scatter_params(base, indices), *inputs, out, stream=self.stream)
            np.testing.assert_array_equal(self.get(out, np.empty_like(base)), scattered(base, rows, indices))

    def put(self, stack: ExitStack, array: np.ndarray, offset: int) -> int:
        """Return the address of a copy of an array, freed with the stack."""
        address = stack.enter_context(self.device.memory(array.nbytes + offset)) + offset
        self.device.upload(address, array)
        return address

    def space(self, stack: ExitStack, like: np.ndarray, offset: int) -> int:
        """Return the address of poisoned memory as large as an array, with guards."""
        size = like.nbytes + offset + 2 * GUARD
        address = stack.enter_context(self.device.memory(size))
        self.device.fill(address, POISON, size)
        return address + GUARD + offset

    def get(self, address: int, array: np.ndarray) -> np.ndarray:
        """Fill an array from an output and check the guards around that."""
        image = np.empty(array.nbytes + 2 * GUARD, np.uint8)
        self.device.download(address - GUARD, image)
        assert (image[:GUARD] == POISON).all(), "bytes before the output were written"
        assert (image[-GUARD:] == POISON).all(), "bytes behind the output were written"
        array.view(np.uint8).reshape(-1)[...] = image[GUARD:-GUARD]
        return array


def missing_device() -> str | None:
    """Return why no CUDA device can be used, None when one can."""
    try:
        Device()
    except CudaError as error:
        return str(error)
    return None


def main() -> None:
    """Run every kind of scores through every kernel once."""
    device = Device()
    with device.stream() as stream:
        runner = Runner(device, Kernels(Path(sys.argv[1])), stream)
        for seed, family in enumerate(SCORES):
            for sizes in ((1, 196, 256), (257, 576, 1100, 4096)):
                runner.hold(random_case(seed, sizes, (family,)), offset=seed % 5)
        for seed, row_bytes in enumerate((1, 6, 16, 768)):
            runner.hold_rows(np.random.default_rng(seed), 70, 40, row_bytes, seed % 2, awkward=bool(seed % 2))


if __name__ == "__main__":
    main()
