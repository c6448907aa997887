# SPDX-License-Identifier: Apache-2.0
"""What hints and pages tell people to type: each flag, variable, command and target exists."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import pytest

from bridge.cli.main import make_parser
from bridge.config import ENVIRONMENT_PREFIX, known_variables
from bridge.pytest_plugin import plugin
from tests.support import ROOT


@dataclass(frozen=True)
class Hint:
    """One hint of the source; ``…`` stands for what is known when it is shown."""

    where: str
    text: str


_TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "bridge").rglob("*.py"))
}
CONSTANTS = {
    statement.targets[0].id: statement.value.value
    for tree in _TREES.values()
    for statement in tree.body
    if isinstance(statement, ast.Assign)
    and isinstance(statement.targets[0], ast.Name)
    and isinstance(statement.value, ast.Constant)
    and isinstance(statement.value.value, str)
}
"""Texts that have a name in some module."""

_NAMES = re.compile(r"_?(?:[A-Z_]*_)?(?:hint|remedy|HINT|REMEDY|REINSTALL)")


def _text(node: ast.AST) -> str:
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) or "…" for part in parts)
        case ast.Name(id=name) | ast.FormattedValue(value=ast.Name(id=name)):
            return CONSTANTS.get(name, "")
        case ast.FormattedValue() | ast.Attribute():
            return ""
        case _:
            return " ".join(filter(None, map(_text, ast.iter_child_nodes(node))))


def hints() -> Iterator[Hint]:
    """All hints: arguments and variables of that name, and the last argument of a check."""
    for path, tree in _TREES.items():
        for node in ast.walk(tree):
            values: list[ast.expr] = []
            match node:
                case ast.keyword(arg="hint" | "remedy", value=value):
                    values = [value]
                case (
                    ast.Assign(targets=[ast.Name(id=name)], value=value)
                    | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
                ) if _NAMES.fullmatch(name):
                    values = [value]
                case ast.Call(func=ast.Name(id="Check"), args=[_, _, _, _, value]):
                    values = [value]
            for value in values:
                if text := _text(value):
                    yield Hint(f"{path}:{value.lineno}", text)


HINTS = list(hints())


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _flags(parser: argparse.ArgumentParser) -> set[str]:
    """The flags of a command and of the commands below it."""
    found = set(parser._option_string_actions)
    return found.union(*map(_flags, _subparsers(parser).values()))


class _Options:
    """Stands for pytest's parser: keeps the names of options."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def getgroup(self, *_: object) -> _Options:
        return self

    def addoption(self, *names: str, **_: object) -> None:
        self.names.update(names)

    def addini(self, *_: object, **__: object) -> None:
        pass


def _pytest_flags() -> set[str]:
    """The flags that the plugin gives pytest."""
    options = _Options()
    plugin.pytest_addoption(cast(pytest.Parser, options))
    return options.names


PARSER = make_parser(complete=True)
COMMANDS = _subparsers(PARSER)
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))

_FOREIGN = re.compile(r"(?:sudo |\b)(?:apt-get|pip|mmdebstrap|dask|qemu-\w+) [^;,)`]*")
"""Commands of others, whose flags are theirs to define."""

_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_COMMAND = re.compile(r"(?<![\w/.-])kcov-bridge ([a-z]+)(?: ([a-z]+))?")
_MAKE = re.compile(r"(?:^|`|: )make ([a-z-]+)(?=$|`)")
_VARIABLE = re.compile(rf"{ENVIRONMENT_PREFIX}[A-Z_]+")
_REFERENCE = re.compile(f"{_FLAG.pattern}|{_COMMAND.pattern}|{_MAKE.pattern}|{_VARIABLE.pattern}")

_IMPERATIVE = re.compile(
    r"(?:^|, |: |; | or )"
    r"(?:choose|switch|allow|ask for|leave|take a|use the|give the|set(?! PYTHON))\b"
)
"""Where a hint speaks of something that is chosen by a flag, a setting or a command."""


def test_hints_are_found_in_the_source() -> None:
    texts = [hint.text for hint in HINTS]
    assert len(texts) > 60
    assert any("--comparisons" in text for text in texts), "keywords"
    assert any("apt-get" in text for text in texts), "calls inside"
    assert any("or leave the guest kernel out" in text for text in texts), "constants"


@pytest.mark.parametrize("hint", HINTS, ids=lambda hint: hint.where)
def test_hint_names_only_what_exists(hint: Hint) -> None:
    text = _FOREIGN.sub("", hint.text)
    for flag in _FLAG.findall(text):
        assert flag in _flags(PARSER) | _pytest_flags(), f"{hint}: there is no flag {flag}"
    for variable in _VARIABLE.findall(text):
        assert variable in known_variables(), f"{hint}: there is no variable {variable}"
    for command, action in _COMMAND.findall(text):
        assert command in COMMANDS, f"{hint}: there is no command {command}"
        if (actions := _subparsers(COMMANDS[command])) and (action or command != "fuzz"):
            assert action in actions, f"{hint}: there is no action {action}"
    for target in _MAKE.findall(text):
        assert target in TARGETS, f"{hint}: there is no target {target}"
    for page in re.findall(r"docs/[\w-]+\.md", text):
        assert (ROOT / page).is_file(), f"{hint}: there is no page {page}"


@pytest.mark.parametrize(
    "hint", [hint for hint in HINTS if _IMPERATIVE.search(hint.text)], ids=lambda hint: hint.where
)
def test_hint_that_asks_for_another_setting_names_it(hint: Hint) -> None:
    assert _REFERENCE.search(hint.text), f"{hint}: no flag, variable or command to do it by"


@pytest.mark.parametrize(
    "text",
    ["choose another, or none to have a free one chosen", "allow more time", "leave it away"],
)
def test_hint_without_a_way_to_follow_it_is_noticed(text: str) -> None:
    assert _IMPERATIVE.search(text)
    assert not _REFERENCE.search(text)


PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md"))
)


def _typed(text: str) -> Iterator[str]:
    """The command lines of a page: in fenced blocks, and between backticks."""
    for block in re.findall(r"^```(?:sh|console)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.removeprefix("$ ").strip()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`]+)`", prose):
        yield " ".join(code.split())


@pytest.mark.parametrize("page", PAGES)
def test_page_names_only_what_exists(page: str) -> None:
    wrong = []
    for line in _typed((ROOT / page).read_text(encoding="utf-8")):
        try:
            words = shlex.split(line.replace("…", "x"), comments=True)
        except ValueError:
            continue  # C or Python between backticks
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words[:1] == ["make"] and len(words) > 1 and re.fullmatch("[a-z-]+", words[1]):
            wrong += [f"make {words[1]}"] if words[1] not in TARGETS else []
        if words[:1] != ["kcov-bridge"] or len(words) < 2 or not words[1].islower():
            continue
        if words[1] not in COMMANDS:
            wrong.append(line)
            continue
        own = words[2 : words.index("--")] if "--" in words else words[2:]
        known = _flags(COMMANDS[words[1]])
        wrong += [
            f"{line}: {word}"
            for word in own
            if word.startswith("--") and word.partition("=")[0] not in known
        ]
    assert wrong == []
