# SPDX-License-Identifier: Apache-2.0
"""Small C programs, compiled for this machine on first use and kept in the cache."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bridge.errors import InfrastructureError, MissingDependencyError
from bridge.util.cache import cache_directory, cache_errors
from bridge.util.files import atomic_output

__all__ = ["COMPILER_REMEDY", "CProgram", "run_tool"]

COMPILER_REMEDY = "install gcc and libc6-dev"

_SAID = 4000
"""How much of what a tool said an error shows."""


def run_tool(command: Sequence[str], failure: str, hint: str = "") -> None:
    """Run a compiler, assembler or the like, which says nothing unless it fails.

    Args:
        failure: what the error says.

    Raises:
        InfrastructureError: it ends with another status than 0; has the end of what it said.
    """
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise InfrastructureError(failure, evidence=done.stderr[-_SAID:], hint=hint)


@dataclass(frozen=True)
class CProgram:
    """A C program of one source file.

    Attributes:
        name: its name in error messages, with an article.
        source: the file to compile.
        flags: the compiler's flags, without ``-o``.
        includes: other files that the source includes.
        folder: the folder of the cache for the compiled program.
        suffix: the end of the compiled file's name.
    """

    name: str
    source: Path
    flags: tuple[str, ...]
    folder: str
    includes: tuple[Path, ...] = ()
    suffix: str = ""

    def build(self, spare: Path | None = None) -> Path:
        """Return the compiled program, from the cache if source, flags and compiler are the same.

        Args:
            spare: a directory to compile into instead of the cache, if it is not in the cache.

        Raises:
            MissingDependencyError: there is no C compiler.
            InfrastructureError: it does not compile.
            CacheError: it is not in the cache, and the cache cannot be written.
        """
        file = self._file_name()
        cached = cache_directory() / self.folder / file
        if cached.is_file():
            return cached
        if spare is not None:
            self.compile(spare / file)
            return spare / file
        with cache_errors(self.name):
            cached.parent.mkdir(parents=True, exist_ok=True)
            self._compile(cached)
        return cached

    def compile(self, output: Path, *flags: str) -> None:
        """Compile it to ``output``, with additional flags. A failure leaves no file.

        Raises:
            MissingDependencyError: there is no C compiler.
            InfrastructureError: it does not compile, or ``output`` cannot be written.
        """
        try:
            self._compile(output, *flags)
        except OSError as error:
            raise InfrastructureError(f"{self.name} cannot be compiled: {error}") from error

    def _compile(self, output: Path, *flags: str) -> None:
        compiler = self._compiler()
        with atomic_output(output) as part:
            command = [compiler, *self.flags, *flags, "-o", str(part), str(self.source)]
            run_tool(command, f"{self.name} does not compile", COMPILER_REMEDY)

    def _file_name(self) -> str:
        version = subprocess.run(
            [self._compiler(), "--version"], capture_output=True, check=False
        ).stdout
        digest = hashlib.sha256(version + "\0".join(self.flags).encode())
        for file in (self.source, *self.includes):
            digest.update(file.read_bytes())
        return f"{self.source.stem}-{digest.hexdigest()[:12]}{self.suffix}"

    def _compiler(self) -> str:
        compiler = shutil.which("cc")
        if compiler is None:
            raise MissingDependencyError(
                f"{self.name} is a C program, and this machine has no C compiler",
                hint=COMPILER_REMEDY,
            )
        return compiler
