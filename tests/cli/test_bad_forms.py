"""What users get wrong with adaptive forms, buckets and several keep rates: one clear message, nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import DIGITS, Cli, Outcome, write_image

SHORT = ("export", *DIGITS, "--no-verify", "--model-option", "depth=4")
ASVIT = (*SHORT, "--method", "asvit", "--stages", "1,2")
RATES = (*SHORT, "--method", "evit")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return where a bundle would go; its parent is otherwise empty."""
    parent = tmp_path / "out"
    parent.mkdir()
    return parent / "bundle"


def assert_refused(result: Outcome, out: Path, name: str, *words: str) -> None:
    """Check exit code 2, the error code, one message with these words, and that nothing was written."""
    assert result.code == 2, result.err
    errors = [line for line in result.err.splitlines() if line.startswith("edgeprune: error")]
    assert len(errors) == 1
    assert errors[0].startswith(f"edgeprune: error [{name}]: ")
    assert "Traceback" not in result.err
    assert result.out == ""
    for word in words:
        assert word in result.err
    assert list(out.parent.iterdir()) == []


# ------------------------------------------------------------------------------------------------ buckets


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ("0", ("from 1 to 64",)),
        ("-5", ("-5", "from 1 to 64")),
        ("48,48", ("48, 48", "did you mean 48?")),
        ("48,20", ("did you mean 20, 48?",)),
        ("20,0", ("did you mean 20?",)),
        ("500", ("500", "from 1 to 64")),
        (",".join(map(str, range(1, 66))), ("1 to 64 whole numbers",)),
        ("abc", ("abc", "--buckets auto:4")),
        ("auto:x", ("auto:x", "auto:NUMBER")),
        ("48,", ("cannot be read",)),
        ("48;96", ("cannot be read",)),
        ("4.5", ("cannot be read",)),
        ("", ("--buckets auto:4",)),
    ],
)
def test_sizes_that_do_not_fit(cli: Cli, out: Path, sizes: str, words: tuple[str, ...]) -> None:
    assert_refused(cli(*ASVIT, "--buckets", sizes, "-o", out), out, "buckets", *words)


@pytest.mark.parametrize("sizes", ["0", "500", "abc", "auto:4"])
def test_dry_run_refuses_sizes_as_well(cli: Cli, out: Path, sizes: str) -> None:
    result = cli(*ASVIT, "--buckets", sizes, "--dry-run")
    assert_refused(result, out, "calibration" if sizes == "auto:4" else "buckets")


@pytest.mark.parametrize("number", ["auto:0", "auto:999", "auto:-1"])
def test_number_of_buckets_out_of_range(cli: Cli, out: Path, number: str) -> None:
    options = ("--calibration", "digits", "--calibration-images", "4")
    assert_refused(cli(*ASVIT, "--buckets", number, *options, "-o", out), out, "buckets", number[5:], "from 1 to 64")


@pytest.mark.parametrize("number", ["auto", "auto:4", "auto:0", "auto:999"])
def test_buckets_are_chosen_for_images_only(cli: Cli, out: Path, number: str) -> None:
    assert_refused(cli(*ASVIT, "--buckets", number, "-o", out), out, "calibration", "--calibration digits")


@pytest.mark.parametrize(
    "method", [("--method", "dynamicvit", "--keep-rate", "0.7"), ("--method", "tome"), ("--method", "dense")]
)
def test_buckets_of_a_method_that_keeps_as_many_of_every_image(cli: Cli, out: Path, method: tuple[str, ...]) -> None:
    assert_refused(cli(*SHORT, *method, "--buckets", "20", "-o", out), out, "buckets", "ats, asvit, sait")


def test_buckets_of_top_k(cli: Cli, out: Path) -> None:
    options = ("--method", "sait", "--method-option", "select=topk", "--keep-rate", "0.5", "--buckets", "20")
    assert_refused(cli(*SHORT, *options, "-o", out), out, "buckets")


def test_buckets_and_several_keep_rates(cli: Cli, out: Path) -> None:
    assert_refused(cli(*ASVIT, "--keep-rate", "1,0.5", "--buckets", "20", "-o", out), out, "buckets", "one of both")


@pytest.mark.parametrize("extra", [("--adaptive", "buckets"), ("--adaptive", "computed", "--buckets", "20")])
def test_form_and_buckets_contradict_each_other(cli: Cli, out: Path, extra: tuple[str, ...]) -> None:
    assert_refused(cli(*ASVIT, *extra, "-o", out), out, "buckets", "--adaptive buckets")


def test_slots_with_buckets(cli: Cli, out: Path) -> None:
    assert_refused(cli(*ASVIT, "--adaptive", "slots", "--buckets", "20", "-o", out), out, "buckets")


# ------------------------------------------------------------------------------------------------ calibration


@pytest.mark.parametrize("sizes", ["auto:2", "20"])
@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
def test_calibration_folder_that_is_missing_or_empty(
    cli: Cli, tmp_path: Path, out: Path, sizes: str, target: str
) -> None:
    (tmp_path / "empty").mkdir()
    options = (*ASVIT, "--target", target, "--buckets", sizes, "-o", out, "--calibration")
    assert_refused(cli(*options, f"imagefolder:{tmp_path / 'absent'}"), out, "data-not-found", "absent")
    assert_refused(cli(*options, f"imagefolder:{tmp_path / 'empty'}"), out, "data-empty", "empty")


