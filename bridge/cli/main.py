# SPDX-License-Identifier: Apache-2.0
"""The command ``kcov-bridge``.

:func:`main` takes arguments and gives an exit status; it raises nothing. Data go to stdout, logs
and errors to stderr. The exit statuses:

=====  =========================================================================
0      done; ``run`` ends with the status of its command instead
1      ``doctor`` misses something, ``symbolize`` did not know a PC
2      wrong usage
123    the guest was lost: it panicked, powered off, did not boot
124    the workload did not end in its time
125    the bridge or the machine it runs on failed
130    interrupted (Ctrl-C), 129 and 143: hung up, terminated; all after cleaning up
141    whoever read stdout went away
=====  =========================================================================
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

from bridge import config
from bridge.errors import BridgeError, UsageError

__all__ = ["entry", "main"]

_PROGRAM = "kcov-bridge"

_log = logging.getLogger("bridge")

_EPILOG = """\
examples:
  kcov-bridge doctor                 what this machine lacks, and how to get it
  kcov-bridge run                    boot, mount the default target, run the default workload
  kcov-bridge run -- ls -lR /mnt/target
                                     run one command in the guest under kcov
  kcov-bridge symbolize < build/run/pcs.txt
                                     what those PCs are
  kcov-bridge ssh                    a shell in a booted guest, its target mounted

Settings come from flags, from KCOV_BRIDGE_<NAME> in the environment, and from kcov-bridge.toml
or [tool.kcov-bridge] in pyproject.toml, in this order.
"""

_RUN_DESCRIPTION = """\
Boot the guest, start the target on this machine under coverage, mount it in the guest and run a
command there under kcov. Without a command, the default workload of file work runs on the target.
"""

_RUN_EPILOG = """\
examples:
  kcov-bridge run
  kcov-bridge run --out build/ls -- ls -lR /mnt/target
  kcov-bridge run --target none --syscall-pcs -- true
  kcov-bridge run --target mypackage.target:Server --timeout 60 -- sh -c 'cat /mnt/target/*'
  KCOV_BRIDGE_MEMORY=512 kcov-bridge run

The directory --out then holds summary.json, pcs.txt (one hex PC a line, in order), .coverage,
html/, lcov.info and console.log. The exit status is that of the command; 125 says that the bridge
failed, 124 that the time was up, 123 that the guest was lost, 2 that the usage was wrong.
"""

_SSH_EPILOG = """\
examples:
  kcov-bridge ssh
  kcov-bridge ssh --target-dir ./files --memory 512

The guest is the same that `run` makes, with the target mounted; it is powered off when the shell
ends. In it, `kcov-exec -- CMD` runs a command under kcov.
"""

_DOCTOR_EPILOG = """\
examples:
  kcov-bridge doctor
  kcov-bridge doctor --json | jq '.checks[] | select(.found | not)'

The exit status is 0 when all that is required is there, else 1.
"""

_SYMBOLIZE_EPILOG = """\
examples:
  kcov-bridge symbolize < build/run/pcs.txt
  echo 0xfffffffff0010008 | kcov-bridge symbolize
  kcov-bridge symbolize --all
"""

_EXPORT_EPILOG = """\
examples:
  kcov-bridge export --format rawcover >rawcover.txt
  kcov-bridge export --format drcov -o kernel.drcov
  kcov-bridge export --format lcov --vmlinux vmlinux -o kernel.info
"""

_STATUS_EPILOG = """\
examples:
  kcov-bridge status
  kcov-bridge status --json | jq .lost_pcs

The exit status is 1 when no bridge is running.
"""

_BENCH_EPILOG = """\
examples:
  kcov-bridge bench --list
  kcov-bridge bench --quick
  kcov-bridge bench --only signal,idle -o signal.json
  kcov-bridge bench --only consume,vms --plot bench.svg

Each figure stands beside its baseline, taken in turn in the same run; a comparison of too few
runs, or of runs that differ too much, is refused with the reason. docs/performance.md says what
is measured and how. Nothing else should run on the machine meanwhile.
"""

_IMAGE_EPILOG = """\
examples:
  kcov-bridge image build
  kcov-bridge image list
  ls -l "$(kcov-bridge image path)"
