from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgeprune.cli.app import VERBS
from edgeprune.cli.ui import Ui
from edgeprune.errors import CheckFailed, EdgepruneWarning, InputError
from tests.cli.conftest import Cli

Fake = Callable[[Callable[..., Any]], str]


def raising(error: BaseException) -> Callable[[Ui], None]:
    def body(ui: Ui) -> None:
        raise error

    return body


def test_help_lists_every_verb(cli: Cli) -> None:
    result = cli("--help")
    assert result.code == 0
    assert all(f"\n  {name} " in result.out for name in VERBS)


def test_no_arguments_shows_help(cli: Cli) -> None:
    assert cli().out == cli("--help").out


@pytest.mark.parametrize("name", VERBS)
def test_verb_help_names_the_shared_options(cli: Cli, name: str) -> None:
    result = cli(name, "--help")
    assert result.code == 0
    assert all(option in result.out for option in ("--json", "--quiet", "--verbose", "--no-progress"))


def test_version_is_printed(cli: Cli) -> None:
    from edgeprune import __version__

    assert __version__ in cli("--version").out


def test_unknown_verb_names_the_nearest(cli: Cli) -> None:
    result = cli("exprot")
    assert result.code == 2
    assert "error [usage]: unknown command 'exprot'" in result.err
    assert "edgeprune export" in result.err


def test_unknown_option_is_a_usage_error(cli: Cli) -> None:
    result = cli("models", "--nope")
    assert result.code == 2
    assert "No such option" in result.err
    assert "edgeprune models --help" in result.err


def test_underscores_in_options_are_hyphens(cli: Cli) -> None:
    assert cli("models", "--no_progress").code == 0


def test_json_holds_the_envelope_and_nothing_else(cli: Cli, fake_verb: Fake) -> None:
    def body(ui: Ui) -> dict[str, Any]:
        ui.data("a table")
        return {"path": Path("x"), "nan": float("nan")}

    document = cli(fake_verb(body), "--json").json
    assert document["schema"] == "edgeprune-cli/1"
    assert (document["command"], document["status"], document["exit_code"]) == ("models", "ok", 0)
    assert document["results"] == {"path": "x", "nan": None}
    assert document["warnings"] == []
    assert document["environment"]["packages"]["edgeprune"]
    assert "error" not in document


def test_json_holds_the_error_of_an_unknown_option(cli: Cli) -> None:
    result = cli("models", "--nope", "--json")
    assert (result.code, result.json["exit_code"], result.json["status"]) == (2, 2, "error")
    assert result.json["error"]["code"] == "usage"


def test_error_is_one_message_with_what_to_do(cli: Cli, fake_verb: Fake) -> None:
    error = InputError("it is [bold]", code="odd", expected="even", hint="add one", details={"n": 1})
    result = cli(fake_verb(raising(error)))
    assert result.code == 2
    assert result.err == "edgeprune: error [odd]: it is [bold]\n  expected: even\n  fix: add one\n"
    assert result.out == ""


def test_failed_check_exits_with_one_and_keeps_the_results(cli: Cli, fake_verb: Fake) -> None:
    def body(ui: Ui) -> None:
        ui.results = {"error": 3}
        raise CheckFailed("no", code="parity", details={"x": 1})

    result = cli(fake_verb(body), "--json")
    assert (result.code, result.json["status"], result.json["results"]) == (1, "failed", {"error": 3})
    assert result.json["error"]["details"] == {"x": 1}


def test_unexpected_exception_writes_a_log_instead_of_a_traceback(
    cli: Cli, fake_verb: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = cli(fake_verb(raising(KeyError("what"))))
    assert result.code == 70
    assert "please report" in result.err
    assert "Traceback" not in result.err
    (log,) = tmp_path.glob("edgeprune-*.log")
    assert str(log) in result.err
    assert "Traceback" in log.read_text()


def test_unexpected_exception_shows_its_traceback_with_vv(cli: Cli, fake_verb: Fake, tmp_path: Path) -> None:
    result = cli(fake_verb(raising(KeyError("what"))), "-vv")
    assert result.code == 70
    assert "Traceback" in result.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), "disk-full"),
        (OSError(errno.EDQUOT, "Quota exceeded"), "disk-full"),
        (MemoryError(), "out-of-memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out-of-memory"),
    ],
)
def test_lack_of_space_exits_with_three(cli: Cli, fake_verb: Fake, error: Exception, code: str) -> None:
    result = cli(fake_verb(raising(error)))
    assert result.code == 3
    assert f"error [{code}]" in result.err


