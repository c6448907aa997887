# SPDX-License-Identifier: Apache-2.0
"""From Python source text to basic blocks.

A block is a maximal straight-line run of statements of one suite. The rules:

* the header of ``if``, ``match``, ``with``, ``try``, ``def`` and ``class`` (decorators and defaults
  included) is executed as part of the run it stands in, and ends it;
* a loop header (``for``, ``while``) is a join point and a block of its own, and so is each
  ``except`` and each ``case`` header;
* each suite (body, ``else``, ``finally``, handler, case) begins a new block, and so does the
  statement after a compound statement;
* ``return``, ``raise``, ``break`` and ``continue`` end a block;
* lambdas and comprehensions belong to their statement;
* what compiles to nothing (a function's docstring, ``global``, a bare annotation of a local
  variable) joins a neighbouring block if there is one.

A line tracer cannot distinguish statements on the same line, so blocks that share a line are
merged. Every line belongs to at most one block: the blocks of a file are disjoint ranges of whole
lines, in order.

Blocks come from the syntax tree, not from bytecode, so they are the same on every Python that can
parse the file.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bridge.errors import SourceError

__all__ = ["Block", "decode_source", "find_blocks"]

_SUITES = frozenset({"body", "orelse", "finalbody", "handlers", "cases"})
_CASE = re.compile(rb"\s*case\b")
_ELSE = re.compile(rb"\s*(?:else|finally)\b")
_COMMENT = re.compile(rb"[ \t\f]*(?:#.*)?\Z")

_Position = tuple[int, int]
"""Line and column, both 1-based."""


@dataclass(frozen=True, slots=True)
class Block:
    """A basic block: from its first character up to, not including, the end position.

    Lines and columns count from 1; columns are bytes of the line in UTF-8, as in Go's coverage
    blocks.
    """

    start_line: int
    start_col: int
    end_line: int
    end_col: int

    @property
    def lines(self) -> range:
        """All lines of the block; blocks of a file share no line."""
        return range(self.start_line, self.end_line + 1)

    def __str__(self) -> str:
        return f"{self.start_line}.{self.start_col},{self.end_line}.{self.end_col}"


def decode_source(source: bytes) -> str:
    """Decode a source file by its coding cookie and byte order mark; line ends become ``\\n``.

    Raises:
        SourceError: the bytes are not valid in their encoding.
    """
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        text = source.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        raise SourceError("cannot decode a Python source file", evidence=str(error)) from error
    return text.removeprefix("\ufeff")


def find_blocks(source: str | bytes) -> list[Block]:
    """Return the basic blocks of a module's source, in the order of the text.

    Raises:
        SourceError: this Python cannot parse it.
    """
    text = decode_source(source) if isinstance(source, bytes) else source
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        with warnings.catch_warnings():
            # Invalid escapes in somebody else's source are not reported.
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SourceError("cannot parse a Python source file", evidence=str(error)) from error
    lines = text.encode("utf-8", "surrogatepass").split(b"\n")
    return _merge(_Splitter(lines).split(tree))


class _Run:
    """A block under construction; items are added in the order of the text."""

    __slots__ = ("end", "start")

    def __init__(self, start: _Position, end: _Position) -> None:
        self.start = start
        self.end = end


class _Splitter:
    """Walks one tree, suite by suite, without recursion: chains of ``elif`` nest deeply."""

    def __init__(self, lines: Sequence[bytes]) -> None:
        self._lines = lines
        self._runs: list[_Run] = []
        # Pending suites: statements, and whether they are in a function (not a class).
        self._todo: list[tuple[list[ast.stmt], bool]] = []

    def split(self, tree: ast.Module) -> list[_Run]:
        self._suite(tree.body, in_function=False)
        while self._todo:
            suite, in_function = self._todo.pop()
            self._suite(suite, in_function=in_function)
        return self._runs

    def _suite(self, suite: list[ast.stmt], *, in_function: bool) -> None:
        run: _Run | None = None
        waiting: _Run | None = None
        if suite:
            keyword = self._else_before(suite[0])
            if keyword is not None:
                waiting = _Run(keyword, keyword)
        docstring = suite[0] if in_function and suite and _is_docstring(suite[0]) else None
        for statement in suite:
            start, end = self._start(statement), self._end(statement)
            if run is not None and not _joins_a_loop(statement):
                run.end = end
            elif statement is docstring or _is_nothing(statement, in_function):
                waiting = waiting or _Run(start, end)
                waiting.end = end
                continue
            else:
                run = self._open(waiting, start, end)
            waiting = None
            if self._ends_run(statement, in_function):
                run = None
        if waiting is not None:
            self._runs.append(waiting)

    def _open(self, waiting: _Run | None, start: _Position, end: _Position) -> _Run:
        run = _Run(start if waiting is None else waiting.start, end)
        self._runs.append(run)
        return run

    def _ends_run(self, statement: ast.stmt, in_function: bool) -> bool:
        """Queue the suites of a statement; return whether the next statement begins a block."""
        match statement:
            case ast.Return() | ast.Raise() | ast.Break() | ast.Continue():
                return True
            case ast.FunctionDef(body=body) | ast.AsyncFunctionDef(body=body):
                self._todo.append((body, True))
                return True
            case ast.ClassDef(body=body):
                self._todo.append((body, False))
                return True
            case ast.Match(cases=cases):
                for case in cases:
                    self._header(self._case_start(case), case, case.body)
                    self._todo.append((case.body, in_function))
                return True
        compound = False
        for field in ("body", "orelse", "finalbody"):
            suite = getattr(statement, field, None)
            if suite:
                self._todo.append((suite, in_function))
                compound = True
        for handler in getattr(statement, "handlers", ()):
            self._header((handler.lineno, handler.col_offset + 1), handler, handler.body)
            self._todo.append((handler.body, in_function))
        return compound

    def _header(self, start: _Position, node: ast.AST, body: list[ast.stmt]) -> None:
        self._runs.append(_Run(start, self._header_end(start, node, body)))

    def _end(self, statement: ast.stmt) -> _Position:
        """Return where a statement, or the header of a compound one, ends."""
        start = self._start(statement)
        if isinstance(statement, ast.Match):
            first = self._case_start(statement.cases[0])
            return self._end_before(first, max(start[0], statement.subject.end_lineno or 0))
        body = getattr(statement, "body", None)
        if isinstance(body, list) and body:
            return self._header_end(start, statement, body)
        return (statement.end_lineno or start[0], (statement.end_col_offset or 0) + 1)

    def _header_end(self, start: _Position, node: ast.AST, body: list[ast.stmt]) -> _Position:
        last = max((line for line in _header_lines(node)), default=0)
        return self._end_before(self._start(body[0]), max(start[0], last))

    def _end_before(self, following: _Position, least: int) -> _Position:
        """Return the end of the last line of code before ``following``, from line ``least`` on."""
        line = following[0] - 1
        while line > least and _COMMENT.match(self._lines[line - 1]):
            line -= 1
        line = max(line, least)
        if line >= following[0]:
            return following
        return (line, len(self._lines[line - 1].rstrip()) + 1)

    def _case_start(self, case: ast.match_case) -> _Position:
        """``case`` is always the first word of its line; the tree knows only the pattern's."""
        line = case.pattern.lineno
        while line > 1 and not _CASE.match(self._lines[line - 1]):
            line -= 1
        text = self._lines[line - 1]
        return (line, len(text) - len(text.lstrip()) + 1)

    def _else_before(self, first: ast.stmt) -> _Position | None:
        """Return the position of the ``else`` or ``finally`` of a suite, or None."""
        line, column = self._start(first)
        before = self._lines[line - 1][: column - 1]
        if not before.strip():
            line -= 1
            while line > 0 and _COMMENT.match(self._lines[line - 1]):
                line -= 1
        text = self._lines[line - 1] if line > 0 else b""
        indent = text[: len(text) - len(text.lstrip())]
        # The ``else`` of an inner statement may precede an ``elif``; it is indented more.
        if not _ELSE.match(text) or not before.startswith(indent) or before == indent:
            return None
        return (line, len(indent) + 1)

    def _start(self, statement: ast.stmt) -> _Position:
        """Return where a statement begins, at its first decorator if it has one."""
        line = statement.lineno
        decorators = getattr(statement, "decorator_list", None)
        if decorators:
            # The decorator's expression may begin on a line below the ``@``.
            line = decorators[0].lineno
            while line > 1 and not self._lines[line - 1].lstrip().startswith(b"@"):
                line -= 1
        return (line, statement.col_offset + 1)


