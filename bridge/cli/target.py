# SPDX-License-Identifier: Apache-2.0
"""The command ``kcov-bridge target``: list, build, path, rm."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

from bridge.errors import (
    BridgeError,
    CacheError,
    InfrastructureError,
    MissingDependencyError,
    UsageError,
)
from bridge.targets import registry
from bridge.targets.programs import PROGRAMS, target_class
from bridge.targets.programs.build import BuiltProgram, Program, built_programs

__all__ = ["DESCRIPTION", "EPILOG", "add_arguments", "run"]

DESCRIPTION = """\
List the targets that have a name, and build the programs of the native ones: from the source of
their projects, with coverage. The cache keeps them. `run` builds a missing program by itself.
"""

EPILOG = """\
examples:
  kcov-bridge target list
  kcov-bridge target build nbdkit
  kcov-bridge target build --all
  ls "$(kcov-bridge target path nbdkit)/source"
  kcov-bridge target rm nbdkit
"""

_SUMMARIES = {
    "plan9": "a 9P2000 server (Python), mounted at /mnt/target",
    "none": "no service",
}
"""What the targets without a program are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of ``target``."""
    commands = parser.add_subparsers(dest="target_action", metavar="ACTION", required=True)

    command = commands.add_parser(
        "list",
        help="list the targets that have a name",
        description="List the targets that have a name, and say whether their programs are built.",
    )
    command.add_argument("--json", action="store_true", help="print one JSON array")
    command.set_defaults(target_function=_list)

    command = commands.add_parser(
        "build",
        help="build the programs of native targets, as far as they are not built yet",
        description="Build the programs of native targets, as far as they are not built yet, and\n"
        "print their directories.",
    )
    command.add_argument("names", nargs="*", metavar="NAME", help="target")
    command.add_argument("--all", action="store_true", help="build the programs of all targets")
    command.add_argument(
        "--force", action="store_true", help="build them again, of the newest source"
    )
    command.set_defaults(target_function=_build)

    command = commands.add_parser(
        "path",
        help="print the directory of a target's program",
        description="Print the directory of a target's program: source/ has its source, in which "
        "it was built.",
    )
    command.add_argument("name", metavar="NAME", help="target")
    command.set_defaults(target_function=_path)

    command = commands.add_parser(
        "rm",
        help="remove the programs of native targets",
        description="Remove the programs of native targets, also those of older recipes and "
        "compilers.",
    )
    command.add_argument("names", nargs="*", metavar="NAME", help="target")
    command.add_argument("--all", action="store_true", help="remove the programs of all targets")
    command.set_defaults(target_function=_rm)


def run(args: argparse.Namespace) -> int:
    """Do what the parsed arguments say; return the exit status."""
    function: Callable[[argparse.Namespace], int] = args.target_function
    return function(args)


def _program(name: str) -> Program:
    """Return how the program of a target is built; raises UsageError."""
    if name in PROGRAMS:
        return target_class(name).program
    registry.check_name(name)
    raise UsageError(
        f"the target {name} has no program to build",
        hint=f"the targets that have one are {', '.join(PROGRAMS)}",
    )


def _found(program: Program) -> BuiltProgram | None:
    """Return a program if it is built; none is where there is no compiler, or no cache."""
    try:
        return program.find()
    except (MissingDependencyError, CacheError):
        return None


def _list(args: argparse.Namespace) -> int:
    rows = []
    for name in registry.names():
        summary = target_class(name).summary if name in PROGRAMS else _SUMMARIES[name]
        built = _found(target_class(name).program) if name in PROGRAMS else None
        rows.append(
            {
                "name": name,
                "summary": summary,
                "program": name in PROGRAMS,
                "version": built.version if built is not None else None,
                "bytes": built.bytes if built is not None else None,
                "directory": str(built.directory) if built is not None else None,
            }
        )
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    width = max(len(str(row["name"])) for row in rows)
    for row in rows:
        state = ""
        if row["program"]:
            state = f"  ({row['version'] or 'not built yet'})"
        print(f"{row['name']:{width}}  {row['summary']}{state}")
    return 0


def _names(args: argparse.Namespace) -> list[str]:
    names: list[str] = args.names
    if args.all == bool(names):
        raise UsageError(
            "--all takes no names" if args.all else "which target? None was named",
            hint="`kcov-bridge target list` shows the names; --all means all",
        )
    return names or list(PROGRAMS)


def _for_each(names: Sequence[str], do: Callable[[str], None], done: str) -> int:
    """Do something with the program of each target, whichever others fail; return 0.

    Raises:
        BridgeError: the failure, of the only target; else one that tells of all failures.
    """
    for name in names:
        _program(name)
    failed: dict[str, BridgeError] = {}
    for name in names:
        try:
            do(name)
        except BridgeError as error:
            failed[name] = error
    if failed and len(names) == 1:
        raise failed[names[0]]
    if failed:
        raise InfrastructureError(
            f"{len(failed)} of {len(names)} programs were not {done}: {', '.join(failed)}",
            evidence="\n".join(f"{name}: {error.report()}" for name, error in failed.items()),
        )
    return 0


def _build(args: argparse.Namespace) -> int:
    def build(name: str) -> None:
        print(_program(name).build(force=args.force).directory, flush=True)

    return _for_each(_names(args), build, "built")


def _path(args: argparse.Namespace) -> int:
    built = _program(args.name).find()
    if built is None:
        raise UsageError(
            f"the program of the target {args.name} is not built, or was by another recipe or "
            "compiler",
            hint=f"build it: kcov-bridge target build {args.name}",
        )
    print(built.directory)
    return 0


def _rm(args: argparse.Namespace) -> int:
    def remove(name: str) -> None:
        for built in built_programs(name):
            built.remove()
            print(f"removed {built.directory}", flush=True)

    return _for_each(_names(args), remove, "removed")
