# SPDX-License-Identifier: Apache-2.0
"""Builds the programs of others with coverage: their source is fetched, never kept here.

Layout below ``programs`` in the cache::

    NAME-FINGERPRINT/source         the source, built in place
    NAME-FINGERPRINT/program.json   name, version and size; its time is that of the build
    NAME-FINGERPRINT/build.log      what the build printed
    NAME.log                        the same of the last build that failed

The fingerprint is that of the recipe (source, steps and products), the compilers and the run time,
so after a change of one of them the program is built again. A program that is linked with the run
time's shared object gets that of the bridge that starts it (:attr:`Program.environment`), and is
built again only if what it calls there changes. The one beside it in ``source`` is for other runs.

A directory appears by a rename when it is complete, and is never changed afterwards. A build holds
the program's lock.

PCs depend on the contents of a program's file, so recipes keep the places of the cache out of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from bridge.errors import MissingDependencyError, TargetError, UsageError
from bridge.sources.native.build import RUNTIME_ABI, build_runtime
from bridge.sources.native.debug import SOURCE_ROOT
from bridge.targets.program import ProgramTarget
from bridge.util.cache import cache_errors, cache_folder, lock_file, locked
from bridge.util.commands import Commands, Phases, Progress, disk_full, print_progress
from bridge.util.files import atomic_output, remove
from bridge.util.packages import apt_line, found

__all__ = ["BuiltProgram", "BuiltTarget", "Program", "Source", "Step", "built_programs"]

_FORMAT: Final = 2
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


_RUN_PATH: Final = "$ORIGIN:$ORIGIN/.."
"""Where the loader finds the run time's shared object in other runs: ld(1), LD_RUN_PATH."""


