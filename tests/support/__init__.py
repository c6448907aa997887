# SPDX-License-Identifier: Apache-2.0
"""Runs of ``kcov-bridge run`` as a process of its own, and what they may leave: nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "bridge"]

MARK = "KCOV_BRIDGE_TEST_RUN"
"""An environment variable by which everything that a run started is found again."""

_SECONDS = 30.0
"""How long the system may take to end and close what died; a loaded machine is slow."""


def sources() -> list[Path]:
    """The files of the project: what git tracks, or all of an unpacked archive's."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        found = [ROOT / name for name in listed.split("\0") if name]
    else:
        found = [
            path
            for path in ROOT.rglob("*")
            if not any(
                part in {"build", "__pycache__"} or (part.startswith(".") and part != ".ci")
                for part in path.relative_to(ROOT).parts[:-1]
            )
        ]
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def without_plugins(directory: Path) -> Path:
    """A QEMU that was built without plugins: the real one, but for its answer to -plugin.

    ``qemu_plugin_opt_parse`` in QEMU's ``include/qemu/plugin.h`` has the words.
    """
    real = shutil.which("qemu-system-x86_64")
    program = directory / "qemu-without-plugins"
    program.write_text(
        '#!/bin/sh\nfor each; do [ "$each" != -plugin ] || {\n'
        '  echo "qemu-system-x86_64: plugin interface not enabled in this build" >&2; exit 1; }\n'
        f'done\nexec {real} "$@"\n'
    )
    program.chmod(0o755)
    return program


class Program(subprocess.Popen[str]):
    """A program that does not outlive a test that fails."""

    def line(self) -> str:
        """Return the next line of its standard output, which is a pipe."""
        assert self.stdout is not None
        return self.stdout.readline()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, error, trace)


def start(
    out: Path,
    *arguments: str,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    stdin: IO[bytes] | int = subprocess.DEVNULL,
    subcommand: str = "run",
) -> Program:
    """Start a run into ``out``; ``env`` is added to the environment."""
    return Program(
        [*COMMAND, subcommand, "--out", str(out), *arguments],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {}), MARK: str(out)},
        start_new_session=True,
    )


def run(
    out: Path, *arguments: str, cwd: Path = ROOT, stdin: IO[bytes] | int = subprocess.DEVNULL
) -> subprocess.CompletedProcess[str]:
    """A whole run; asserts that it leaves nothing."""
    with nothing_left(out), start(out, *arguments, cwd=cwd, stdin=stdin) as process:
        try:
            stdout, stderr = process.communicate(timeout=600)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def started_by(out: Path) -> dict[int, str]:
    """The live processes that the run into ``out`` started, itself too, and their names."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{MARK}={out}\0".encode() in (
                (entry / "environ").read_bytes() + b"\0"
            ):
                found[int(entry.name)] = (entry / "comm").read_text().strip()
        except OSError:
            continue
    return found


def qemu_of(out: Path) -> int:
    """The process of a run's QEMU."""
    (qemu,) = [pid for pid, name in started_by(out).items() if name.startswith("qemu")]
    return qemu


def wait_until_gone(out: Path) -> None:
    """Assert that the processes of a run end soon."""
    end = time.monotonic() + _SECONDS
    while (left := started_by(out)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


@contextmanager
def nothing_left(out: Path) -> Iterator[None]:
    """No process and no temporary file is left behind by what runs inside."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setenv("TMPDIR", directory)
        yield
        wait_until_gone(out)
        assert not list(Path(directory).iterdir())
    assert not [path for path in out.glob(".*") if path.name != ".coverage"]


@dataclass(frozen=True)
class Held:
    """Sockets and anonymous memory, by their inodes: they can outlive who made them."""

    sockets: set[int] = field(default_factory=set)
    memory: set[int] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.sockets or self.memory)


def held_by(out: Path) -> Held:
    """What the processes of a run hold now."""
    held = Held()
    for pid in started_by(out):
        with suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                _note(link, held)
    return held


def _note(link: Path, held: Held) -> None:
    with suppress(OSError):
        name = str(link.readlink())
        if match := re.fullmatch(r"socket:\[(\d+)\]", name):
            held.sockets.add(int(match.group(1)))
        elif name.startswith("/memfd:"):
            held.memory.add(link.stat().st_ino)


def still_there(held: Held) -> Held:
    """What of it is still in the system, whoever holds it."""
    sockets: set[int] = set()
    # The columns of the inode: proc(5).
    for table, column in (("unix", 6), ("tcp", 9), ("tcp6", 9), ("udp", 9), ("udp6", 9)):
        for line in Path(f"/proc/net/{table}").read_text(errors="replace").splitlines()[1:]:
            sockets.add(int(line.split()[column]))
    found = Held()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with suppress(OSError):
            for link in (process / "fd").iterdir():
                _note(link, found)
        with suppress(OSError):
            for line in (process / "maps").read_text(errors="replace").splitlines():
                words = line.split(maxsplit=5)
                if words[5:] and words[5].startswith("/memfd:"):
                    found.memory.add(int(words[4]))
    return Held(held.sockets & sockets, held.memory & found.memory)
