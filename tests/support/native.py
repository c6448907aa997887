# SPDX-License-Identifier: Apache-2.0
"""Native programs for tests: built with coverage, and run under a source."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

from bridge.sources import PC
from bridge.sources.native.build import build_runtime
from bridge.sources.native.source import NativeSource

__all__ = [
    *("CARGO", "DATA", "GUARDS", "build", "functions", "lines", "needs_cargo", "needs_clang", "run")
]

DATA = Path(__file__).resolve().parents[1] / "data" / "native"
GUARDS = ("-fsanitize-coverage=trace-pc-guard,pc-table",)

needs_clang = pytest.mark.skipif(
    shutil.which("clang") is None, reason="clang is missing: apt-get install clang"
)


def _find_cargo() -> str | None:
    """Return a cargo that runs: rustup leaves one that does not where it has no tool chain."""
    for place in (None, str(Path.home() / ".cargo" / "bin"), "/usr/bin"):
        cargo = shutil.which("cargo", path=place)
        if cargo and not subprocess.run([cargo, "--version"], capture_output=True).returncode:
            return cargo
    return None


CARGO = _find_cargo()

needs_cargo = pytest.mark.skipif(CARGO is None, reason="no cargo runs: apt-get install cargo")


def build(
    output: Path,
    source: Path,
    *flags: str,
    compiler: str = "clang",
    coverage: Sequence[str] = GUARDS,
    linked: Iterable[str] | None = None,
) -> Path:
    """Compile a program with coverage, and link it with the run time.

    Args:
        linked: flags for the linker in place of the run time's own.
    """
    if linked is None:
        linked = build_runtime().link_flags
    if compiler == "clang":
        # Its own run time is a package of its own.
        linked = ("-fno-sanitize-link-runtime", *linked)
    command = [compiler, "-g", "-O1", *coverage, *flags, str(source), *linked, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


def run(
    source: NativeSource, *command: str | Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, covered by a source that was started."""
    return subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **source.environment, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def functions(source: NativeSource, pcs: Iterable[PC]) -> set[str]:
    """Return the names of the functions that PCs lie in, also those that they are inlined into."""
    places = source.places()
    names = set()
    for pc in pcs:
        found = places.table.lookup(pc)
        assert found is not None, hex(pc)
        names |= {frame.function for frame in places.frames(*found)}
    return names


def lines(source: NativeSource, pcs: Iterable[PC]) -> set[int]:
    """Return the lines of the innermost functions that PCs lie in."""
    places = source.places()
    numbers = set()
    for pc in pcs:
        found = places.table.lookup(pc)
        assert found is not None, hex(pc)
        numbers |= {frame.line for frame in places.frames(*found)[:1]}
    return numbers
