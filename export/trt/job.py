"""What the building process is told and what it answers: JSON, one message a line."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgeprune import errors
from edgeprune.errors import EdgepruneError, InternalError
from edgeprune.runtime.engines import ProofInfo
from edgeprune.runtime.manifest import Count, Sha256, Size


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JobProfile(_Message):
    """Shapes of the inputs whose batch is open, and the value of `slots`."""

    shapes: dict[str, list[Size]]
    slots: list[Count] | None = None


Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]


class Job(_Message):
    """One engine to build; every path is absolute.

    Attributes:
        graph: the ONNX file, its weights beside it.
        engine, layers: files to write: the plan, and what the engine inspector says.
        log: file for all that TensorRT says.
        plugin: the graph has nodes of the plugin.
        timing_cache: file to read and to add to, None for neither.
    """

    graph: str
    engine: str
    layers: str
    log: str
    profiles: list[JobProfile]
    precision: Precision
    workspace: Size
    tactics: Literal["default", "builtin"] = "default"
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None = None
    plugin: bool = False
    timing_cache: str | None = None


class Built(_Message):
    """The engine that was built; `warnings` are for the user."""

    sha256: Sha256
    bytes: Size
    scratch_bytes: Count
    build_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    proof: ProofInfo
    warnings: list[str] = []


class Progress(_Message):
    """How far it is; `share` never falls."""

    event: Literal["progress"] = "progress"
    step: str
    share: Annotated[float, Field(ge=0, le=1)]


class Result(_Message):
    """The last message of a build that went well."""

    event: Literal["result"] = "result"
    built: Built


class Failure(_Message):
    """The last message of one that did not: an EdgepruneError."""

    event: Literal["failure"] = "failure"
    kind: str
    message: str
    code: str
    expected: str | None = None
    hint: str | None = None
    details: dict[str, Any] = {}

    @classmethod
    def of(cls, error: EdgepruneError) -> Failure:
        """Return the message for an error."""
        fields = {name: getattr(error, name) for name in ("message", "code", "expected", "hint", "details")}
        return cls(kind=type(error).__name__, **fields)

    def error(self) -> EdgepruneError:
        """Return the error it was made of."""
        kind = getattr(errors, self.kind, InternalError)
        made: EdgepruneError = kind(
            self.message, code=self.code, expected=self.expected, hint=self.hint, details=self.details
        )
        return made


Message = Annotated[Progress | Result | Failure, Field(discriminator="event")]


class Envelope(_Message):
    """Reads any message."""

    message: Message

    @classmethod
    def read(cls, line: str) -> Progress | Result | Failure:
        """Return the message of a line; ValueError for any other line."""
        return cls.model_validate_json(f'{{"message": {line}}}').message