"""


class _Interrupted(KeyboardInterrupt):
    """A signal that asks the command to end: it unwinds like Ctrl-C, so everything is closed."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.exit_status = 128 + number


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are :class:`UsageError`, and that fills itself when it is used.

    ``fill`` adds the arguments when they are first needed, so that one subcommand does not pay for
    the imports of the others.
    """

    def __init__(
        self,
        *,
        fill: Callable[[argparse.ArgumentParser], None] | None = None,
        **rest: Any,
    ) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **rest)
        self._fill = fill

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        fill, self._fill = self._fill, None
        if fill is not None:
            fill(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(message, hint=f"`{self.prog} --help` shows what there is")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=argparse.SUPPRESS,
        help="say more on stderr; twice: also what the libraries say",
    )
    parser.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        default=argparse.SUPPRESS,
        help="only errors on stderr",
    )


def _add_config(parser: argparse.ArgumentParser, names: Sequence[str] | None = None) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="settings file (default: kcov-bridge.toml here, or the table [tool.kcov-bridge] of "
        "pyproject.toml)",
    )
    config.add_arguments(parser, names)


def _fill_run(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.set_defaults(function=_run)


def _fill_ssh(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.set_defaults(function=_ssh)


def _fill_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_config(parser, ("qemu", "accel", "source", "image", "memory", "region"))
    parser.set_defaults(function=_doctor)


def _fill_symbolize(parser: argparse.ArgumentParser) -> None:
    from bridge.sources.symbolize import add_symbolize_arguments, symbolize_command

    add_symbolize_arguments(parser)
    parser.set_defaults(function=symbolize_command)


def _fill_export(parser: argparse.ArgumentParser) -> None:
    from bridge.sources.guest_kernel.export import add_export_arguments, export_command

    add_export_arguments(parser)
    parser.set_defaults(function=export_command)


def _fill_status(parser: argparse.ArgumentParser) -> None:
    from bridge.session.status import add_status_arguments, status_command

    add_status_arguments(parser)
    parser.set_defaults(function=status_command)


def _fill_bench(parser: argparse.ArgumentParser) -> None:
    from bridge.bench.command import add_bench_arguments

    add_bench_arguments(parser)
    _add_config(parser, ("accel", "qemu", "image", "memory"))
    parser.set_defaults(function=_bench)


def _fill_image(parser: argparse.ArgumentParser) -> None:
    from bridge.cli.image import add_image_arguments, image_command

    add_image_arguments(parser)
    parser.set_defaults(function=image_command)


_SUBCOMMANDS: tuple[tuple[str, str, str, str, Callable[[argparse.ArgumentParser], None]], ...] = (
    (
        "doctor",
        "say what this machine needs, what it has, and how to get the rest",
        "",
        _DOCTOR_EPILOG,
        _fill_doctor,
    ),
    (
        "run",
        "run a command in a guest under kcov, covered by a target on this machine",
        _RUN_DESCRIPTION,
        _RUN_EPILOG,
        _fill_run,
    ),
    ("ssh", "open a shell in a booted guest", "", _SSH_EPILOG, _fill_ssh),
    ("symbolize", "say what PCs are", "", _SYMBOLIZE_EPILOG, _fill_symbolize),
    (
        "export",
        "write the coverage of the guest's kernel for other programs",
        "",
        _EXPORT_EPILOG,
        _fill_export,
    ),
    (
        "status",
        "say what the running bridges are doing",
        "What each running bridge of yours has signalled, appended and lost, by instance.",
        _STATUS_EPILOG,
        _fill_status,
    ),
    (
        "bench",
        "measure what the bridge costs, beside baselines",
        "",
        _BENCH_EPILOG,
        _fill_bench,
    ),
    ("image", "build, list and remove guest images", "", _IMAGE_EPILOG, _fill_image),
)


def _version() -> str:
    try:
        return version(_PROGRAM)
    except PackageNotFoundError:
        return "(not installed)"


def _parser() -> _Parser:
    parser = _Parser(
        prog=_PROGRAM,
        description="The kcov device for guests whose kernel was built without it: coverage from "
        "the host side of the virtual machine.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {_version()}")
    _add_common(parser)
    commands = parser.add_subparsers(dest="subcommand", metavar="COMMAND")
    for name, text, description, epilog, fill in _SUBCOMMANDS:
        usage = f"{_PROGRAM} run [options] [-- CMD ...]" if name == "run" else None
        _add_common(
            commands.add_parser(
                name,
                help=text,
                description=description or f"{text[0].upper()}{text[1:]}.",
                epilog=epilog,
                usage=usage,
                fill=fill,
            )
        )
    return parser


def _settings(args: argparse.Namespace) -> config.Settings:
    return config.load(config.flags_of(args), file=args.config)


def _run(args: argparse.Namespace) -> int:
    from bridge.cli.runner import run

    return run(_settings(args), args.command)


def _ssh(args: argparse.Namespace) -> int:
    from bridge.cli.runner import shell

    return shell(_settings(args))


def _doctor(args: argparse.Namespace) -> int:
    from bridge.cli.doctor import doctor_command

    return doctor_command(_settings(args), as_json=args.json)


def _bench(args: argparse.Namespace) -> int:
    from bridge.bench.command import bench_command

    return bench_command(_settings(args), args)


def _parse(arguments: Sequence[str]) -> argparse.Namespace | None:
    """The parsed arguments, or ``None`` when only help was asked for; ``command`` is after --."""
    own = list(arguments)
    command: list[str] = []
    split = own.index("--") if "--" in own else None
    if split is not None:
        own, command = own[:split], own[split + 1 :]
    parser = _parser()
    if not own and split is None:
        parser.print_help()
        return None
    parsed: tuple[argparse.Namespace, list[str]] = parser.parse_known_args(own)
    args, extra = parsed
    if extra:
        hint = f"`{_PROGRAM} {args.subcommand or ''} --help` shows what there is".replace("  ", " ")
        if args.subcommand == "run" and not extra[0].startswith("-"):
            hint = f"the command comes after --: {_PROGRAM} run -- {' '.join(extra)}"
        raise UsageError(f"unexpected argument: {' '.join(extra)}", hint=hint)
    if args.subcommand is None:
        raise UsageError("no command is given", hint=f"`{_PROGRAM} --help` shows what there is")
    if split is not None and args.subcommand != "run":
        raise UsageError(
            f"`{_PROGRAM} {args.subcommand}` takes no command after --",
            hint=f"`{_PROGRAM} run -- CMD` runs one in the guest",
        )
    if split is not None and not command:
        raise UsageError(
            "there is no command after --",
            hint="leave -- away to run the default workload",
        )
    args.command = command
    return args


@contextlib.contextmanager
def _logging(verbosity: int, quiet: bool) -> Iterator[None]:
    """Log to stderr while inside; the loggers are as before afterwards."""
    handler = logging.StreamHandler(sys.stderr)
    if verbosity:
        handler.setFormatter(logging.Formatter("%(relativeCreated)8.0f ms %(name)s: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter(f"{_PROGRAM}: %(message)s"))
    root = logging.getLogger()
    before = root.level, _log.level
    root.setLevel(logging.ERROR if quiet else logging.DEBUG if verbosity > 1 else logging.WARNING)
    _log.setLevel(logging.ERROR if quiet else logging.DEBUG if verbosity else logging.INFO)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before[0])
        _log.setLevel(before[1])


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """While inside, the first SIGINT, SIGTERM or SIGHUP unwinds; a second one does not disturb.

    The third one unwinds again, for a clean-up that hangs. Signals that were ignored stay so
    (`nohup`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    count = 0

    def received(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count == 2:
            # No logging here: the handler may have interrupted a logging call.
            os.write(2, b"kcov-bridge: cleaning up; once more to give that up\n")
            return
        raise _Interrupted(signal.Signals(number))

    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, received)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _complain(text: str) -> None:
    print(f"{_PROGRAM}: error: {text}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (the process's own by default); give its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    verbosity = 0
    try:
        args = _parse(arguments)
        if args is None:
            return 0
        verbosity = getattr(args, "verbose", 0)
        with _logging(verbosity, getattr(args, "quiet", False)), _signals():
            status = int(args.function(args))
            sys.stdout.flush()
            return status
    except SystemExit as stop:
        # argparse ends --help and --version this way.
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except BridgeError as error:
        _complain(error.report())
        if verbosity:
            traceback.print_exc()
        return error.exit_status
    except KeyboardInterrupt as interrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return getattr(interrupt, "exit_status", 128 + signal.SIGINT)
    except BrokenPipeError:
        # Else the interpreter's own flush at exit would complain about the same pipe.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        # The one place that catches everything: a defect of the bridge is a status, not a trace.
        hint = "" if verbosity else "\nhint: -v shows where this comes from"
        _complain(f"internal error: {type(error).__name__}: {error}{hint}")
        if verbosity:
            traceback.print_exc()
        return BridgeError.exit_status


def entry() -> None:
    """The console script: :func:`main` as a process."""
    sys.exit(main())
