"""What the classes of the stand-in for TensorRT share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.helpers.fake_trt import FakeTensorRT


def checked_logger(fake: FakeTensorRT, logger: Any) -> Any:
    if not isinstance(logger, fake.module.ILogger):
        raise TypeError("incompatible constructor arguments: a logger is wanted")
    if not getattr(logger, "_ready", False):
        raise TypeError("ILogger.__init__() must be called when overriding __init__")
    return logger


def asked_device(fake: FakeTensorRT, what: str) -> None:
    """Refuse what ends a real process: TensorRT 8.6.0 before anybody has asked for a device."""
    if not fake.device.initialised or not fake.device.count:
        raise AssertionError(f"a real {what} may end the process here: no device was found first")


def properties(**defaults: Any) -> dict[str, property]:
    """Return properties that hold a value."""

    def one(name: str, default: Any) -> property:
        def read(self: Any) -> Any:
            return self._held.get(name, default)

        def write(self: Any, value: Any) -> None:
            self._held[name] = value

        return property(read, write)

    return {name: one(name, default) for name, default in defaults.items()}


def member(kind: Any, value: Any) -> str:
    if not isinstance(value, kind):
        raise TypeError(f"incompatible function arguments: {value!r} is no {kind.__name__}")
    return value.name
