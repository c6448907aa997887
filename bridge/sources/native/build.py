# SPDX-License-Identifier: Apache-2.0
"""The run time and the reader: compiled for this machine on first use, then kept in the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from bridge.errors import InfrastructureError, MissingDependencyError
from bridge.util.cache import cache_errors, cache_folder
from bridge.util.compile import COMPILER_REMEDY, CProgram, run_tool

__all__ = ["READER", "RUNTIME", "RUNTIME_ABI", "Runtime", "build_runtime"]

_HERE = Path(__file__).parent / "runtime"
_FOLDER = "native"
_HEADER = _HERE / "kcov_bridge.h"
_LAYOUT = _HERE / "layout.h"
_FLAGS = (
    *("-O2", "-g", "-std=gnu11", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Werror"),
)
RUNTIME = CProgram(
    "the run time for native code",
    _HERE / "runtime.c",
    (*_FLAGS, "-shared", "-Wl,-soname,libkcovbridge.so"),
    _FOLDER,
    (_HEADER, _LAYOUT),
    ".so",
)
_OBJECT = CProgram(RUNTIME.name, RUNTIME.source, (*_FLAGS, "-c"), _FOLDER, RUNTIME.includes, ".o")
RUNTIME_ABI: Final = 1
"""Version of what a program calls in the shared object: one that was linked with it runs with any
other of the same version."""
READER = CProgram(
    "the reader of native coverage",
    _HERE / "reader.c",
    (*_FLAGS, "-shared"),
    _FOLDER,
    (_LAYOUT,),
    ".so",
)


@dataclass(frozen=True)
class Runtime:
    """A directory with ``libkcovbridge.a``, ``libkcovbridge.so`` and ``kcov_bridge.h``."""

    directory: Path

    @property
    def archive(self) -> Path:
        """The library to link an executable with."""
        return self.directory / "libkcovbridge.a"

    @property
    def shared(self) -> Path:
        """The library to link shared objects with, or to preload."""
        return self.directory / "libkcovbridge.so"

    @property
    def header(self) -> Path:
        """Declares what a program may call."""
        return self.directory / "kcov_bridge.h"

    @property
    def link_flags(self) -> tuple[str, ...]:
        """Flags for the linking of an executable by gcc or clang.

        The archive as a whole: clang links weak callbacks of its own before it, so nothing would
        ask for those in the archive.
        """
        return ("-Wl,--whole-archive", str(self.archive), "-Wl,--no-whole-archive", "-pthread")

    @property
    def shared_flags(self) -> tuple[str, ...]:
        """The same with the shared object, for all parts of a program that has several."""
        return (str(self.shared), f"-Wl,-rpath,{self.directory}")

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables with which a program gets this shared object, wherever it was linked.

        Raises:
            InfrastructureError: the loader would split the path of the cache.
        """
        # ld.so(8): the directories are separated by either.
        if any(each in str(self.directory) for each in ":;"):
            raise InfrastructureError(
                f"a covered program cannot be given what is in {self.directory}: the path has a "
                "colon or a semicolon",
                hint="name another cache: KCOV_BRIDGE_CACHE=DIR",
            )
        given = os.environ.get("LD_LIBRARY_PATH")
        return {"LD_LIBRARY_PATH": f"{self.directory}{f':{given}' if given else ''}"}

    @property
    def rust_flags(self) -> tuple[str, ...]:
        """Flags for rustc, which instrument all crates but the standard library, and link."""
        return (
            "-Cpasses=sancov-module",
            *(
                f"-Cllvm-args=-sanitizer-coverage-{each}"
                for each in ("level=3", "trace-pc-guard", "pc-table")
            ),
            *(f"-Clink-arg={each}" for each in self.link_flags),
        )


def build_runtime() -> Runtime:
    """Return the run time, from the cache if it is there.

    Raises:
        MissingDependencyError: there is no C compiler, or no ``ar``.
        InfrastructureError: it does not compile.
        CacheError: it is not in the cache, and the cache cannot be written.
    """
    shared, compiled = RUNTIME.build(), _OBJECT.build()
    digest = hashlib.sha256(f"{shared.name} {compiled.name}".encode()).hexdigest()[:12]
    runtime = Runtime(shared.with_name(f"kcov-bridge-{digest}"))
    if runtime.directory.is_dir():
        return runtime
    archiver = shutil.which("ar")
    if archiver is None:
        raise MissingDependencyError(
            "the run time for native code is an archive, and this machine has no ar",
            hint=COMPILER_REMEDY,
        )
    folder = cache_folder(_FOLDER)
    with (
        cache_errors("the run time for native code"),
        TemporaryDirectory(prefix=".part-", dir=folder) as scratch,
    ):
        made = Runtime(Path(scratch, "made"))
        made.directory.mkdir()
        shutil.copy(shared, made.shared)
        shutil.copy(_HEADER, made.header)
        run_tool(
            [archiver, "rcsD", str(made.archive), str(compiled)],
            "the run time for native code cannot be archived",
            COMPILER_REMEDY,
        )
        try:
            made.directory.rename(runtime.directory)
        except OSError:
            # Another process was first.
            if not runtime.directory.is_dir():
                raise
    return runtime
