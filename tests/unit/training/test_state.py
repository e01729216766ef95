from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeprune.errors import EnvironmentLackError, InputError
from edgeprune.training.logs import CsvLog, log_path, open_log
from edgeprune.training.state import StateFile, folder_of

REQUEST = {"seed": 0, "recipe": "r"}


def state_file(tmp_path: Path, **request: Any) -> StateFile:
    return StateFile(folder_of(tmp_path / "x.safetensors"), {**REQUEST, **request})


def code_of(call: Any) -> str:
    with pytest.raises(InputError) as error:
        call()
    assert error.value.expected and error.value.hint
    return error.value.code


def test_state_comes_back_and_goes(tmp_path: Path) -> None:
    state = state_file(tmp_path)
    assert state.load() is None
    state.save({"step": 3, "model": {"w": torch.ones(2)}})
    loaded = state.load()
    assert loaded is not None and loaded["step"] == 3 and torch.equal(loaded["model"]["w"], torch.ones(2))
    assert [path.name for path in state.folder.iterdir()] == ["state.pt"]
    assert code_of(state.refuse_existing) == "state-exists"
    state.remove()
    assert list(tmp_path.iterdir()) == []
    state.refuse_existing()


def test_state_of_another_request_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    state_file(tmp_path).save({"step": 1})
    with pytest.raises(InputError, match="seed: 0 there, 1 here") as error:
        state_file(tmp_path, seed=1).load()
    assert error.value.code == "state-mismatch"
    assert error.value.details == {"different": ["seed"]}


@pytest.mark.parametrize("content", [b"", b"damaged", None])
def test_damaged_state_is_refused(content: bytes | None, tmp_path: Path) -> None:
    state = state_file(tmp_path)
    state.save({"step": 1})
    state.path.write_bytes(state.path.read_bytes()[:-200] if content is None else content)
    assert code_of(state.load) == "state-unreadable"


def test_state_that_would_run_code_is_refused(tmp_path: Path) -> None:
    state = state_file(tmp_path)
    state.save({"step": 1})
    torch.save({"format": 1, "request": REQUEST, "x": Path("x")}, state.path)
    assert code_of(state.load) == "state-unreadable"


def test_failed_save_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_file(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentLackError):
        state.save({"step": 1})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    state.save({"step": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentLackError):
        state.save({"step": 2})
    monkeypatch.undo()
    assert state.load()["step"] == 1  # type: ignore[index]
    assert len(list(state.folder.iterdir())) == 1


def row(step: int) -> dict[str, Any]:
    return {"scope": "step", "epoch": 1, "step": step, "loss": 0.5, "parts": {"classification": 0.5}}


def test_csv_goes_on_where_the_state_is(tmp_path: Path) -> None:
    path = tmp_path / "x.log.csv"
    first = CsvLog(path)
    first.begin(0)
    assert not path.exists()
    for step in (2, 4, 6):
        first.write(row(step))
    with path.open("a") as file:
        file.write("step,1,")  # cut off by a kill
    again = CsvLog(path)
    again.begin(4)
    again.write(row(6))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["step"] for r in rows] == ["2", "4", "6"]
    assert rows[0]["parts"] == "classification=0.5"
    CsvLog(path).begin(0)
    assert not path.exists()


def test_tensorboard_writes_events_and_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "x.safetensors"
    log = open_log("tensorboard", out)
    log.begin(0)
    log.write(row(2))
    log.close()
    assert list(log_path("tensorboard", out).glob("events*"))
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(EnvironmentLackError, match=r"edgeprune\[tensorboard\]"):
        open_log("tensorboard", out)