def _joins_a_loop(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.For | ast.AsyncFor | ast.While)


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _is_nothing(statement: ast.stmt, in_function: bool) -> bool:
    """Return whether a statement compiles to no code."""
    match statement:
        case ast.Global() | ast.Nonlocal():
            return True
        case ast.AnnAssign(value=None, simple=1):
            return in_function
    return False


def _header_lines(node: ast.AST) -> Iterator[int]:
    """Return the last lines of the parts of a header, without its suites."""
    for field, value in ast.iter_fields(node):
        if field in _SUITES:
            continue
        for part in value if isinstance(value, list) else (value,):
            if isinstance(part, ast.AST):
                last = getattr(part, "end_lineno", None)
                if last is not None:
                    yield last
                else:
                    yield from _header_lines(part)


def _merge(runs: list[_Run]) -> list[Block]:
    """Put runs in order and merge those that share a line."""
    runs.sort(key=lambda run: (run.start, run.end))
    merged: list[_Run] = []
    for run in runs:
        if merged and run.start[0] <= merged[-1].end[0]:
            merged[-1].end = max(merged[-1].end, run.end)
        else:
            merged.append(run)
    return [Block(*run.start, *run.end) for run in merged]


if __name__ == "__main__":
    print(*find_blocks(sys.stdin.buffer.read()), sep="\n")
