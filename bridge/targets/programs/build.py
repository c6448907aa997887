# SPDX-License-Identifier: Apache-2.0
"""Builds the programs of others with coverage: their source is fetched, never kept here.

Layout below ``programs`` in the cache::

    NAME-FINGERPRINT/source         the source, built in place
    NAME-FINGERPRINT/program.json   name, version and size; its time is that of the build
    NAME-FINGERPRINT/build.log      what the build printed
    NAME.log                        the same of the last build that failed

The fingerprint is that of the recipe (:class:`Program`), the compilers and the run time, so after a
change of one of them the program is built again. A directory appears by a rename when it is
complete, and is never changed afterwards. A build holds the program's lock.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from bridge.errors import MissingDependencyError, TargetError
from bridge.sources.native.build import build_runtime
from bridge.targets.program import ProgramTarget
from bridge.util.cache import cache_errors, cache_folder, lock_file, locked
from bridge.util.commands import Commands, Phases, Progress, disk_full, print_progress
from bridge.util.files import atomic_output, remove
from bridge.util.packages import apt_line, found

__all__ = ["BuiltProgram", "BuiltTarget", "Program", "Source", "Step", "built_programs"]

_FORMAT: Final = 1
"""Version of what is made of a recipe; all programs are built again after a change."""
_FOLDER: Final = "programs"
_RECORD: Final = "program.json"
_DIGITS: Final = "[0-9a-f]" * 12
"""A fingerprint, as a pattern of file names."""
_NOT_INHERITED: Final = (
    *("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "OUT", "ARGS", "VENV", "PYTHON"),
    *("CC", "CXX", "CPP", "CFLAGS", "CPPFLAGS", "CXXFLAGS", "LDFLAGS", "LIBS", "CONFIG_SITE"),
    *("RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "GOFLAGS", "DESTDIR"),
)
"""Variables that a make above this process, or the user's own builds, may have set."""


class Source(Protocol):
    """Where a program's source comes from; a frozen dataclass, because its ``repr`` counts for the
    fingerprint."""

    @property
    def tools(self) -> Mapping[str, str]:
        """What fetching needs: probes and Debian packages, as :attr:`Program.tools`."""

    def fetch(self, directory: Path, commands: Commands) -> tuple[Path, str]:
        """Fetch the source into an empty directory.

        Returns:
            The top of its tree, in that directory, and its version.

        Raises:
            TargetError: it cannot be fetched.
        """


