# SPDX-License-Identifier: Apache-2.0
"""The pages: links lead somewhere, messages are real, the API reference builds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bridge
from tests.support import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md"))
)


def _anchor(heading: str) -> str:
    """The anchor that is made of a heading: lower case, blanks as dashes, no punctuation."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_page_links_lead_to_what_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists():
            wrong.append(link)
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            wrong += [] if anchor in map(_anchor, headings) else [link]
    assert wrong == []


def _texts(tree: ast.AST) -> Iterator[str]:
    """The texts of a module, ``…`` standing for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
            )


MESSAGES = re.findall(
    r"^### `(.*)`$", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
)


def test_troubleshooting_has_ten_messages_at_least() -> None:
    assert len(MESSAGES) >= 10


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """All texts of the package."""
    files = sorted((ROOT / "bridge").rglob("*.py"))
    return [text for path in files for text in _texts(ast.parse(path.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("message", MESSAGES)
def test_troubleshooting_message_is_one_of_the_source(message: str, texts: list[str]) -> None:
    # A name that is filled in may have been written out, so … stands for anything on both sides.
    parts = [part for part in message.split("…") if part.strip()]
    pattern = re.compile(".*".join(map(re.escape, parts)))
    blocks = message.replace("(blocks.tsv)", "(…)")
    assert any(pattern.search(text) or blocks in text for text in texts)


def test_glossary_is_in_order() -> None:
    page = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^\| ([^|]+?) \|", page, re.MULTILINE)[1:]
    terms = [term for term in terms if not term.startswith("-")]
    assert len(terms) > 30
    assert terms == sorted(terms, key=str.lower)


def test_api_reference_has_every_public_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", ROOT / "docs" / "api.py", tmp_path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    page = (tmp_path / "bridge.html").read_text(encoding="utf-8")
    missing = [name for name in bridge.__all__ if f'id="{name}"' not in page]
    assert missing == []
    assert 'id="Session.kcov"' in page
    assert ":class:`" not in page
    assert (tmp_path / "bridge" / "targets.html").is_file()
