"""The governor at work: in a loop with a device that only keeps time, and in a session."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from edgeprune.errors import InputError
from edgeprune.export import ExportRequest, export_model
from edgeprune.runtime import pace
from edgeprune.runtime.bundle import Bundle
from edgeprune.runtime.device_state import DeviceState
from edgeprune.runtime.governor import Policy
from edgeprune.runtime.null import NullDevice
from edgeprune.runtime.pace import Pace
from edgeprune.runtime.session import Session

COSTS = {1.0: 10.0, 0.7: 7.0, 0.5: 5.0, 0.3: 3.0}
RATES = sorted(COSTS, reverse=True)


class Cool:
    """A reader of a device that never tells anything."""

    def read(self) -> DeviceState:
        return DeviceState(None, None, None)


def pace_of(device: NullDevice, policy: Policy, density: float = 1.0) -> Pace:
    return Pace(policy, COSTS, density, reader=Cool(), clock=lambda: device.now_s)  # type: ignore[arg-type]


def drive(made: Pace, device: NullDevice, density: float, seconds: float) -> tuple[list[float], float]:
    """Run frame after frame; return what each took and the last density."""
    took, end = [], device.now_s + seconds
    while device.now_s < end:
        latency = device.run(RATES.index(density)).latency_ms
        took.append(latency)
        density = made.after(density, latency)
    return took, density


def test_load_that_comes_and_goes_is_answered_and_forgotten() -> None:
    device = NullDevice(list(COSTS.values()), frame_s=0.02, loads=((10.0, 20.0, 2.5),))
    made = pace_of(device, Policy(12.0))
    quiet, density = drive(made, device, 1.0, 9.0)
    assert (density, max(quiet)) == (1.0, 10.0)
    loaded, density = drive(made, device, density, 10.0)
    assert density == 0.3
    assert np.mean([ms > 12.0 for ms in loaded]) < 0.1
    _, density = drive(made, device, density, 60.0)
    assert density == 1.0
    assert made.steps[0].before == 1.0
    assert all(step.reason for step in made.steps)


def test_steps_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    device = NullDevice(list(COSTS.values()), frame_s=0.02, loads=((0.0, 9.0, 3.0),))
    made = pace_of(device, Policy(12.0))
    with caplog.at_level(logging.INFO, "edgeprune.governor"):
        drive(made, device, 1.0, 3.0)
    assert "density 1 -> " in caplog.text
    assert "over the deadline of 12 ms" in caplog.text


def test_run_of_another_density_does_not_count() -> None:
    device = NullDevice(list(COSTS.values()))
    made = pace_of(device, Policy(12.0))
    for _ in range(100):
        device.run(3)
        assert made.after(0.3, 1000.0) == 1.0
    assert not made.steps


def test_costs_that_rise_are_taken_as_equal() -> None:
    made = Pace(Policy(5.0), {1.0: 10.0, 0.7: 11.0, 0.5: 4.0}, 0.7, reader=Cool())  # type: ignore[arg-type]
    assert made.after(0.7, 4.9) == 0.7


def test_one_density_is_nothing_to_choose_from() -> None:
    with pytest.raises(InputError) as error:
        Pace(Policy(5.0), {0.7: 10.0}, 0.7, reader=Cool())  # type: ignore[arg-type]
    assert error.value.code == "deadline"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    request = ExportRequest(
        model="vit_digits", model_options={"depth": 4}, method="evit", densities=(0.5, 1.0, 0.7), random_weights=True
    )
    return export_model(request, tmp_path_factory.mktemp("pace") / "bundle")


def test_session_with_a_hopeless_deadline_goes_to_the_sparsest(bundle: Bundle) -> None:
    session = Session(bundle, threads=1, spinning=False, deadline_ms=Policy(1e-6, down_dwell_s=0.0))
    assert session.density == 0.5  # the first that was exported
    session = Session(bundle, threads=1, spinning=False, density=1.0, deadline_ms=Policy(1e-6, down_dwell_s=0.0))
    images = np.zeros((1, 3, 64, 64), np.float32)
    for _ in range(20):
        session.run(images)
    assert session.density == 0.5
    assert [(step.before, step.after) for step in session.density_steps] == [(1.0, 0.5)]


def test_session_with_an_easy_deadline_stays(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "DeviceReader", Cool)
    session = Session(bundle, threads=1, spinning=False, density=1.0, deadline_ms=1e9)
    for _ in range(40):
        session.run(np.zeros((1, 3, 64, 64), np.float32))
    assert (session.density, session.density_steps) == (1.0, [])


def test_density_under_a_deadline_is_not_set_by_hand(bundle: Bundle) -> None:
    session = Session(bundle, threads=1, spinning=False, deadline_ms=1e9)
    with pytest.raises(InputError) as error:
        session.density = 0.7
    assert error.value.code == "density"


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_deadline_is_refused(bundle: Bundle, deadline: float) -> None:
    with pytest.raises(InputError) as error:
        Session(bundle, threads=1, spinning=False, deadline_ms=deadline)
    assert error.value.code == "governor"


def test_bundle_of_one_keep_rate_has_no_deadline(tmp_path: Path) -> None:
    request = ExportRequest(model="vit_digits", method="evit", keep_rate=0.7, random_weights=True, verify=False)
    made = export_model(request, tmp_path / "bundle")
    with pytest.raises(InputError) as error:
        Session(made, threads=1, spinning=False, deadline_ms=5.0)
    assert error.value.code == "deadline"
