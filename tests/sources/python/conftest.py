# SPDX-License-Identifier: Apache-2.0
"""Packages to be measured, and sources that measure them."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from bridge.sources.python.source import PythonSource
from tests.sources.python.support import MakePackage, MakeSource, Measure, TargetThread

_numbers = count()


@pytest.fixture
def make_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePackage]:
    """Writes a package of a new name with the given files, and makes it importable."""
    made = []
    root = tmp_path / "packages"
    root.mkdir()
    monkeypatch.syspath_prepend(root)
    # For the programs that are started.
    monkeypatch.setenv("PYTHONPATH", str(root))

    def make(files: dict[str, str | bytes] | None = None, **modules: str) -> str:
        name = f"covered{next(_numbers)}"
        made.append(name)
        texts = {"__init__.py": "", **(files or {})}
        texts.update({f"{module}.py": textwrap.dedent(text) for module, text in modules.items()})
        for file, text in texts.items():
            path = root / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode() if isinstance(text, str) else text)
        importlib.invalidate_caches()
        return name

    yield make
    for module in list(sys.modules):
        if module.partition(".")[0] in made:
            del sys.modules[module]


@pytest.fixture
def make_source(tmp_path: Path) -> Iterator[MakeSource]:
    """Makes sources that are stopped at the end of the test, started or not."""
    made: list[PythonSource] = []

    def make(*packages: str, data_file: Path | None = None) -> PythonSource:
        source = PythonSource(packages, data_file=data_file or tmp_path / ".coverage")
        made.append(source)
        return source

    yield make
    for source in reversed(made):
        source.stop()


@pytest.fixture
def on_target() -> Iterator[TargetThread]:
    """Calls functions on a thread that is not the test's."""
    thread = TargetThread()
    yield thread
    thread.end()


@pytest.fixture
def measure(make_package: MakePackage, make_source: MakeSource, on_target: TargetThread) -> Measure:
    """Writes a package and imports its module ``wanted`` on the target's thread, which is measured;
    what that covers is consumed."""

    def start(wanted: str, **modules: str) -> tuple[Any, PythonSource]:
        name = make_package(**modules)
        source = make_source(name)
        on_target(source.start)
        module = on_target(importlib.import_module, f"{name}.{wanted}")
        source.consume()
        return module, source

    return start