def test_interrupt_exits_with_130(cli: Cli, fake_verb: Fake) -> None:
    result = cli(fake_verb(raising(KeyboardInterrupt())))
    assert result.code == 130
    assert result.err.strip() == "edgeprune: error [interrupted]: interrupted, nothing was written"


def test_interrupt_names_what_was_written_before(cli: Cli, fake_verb: Fake) -> None:
    def body(ui: Ui) -> None:
        ui.written.append(Path("out/done"))
        raise KeyboardInterrupt

    assert "already written: out/done" in cli(fake_verb(body)).err


def test_terminate_unwinds_and_exits_with_143(cli: Cli, fake_verb: Fake) -> None:
    unwound = []
    before = signal.getsignal(signal.SIGTERM)

    def body(ui: Ui) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            unwound.append(True)

    result = cli(fake_verb(body))
    assert result.code == 143
    assert unwound
    assert signal.getsignal(signal.SIGTERM) is before


def test_signal_counts_when_a_library_turns_its_exception_into_another(cli: Cli, fake_verb: Fake) -> None:
    def body(ui: Ui) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        except KeyboardInterrupt:
            raise RecursionError("import failed") from None

    result = cli(fake_verb(body))
    assert result.code == 130
    assert "interrupted, nothing was written" in result.err


def test_ignored_signal_stays_ignored(cli: Cli, fake_verb: Fake) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert cli(fake_verb(lambda ui: os.kill(os.getpid(), signal.SIGINT))).code == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupt_while_starting_is_quiet() -> None:
    script = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from edgeprune.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "edgeprune: error [interrupted]: interrupted\n")


def test_closed_pipe_is_silent() -> None:
    command = f"{sys.executable} -m edgeprune models --json | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141)  # 0 when the pipe held everything before it was closed
    assert done.stderr.replace("tokens: prefix + patches; MACs of one image, dense", "").strip() == ""


def test_warning_is_shown_once_and_listed(cli: Cli, fake_verb: Fake) -> None:
    def body(ui: Ui) -> None:
        for _ in range(2):
            warnings.warn("mind the gap", EdgepruneWarning, stacklevel=1)
        warnings.warn("of another package", UserWarning, stacklevel=1)

    name = fake_verb(body)
    assert cli(name).err == "edgeprune: warning: mind the gap\n"
    assert cli(name, "--json").json["warnings"] == ["mind the gap"]


def test_quiet_keeps_data_and_errors_only(cli: Cli, fake_verb: Fake) -> None:
    def body(ui: Ui) -> None:
        ui.note("chatter")
        with ui.steps() as report:
            report("working", 0.5)
        ui.data("data")

    result = cli(fake_verb(body), "-q")
    assert (result.out, result.err) == ("data\n", "")


def test_progress_is_a_line_per_step_when_stderr_is_no_terminal(cli: Cli, fake_verb: Fake) -> None:
    def body(ui: Ui) -> None:
        with ui.steps() as report:
            for share in (0.1, 0.2, 0.3):
                report(f"epoch 1, loss {share}", share)
            report("hashing", 0.9)

    name = fake_verb(body)
    assert cli(name).err == "  epoch 1, loss 0.1 ...\n  hashing ...\n"
    assert cli(name, "--no-progress").err == ""


def test_progress_is_a_bar_on_a_terminal() -> None:
    ui, screen = Ui(), StringIO()
    ui.err = Console(file=screen, force_terminal=True, width=80)
    with ui.steps() as report:
        report("lowering model.onnx", 0.4)
    assert "lowering model.onnx" in screen.getvalue()
    assert "\x1b[" in screen.getvalue()


def test_no_colour_reaches_a_pipe_or_no_color(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "")
    result = cli("nope")
    assert "\x1b" not in result.err


def test_starting_loads_no_heavy_package() -> None:
    heavy = ("torch", "onnx", "onnxruntime", "sklearn", "huggingface_hub", "openvino")
    script = (
        "import sys; from edgeprune.cli.app import run, VERBS\n"
        "codes = [run([v, '--help']) for v in VERBS] + [run(['models', '-q'])]\n"
        f"loaded = [m for m in {heavy} if m in sys.modules]\n"
        "sys.exit(str(loaded) if loaded or any(codes) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
