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
import functools
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import FrameType
from typing import Any, Protocol, TextIO, cast

import bridge
from bridge.cli.streams import Streams, check_stdout, own_streams, reserve_descriptors
from bridge.errors import BridgeError, UsageError

__all__ = ["entry", "main", "make_parser"]

_PROGRAM = "kcov-bridge"

_log = logging.getLogger("bridge")

_EPILOG = """\
examples:
  kcov-bridge setup                  install the Debian packages that are missing
  kcov-bridge doctor                 check what else is missing, and how to get it
  kcov-bridge run                    boot, mount the default target, run the default workload
  kcov-bridge run -- ls -lR /mnt/target
                                     run one command in the guest under kcov
  kcov-bridge symbolize <build/run/pcs.txt
                                     print the source of each of those PCs
  kcov-bridge ssh                    open a shell in a booted guest, with its target mounted

Settings come from flags, from KCOV_BRIDGE_<NAME> in the environment, and from kcov-bridge.toml
or [tool.kcov-bridge] in pyproject.toml; the first that gives a value wins.
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
        _add_common(self)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        self.fill()
        return super().parse_known_args(args, namespace)

    def fill(self) -> None:
        """Add the arguments, if they are not there yet."""
        fill, self._fill = self._fill, None
        if fill is not None:
            fill(self)

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(message, hint=f"`{self.prog} --help` shows what is allowed")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=argparse.SUPPRESS,
        help="log more to stderr; -vv also logs what the libraries do",
    )
    parser.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        default=argparse.SUPPRESS,
        help="log only errors to stderr",
    )


_SUBCOMMANDS = {
    "setup": "install the Debian packages that are missing",
    "doctor": "check that this machine has all that a run needs",
    "run": "run a command in a guest under kcov, with a target on this machine",
    "ssh": "open a shell in a booted guest",
    "serve": "hold a guest for other programs, on an SSH port that stays the same",
    "syzkaller": "prepare a directory in which syzkaller's manager fuzzes a stock kernel",
    "native": "print the flags that link a native program with the run time for coverage",
    "symbolize": "print the source of each PC",
    "trace": "print the system calls of a run, with the code that each reached",
    "fuzz": "fuzz what stands behind the guest's system calls",
    "export": "write coverage for other programs: viewers of kernel coverage, addr2line, genhtml",
    "report": "make a page of a finished run or of tests, for a browser; also LCOV and others",
    "status": "show the figures of the running bridges",
    "bench": "measure what the bridge costs, beside baselines",
    "target": "build the programs of native targets, and list all targets",
    "image": "build, list and remove guest images",
}
"""What each subcommand does; ``bridge.cli.NAME`` carries it out."""

_USAGES = {
    "run": f"{_PROGRAM} run [options] [-- CMD ...]",
    "fuzz": f"{_PROGRAM} fuzz [options] [-- CMD ...]\n       {_PROGRAM} fuzz ACTION ...",
}
"""Of the subcommands that take a command."""


class _Subcommand(Protocol):
    """What each module ``bridge.cli.NAME`` has."""

    DESCRIPTION: str
    EPILOG: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of the command."""

    def run(self, args: argparse.Namespace) -> int:
        """Carry it out; return the exit status."""


def _fill(name: str, parser: argparse.ArgumentParser) -> None:
    module = cast(_Subcommand, import_module(f"bridge.cli.{name}"))
    parser.description, parser.epilog = module.DESCRIPTION, module.EPILOG
    module.add_arguments(parser)
    parser.set_defaults(function=module.run)


def make_parser(*, complete: bool = False) -> argparse.ArgumentParser:
    """Return the parser of the command.

    Args:
        complete: have the arguments of all subcommands in it now, not each when it is used.
    """
    parser = _Parser(
        prog=_PROGRAM,
        description="Give virtual machines that run stock Linux kernels a kcov device, filled with "
        "the coverage\nof the host code that serves them, and of the guest kernel itself.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {bridge.__version__}")
    commands = parser.add_subparsers(dest="subcommand", metavar="COMMAND")
    for name, text in _SUBCOMMANDS.items():
        usage = _USAGES.get(name)
        fill = functools.partial(_fill, name)
        command = commands.add_parser(name, help=text, usage=usage, fill=fill)
        if complete:
            _fill_all(command)
    return parser


