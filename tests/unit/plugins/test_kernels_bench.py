"""benchmarks/kernels.py without a device: its refusal, its arithmetic, and a run on a device that only counts."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.helpers.device_kernels import missing_device

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
CALL_US = {"topk": 3.0, "copy": 1.0, "empty": 2.0}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("onnxruntime")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("kernels")


class Clock:
    """A device whose calls take the time that `CALL_US` says, in graphs and outside."""

    name, architecture, multiprocessors, l2_bytes, driver_version = "Test GPU (none)", "sm_87", 8, 1 << 20, "13.0"

    def __init__(self) -> None:
        self.now_us = 0.0
        self.addresses = itertools.count(256, 256)
        self.live = 0

    @contextmanager
    def memory(self, size: int) -> Iterator[int]:
        assert size > 0
        self.live += 1
        yield next(self.addresses)
        self.live -= 1

    @contextmanager
    def stream(self) -> Iterator[int]:
        yield 7

    @contextmanager
    def graph(self, stream: int, work: Callable[[], Any]) -> Iterator[SimpleNamespace]:
        before = self.now_us
        work()
        taken, self.now_us = self.now_us - before, before
        yield SimpleNamespace(launch=lambda: self.spend(taken), nodes=1)

    @contextmanager
    def stopwatch(self, stream: int) -> Iterator[Callable[[Callable[[], Any]], float]]:
        def measure(work: Callable[[], Any]) -> float:
            before = self.now_us
            work()
            return (self.now_us - before) / 1e3

        yield measure

    def spend(self, microseconds: float) -> None:
        self.now_us += microseconds

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        self.spend(CALL_US["copy"])

    def empty_kernel(self, stream: int) -> Callable[[], None]:
        return lambda: self.spend(CALL_US["empty"])

    def upload(self, *arguments: Any) -> None: ...

    def fill(self, *arguments: Any) -> None: ...

    def synchronize(self) -> None: ...


def test_a_machine_without_a_device_is_told_so() -> None:
    reason = missing_device()
    if reason is None:
        pytest.skip("this machine has a device")
    script = [sys.executable, str(BENCHMARKS / "kernels.py"), "--quick"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", f"error: {reason}\n")


def test_the_floor_counts_every_byte_once(bench: ModuleType) -> None:
    workload = bench.Workload("ViT-S", 1, 196, 137, 384)  # 0.21 MB, as calculated by hand
    assert workload.moved_bytes == 4 * 196 + 2 * 138 * 768 + 4 * 137 + 4
    assert workload.sizes == (4 * 196, 197 * 768, 138 * 768, 4 * 137, 4)


def test_a_run_writes_samples_and_goals(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    library = SimpleNamespace(topk_gather=lambda *arguments, stream: clock.spend(CALL_US["topk"]))
    monkeypatch.setattr(bench, "Device", lambda: clock)
    monkeypatch.setattr(bench, "Kernels", lambda path: library)
    monkeypatch.setattr(bench, "torch_with_cuda", lambda: None)
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--quick", "--library", "x.so", "--out", str(out)])
    bench.main()
    result = json.loads(out.read_text())
    assert clock.live == 0
    assert result["fingerprint"]["gpu"]["name"] == "Test GPU (none)"
    assert [(case["model"], case["tokens"], case["batch"]) for case in result["cases"]] == [
        *(("ViT-S", 196, batch) for batch in (1, 8, 64)),
        *(("ViT-B", 4096, batch) for batch in (1, 8, 64)),
    ]
    for case in result["cases"]:
        assert case["median_us"] == pytest.approx({bench.OURS: 3.0, bench.COPY: 1.0, bench.EMPTY: 2.0})
        assert case["median_us_without_graph"] == pytest.approx(3.0)
        assert case["times_slower_than_edgeprune"][bench.COPY]["estimate"] == pytest.approx(1 / 3)
        assert len(case["samples_us"][bench.OURS]) == result["arguments"]["rounds"]
    assert [goal["what"] for goal in result["goals"]] == ["launches up to 256 tokens"]
    assert "ViT-S 196->137, batch 8" in capsys.readouterr().out
