"""Whole trainings in processes of their own: divided, killed, resumed."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from edgeprune.cli.app import run as edgeprune
from edgeprune.models.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[3]
DENSE = ROOT / "checkpoints" / "vit_digits_dense.safetensors"
PRUNED = ("--method", "dynamicvit", "--keep-rate", "0.7")
# Steps long enough that a difference would show: weights move by 1e-3 and more.
LARGE = ("--lr", "3e-4", "--recipe-option", "warmup_epochs=0")

pytestmark = pytest.mark.slow


def finetune(out: Path, *options: str) -> list[str]:
    return [
        *("-m", "edgeprune", "finetune", "-m", "vit_digits", "--checkpoint", str(DENSE), "--device", "cpu"),
        *("--threads", "1", "-q", "-o", str(out), *options),
    ]


def start(*words: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def run(*words: str) -> None:
    process = start(*words)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def run_here(*words: str) -> None:
    """Run a command line in this process, which saves the time to import torch."""
    assert edgeprune(words[2:]) == 0


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def launcher(kind: str) -> list[str]:
    if kind == "torchrun":
        return ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    return [
        *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"),
        *("--main_process_port", free_port()),
    ]


MIXED = ("--recipe-option", "mixup=0.8", "--recipe-option", "cutmix=1", "--recipe-option", "drop_path=0.2")


@pytest.mark.parametrize(
    ("kind", "options"),
    [("torchrun", ()), ("accelerate", (*PRUNED, *MIXED))],
    ids=["dense-torchrun", "dynamicvit-mixed-accelerate"],
)
def test_two_processes_do_what_one_does(kind: str, options: tuple[str, ...], tmp_path: Path) -> None:
    options = (*options, *LARGE, "--max-steps", "10")
    run_here(*finetune(tmp_path / "one.safetensors", *options))
    run(*launcher(kind), *finetune(tmp_path / "two.safetensors", *options))
    one, two = (load_checkpoint(tmp_path / f"{name}.safetensors").tensors for name in ("one", "two"))
    before = load_checkpoint(DENSE).tensors
    assert max((one[name] - before[name]).abs().max().item() for name in before) > 3e-4
    assert max((one[name] - two[name]).abs().max().item() for name in one) <= 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{end}" for name in ("one", "two") for end in ("json", "log.csv", "safetensors")
    )


def test_two_processes_train_quantized_layers_as_one_does_but_for_rounding(tmp_path: Path) -> None:
    options = ("--method", "evit", "--keep-rate", "0.7", "--quantize", "int8", *LARGE, "--max-steps", "6")
    run_here(*finetune(tmp_path / "one.safetensors", *options))
    run(*launcher("torchrun"), *finetune(tmp_path / "two.safetensors", *options))
    one, two = (load_checkpoint(tmp_path / f"{name}.safetensors").tensors for name in ("one", "two"))
    before = load_checkpoint(DENSE).tensors
    moved, apart = (sum((one[n] - o[n]).square().sum().item() for n in one) ** 0.5 for o in (before, two))
    assert 0 < apart < 0.01 * moved  # a sum that rounds otherwise can round an input to the other integer


def test_kill_in_the_middle_of_an_epoch_loses_nothing(tmp_path: Path) -> None:
    options = (*PRUNED, *MIXED, "--max-steps", "40", "--log-every", "4", "--recipe-option", "ema_decay=0.9")
    run_here(*finetune(tmp_path / "whole.safetensors", *options))
    killed, log = tmp_path / "killed.safetensors", tmp_path / "killed.log.csv"
    process = start(*finetune(killed, *options, "--save-every", "6"))
    while not log.exists() or len(log.read_text().splitlines()) < 5:  # 16 steps: state of step 12, log beyond
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert (tmp_path / "killed.safetensors.resume" / "state.pt").exists()
    assert not killed.exists()
    run(*finetune(killed, *options, "--resume"))
    assert not (tmp_path / "killed.safetensors.resume").exists()
    for end in ("safetensors", "ema.safetensors"):
        whole, resumed = (load_checkpoint(tmp_path / f"{name}.{end}").tensors for name in ("whole", "killed"))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    rows = []
    for name in ("whole", "killed"):
        with (tmp_path / f"{name}.log.csv").open(newline="") as file:
            rows.append([{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)])
    assert rows[0] == rows[1]
    assert [int(row["step"]) for row in rows[0]] == [*range(4, 41, 4), 40]
