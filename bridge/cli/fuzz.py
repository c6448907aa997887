# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge fuzz``: campaigns, and what is done with their findings and results."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from bridge import config
from bridge.cli.arguments import add_settings, duration, settings_of
from bridge.errors import UsageError

if TYPE_CHECKING:
    from bridge.cli.fuzz_screen import Screen

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
Fuzz what stands behind the guest's system calls, with the guest's kcov as feedback: AFL++ makes
the cases, a harness in the guest executes them, and each job has a VM that is reset.
With an ACTION instead: work with the findings and results of campaigns.
"""

EPILOG = """\
examples:
  kcov-bridge fuzz --out build/fuzz --time 5m
                                     fuzz the default target with file-system calls
  kcov-bridge fuzz --out build/fuzz --resume
                                     go on, with the same settings
  kcov-bridge fuzz --target mypackage.target:Server --jobs 2 --corpus seeds --out build/fuzz
  kcov-bridge fuzz --harness ./parser.so --target none --source kernel --out build/parser
  kcov-bridge fuzz --out build/tar -- tar -xf @@ -C /mnt/target
  kcov-bridge fuzz report build/fuzz
  kcov-bridge fuzz repro build/fuzz/findings/NAME

The directory --out has the corpus, the findings, the figures over time and report.html; see
docs/fuzzing.md. The exit status: 0: it ended at a limit and found nothing, 1: there are new
findings, 130: Ctrl-C (all is kept), 2: wrong usage, 125: it failed.
"""

_ACTIONS: dict[str, str] = {
    "repro": "run the case of a finding again, and say how often it leads there",
    "minimize": "make the case of a finding small, and a program that reproduces it",
    "report": "make a page of a campaign, for a browser",
    "compare": "compare groups of campaigns, with the statistics of evaluations",
    "simulate": "measure the coordinator of a campaign with simulated workers",
    "text": "print a case of the harness files as text, or make one of text",
}
"""What each action does; ``bridge.cli.fuzz_NAME`` carries it out, with the names of a subcommand's
module."""

_OTHERS: Final = frozenset(
    {"out", "timeout", "isolate", "comparisons", "personality", "diagnose", "awake"}
    | {"syscall_pcs", "syscall_comparisons"}
)
"""Settings of a session that a campaign chooses by itself."""

_DEFAULTS: Final = {"transport": "auto"}
"""Defaults of a campaign: the way of a message decides how many cases it executes."""

_FOUND: Final = 1


def _fill(name: str, parser: argparse.ArgumentParser) -> None:
    module = import_module(f"bridge.cli.fuzz_{name}")
    parser.description, parser.epilog = module.DESCRIPTION, module.EPILOG
    module.add_arguments(parser)
    parser.set_defaults(fuzz_function=module.run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a campaign, and the actions."""
    # The usage of the whole command is long, and is not that of an action.
    actions = parser.add_subparsers(dest="fuzz_action", metavar="ACTION", prog=parser.prog)
    for name, text in _ACTIONS.items():
        # The parser of each subcommand fills itself when it is used.
        fill: dict[str, Any] = {"fill": functools.partial(_fill, name)}
        actions.add_parser(name, help=text, **fill)

    group = parser.add_argument_group("the campaign")
    group.add_argument(
        "--out",
        type=Path,
        default=Path("build/fuzz"),
        metavar="DIR",
        help="directory of the campaign (default: %(default)s)",
    )
    group.add_argument("--resume", action="store_true", help="go on with the campaign in --out")
    group.add_argument(
        "--corpus",
        type=Path,
        metavar="DIR",
        help="directory of seeds (default: what the harness brings)",
    )
    group.add_argument(
        "--jobs",
        type=_count,
        metavar="N",
        help="engines with a VM each at the same time (default: 1, or as many as before)",
    )
    group.add_argument(
        "--time", type=duration, metavar="T", help="end after this time: 90s, 5m, 4h, 1d"
    )
    group.add_argument(
        "--executions", type=_count, metavar="N", help="end after this many executions in all"
    )
    group.add_argument(
        "--scheduler",
        default="",
        metavar="ADDR",
        help="run the jobs on the cluster of this Dask scheduler, such as tcp://host:8786 "
        "(default: on this machine)",
    )

    group = parser.add_argument_group("the cases")
    group.add_argument(
        "--harness",
        metavar="SPEC",
        help="what executes a case in the guest: files (file-system calls on the mounted target), "
        "a shared object (.so) or archive (.a) with LLVMFuzzerTestOneInput, "
        "python:MODULE:FUNCTION, or a command after -- with the case on stdin or as @@ "
        "(default: files)",
    )
    group.add_argument(
        "--dictionary", type=Path, metavar="FILE", help="tokens in the engine's format"
    )
    group.add_argument(
        "--no-learn",
        action="store_true",
        help="leave out the words that the target compares the seeds with (KCOV_TRACE_CMP), which "
        "the engine gets as a further dictionary",
    )
    group.add_argument(
        "--case-time",
        type=duration,
        metavar="T",
        help="limit of a case, such as 500ms (default: measured with the seeds)",
    )
    group.add_argument(
        "--reset-every",
        type=int,
        default=2000,
        metavar="N",
        help="executions between two resets of guest and target; 0: only after findings and when "
        "the guest drifts (default: %(default)s)",
    )
    group.add_argument(
        "--target-state",
        choices=("fork", "restart", "keep"),
        default="fork",
        help="what a reset does to the target: fork it from its ready state, start it again, or "
        "keep it (default: %(default)s)",
    )
    group.add_argument(
        "--target-memory",
        type=int,
        default=1024,
        metavar="MIB",
        help="a target that takes more is a finding; 0: no limit (default: %(default)s)",
    )
    group.add_argument(
        "--differential",
        action="store_true",
        help="harness files: a case that behaves differently on a local file system is a finding",
    )
    group.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="WHAT",
        help="with --differential: CALL, FIELD or CALL.FIELD that may differ; may be repeated",
    )
    group.add_argument(
        "--library",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help="a library, or a directory of them, that a harness .so needs in the guest; may be "
        "repeated",
    )
    group.add_argument(
        "--exit-status",
        action="store_true",
        help="a command that exits with another status than 0 is a finding",
    )
    group.add_argument(
        "--no-feedback",
        action="store_true",
        help="mutate blindly, to compare with: coverage is recorded, but the engine gets none",
    )
    group.add_argument(
        "--random-seed", type=int, metavar="N", help="of the engine's random numbers"
    )

    group = parser.add_argument_group("what is shown")
    group.add_argument("--json", action="store_true", help="print lines of JSON")
    group.add_argument(
        "--plain", action="store_true", help="print plain lines, as without a terminal"
    )
    group = parser.add_argument_group("the guest and the target, as of kcov-bridge run")
    names = [name for name in config.options() if name not in _OTHERS]
    add_settings(group, names, defaults=_DEFAULTS)


