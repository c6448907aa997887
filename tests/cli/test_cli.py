# SPDX-License-Identifier: Apache-2.0
"""The command: arguments, messages, exit statuses, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from bridge.cli.main import main, make_parser
from bridge.config import Settings
from bridge.errors import (
    BootTimeoutError,
    BridgeError,
    GuestPanicError,
    InfrastructureError,
    QemuError,
    RunTimeoutError,
    UsageError,
)
from tests.support import ROOT, Program

Runner = Callable[[Settings, list[str]], int]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("KCOV_BRIDGE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Callable[[Runner], None]:
    """Put another function in the place of the one that boots a guest."""

    def replace(run: Runner) -> None:
        module = ModuleType("bridge.cli.runner")
        rest = {
            "run": lambda settings, command, streams, trace=None: run(settings, command),
            "shell": lambda settings, streams: run(settings, ["shell"]),
        }
        vars(module).update(rest)
        monkeypatch.setitem(sys.modules, "bridge.cli.runner", module)
        monkeypatch.setattr("bridge.cli.runner", module, raising=False)

    return replace


def test_main_no_arguments_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    for word in ("doctor", "run", "ssh", "symbolize", "image", "examples:", "KCOV_BRIDGE_"):
        assert word in out


@pytest.mark.parametrize(
    "subcommand",
    ["doctor", "run", "serve", "ssh", "syzkaller", "symbolize", "trace", "bench", "image"],
)
def test_help_each_subcommand_has_examples(
    subcommand: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([subcommand, "--help"]) == 0
    captured = capsys.readouterr()
    assert f"kcov-bridge {subcommand}" in captured.out
    assert "examples:" in captured.out
    assert captured.err == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kcov-bridge ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "invalid choice: 'rnu'"),
        (["run", "--memroy", "1"], "unexpected argument: --memroy 1"),
        (["run", "--mem", "300"], "unexpected argument: --mem 300"),
        (["run", "ls", "-l"], "kcov-bridge run -- ls -l"),
        (["run", "--"], "there is no command after --"),
        (["ssh", "--", "ls"], "takes no command after --"),
        (["-v"], "no command is given"),
        (["--", "ls"], "no command is given"),
        (["run", "--memory"], "expected one argument"),
        (["run", "--memory", "lots"], '--memory: "lots" is not allowed'),
        (["run", "--accel", "tgc"], "did you mean tcg?"),
        (
            ["run", "--config", "none.toml"],
            "the settings file none.toml cannot be read: No such file",
        ),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    message: str,
    runner: Callable[[Runner], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def must_not_run(settings: Settings, command: list[str]) -> int:
        raise AssertionError("it ran")

    runner(must_not_run)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kcov-bridge: error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_run_gets_settings_and_command(
    runner: Callable[[Runner], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Settings, list[str]]] = []

    def run(settings: Settings, command: list[str]) -> int:
        seen.append((settings, command))
        return 42

    runner(run)
    (tmp_path / "kcov-bridge.toml").write_text("cpus = 2\nmemory = 300\n")
    monkeypatch.setenv("KCOV_BRIDGE_MEMORY", "400")
    arguments = ["-q", "run", "--memory", "500", "--syscall-pcs", "--", "sh", "-c", "a -- b", "--"]
    assert main(arguments) == 42
    expected = Settings(cpus=2, memory=500, syscall_pcs=True)
    assert seen == [(expected, ["sh", "-c", "a -- b", "--"])]
    assert main(["run"]) == 42
    assert seen[1] == (Settings(cpus=2, memory=400), [])
    assert main(["ssh", "--no-syscall-pcs"]) == 42
    assert seen[2] == (Settings(cpus=2, memory=400), ["shell"])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("no"), 2),
        (QemuError("no"), 125),
        (BootTimeoutError("no"), 123),
        (GuestPanicError("no"), 123),
        (RunTimeoutError("no"), 124),
        (BridgeError("no"), 125),
    ],
)
def test_main_each_error_has_its_status(
    error: BridgeError,
    status: int,
    runner: Callable[[Runner], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(settings: Settings, command: list[str]) -> int:
        error.evidence = "console line"
        error.hint = "look there"
        raise error

    runner(run)
    assert main(["run"]) == status
    assert capsys.readouterr().err == (
        "kcov-bridge: error: no\n  | console line\nhint: look there\n"
    )


def test_main_unexpected_exception_is_125_with_a_traceback_on_request(
    runner: Callable[[Runner], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(settings: Settings, command: list[str]) -> int:
        raise ZeroDivisionError("of all things")

    runner(run)
    assert main(["run"]) == 125
    err = capsys.readouterr().err
    assert "internal error: ZeroDivisionError: of all things" in err
    assert "Traceback" not in err
    assert main(["run", "-v"]) == 125
    assert "Traceback" in capsys.readouterr().err


PROGRAM = """
    import logging, sys, time, types
    import bridge
    from bridge.cli.main import entry

    log = logging.getLogger("bridge.test")

    def run(settings, command):
        log.debug("a detail")
        log.info("a step")
        log.error("an error")
        logging.getLogger("library").info("chatter")
        try:
            print("started", flush=True)
            time.sleep(60)
        finally:
            time.sleep({cleanup})
            print("cleaned up", flush=True)

    def flood(settings, command):
        while True:
            print("line")

    runner = types.ModuleType("bridge.cli.runner")
    runner.run = lambda settings, command, streams, trace=None: run(settings, command)
    runner.shell = lambda settings, streams: flood(settings, [])
    sys.modules["bridge.cli.runner"] = bridge.cli.runner = runner
    entry()
