# SPDX-License-Identifier: Apache-2.0
"""Records comparisons of Python code, as a compiler does with -fsanitize-coverage=trace-cmp.

Neither a tracer nor ``sys.monitoring`` sees operands, so the syntax tree of a module is changed
when it is imported, before it is compiled:

=======================  ===========================================================
``x == 5``               ``observe(x, (5,), site) == 5``
``5 < x < y``            ``5 < observe(x, (5,), site) < y``
``0 <= x < 9``           ``0 <= within(x, 0, le, 9, site) < 9``
``x in (1, 2)``          ``observe(x, (1, 2), site) in (1, 2)``
``match x: case 1: …``   ``match observe(x, (1,), site): case 1: …``
``x < y``                ``lt(*pair(x, y, site))``
=======================  ===========================================================

The helpers (:data:`bridge.sources.python.recorder.HELPERS`, under longer names) return what they
are given; ``lt`` is the built-in ``operator.lt``. So each operand is evaluated once and in its
place, the operator is applied once to the same objects, tracebacks get no new frame, and await,
yield and ``:=`` stay in their function. Not recorded: comparisons in a chain without a literal;
operators other than ``== != < <= > >=``; annotations.

New code has the line of the comparison, which has code anyway, so the lines and their coverage stay
the same.
"""

from __future__ import annotations

import ast
import builtins
import importlib.machinery
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any, Final

from bridge.sources.python.recorder import HELPERS, number_of, site_at

__all__ = ["compile_instrumented", "instrumenting"]

_log = logging.getLogger(__name__)

_OPERATORS: Final[dict[type[ast.cmpop], str]] = {
    ast.Eq: "eq",
    ast.NotEq: "ne",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
}

# Literals, and expressions that are never a number or bytes.
_OTHER_VALUES: Final = (
    *(ast.Constant, ast.JoinedStr, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.Lambda),
    *(ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp),
)

# Fields that may be kept as text, or are never evaluated.
_ANNOTATIONS: Final = frozenset({"annotation", "returns"})

# Fields that hold a condition.
_CONDITIONS: Final = frozenset({"test", "ifs", "guard"})

_LONG_NAME: Final = "__kcov_bridge_{}__"
"""Name of a helper in :data:`bridge.sources.python.recorder.HELPERS`."""


@contextmanager
def instrumenting(packages: Sequence[str]) -> Iterator[None]:
    """While inside, instrument modules of the packages and below when they are imported.

    Modules that were imported before stay as they are. Instrumented ones stay instrumented, and the
    helpers stay in ``builtins`` for them. Their compiled code is neither read from nor written to
    ``__pycache__``.
    """
    for name, helper in HELPERS.items():
        setattr(builtins, name, helper)
    finder = _Finder(packages)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        # The target may have put another list there.
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)