def run(args: argparse.Namespace) -> int:
    """Carry an action out, or run a campaign; return the exit status."""
    if args.fuzz_action is not None:
        return int(args.fuzz_function(args))
    return _campaign(args)


def _campaign(args: argparse.Namespace) -> int:
    from bridge.fuzz.campaign import Campaign, run_campaign
    from bridge.fuzz.campaign_job import Plan

    campaign = Campaign(
        out=args.out.absolute(),
        plan=Plan(settings={}) if args.resume else _plan(args),
        corpus=args.corpus.absolute() if args.corpus is not None else None,
        jobs=args.jobs,
        seconds=args.time,
        executions=args.executions,
        scheduler=args.scheduler,
        resume=args.resume,
    )
    out: TextIO = args.streams.out
    with ExitStack() as stack:
        # What a target prints is not for whoever reads the campaign's lines.
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        screen = _screen(args, out, stack)
        end = run_campaign(campaign, shown=screen.show, said=screen.say)
    if not args.json:
        from bridge.cli.fuzz_screen import counted

        print(
            f"{counted(end.view.executions, 'execution')}, {counted(end.view.blocks, 'block')}, "
            f"{counted(end.view.corpus, 'case')}, {counted(end.view.findings, 'finding')}: "
            f"{args.out}",
            file=out,
        )
        if end.report is not None:
            print(f"the report: {end.report}", file=out)
    if end.interrupted is not None:
        raise end.interrupted
    if end.unreported is not None:
        raise end.unreported
    return _FOUND if end.new_findings else 0


def _plan(args: argparse.Namespace) -> Any:
    from bridge.fuzz.campaign_job import Plan

    command = tuple(args.command)
    if command and args.harness:
        raise UsageError(
            "both --harness and a command after -- are given",
            hint="leave out --harness: a command is a harness by itself",
        )
    if args.ignore and not args.differential:
        raise UsageError("--ignore is given without --differential", hint="add --differential")
    dictionary = ""
    if args.dictionary is not None:
        try:
            dictionary = args.dictionary.read_text(errors="surrogateescape")
        except OSError as error:
            raise UsageError(
                f"the dictionary {args.dictionary} cannot be read: {error.strerror}"
            ) from error
    return Plan(
        settings=settings_of(args, defaults=_DEFAULTS).changed(),
        harness="" if command else _harness(args.harness or "files"),
        command=command,
        differential=args.differential,
        ignore=tuple(args.ignore),
        libraries=tuple(str(each.absolute()) for each in args.library),
        exit_status=args.exit_status,
        target_state=args.target_state,
        dictionary=dictionary,
        learn=not args.no_learn,
        case_seconds=args.case_time,
        reset_every=args.reset_every,
        target_memory=args.target_memory,
        feedback=not args.no_feedback,
        random_seed=args.random_seed,
        path=_path(),
    )


def _harness(spec: str) -> str:
    """Return the specification of a harness so that it means the same in each directory."""
    path = Path(spec)
    return str(path.absolute()) if path.suffix and path.is_file() else spec


def _path() -> tuple[str, ...]:
    """Return where this process finds modules that are not installed with its Python."""
    installed = {Path(each).resolve() for each in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    found = [Path(each or ".").absolute() for each in sys.path] + [Path.cwd()]
    own = [path for path in found if not installed & {path.resolve(), *path.resolve().parents}]
    return tuple(dict.fromkeys(map(str, own)))


def _screen(args: argparse.Namespace, out: TextIO, stack: ExitStack) -> Screen:
    from bridge.cli.fuzz_screen import JsonLines, PlainLines, live_screen

    if args.json:
        return JsonLines(out)
    if args.plain or not out.isatty():
        return PlainLines(out)
    return stack.enter_context(live_screen(str(args.out), out))


def _count(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