def _fill_all(parser: argparse.ArgumentParser) -> None:
    """Fill a parser, and those of its actions."""
    if isinstance(parser, _Parser):
        parser.fill()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                _fill_all(each)


def _parse(arguments: Sequence[str]) -> argparse.Namespace | None:
    """Parse the arguments; ``command`` is what follows --. None if only help was requested."""
    own = list(arguments)
    command: list[str] = []
    split = own.index("--") if "--" in own else None
    if split is not None:
        own, command = own[:split], own[split + 1 :]
    parser = make_parser()
    if not own and split is None:
        parser.print_help()
        return None
    parsed: tuple[argparse.Namespace, list[str]] = parser.parse_known_args(own)
    args, extra = parsed
    if extra:
        hint = f"`{_PROGRAM} {args.subcommand or ''} --help` shows what is allowed".replace(
            "  ", " "
        )
        if args.subcommand == "run" and not extra[0].startswith("-"):
            hint = f"the command comes after --: {_PROGRAM} run -- {' '.join(extra)}"
        raise UsageError(f"unexpected argument: {' '.join(extra)}", hint=hint)
    if args.subcommand is None:
        raise UsageError("no command is given", hint=f"`{_PROGRAM} --help` shows what is allowed")
    takes_command = args.subcommand == "run" or (
        args.subcommand == "fuzz" and args.fuzz_action is None
    )
    if split is not None and not takes_command:
        raise UsageError(
            f"`{_PROGRAM} {args.subcommand}` takes no command after --",
            hint=f"`{_PROGRAM} run -- CMD` runs one in the guest",
        )
    if split is not None and not command:
        raise UsageError(
            "there is no command after --",
            hint="without --, the default "
            + ("workload runs" if args.subcommand == "run" else "harness is used"),
        )
    args.command = command
    return args


@contextlib.contextmanager
def _logging(stream: TextIO, verbosity: int, quiet: bool) -> Iterator[None]:
    """Log to ``stream`` while inside; the loggers are as before afterwards."""
    handler = logging.StreamHandler(stream)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (the process's own by default); give its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    with own_streams() as streams:
        return _main(arguments, streams)


def _main(arguments: Sequence[str], streams: Streams) -> int:
    verbosity = 0

    def complain(text: str) -> None:
        # The exit status also tells it where stderr cannot be written.
        with contextlib.suppress(OSError, ValueError):
            print(f"{_PROGRAM}: error: {text}", file=streams.err)
            if verbosity:
                traceback.print_exc(file=streams.err)

    try:
        try:
            args = _parse(arguments)
        except SystemExit:
            # argparse ends --help and --version this way.
            sys.stdout.flush()
            raise
        if args is None:
            sys.stdout.flush()
            return 0
        verbosity = getattr(args, "verbose", 0)
        args.streams = streams
        stdout = sys.stdout
        with _logging(streams.err, verbosity, getattr(args, "quiet", False)), _signals():
            status = int(args.function(args))
            if not stdout.closed:
                stdout.flush()
            return status
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except BridgeError as error:
        complain(error.report())
        return error.exit_status
    except KeyboardInterrupt as interrupt:
        with contextlib.suppress(OSError, ValueError):
            print(f"{_PROGRAM}: interrupted", file=streams.err)
        return getattr(interrupt, "exit_status", 128 + signal.SIGINT)
    except BrokenPipeError:
        # Else the interpreter's own flush at exit would complain about the same pipe.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        # The one place that catches everything: a defect of the bridge is a status, not a trace.
        hint = "" if verbosity else "\nhint: -v shows where this comes from"
        complain(f"internal error: {type(error).__name__}: {error}{hint}")
        return BridgeError.exit_status


def entry() -> None:
    """Run :func:`main` as a process: the console script."""
    reserve_descriptors()
    check_stdout()
    status = main()
    try:
        # A target may have closed it.
        if not sys.stdout.closed:
            sys.stdout.flush()
    except (BridgeError, OSError):
        # It was said. The interpreter's own flush at exit would say it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
