"""Recipe files: a schedule that a search found, for `edgeprune export --recipe`, and how it was found. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgeprune.errors import InputError

SCHEMA: Literal["edgeprune-recipe/1"] = "edgeprune-recipe/1"
MOST_BYTES = 1 << 20

Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[int, Field(ge=1, lt=1 << 31)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RecipeWeights(_Model):
    """The checkpoint the schedule was found with: name and hash, never a path; None for random weights."""

    file: str | None = None
    sha256: str | None = None
    ema: bool = False


class RecipeStage(_Model):
    """Patch tokens at a stage; of an adaptive method `kept` are the slots."""

    block: Annotated[int, Field(ge=0)]
    tokens_in: Size
    kept: Size


class Expected(_Model):
    """What the schedule is expected to do.

    Attributes:
        predicted_ms: by the latency table.
        measured_ms: of the exported bundle.
        dense_ms: of the dense graph in the same measurement.
        clock: "cpu" time of one thread, or "wall".
        top1, dense_top1: on the calibration images, which the schedule was chosen by.
        test_top1, dense_test_top1: on images that had no part in it; None where there are none.
    """

    predicted_ms: Milliseconds
    measured_ms: Milliseconds | None = None
    dense_ms: Milliseconds | None = None
    clock: Literal["cpu", "wall"]
    top1: Share
    dense_top1: Share
    test_top1: Share | None = None
    dense_test_top1: Share | None = None


class TableInfo(_Model):
    """The latency table: rows of a sequence, milliseconds of a block with them, everything else by name.

    Attributes:
        median_error, worst_error: relative, of measured networks predicted by a table made of the others.
    """

    tokens: list[Size]
    block_ms: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    extras_ms: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    networks: Size
    median_error: float
    worst_error: float


class Provenance(_Model):
    """How a schedule was found."""

    tool_version: str
    created: str
    data: str
    data_sha256: str
    images: Size
    subset: Size
    test_images: int | None = None
    evaluations: Size
    seed: int
    threads: int
    quick: bool
    latency_budget_ms: Milliseconds | None = None
    max_drop: float
    label: str | None = None
    table: TableInfo
    fingerprint: dict[str, Any]


class Recipe(_Model):
    """What an export needs besides the weights, and where it comes from."""

    schema_: Annotated[Literal["edgeprune-recipe/1"], Field(alias="schema")] = SCHEMA
    model: str
    model_options: dict[str, Any] = {}
    image_size: tuple[Size, Size] | None = None
    patch_size: Size | None = None
    num_classes: Size | None = None
    method: str
    method_options: dict[str, str] = {}
    stages: str | None
    target: str
    batch: tuple[Size, Size]
    weights: RecipeWeights
    counts: list[RecipeStage]
    expected: Expected
    found: Provenance

    def to_json(self) -> str:
        """Return the file's text."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"


def load_recipe(path: Path) -> Recipe:
    """Return the recipe in a file.

    Raises:
        InputError: `recipe` when the file cannot be read or is none.
    """
    expected = "a file that `edgeprune search -o FILE` wrote"
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise InputError(f"'{path}' is too long for a recipe", code="recipe", expected=expected)
        return Recipe.model_validate_json(text)
    except OSError as error:
        raise InputError(
            f"cannot read the recipe '{path}': {error.strerror}", code="recipe", expected=expected
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(
            f"'{path}' is no recipe: {where}: {first['msg']}",
            code="recipe",
            expected=expected + f", schema {SCHEMA}",
            hint="run the search again with this version of edgeprune",
        ) from error