def compile_instrumented(source: str | bytes, path: str, optimize: int = -1) -> CodeType:
    """Compile a module with its comparisons recorded; without, if that is not possible.

    Raises what ``compile()`` raises for the source.
    """
    try:
        tree: Any = compile(source, path, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
        _instrument(tree, os.path.realpath(path))
        code: CodeType = compile(tree, path, "exec", dont_inherit=True, optimize=optimize)
    except Exception as error:
        code = compile(source, path, "exec", dont_inherit=True, optimize=optimize)
        _log.warning("%s: its comparisons are not recorded: %r", path, error)
    return code


class _Finder:
    """Finds what later finders find, and gives it a loader that instruments."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = tuple(packages)
        self._below = tuple(package + "." for package in packages)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self._packages and not name.startswith(self._below):
            return None
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            if find is None or isinstance(finder, _Finder):
                continue
            spec: importlib.machinery.ModuleSpec | None = find(name, path, target)
            if spec is not None:
                self._instrument(spec)
                return spec
        return None

    @staticmethod
    def _instrument(spec: importlib.machinery.ModuleSpec) -> None:
        loader = spec.loader
        if type(loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(loader.name, loader.path)
        elif loader is not None:
            _log.warning(
                "%s: its comparisons are not recorded: it is loaded by %s, not from a source file",
                spec.name,
                type(loader).__name__,
            )


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a source file with instrumentation, each time."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return compile_instrumented(self.get_data(path), path)


@dataclass(frozen=True, slots=True)
class _Slot:
    """The field of a node that holds a comparison or a match statement."""

    holder: ast.AST
    field: str
    index: int
    """In the field if that is a list; else -1."""
    jump: bool
    """Whether only the value's truth counts, and it begins below its statement's first line."""

    def get(self) -> Any:
        value = getattr(self.holder, self.field)
        return value if self.index < 0 else value[self.index]

    def put(self, node: ast.expr) -> None:
        if self.index < 0:
            setattr(self.holder, self.field, node)
        else:
            getattr(self.holder, self.field)[self.index] = node


def _instrument(tree: ast.Module, path: str) -> None:
    """Change a tree in place."""
    # From the inside out, so that operands are final before the expression around them.
    for slot in reversed(list(_slots(tree))):
        node = slot.get()
        if isinstance(node, ast.Match):
            _instrument_match(node, path)
            continue
        changed = _instrumented(node, path)
        if slot.jump and changed is not node:
            # Python 3.11 gives a jump the line of its statement, unless it depends on a
            # comparison; then it has that one's line.
            truth = _call(node, "truth", [changed])
            changed = ast.Compare(truth, [ast.Is()], [ast.copy_location(ast.Constant(True), node)])
            ast.copy_location(changed, node)
        slot.put(changed)


def _slots(tree: ast.AST) -> Iterator[_Slot]:
    """Iterate over comparisons and match statements, outer ones before inner ones.

    Without recursion, because chains of ``elif`` nest deeply.
    """
    # Nodes, the line of their statement, and whether only their truth counts.
    todo: list[tuple[ast.AST, int, bool]] = [(tree, 0, False)]
    while todo:
        holder, line, true = todo.pop()
        if isinstance(holder, ast.stmt):
            line = holder.lineno
        for field, value in ast.iter_fields(holder):
            if field in _ANNOTATIONS:
                continue
            for index, node in enumerate(value) if isinstance(value, list) else ((-1, value),):
                if not isinstance(node, ast.AST):
                    continue
                jump = (
                    field in _CONDITIONS
                    or (isinstance(holder, ast.UnaryOp) and isinstance(holder.op, ast.Not))
                    or (true and isinstance(holder, ast.BoolOp | ast.IfExp))
                )
                todo.append((node, line, jump))
                if isinstance(node, ast.Compare):
                    yield _Slot(holder, field, index, jump and node.lineno != line)
                elif isinstance(node, ast.Match):
                    yield _Slot(holder, field, index, False)


def _instrumented(node: ast.Compare, path: str) -> ast.expr:
    """A comparison that shows its operands."""
    if len(node.ops) == 1:
        left, op, right = node.left, node.ops[0], node.comparators[0]
        if isinstance(op, ast.In | ast.NotIn):
            if isinstance(right, ast.Tuple | ast.List | ast.Set):
                node.left = _observing(node, left, [_literal(each) for each in right.elts], path)
            return node
        if type(op) in _OPERATORS and not any(map(_is_other, (left, right))):
            pair = _call(node, "pair", [left, right, _site(node, path)])
            return _call(node, _OPERATORS[type(op)], [ast.Starred(pair, ast.Load())])
    # One operand is a literal, or there are more than two.
    operands = [node.left, *node.comparators]
    for at, operand in enumerate(operands):
        if _is_other(operand):
            continue
        # The literals that it is compared with: one before it, one after it.
        first = second = None
        if at and type(node.ops[at - 1]) in _OPERATORS:
            first = _literal(operands[at - 1])
        if at < len(node.ops) and type(node.ops[at]) in _OPERATORS:
            second = _literal(operands[at + 1])
        if first is not None and second is not None:
            holds = ast.Name(_LONG_NAME.format(_OPERATORS[type(node.ops[at - 1])]), ast.Load())
            constants = (ast.Constant(first), holds, ast.Constant(second))
            changed: ast.expr = _call(node, "within", [operand, *constants, _site(node, path)])
        elif first is not None:
            changed = _observing(node, operand, [first], path)
        elif second is not None and not at:
            changed = _observing(node, operand, [second], path)
        else:
            continue
        if at:
            node.comparators[at - 1] = changed
        else:
            node.left = changed
    return node


def _instrument_match(node: ast.Match, path: str) -> None:
    """A match statement whose subject is shown with all literals, as a switch's is in Linux."""
    patterns: list[ast.pattern] = [case.pattern for case in reversed(node.cases)]
    literals = []
    while patterns:
        match patterns.pop():
            case ast.MatchValue(value=value):
                literals.append(_literal(value))
            case ast.MatchOr(patterns=below):
                patterns += reversed(below)
            case ast.MatchAs(pattern=ast.pattern() as pattern):
                patterns.append(pattern)
    node.subject = _observing(node.subject, node.subject, literals, path)


def _observing(
    place: ast.expr, operand: ast.expr, literals: Sequence[int | bytes | None], path: str
) -> ast.expr:
    """Return the operand, recorded with the literals among ``literals`` if there are any."""
    constants = tuple(literal for literal in literals if literal is not None)
    if not constants or _is_other(operand):
        return operand
    literal: Any = constants
    return _call(place, "observe", [operand, ast.Constant(literal), _site(place, path)])


def _call(place: ast.expr, name: str, arguments: list[ast.expr]) -> ast.Call:
    """Return a call of a helper, with the position of ``place`` for all new nodes."""
    call = ast.Call(ast.Name(_LONG_NAME.format(name), ast.Load()), arguments, [])
    for node in (call, call.func, *arguments):
        if not hasattr(node, "lineno"):
            ast.copy_location(node, place)
    return call


def _site(node: ast.expr, path: str) -> ast.Constant:
    return ast.Constant(site_at(path, node.lineno))


def _is_other(node: ast.expr) -> bool:
    """Return whether a node is a literal, or cannot be an operand of a record."""
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    return isinstance(node, _OTHER_VALUES)


def _literal(node: ast.expr) -> int | bytes | None:
    """Return the value of a literal if a record can hold it, else None."""
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    if isinstance(node, ast.UnaryOp) and negative:
        node = node.operand
    if not isinstance(node, ast.Constant):
        return None
    value = node.value
    if type(value) is int:
        value = -value if negative else value
        return value if number_of(value) is not None else None
    if type(value) is bytes and not negative and number_of(value) is not None:
        return value
    return None