"""


def start(*arguments: str, cleanup: float = 0, wrapper: Sequence[str] = ()) -> Program:
    """Start the command; ``wrapper`` is a command that becomes it."""
    program = textwrap.dedent(PROGRAM).replace("{cleanup}", str(cleanup))
    return Program(
        [*wrapper, sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_main_signal_ends_it_after_the_clean_up(number: signal.Signals, status: int) -> None:
    with start("run") as process:
        assert process.line() == "started\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert out == "cleaned up\n"
    assert err.endswith("kcov-bridge: interrupted\n")
    assert "Traceback" not in err


EARLY = """
    import sys, time
    import bridge.__main__

    class Slow:
        def find_spec(self, name, path=None, target=None):
            if name == "bridge.cli.main":
                print("importing", flush=True)
                time.sleep(60)

    sys.meta_path.insert(0, Slow())
    bridge.__main__.main()
"""


def test_interrupt_while_the_command_is_imported_ends_it_quietly() -> None:
    program = [sys.executable, "-c", textwrap.dedent(EARLY)]
    with Program(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.line() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "kcov-bridge: interrupted\n")
    # What pip makes of it is such a program.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["kcov-bridge"] == "bridge.__main__:main"


def test_signal_ignored_at_start_stays_ignored() -> None:
    """As a shell's background jobs ignore SIGINT."""
    with start("run", wrapper=("sh", "-c", "trap '' INT HUP; exec \"$@\"", "sh")) as process:
        assert process.line() == "started\n"
        for number in (signal.SIGINT, signal.SIGHUP):
            process.send_signal(number)
        # Delivered in the order of their numbers, if at once: each of the two comes before.
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert out == "cleaned up\n"
    assert "once more to give that up" not in err


def test_main_second_signal_does_not_disturb_the_clean_up() -> None:
    with start("run", cleanup=1) as process:
        assert process.line() == "started\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == "cleaned up\n"
    assert "cleaning up; once more to give that up" in err


def test_main_third_signal_gives_up_a_stuck_clean_up() -> None:
    with start("run", cleanup=60) as process:
        assert process.line() == "started\n"
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == ""


@pytest.mark.parametrize(
    ("flags", "shown", "hidden"),
    [
        ([], ["a step", "an error"], ["a detail", "chatter"]),
        (["-q"], ["an error"], ["a step", "a detail", "chatter"]),
        (["-v"], ["a step", "an error", "a detail"], ["chatter"]),
        (["-vv"], ["a step", "an error", "a detail", "chatter"], []),
    ],
)
def test_logs_go_to_stderr_by_verbosity(
    flags: list[str], shown: list[str], hidden: list[str]
) -> None:
    with start("run", *flags) as process:
        assert process.line() == "started\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert out == "cleaned up\n"
    for text in shown:
        assert text in err
    for text in hidden:
        assert text not in err


def test_main_reader_goes_away_prints_no_error() -> None:
    with start("ssh") as process:
        assert process.line() == "line\n"
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(20) == 141


def test_main_stderr_is_full_the_status_is_the_errors_own() -> None:
    command = [sys.executable, "-m", "bridge", "symbolize", "--run", "/no/such/run"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=full)
    assert done.returncode == UsageError.exit_status


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["run", "--help"], ["target", "list"], ["bench", "--list"]],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_main_stdout_is_full_says_so(arguments: list[str], unbuffered: str) -> None:
    command = [sys.executable, "-m", "bridge", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert done.returncode == InfrastructureError.exit_status
    assert done.stderr == "kcov-bridge: error: stdout cannot be written: No space left on device\n"


def test_main_stdout_was_closed_by_a_target_the_status_is_the_runs() -> None:
    script = (
        "import sys\n"
        "import bridge.cli.main\n"
        "bridge.cli.main.main = lambda: sys.stdout.close() or 7\n"
        "bridge.cli.main.entry()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")


def test_main_stdout_is_unbuffered_if_python_was_told_so() -> None:
    script = (
        "import os, sys, bridge.cli.streams as s\n"
        "s.check_stdout(); print('line'); sys.stdin.read(); os._exit(0)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        out, _ = process.communicate("", timeout=60)
    assert out == "line\n"


def test_main_stdout_of_a_narrow_encoding_takes_any_text_and_path(tmp_path: Path) -> None:
    script = "import bridge.cli.streams as s; s.check_stdout(); print('1 \\u2192 2 \\udcff')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"1 \\u2192 2 \xff\n"


@pytest.mark.parametrize("action", [["image", "list"], ["target", "list"], ["fuzz", "report", "x"]])
def test_flags_of_all_commands_are_those_of_each_action(action: list[str]) -> None:
    args = make_parser(complete=True).parse_args([*action, "-vv", "-q"])
    assert (args.verbose, args.quiet) == (2, True)


def test_main_leaves_signals_and_loggers_as_they_were(runner: Callable[[Runner], None]) -> None:
    import logging

    runner(lambda settings, command: 0)
    before = signal.getsignal(signal.SIGTERM), logging.getLogger().handlers[:]
    assert main(["run", "-vv"]) == 0
    assert (signal.getsignal(signal.SIGTERM), logging.getLogger().handlers[:]) == before