@pytest.mark.parametrize("sizes", ["auto:2", "20"])
def test_calibration_with_one_image(cli: Cli, tmp_path: Path, out: Path, sizes: str) -> None:
    (tmp_path / "images").mkdir()
    write_image(tmp_path / "images" / "only.png", "RGB")
    options = ("--buckets", sizes, "--calibration", f"imagefolder:{tmp_path / 'images'}")
    assert_refused(cli(*ASVIT, *options, "-o", out), out, "calibration", "at least two images")


def test_calibration_with_a_broken_image(cli: Cli, tmp_path: Path, out: Path) -> None:
    (tmp_path / "images").mkdir()
    write_image(tmp_path / "images" / "a.png", "RGB")
    (tmp_path / "images" / "b.png").write_text("hello")
    options = ("--buckets", "20", "--calibration", f"imagefolder:{tmp_path / 'images'}")
    assert_refused(cli(*ASVIT, *options, "-o", out), out, "image-unreadable", "b.png")


@pytest.mark.parametrize("data", ["photos", "imagefolder:", "imagefolder"])
def test_calibration_with_unknown_data(cli: Cli, out: Path, data: str) -> None:
    assert_refused(cli(*ASVIT, "--buckets", "20", "--calibration", data, "-o", out), out, "data-unknown", data)


def test_calibration_images_are_two_at_least(cli: Cli, out: Path) -> None:
    options = ("--buckets", "20", "--calibration", "digits", "--calibration-images", "1")
    assert_refused(cli(*ASVIT, *options, "-o", out), out, "usage", "--calibration-images")


@pytest.mark.parametrize(
    ("option", "value", "code"), [("--calibration", "digits", "calibration"), ("--fill", "next-best", "fill")]
)
@pytest.mark.parametrize("method", [ASVIT, (*RATES, "--keep-rate", "0.7"), SHORT])
def test_options_of_buckets_without_buckets(
    cli: Cli, out: Path, method: tuple[str, ...], option: str, value: str, code: str
) -> None:
    assert_refused(cli(*method, option, value, "-o", out), out, code, "--buckets beside them")


def test_unknown_fill(cli: Cli, out: Path) -> None:
    assert_refused(cli(*ASVIT, "--buckets", "20", "--fill", "zeros", "-o", out), out, "usage", "next-best")


# ------------------------------------------------------------------------------------------------ forms


@pytest.mark.parametrize("form", ["computed", "slots"])
@pytest.mark.parametrize("method", [("--method", "evit", "--keep-rate", "0.7"), ("--method", "dense")])
def test_form_of_a_method_that_keeps_as_many_of_every_image(
    cli: Cli, out: Path, method: tuple[str, ...], form: str
) -> None:
    assert_refused(cli(*SHORT, *method, "--adaptive", form, "-o", out), out, "adaptive", "ats, asvit, sait")


@pytest.mark.parametrize("extra", [("--adaptive", "computed"), ("--buckets", "20")])
def test_form_for_one_image_of_a_count_that_is_the_batchs(cli: Cli, out: Path, extra: tuple[str, ...]) -> None:
    options = ("--method-option", "count=batch-mean", *extra)
    assert_refused(cli(*ASVIT, *options, "-o", out), out, "adaptive", "--adaptive slots")


def test_unknown_form(cli: Cli, out: Path) -> None:
    assert_refused(cli(*ASVIT, "--adaptive", "stretched", "-o", out), out, "usage", "computed")


# ------------------------------------------------------------------------------------------------ several keep rates


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ("1,9", ("9.0", "did you mean 0.09?")),
        ("0.7,0", ("0.0", "above 0")),
        ("0.7,nan", ("nan",)),
        ("0.7,-0.5", ("-0.5",)),
        ("0.7,inf", ("inf",)),
        ("0.7,0.7", ("each once",)),
        ("1,0.7,1.0", ("each once",)),
        (",".join(f"0.{n}" for n in range(10, 27)), ("up to 16",)),
    ],
)
def test_keep_rates_that_do_not_fit(cli: Cli, out: Path, rates: str, words: tuple[str, ...]) -> None:
    assert_refused(cli(*RATES, "--keep-rate", rates, "-o", out), out, "keep-rate", *words)


@pytest.mark.parametrize("rates", ["0.7,", ",", "0.7,half", "0.7;0.5", "0.7 0.5"])
def test_keep_rates_that_cannot_be_read(cli: Cli, out: Path, rates: str) -> None:
    assert_refused(cli(*RATES, "--keep-rate", rates, "-o", out), out, "usage", "1.0,0.7,0.5")


@pytest.mark.parametrize("method", ["tome", "cropr", "dense"])
def test_several_keep_rates_of_a_method_without(cli: Cli, out: Path, method: str) -> None:
    result = cli(*SHORT, "--method", method, "--keep-rate", "0.7,0.5", "-o", out)
    assert_refused(result, out, "keep-rate", method, "takes no list of keep rates")


def test_several_keep_rates_and_rates_of_stages(cli: Cli, out: Path) -> None:
    result = cli(*RATES, "--keep-rate", "0.7,0.5", "--stages", "1:0.7,2:0.5", "-o", out)
    assert_refused(result, out, "keep-rate", "--stages without rates of their own")


def test_a_keep_rate_among_several_that_leaves_nothing(cli: Cli, out: Path) -> None:
    result = cli(*SHORT, "--method", "dynamicvit", "--keep-rate", "0.7,0.01", "-o", out)
    assert_refused(result, out, "keep-rate", "at least one token")


def test_dry_run_with_several_keep_rates_writes_nothing(cli: Cli, out: Path) -> None:
    result = cli(*RATES, "--keep-rate", "1,0.7", "--dry-run", "--json")
    assert result.code == 0
    assert set(result.json["results"]["densities"]) == {"1.0", "0.7"}
    assert list(out.parent.iterdir()) == []