@dataclass(frozen=True)
class Step:
    """One command of a build.

    In its words ``{archive}``, ``{shared}`` and ``{rust}`` stand for the flags that
    ``kcov-bridge native`` prints, ``{jobs}`` for the number of processors, ``{source}`` for the
    top of the source while it is built, and ``{place}`` for what it is called afterwards.

    Attributes:
        what: what it does, for progress: "compiling the server".
        command: program and arguments.
        directory: where it runs, below the top of the source.
        environment: further variables.
    """

    what: str
    command: tuple[str, ...]
    directory: str = "."
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class BuiltProgram:
    """A program in the cache."""

    directory: Path
    name: str
    version: str
    bytes: int

    @property
    def source(self) -> Path:
        """The top of the source, in which the program was built."""
        return self.directory / "source"

    @classmethod
    def load(cls, directory: Path) -> BuiltProgram | None:
        """Read what a build has recorded; None if there is none."""
        try:
            record = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
            return cls(directory, str(record["name"]), str(record["version"]), int(record["bytes"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def remove(self) -> None:
        """Remove it from the cache, whole or not at all for who looks for it.

        Raises:
            CacheError: it cannot be removed.
        """
        # Another process may remove it at the same time.
        with cache_errors(f"the program {self.name}"), contextlib.suppress(FileNotFoundError):
            doomed = self.directory.with_name(f".rm-{self.directory.name}-{os.getpid()}")
            self.directory.rename(doomed)
            shutil.rmtree(doomed)


@dataclass(frozen=True)
class Program:
    """How a program is built.

    Attributes:
        name: its name in commands and in the cache.
        source: where its source comes from.
        steps: the commands, in their order.
        products: files that are there when all steps are done, below the top of the source.
        tools: what the steps need, and the Debian package of each: a program on PATH, or a file
            if it begins with ``/``.
        versions: commands whose output says which compilers there are.
        minutes: how long a build takes on two processors, about.
        room: free space in bytes that a build needs.
    """

    name: str
    source: Source
    steps: tuple[Step, ...]
    products: tuple[str, ...]
    tools: Mapping[str, str] = field(default_factory=lambda: {"clang": "clang", "make": "make"})
    versions: tuple[tuple[str, ...], ...] = (("clang", "--version"),)
    minutes: int = 1
    room: int = 256 << 20

    def find(self) -> BuiltProgram | None:
        """Return the program if it is built, as this recipe says and with the present compilers.

        Raises:
            MissingDependencyError: there is no compiler for the run time.
        """
        return BuiltProgram.load(self._place())

    def build(self, *, force: bool = False, progress: Progress | None = None) -> BuiltProgram:
        """Return the program, built if it is missing.

        Args:
            force: build it again, of the newest source.
            progress: takes lines about what is being done (default: to stderr).

        Raises:
            MissingDependencyError: this machine lacks what the build needs.
            TargetError: the source cannot be had, or does not compile.
            CacheError: the cache cannot be written.
        """
        place = self._place()
        if not force and (built := BuiltProgram.load(place)) is not None:
            return built
        self._require()
        tell = progress or functools.partial(print_progress, product=self.name)
        with locked(lock_file(f"program-{self.name}"), f"the program {self.name}", tell) as fd:
            if not force and (built := BuiltProgram.load(place)) is not None:
                return built
            phases = Phases(tell)
            with cache_errors(f"the program {self.name}"):
                self._remove_partial(place.parent)
                if shutil.disk_usage(place.parent).free < self.room:
                    raise disk_full(place.parent, self.room, product=self.name, error=TargetError)
                with atomic_output(place) as part, self._log_kept(part, place):
                    self._make(part, place, phases, fd)
            built = BuiltProgram.load(place)
            if built is None:
                raise TargetError(f"the program {self.name} was removed while it was built")
            tell(
                f"{place.name} is ready: version {built.version}, {built.bytes / 1e6:.0f} MB, "
                f"{phases.elapsed:.0f} s"
            )
            return built

    def _remove_partial(self, folder: Path) -> None:
        """Remove what killed builds left, also of other recipes; this build holds their lock."""
        for left in folder.glob(f".{self.name}-{_DIGITS}.*"):
            remove(left)

    def _place(self) -> Path:
        runtime = build_runtime()
        digest = hashlib.sha256(f"{_FORMAT}\n{self!r}\n{runtime.directory}\n".encode())
        for command in self.versions:
            digest.update(_printed(command) or b"")
        return cache_folder(_FOLDER) / f"{self.name}-{digest.hexdigest()[:12]}"

    def missing(self) -> list[str]:
        """Return the Debian packages that a build needs and that this machine lacks, in order.

        A compiler that is there but does not run is missing: rustup leaves such a ``cargo`` where
        it has no tool chain.
        """
        needed = {**self.source.tools, **self.tools}
        absent = {package for probe, package in needed.items() if not found(probe)}
        absent |= {
            needed.get(command[0], command[0])
            for command in self.versions
            if _printed(command) is None
        }
        return sorted(absent)

    def _require(self) -> None:
        """Raise :class:`MissingDependencyError` if something is missing, with all that is."""
        if missing := self.missing():
            raise MissingDependencyError(
                f"building the program {self.name} needs: {', '.join(missing)}",
                hint=f"on Debian: {apt_line(*missing)}",
            )

    def _make(self, part: Path, place: Path, phases: Phases, fd: int) -> None:
        part.mkdir()
        commands = Commands(part / "build.log", phases, (fd,), product=self.name, error=TargetError)
        phases.begin(f"fetching its source (the build takes about {self.minutes} min)")
        fetched = part / "fetched"
        fetched.mkdir()
        top, version = self.source.fetch(fetched, commands)
        source = part / "source"
        top.rename(source)
        shutil.rmtree(fetched)
        runtime = build_runtime()
        words = {
            "{archive}": shlex.join(runtime.link_flags),
            "{shared}": shlex.join(runtime.shared_flags),
            "{rust}": " ".join(runtime.rust_flags),
            "{jobs}": str(os.cpu_count() or 1),
            "{source}": str(source),
            "{place}": str(place / "source"),
        }
        plain = {name: text for name, text in os.environ.items() if name not in _NOT_INHERITED}
        for step in self.steps:
            phases.begin(step.what)
            commands.run(
                [_filled(word, words) for word in step.command],
                what=f"{step.what} ({self.name} {version})",
                cwd=source / step.directory,
                env={
                    **plain,
                    "LC_ALL": "C",
                    **{name: _filled(text, words) for name, text in step.environment},
                },
            )
        missing = [product for product in self.products if not (source / product).exists()]
        if missing:
            raise TargetError(
                f"the build of {self.name} {version} has not made {', '.join(missing)}"
            )
        size = sum(each.lstat().st_size for each in part.rglob("*"))
        record = {"name": self.name, "version": version, "bytes": size}
        (part / _RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")

    @contextlib.contextmanager
    def _log_kept(self, part: Path, place: Path) -> Iterator[None]:
        """Keep the log of a build that fails, and say where."""
        kept = place.with_name(f"{self.name}.log")
        try:
            yield
        except TargetError as error:
            with contextlib.suppress(OSError):
                shutil.copyfile(part / "build.log", kept)
                error.hint = "; ".join(filter(None, (error.hint, f"all that it printed: {kept}")))
            raise
        kept.unlink(missing_ok=True)


def _printed(command: Sequence[str]) -> bytes | None:
    """Return what a command prints, or None if it does not run."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError:
        return None
    return None if done.returncode else done.stdout


def _filled(word: str, words: Mapping[str, str]) -> str:
    for name, text in words.items():
        word = word.replace(name, text)
    return word


def built_programs(name: str | None = None) -> Sequence[BuiltProgram]:
    """Return the programs in the cache, or those of one name, also of older recipes."""
    pattern = f"{name or '*'}-{_DIGITS}"
    with contextlib.suppress(OSError):
        found = sorted(cache_folder(_FOLDER).glob(pattern))
        return [each for path in found if (each := BuiltProgram.load(path)) is not None]
    return []


class BuiltTarget(ProgramTarget):
    """A target whose program is built from the source of its project when it is first used."""

    program: Program
    """How it is built."""
    summary = ""
    """What the target is, in some words."""
    workload = ""
    """A script for the guest's ``sh`` that uses the target: what ``kcov-bridge run`` runs if it is
    given no command."""

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__(directory)
        self._built: BuiltProgram | None = None

    @property
    def built(self) -> BuiltProgram:
        """The program.

        Raises:
            MissingDependencyError: it is not built.
        """
        if self._built is None:
            self._built = self.program.find()
        if self._built is None:
            raise MissingDependencyError(
                f"the program of the target {self.name} is not built yet",
                hint=f"build it: kcov-bridge target build {self.name}",
            )
        return self._built

    def build_programs(self) -> None:
        """Build the program if it is missing; called before :meth:`start`, takes minutes."""
        self._built = self.program.build()
