# SPDX-License-Identifier: Apache-2.0
"""The fuzzing engine, AFL++: find it, start it on a slot, read its figures, end it.

The engine runs unmodified, with the shim (:mod:`bridge.fuzz.shim`) as its target. It keeps its own
directory, of which the bridge reads ``fuzzer_stats`` and writes one thing: ``peers/queue``, where
the engine looks for other fuzzers' cases once a minute (:meth:`EngineJob.offer`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bridge.errors import InfrastructureError, MissingDependencyError, UsageError
from bridge.fuzz.board import SLOT_VARIABLE
from bridge.fuzz.shim import PROTOCOL_VARIABLE, shim_program
from bridge.util.packages import apt_line
from bridge.vm.process import Process, spawn

__all__ = [
    "CASE_LIMIT",
    "DEFAULT_SEED",
    "Engine",
    "EngineError",
    "EngineFigures",
    "EngineJob",
    "JobOptions",
    "SeedFolder",
    "find_engine",
    "prepare_seeds",
    "read_seeds",
    "start_job",
    "time_limit_ms",
]

logger = logging.getLogger(__name__)

CASE_LIMIT: Final = 1 << 20
"""Bytes of a case at most; longer ones are cut by the engine."""
DEFAULT_SEED: Final = b"0"
"""The only seed of a campaign that has no other."""

_NEW_PROTOCOL_SINCE = (4, 20)
_STATS_INTERVAL_SINCE = (4, 6)
_OLDEST = (4, 0)
_VERSION = re.compile(r"\+\+(\d+)\.(\d+)([a-z]*)")
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[()][0AB]|[\x0e\x0f]")
_READY_LIMIT_MS = 60_000
_PEERS = "peers"

_REMEDIES = (
    (
        "No instrumentation detected",
        "the harness covers nothing of what is recorded: name a --corpus with a seed that it "
        "does not refuse at once, check with 'kcov-bridge run' that the target is reached, or "
        "choose another source",
    ),
    (
        "at least one valid input seed",
        "each seed crashes the harness or takes too long: add a seed that does not",
    ),
    ("All test cases time out or crash", "each seed crashes the harness or takes too long"),
    ("fork server", "the slot ended first: its own error says why"),
    ("core_pattern", "run as root: echo core > /proc/sys/kernel/core_pattern"),
    ("scaling governor", "set AFL_SKIP_CPUFREQ=1, or the governor of the processors"),
    ("shmget", "raise the limit of shared memory: sysctl kernel.shmmax, kernel.shmall"),
    ("No space left", "free some room on the disk of the output directory"),
)
"""What the engine says when it ends, and what to do then."""


_ABORT: Final = re.compile(r"PROGRAM ABORT : (.+)")
"""Why the engine ended, in its own words."""


class EngineError(InfrastructureError):
    """The fuzzing engine did not start, or ended by itself."""


@dataclass(frozen=True)
class Engine:
    """An installed AFL++.

    Attributes:
        program: ``afl-fuzz``.
        version: its version as it writes it; empty if it says none that can be read.
        number: the version's numbers, (0, 0) if they are unknown.
    """

    program: Path
    version: str
    number: tuple[int, int]

    @property
    def protocol(self) -> str:
        """The fork-server protocol to speak: all versions know ``old``."""
        return "new" if self.number >= _NEW_PROTOCOL_SINCE else "old"

    def tool(self, name: str) -> Path:
        """Return another program of the engine, such as ``afl-cmin``.

        Raises:
            MissingDependencyError: it is not beside ``afl-fuzz``, nor on PATH.
        """
        beside = self.program.with_name(name)
        found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
        if found is None:
            raise MissingDependencyError(
                f"{name} is missing beside {self.program}", hint=apt_line("afl++")
            )
        return Path(found)

    def environment(self, slot: str | Path, map_size: int) -> dict[str, str]:
        """Return what each of the engine's programs needs in its environment.

        Args:
            slot: the socket of the slot.
            map_size: cells of the map.
        """
        return {
            **os.environ,
            SLOT_VARIABLE: str(slot),
            PROTOCOL_VARIABLE: self.protocol,
            "AFL_MAP_SIZE": str(map_size),
            "AFL_FORKSRV_INIT_TMOUT": str(_READY_LIMIT_MS),
            # Crashes of the guest leave no core files here, and the speed that matters is the
            # guest's, so neither the core pattern nor the CPU governor is a problem.
            "AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES": "1",
            "AFL_SKIP_CPUFREQ": "1",
            # A slot has several busy processes; the scheduler places them better.
            "AFL_NO_AFFINITY": "1",
            "AFL_NO_UI": "1",
        }


@dataclass(frozen=True)
class JobOptions:
    """How one ``afl-fuzz`` is run.

    Attributes:
        name: its name among the jobs of a campaign, and of its folder.
        main: it is the main one (``-M``): others do less of the systematic work.
        map_size: cells of the map, as on the board.
        time_limit_ms: of a case; see :func:`time_limit_ms`.
        dictionaries: files of tokens, four at most.
        random_seed: for runs that are to be the same again.
        seconds: the engine ends by itself after so long.
        resume: continue what is in the output directory.
        more: further arguments of ``afl-fuzz``.
    """

    name: str = "main"
    main: bool = True
    map_size: int = 1 << 16
    time_limit_ms: int = 1000
    dictionaries: tuple[Path, ...] = ()
    random_seed: int | None = None
    seconds: int | None = None
    resume: bool = False
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineFigures:
    """What ``fuzzer_stats`` says; ``all`` has every line of it."""

    executions: int
    executions_per_second: float
    corpus: int
    imported: int
    crashes: int
    hangs: int
    cycles: int
    stability: float
    map_filled: float
    all: Mapping[str, str]

    @classmethod
    def read(cls, file: Path) -> EngineFigures | None:
        """Return the figures; None while there are none, or only half of them."""
        try:
            lines = file.read_text(errors="replace").splitlines()
        except OSError:
            return None
        words = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if colon:
                words[name.strip()] = value.strip()
        try:
            return cls(
                executions=int(words["execs_done"]),
                executions_per_second=float(words["execs_per_sec"]),
                corpus=int(words["corpus_count"]),
                imported=int(words["corpus_imported"]),
                crashes=int(words["saved_crashes"]),
                hangs=int(words["saved_hangs"]),
                cycles=int(words["cycles_done"]),
                stability=float(words["stability"].rstrip("%")) / 100,
                map_filled=float(words["bitmap_cvg"].rstrip("%")) / 100,
                all=words,
            )
        except (KeyError, ValueError):
            return None


class EngineJob:
    """A running ``afl-fuzz``. :meth:`stop` ends it; so does the end of the bridge or of its slot.

    Attributes:
        directory: the engine's own, with ``queue/``, ``crashes/``, ``hangs/``, ``fuzzer_stats``.
    """

    def __init__(self, process: Process, options: JobOptions, output: Path) -> None:
        self.process = process
        self.options = options
        self.directory = output / options.name
        self._peers = output / _PEERS / "queue"
        self._offered = sum(1 for _ in self._peers.glob("id:*"))

    @property
    def running(self) -> bool:
        """Whether the engine still runs."""
        return self.process.running

    @property
    def queue(self) -> Path:
        """The folder of the cases that the engine keeps."""
        return self.directory / "queue"

    @property
    def crashes(self) -> Path:
        """The folder of the cases that crashed."""
        return self.directory / "crashes"

    def figures(self) -> EngineFigures | None:
        """Return the engine's last figures; it writes them once in a while."""
        return EngineFigures.read(self.directory / "fuzzer_stats")

    def offer(self, case: bytes) -> None:
        """Give the engine a case of another fuzzer; it looks at such cases once a minute.

        Raises:
            InfrastructureError: the case cannot be written.
        """
        if not 0 < len(case) <= CASE_LIMIT:
            return
        part = self._peers.with_name("case")
        try:
            part.write_bytes(case)
            part.rename(self._peers / f"id:{self._offered:06},src:bridge")
        except OSError as error:
            raise InfrastructureError(
                f"a case for the engine cannot be written to {part}: {error.strerror}",
                hint="free some room on the disk of the output directory",
            ) from error
        self._offered += 1

    def check(self) -> None:
        """Raise what ended the engine, if it did not end as it should.

        Raises:
            EngineError: it ended with an error.
        """
        if self.process.running or self.process.returncode in (0, -signal.SIGINT):
            return
        raise _failure(self.process)

    def stop(self, seconds: float = 10) -> None:
        """Let the engine write its files and end; kill it if it takes longer."""
        self.process.send_signal(signal.SIGINT)
        if not self.process.wait(seconds):
            logger.warning("%s did not end in %g s and is killed", self.process.name, seconds)
        self.process.kill()

    def __enter__(self) -> EngineJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def find_engine(program: str | Path = "afl-fuzz") -> Engine:
    """Find AFL++ and its version.

    Args:
        program: a name on PATH, or a path.

    Raises:
        MissingDependencyError: it is not installed, or too old.
    """
    found = shutil.which(program)
    if found is None:
        raise MissingDependencyError(
            f"{program} is not installed: the fuzzing engine AFL++", hint=apt_line("afl++")
        )
    try:
        done = subprocess.run(
            [found, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingDependencyError(
            f"{found} does not say its version: {error}", hint=apt_line("afl++")
        ) from error
    text = _COLOURS.sub("", done.stdout + done.stderr)
    version = _VERSION.search(text)
    if version is None:
        if "afl" not in text.lower():
            raise MissingDependencyError(
                f"{found} is not AFL++", evidence=text[:500], hint=apt_line("afl++")
            )
        logger.warning("the version of %s is unknown; it gets the old protocol", found)
        return Engine(Path(found), "", (0, 0))
    number = int(version[1]), int(version[2])
    if number < _OLDEST:
        raise MissingDependencyError(
            f"{found} is AFL++ {version[0][2:]}; the bridge needs 4.0 or later",
            hint=apt_line("afl++"),
        )
    return Engine(Path(found), version[0][2:], number)


def start_job(
    engine: Engine, slot: str | Path, seeds: Path, output: Path, options: JobOptions
) -> EngineJob:
    """Start ``afl-fuzz`` on a slot.

    Args:
        slot: the slot's socket.
        seeds: a folder of seeds, which :func:`prepare_seeds` made.
        output: the engine's output directory, which is made if it is missing.

    Raises:
        UsageError: the output directory has a job of this name, and it is not to be resumed.
        MissingDependencyError: there is no C compiler for the shim.
        InfrastructureError: the shim does not compile, or the engine does not start.
    """
    shim = shim_program()
    resumed = (output / options.name / "fuzzer_setup").exists()
    if resumed and not options.resume:
        raise UsageError(
            f"{output} has the job {options.name!r} of an earlier campaign",
            hint="choose another directory with --out, or go on with --resume",
        )
    try:
        _make_peers(output)
    except OSError as error:
        raise InfrastructureError(
            f"the engine's directory {output} cannot be made: {error.strerror}"
        ) from error
    command = [
        str(engine.program),
        *("-i", "-" if resumed else str(seeds)),
        *("-o", str(output)),
        *("-M" if options.main else "-S", options.name),
        *("-t", str(options.time_limit_ms)),
        *(word for file in options.dictionaries for word in ("-x", str(file))),
        *(("-s", str(options.random_seed)) if options.random_seed is not None else ()),
        *(("-V", str(options.seconds)) if options.seconds is not None else ()),
        *options.more,
        "--",
        str(shim),
    ]
    environment = {
        **engine.environment(slot, options.map_size),
        "AFL_SYNC_TIME": "1",
        # A case that takes too long is over then: running it again would cost another reset.
        "AFL_HANG_TMOUT": str(options.time_limit_ms),
    }
    if engine.number >= _STATS_INTERVAL_SINCE:
        environment["AFL_FUZZER_STATS_UPDATE_INTERVAL"] = "5"
    process = spawn(command, name=f"afl-fuzz {options.name}", env=environment, join_output=True)
    return EngineJob(process, options, output)


def _make_peers(output: Path) -> None:
    peers = output / _PEERS / "queue"
    peers.mkdir(parents=True, exist_ok=True)
    # Jobs that are not main ones take cases only from a folder that has this file.
    (peers.parent / "is_main_node").touch()


def _failure(process: Process) -> EngineError:
    text = _COLOURS.sub("", process.stderr_text)
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    hint = next((remedy for words, remedy in _REMEDIES if words.lower() in text.lower()), "")
    reason = _ABORT.search(text)
    why = f": {reason[1].strip()}" if reason is not None else ""
    return EngineError(
        f"{process.name} {process.how_it_ended}{why}", evidence="\n".join(lines[-12:]), hint=hint
    )


def time_limit_ms(seconds: Sequence[float]) -> int:
    """Return a limit for cases from how long some took.

    A case that exceeds it costs a reset, and a machine that is busy makes cases slow by accident;
    so it is five times the median, three times the slowest, and 1 s at least.
    """
    longest = max(5 * statistics.median(seconds), 3 * max(seconds)) if seconds else 1.0
    return min(max(math.ceil(longest * 1000), 1000), 60_000)


@dataclass(frozen=True)
class SeedFolder:
    """What became of the files of a corpus.

    Attributes:
        used: seeds in the folder.
        repeated: files whose content was there already.
        empty: files without content.
        too_long: files of more than :data:`CASE_LIMIT` bytes.
        left_out: the longest ones, beyond the limit of seeds.
        default: whether the only seed is :data:`DEFAULT_SEED` or what the harness brings.
    """

    used: int
    repeated: int = 0
    empty: int = 0
    too_long: int = 0
    left_out: int = 0
    default: bool = False

    def sentence(self) -> str:
        """Say it in one line."""
        parts = [
            f"{number} {what}"
            for number, what in (
                (self.repeated, "repeated"),
                (self.empty, "empty"),
                (self.too_long, f"longer than {CASE_LIMIT} bytes"),
                (self.left_out, "beyond the limit (afl-cmin makes a corpus smaller)"),
            )
            if number
        ]
        seeds = f"{self.used} seed{'s' if self.used != 1 else ''}"
        seeds += " (the corpus had none)" if self.default else ""
        return f"{seeds}; not used: {', '.join(parts)}" if parts else seeds


def read_seeds(
    corpus: Path | None,
    *,
    defaults: Sequence[bytes] = (DEFAULT_SEED,),
    limit: int = 10_000,
) -> tuple[list[bytes], SeedFolder]:
    """Read the seeds of a corpus without what the engine cannot use.

    Args:
        corpus: files in it and below it are seeds; None for no corpus.
        defaults: what is used if the corpus has nothing.
        limit: of seeds; the shortest are taken, as each is executed several times before the
            engine starts to fuzz.

    Raises:
        UsageError: the corpus is not a readable folder.
    """
    sizes: list[tuple[int, Path]] = []
    empty = too_long = 0
    if corpus is not None:
        if not corpus.is_dir():
            raise UsageError(
                f"the corpus {corpus} is not a directory",
                hint="name a directory of seeds; an empty one will do",
            )
        try:
            for path in sorted(corpus.rglob("*")):
                if any(part.startswith(".") for part in path.relative_to(corpus).parts):
                    continue
                if not path.is_file():
                    continue
                size = path.stat().st_size
                empty += not size
                too_long += size > CASE_LIMIT
                if 0 < size <= CASE_LIMIT:
                    sizes.append((size, path))
        except OSError as error:
            raise UsageError(f"the corpus {corpus} cannot be read: {error}") from error
    sizes.sort(key=lambda each: each[0])
    seeds: dict[bytes, None] = {}
    repeated = left_out = 0
    for number, (_, path) in enumerate(sizes):
        if len(seeds) == limit:
            left_out = len(sizes) - number
            break
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UsageError(f"the seed {path} cannot be read: {error}") from error
        repeated += content in seeds
        seeds[content] = None
    found = list(seeds) or list(defaults)
    return found, SeedFolder(len(found), repeated, empty, too_long, left_out, default=not seeds)


def prepare_seeds(
    corpus: Path | None,
    folder: Path,
    *,
    defaults: Sequence[bytes] = (DEFAULT_SEED,),
    limit: int = 10_000,
) -> SeedFolder:
    """Make a folder of seeds for the engine; as :func:`read_seeds`.

    Args:
        folder: is made.

    Raises:
        UsageError: the corpus is not a readable folder.
        InfrastructureError: the folder cannot be written.
    """
    seeds, chosen = read_seeds(corpus, defaults=defaults, limit=limit)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(seeds):
            _put_seed(folder, number, content)
    except OSError as error:
        raise InfrastructureError(
            f"the seeds cannot be written to {folder}: {error.strerror}",
            hint="free some room on the disk of the output directory",
        ) from error
    return chosen


def _put_seed(folder: Path, number: int, content: bytes) -> None:
    with contextlib.suppress(FileExistsError), (folder / f"seed-{number:06}").open("xb") as file:
        file.write(content)