_VERSION: Final = re.compile(r"(?<![\d.])\d+(?:\.\d+)+")
_NEWER: Final = {
    "cargo": "Debian 12 has cargo-web and rustc-web, rustup has it for all systems",
    "go": "Debian 12 has golang-go in bookworm-backports, the Go project has it for all systems",
}
"""Where there is a newer one than a release of Debian has."""


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

    In its words ``{archive}`` and ``{rust}`` stand for the flags that ``kcov-bridge native``
    prints, ``{shared}`` for the run time's shared object, ``{runtime}`` for the directory in which
    a linker finds that as ``-lkcovbridge``, ``{jobs}`` for the number of processors, ``{source}``
    for the top of the source while it is built, and ``{place}`` for what debug information has to
    call it.

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

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep others from removing it.

        Raises:
            MissingDependencyError: somebody has removed it.
        """
        # A lock on its record needs no right to write, and ends with this process.
        with contextlib.ExitStack() as stack:
            try:
                record = stack.enter_context(self._record_locked(fcntl.LOCK_SH))
                removed = os.fstat(record).st_nlink == 0
            except (FileNotFoundError, BlockingIOError):
                removed = True
            if removed:
                raise MissingDependencyError(
                    f"the program {self.name} was removed just now", hint="run the command again"
                )
            yield

    @contextlib.contextmanager
    def _record_locked(self, operation: int) -> Iterator[int]:
        """Hold a lock of flock(2) on the record; raises BlockingIOError if that would wait."""
        record = os.open(self.directory / _RECORD, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(record, operation | fcntl.LOCK_NB)
            try:
                yield record
            finally:
                # Processes that were forked meanwhile have it open, too.
                fcntl.flock(record, fcntl.LOCK_UN)
        finally:
            os.close(record)

    def remove(self) -> None:
        """Remove it from the cache, whole or not at all for who looks for it.

        Raises:
            UsageError: it is in use.
            CacheError: it cannot be removed.
        """
        # Another process may remove it at the same time.
        with (
            cache_errors(f"the program {self.name}"),
            contextlib.suppress(FileNotFoundError),
            self.unused(),
        ):
            doomed = self.directory.with_name(f".rm-{self.directory.name}-{os.getpid()}")
            self.directory.rename(doomed)
            shutil.rmtree(doomed)

    @contextlib.contextmanager
    def unused(self) -> Iterator[None]:
        """Keep others from using it; does nothing if somebody has removed it.

        Raises:
            UsageError: it is in use.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._record_locked(fcntl.LOCK_EX))
            except FileNotFoundError:
                pass
            except BlockingIOError:
                raise UsageError(
                    f"the program {self.directory.name} is in use by a session, and stays as it is",
                    hint="end what runs with this target first",
                ) from None
            yield


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
        oldest: the oldest version of some of these compilers that will do.
        minutes: how long a build takes on two processors, about.
        room: free space in bytes that a build needs.
    """

    name: str
    source: Source
    steps: tuple[Step, ...]
    products: tuple[str, ...]
    tools: Mapping[str, str] = field(default_factory=lambda: {"clang": "clang", "make": "make"})
    versions: tuple[tuple[str, ...], ...] = (("clang", "--version"),)
    oldest: Mapping[str, str] = field(default_factory=dict)
    minutes: int = 1
    room: int = 256 << 20

    def _links(self, *flags: str) -> bool:
        """Return whether a step has one of these words."""
        return any(
            flag in word
            for step in self.steps
            for word in (*step.command, *(text for _, text in step.environment))
            for flag in flags
        )

    @property
    def _shared(self) -> bool:
        return self._links("{shared}", "{runtime}")

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables that the program needs where the bridge starts it.

        Raises:
            MissingDependencyError: there is no compiler for the run time.
        """
        return build_runtime().environment if self._shared else {}

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
            UsageError: it is in use, and would be replaced.
            CacheError: the cache cannot be written.
        """
        place = self._place()
        if not force and (built := BuiltProgram.load(place)) is not None:
            return built
        self.require()
        tell = progress or functools.partial(print_progress, product=self.name)
        with locked(lock_file(f"program-{self.name}"), f"the program {self.name}", tell) as fd:
            if not force and (built := BuiltProgram.load(place)) is not None:
                return built
            phases = Phases(tell)
            with cache_errors(f"the program {self.name}"), contextlib.ExitStack() as stack:
                with _unused(place):
                    pass  # before it takes minutes
                self._remove_partial(place.parent)
                if shutil.disk_usage(place.parent).free < self.room:
                    raise disk_full(place.parent, self.room, product=self.name, error=TargetError)
                with atomic_output(place) as part, self._log_kept(part, place):
                    self._make(part, place, phases, fd)
                    stack.enter_context(_unused(place))
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
        # Its name has a digest of what it was made of.
        linked = runtime.directory.name if self._links("{archive}", "{rust}") else RUNTIME_ABI
        recipe = (_FORMAT, self.name, self.source, self.steps, self.products, linked)
        digest = hashlib.sha256(repr(recipe).encode())
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

    def too_old(self) -> Mapping[str, str]:
        """Return the compilers that are here but too old, and the version of each."""
        found = {}
        for command in self.versions:
            if (wanted := self.oldest.get(command[0])) is None:
                continue
            printed = (_printed(command) or b"").decode(errors="replace")
            # A version that is none is the compiler's own business.
            version = _VERSION.search(printed)
            if version is not None and _parts(version[0]) < _parts(wanted):
                found[command[0]] = version[0]
        return found

    def require(self) -> None:
        """Check that this machine has what a build needs.

        Raises:
            MissingDependencyError: it lacks something, or has a version that is too old; the error
                names all of it.
        """
        missing, old = self.missing(), self.too_old()
        # A package of the release may be as old.
        packages = {**self.source.tools, **self.tools}
        newer = [name for name in self.oldest if name in old or packages.get(name) in missing]
        if not missing and not old:
            return
        needs = [*missing]
        for name, version in old.items():
            needs.append(f"{name} {self.oldest[name]} or newer (this one is {version})")
        hints = [f"on Debian: {apt_line(*missing)}"] if missing else []
        hints += [f"{name} {self.oldest[name]}: {_NEWER[name]}" for name in newer if name in _NEWER]
        raise MissingDependencyError(
            f"building the program {self.name} needs: {', '.join(needs)}", hint="; ".join(hints)
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
        plain = {name: text for name, text in os.environ.items() if name not in _NOT_INHERITED}
        if self._shared:
            shutil.copy(runtime.shared, source)
            plain |= {**runtime.environment, "LD_RUN_PATH": _RUN_PATH}
        words = {
            "{archive}": shlex.join(runtime.link_flags),
            "{shared}": shlex.quote(str(runtime.shared)),
            "{runtime}": str(runtime.directory),
            "{rust}": " ".join(runtime.rust_flags),
            "{jobs}": str(os.cpu_count() or 1),
            "{source}": str(source),
            "{place}": SOURCE_ROOT,
        }
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


def _unused(place: Path) -> AbstractContextManager[None]:
    """Keep others from using the program of a directory, if it has one; raises UsageError."""
    built = BuiltProgram.load(place)
    return built.unused() if built is not None else contextlib.nullcontext()


def _printed(command: Sequence[str]) -> bytes | None:
    """Return what a command prints, or None if it does not run."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError:
        return None
    return None if done.returncode else done.stdout


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


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
        self._use = contextlib.ExitStack()

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

    def cover_programs(self, environment: Mapping[str, str]) -> None:
        """As :class:`bridge.targets.program.ProgramTarget`."""
        super().cover_programs({**environment, **self.program.environment})

    def start(self) -> None:
        """As :class:`bridge.targets.program.ProgramTarget`; the program cannot be removed then."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.built.in_use())
            super().start()
            self._use = stack.pop_all()

    def stop(self) -> None:
        """As :class:`bridge.targets.program.ProgramTarget`."""
        try:
            super().stop()
        finally:
            self._use.close()

    def build_programs(self) -> None:
        """Build the program if it is missing; called before :meth:`start`, takes minutes."""
        self._built = self.program.build()
