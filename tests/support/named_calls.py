# SPDX-License-Identifier: Apache-2.0
"""System calls by name in a guest, and the functions of the host's code that each one reached."""

from __future__ import annotations

import ast
import errno
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge.session.session import Session
from bridge.sources.pcs import Location
from bridge.sources.python.packages import find_packages
from tests.support.programs import guest_program

__all__ = ["NamedCall", "make_calls"]

PROGRAM = Path(__file__).parents[1] / "system" / "named_calls.c"
IN_GUEST = "/root/named_calls"


@dataclass(frozen=True)
class NamedCall:
    """A system call that was made.

    Attributes:
        name: as :func:`make_calls` was given it.
        error: the errno's name; empty for a call that succeeded.
        data: the first bytes that it read.
        functions: the functions on the host that ran for it, each ``file:Class.method``.
    """

    name: str
    result: int
    error: str
    data: bytes
    functions: frozenset[str]


def make_calls(session: Session, *calls: str) -> Sequence[NamedCall]:
    """Make system calls in the guest, in one thread; tests/system/named_calls.c has their names.

    Raises:
        AssertionError: the program failed; a call that fails is none.
    """
    session.guest.put(guest_program(PROGRAM), IN_GUEST, mode=0o755)
    done = session.run([IN_GUEST, "/sys/kernel/debug/kcov", *calls], timeout=60)
    assert done.exit_status == 0, done.stderr.decode()
    return [_call(session, line) for line in done.stdout.decode().splitlines()]


def _call(session: Session, line: str) -> NamedCall:
    name, result, error, data, pcs = line.split("\t")
    found = set()
    for pc in pcs.split():
        location = session.symbolize(int(pc, 16))
        if isinstance(location, Location):
            found |= _functions_at(session, location)
    return NamedCall(
        name,
        int(result),
        errno.errorcode[int(error)] if int(error) else "",
        bytes.fromhex(data),
        frozenset(found),
    )


def _functions_at(session: Session, location: Location) -> set[str]:
    source = session.source
    assert source is not None
    spans = _functions(source.packages, location.file)
    lines = location.block.lines
    return {
        f"{location.file}:{name}"
        for name, span in spans.items()
        if any(line in span for line in lines)
    }


@functools.cache
def _functions(packages: tuple[str, ...], file: str) -> dict[str, range]:
    """Return the lines of the bodies of a file's functions."""
    paths = {name: path for path, name in find_packages(packages).names.items()}
    return dict(_spans(ast.parse(Path(paths[file]).read_bytes()), ""))


def _spans(node: ast.AST, prefix: str) -> Iterator[tuple[str, range]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _spans(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}{child.name}"
            # The line of "def" runs when the module is imported.
            yield name, range(child.body[0].lineno, (child.end_lineno or 0) + 1)
            yield from _spans(child, f"{name}.")
