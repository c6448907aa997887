# SPDX-License-Identifier: Apache-2.0
"""The real engine, unmodified, on a slot without a VM."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.errors import MissingDependencyError, UsageError
from bridge.fuzz import engine as engines
from bridge.fuzz.engine import (
    CASE_LIMIT,
    Engine,
    EngineError,
    EngineFigures,
    JobOptions,
    find_engine,
    prepare_seeds,
    start_job,
    time_limit_ms,
)
from bridge.fuzz.messages import NewCells, SuspectCase, TimedOut
from bridge.fuzz.shim import shim_program
from tests.fuzz.test_shim import gone
from tests.support.null_slot import NullSlot

MAP = 1 << 16
OPTIONS = JobOptions(time_limit_ms=250, random_seed=1)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return find_engine()


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[NullSlot]:
    with NullSlot(tmp_path) as slot:
        yield slot


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    folder = tmp_path / "seeds"
    folder.mkdir()
    (folder / "one").write_bytes(b"KCOV ")
    return folder


def until(condition: object, what: str, seconds: float = 60) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)


# ---- finding it


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_find_installed_engine_has_version_and_tools(engine: Engine) -> None:
    assert engine.number >= (4, 0)
    assert engine.version.startswith(f"{engine.number[0]}.{engine.number[1]:02}")
    assert os.access(engine.tool("afl-cmin"), os.X_OK)


@pytest.mark.parametrize(
    ("text", "number", "protocol"),
    [
        ("afl-fuzz++4.04c", (4, 4), "old"),
        ("afl-fuzz++4.10c", (4, 10), "old"),
        ("\033[0;36mafl-fuzz++4.20c\033[0m", (4, 20), "new"),
        ("afl-fuzz++5.02c", (5, 2), "new"),
        ("afl-fuzz of a private build", (0, 0), "old"),
    ],
)
def test_find_version_decides_the_protocol(
    tmp_path: Path, text: str, number: tuple[int, int], protocol: str
) -> None:
    found = find_engine(script(tmp_path / "afl-fuzz", f"printf '{text}\\n'"))
    assert found.number == number
    assert found.protocol == protocol


def test_find_missing_engine_says_the_package() -> None:
    with pytest.raises(MissingDependencyError) as raised:
        find_engine("/nowhere/afl-fuzz")
    assert "apt-get install" in raised.value.hint
    assert "afl++" in raised.value.hint


@pytest.mark.parametrize("text", ["echo afl-fuzz++3.15c", "echo 'GNU bash, version 5'", "exit 1"])
def test_find_other_programs_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(MissingDependencyError):
        find_engine(script(tmp_path / "afl-fuzz", text))


# ---- the tools, as they are


def run_tool(engine: Engine, slot: NullSlot, tool: str, *words: str | Path) -> str:
    done = subprocess.run(
        [engine.tool(tool), *words],
        env={
            **engine.environment(slot.socket, MAP),
            "PATH": f"{engine.program.parent}:{os.environ['PATH']}",
            "AFL_ALLOW_TMP": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_showmap_one_case_writes_its_cells(engine: Engine, slot: NullSlot, tmp_path: Path) -> None:
    case, output = tmp_path / "case", tmp_path / "map"
    case.write_bytes(b"KC")
    with case.open("rb") as file:
        subprocess.run(
            [engine.tool("afl-showmap"), "-o", output, "--", shim_program()],
            env=engine.environment(slot.socket, MAP),
            stdin=file,
            capture_output=True,
            check=True,
        )
    assert len(output.read_text().splitlines()) == 3


def test_showmap_folder_writes_a_map_a_case(engine: Engine, slot: NullSlot, tmp_path: Path) -> None:
    cases, maps = tmp_path / "cases", tmp_path / "maps"
    cases.mkdir()
    for number in range(5):
        (cases / f"{number}").write_bytes(b"KCOV"[:number])
    (cases / "0").write_bytes(b"x")
    run_tool(engine, slot, "afl-showmap", "-i", cases, "-o", maps, "--", shim_program())
    counts = {path.name: len(path.read_text().splitlines()) for path in maps.iterdir()}
    assert counts == {f"{number}": number + 1 for number in range(5)}


def test_showmap_case_as_a_file(engine: Engine, slot: NullSlot, tmp_path: Path) -> None:
    cases, maps = tmp_path / "cases", tmp_path / "maps"
    cases.mkdir()
    (cases / "a").write_bytes(b"KCO")
    (cases / "b").write_bytes(b"K")
    run_tool(engine, slot, "afl-showmap", "-i", cases, "-o", maps, "--", shim_program(), "@@")
    assert len((maps / "a").read_text().splitlines()) == 4
    assert len((maps / "b").read_text().splitlines()) == 2


def test_cmin_keeps_one_case_of_each_coverage(
    engine: Engine, slot: NullSlot, tmp_path: Path
) -> None:
    cases, least = tmp_path / "cases", tmp_path / "least"
    cases.mkdir()
    for name, case in (("a", b"KCOxxxx"), ("b", b"KCO"), ("c", b"Kx"), ("d", b"KCOy")):
        (cases / name).write_bytes(case)
    run_tool(engine, slot, "afl-cmin", "-i", cases, "-o", least, "--", shim_program())
    assert [path.read_bytes() for path in least.iterdir()] == [b"KCO"]


def test_tmin_shrinks_a_case(engine: Engine, slot: NullSlot, tmp_path: Path) -> None:
    case, least = tmp_path / "case", tmp_path / "least"
    case.write_bytes(b"KCO and much that does not matter")
    run_tool(engine, slot, "afl-tmin", "-i", case, "-o", least, "--", shim_program())
    assert least.read_bytes() == b"KCO"


def test_tmin_shrinks_a_crash(engine: Engine, slot: NullSlot, tmp_path: Path) -> None:
    case, least = tmp_path / "case", tmp_path / "least"
    case.write_bytes(b"KCOV! and so on")
    run_tool(engine, slot, "afl-tmin", "-i", case, "-o", least, "--", shim_program())
    assert least.read_bytes() == b"KCOV!"


def test_analyze_names_the_magic_bytes(engine: Engine, slot: NullSlot, tmp_path: Path) -> None:
    case = tmp_path / "case"
    case.write_bytes(b"KCOVab")
    text = run_tool(engine, slot, "afl-analyze", "-i", case, "--", shim_program())
    assert "no-op" in text or "critical" in text or "checksum" in text


# ---- a job


def test_job_finds_crash_and_timeout_and_ends_in_order(
    engine: Engine, slot: NullSlot, seeds: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with start_job(engine, slot.socket, seeds, output, OPTIONS) as job:
        until(lambda: slot.cases(TimedOut) and slot.cases(SuspectCase), "a crash and a time-out")
        until(lambda: any(job.crashes.glob("id:*")), "the engine keeps the crash")
        shim = slot.received[0][0]
        job.check()
        job.stop()
        assert job.process.returncode == 0
    assert any(case.startswith(b"KCOV") for case in slot.cases(SuspectCase))
    assert all(case.startswith(b"KCOV?") for case in slot.cases(TimedOut))
    assert slot.cases(NewCells)[0] == b"KCOV "
    assert gone(getattr(shim, "pid", 0))
    figures = job.figures()
    assert figures is not None
    assert figures.executions > 0
    assert figures.crashes > 0
    assert figures.stability == 1
    job.check()


def test_job_resumed_continues_and_a_fresh_one_is_refused(
    engine: Engine, slot: NullSlot, seeds: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    first = JobOptions(name="j", time_limit_ms=250, seconds=1)
    with start_job(engine, slot.socket, seeds, output, first) as job:
        assert job.process.wait(60)
        job.check()
    with pytest.raises(UsageError, match="earlier campaign"):
        start_job(engine, slot.socket, seeds, output, first)
    again = JobOptions(name="j", time_limit_ms=250, seconds=1, resume=True)
    with start_job(engine, slot.socket, seeds, output, again) as job:
        assert job.process.wait(60)
        job.check()
    assert any((output / "j" / "queue").glob("id:*"))


def test_job_takes_dictionary_and_cases_of_others(
    engine: Engine, slot: NullSlot, seeds: Path, tmp_path: Path
) -> None:
    (seeds / "one").write_bytes(b"x")
    dictionary = tmp_path / "words"
    dictionary.write_text('word="KCOV"\n')
    options = JobOptions(name="j", main=False, dictionaries=(dictionary,), time_limit_ms=250)
    with start_job(engine, slot.socket, seeds, tmp_path / "out", options) as job:
        job.offer(b"offered")
        until(
            lambda: (
                any(case == b"KCOV" for case in slot.cases(NewCells))
                or any(case.startswith(b"KCOV") for case in slot.cases(NewCells))
            ),
            "the dictionary's word is used",
        )
    peers = tmp_path / "out" / "peers"
    assert [path.read_bytes() for path in (peers / "queue").iterdir()] == [b"offered"]
    assert (peers / "is_main_node").exists()


def test_job_harness_that_covers_nothing_is_explained(
    engine: Engine, seeds: Path, tmp_path: Path
) -> None:
    with (
        NullSlot(tmp_path, covers=False) as slot,
        start_job(engine, slot.socket, seeds, tmp_path / "out", OPTIONS) as job,
    ):
        assert job.process.wait(60)
        with pytest.raises(EngineError) as raised:
            job.check()
    assert raised.value.message.endswith("exited with status 1: No instrumentation detected")
    assert "No instrumentation detected" in raised.value.evidence
    assert "covers nothing" in raised.value.hint
    assert "\x1b" not in raised.value.evidence


def test_job_seeds_that_all_crash_are_explained(
    engine: Engine, slot: NullSlot, seeds: Path, tmp_path: Path
) -> None:
    (seeds / "one").write_bytes(b"KCOV!")
    with start_job(engine, slot.socket, seeds, tmp_path / "out", OPTIONS) as job:
        assert job.process.wait(60)
        with pytest.raises(EngineError) as raised:
            job.check()
    assert "seed" in raised.value.hint


def test_job_seed_that_crashes_beside_one_that_does_not(
    engine: Engine, slot: NullSlot, seeds: Path, tmp_path: Path
) -> None:
    (seeds / "two").write_bytes(b"KCOV!")
    options = JobOptions(seconds=1, time_limit_ms=250)
    with start_job(engine, slot.socket, seeds, tmp_path / "out", options) as job:
        assert job.process.wait(60)
        job.check()
    assert b"KCOV!" in slot.cases(SuspectCase)


def test_job_seed_that_covers_nothing_beside_one_that_does(
    engine: Engine, slot: NullSlot, seeds: Path, tmp_path: Path
) -> None:
    (seeds / "another").write_bytes(b"-")
    options = JobOptions(seconds=1, time_limit_ms=250)
    with start_job(engine, slot.socket, seeds, tmp_path / "out", options) as job:
        assert job.process.wait(60)
        job.check()


def test_job_end_of_the_slot_ends_the_engine(
    engine: Engine, slot: NullSlot, seeds: Path, tmp_path: Path
) -> None:
    with start_job(engine, slot.socket, seeds, tmp_path / "out", OPTIONS) as job:
        slot.wait_for(NewCells)
        slot.close()
        assert job.process.wait(60)
        with pytest.raises(EngineError) as raised:
            job.check()
    assert "slot" in raised.value.hint


def test_job_kill_of_the_engine_leaves_no_process(
    engine: Engine, slot: NullSlot, seeds: Path, tmp_path: Path
) -> None:
    with start_job(engine, slot.socket, seeds, tmp_path / "out", OPTIONS) as job:
        slot.wait_for(NewCells)
        hello = slot.received[0][0]
        stand_in = slot.stand_in
        job.process.send_signal(signal.SIGKILL)
        assert job.process.wait(10)
        assert gone(getattr(hello, "pid", 0))
        assert gone(stand_in)


def test_job_kill_of_the_shim_ends_the_engine(
    engine: Engine, slot: NullSlot, seeds: Path, tmp_path: Path
) -> None:
    with start_job(engine, slot.socket, seeds, tmp_path / "out", OPTIONS) as job:
        slot.wait_for(NewCells)
        stand_in = slot.stand_in
        os.kill(getattr(slot.received[0][0], "pid", 0), signal.SIGKILL)
        assert job.process.wait(60)
        assert gone(stand_in)
        with pytest.raises(EngineError):
            job.check()


BRIDGE = """
import sys, time
from pathlib import Path
from bridge.fuzz.engine import JobOptions, find_engine, start_job
from bridge.fuzz.messages import NewCells
from tests.support.null_slot import NullSlot
here = Path(sys.argv[1])
slot = NullSlot(here)
job = start_job(find_engine(), slot.socket, here / "seeds", here / "out", JobOptions())
slot.wait_for(NewCells)
print(job.process.pid, slot.received[0][0].pid, slot.stand_in, slot.vm_pid, flush=True)
time.sleep(300)
"""


def test_job_kill_of_the_bridge_leaves_no_process(seeds: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BRIDGE, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    ) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 4
    for pid in pids:
        assert gone(pid), pids


def test_job_core_pattern_with_a_pipe_is_no_obstacle(
    engine: Engine, slot: NullSlot, seeds: Path, tmp_path: Path
) -> None:
    """Debian with systemd-coredump, Ubuntu with apport: the engine refuses that by itself."""
    (tmp_path / "core_pattern").write_text("|/usr/share/apport/apport -p%p\n")
    environment = engine.environment(slot.socket, MAP)
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    command: list[str | Path] = [
        *("unshare", *user, "--mount", "sh", "-c"),
        'mount --bind "$0" /proc/sys/kernel/core_pattern && exec "$@"',
        tmp_path / "core_pattern",
        engine.program,
        *("-i", seeds, "-V", "1", "-t", "1000"),
    ]

    def run(output: str, environment: dict[str, str]) -> tuple[int, str]:
        done = subprocess.run(
            [*command, "-o", tmp_path / output, "--", shim_program()],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    status, text = run("with", environment)
    assert status == 0, text
    status, text = run(
        "without",
        {
            name: value
            for name, value in environment.items()
            if name != "AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES"
        },
    )
    assert status != 0
    assert "core_pattern" in text


# ---- figures, limits, seeds


def test_figures_half_written_are_none(tmp_path: Path) -> None:
    file = tmp_path / "fuzzer_stats"
    assert EngineFigures.read(file) is None
    file.write_text("execs_done        : 12\nexecs_per_sec")
    assert EngineFigures.read(file) is None


@pytest.mark.parametrize(
    ("seconds", "limit"),
    [
        ([], 1000),
        ([0.001], 1000),
        ([0.3, 0.3, 0.3], 1500),
        ([0.1, 0.1, 0.9], 2700),
        ([1e9], 60_000),
    ],
)
def test_time_limit_from_measured_cases(seconds: list[float], limit: int) -> None:
    assert time_limit_ms(seconds) == limit


def test_seeds_without_a_corpus_is_the_default(tmp_path: Path) -> None:
    made = prepare_seeds(None, tmp_path / "seeds")
    assert made.default
    assert [path.read_bytes() for path in (tmp_path / "seeds").iterdir()] == [engines.DEFAULT_SEED]


def test_seeds_empty_corpus_takes_those_of_the_harness(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "nothing").touch()
    made = prepare_seeds(tmp_path / "corpus", tmp_path / "seeds", defaults=(b"a", b"b"))
    assert made.default
    assert made.used == 2
    assert "1 empty" in made.sentence()


def test_seeds_of_a_corpus_without_what_the_engine_cannot_use(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "below").mkdir(parents=True)
    (corpus / ".hidden").mkdir()
    (corpus / ".hidden" / "x").write_bytes(b"hidden")
    (corpus / "a").write_bytes(b"one")
    (corpus / "below" / "b").write_bytes(b"two!")
    (corpus / "c").write_bytes(b"one")
    (corpus / "d").touch()
    (corpus / "e").write_bytes(bytes(CASE_LIMIT + 1))
    (corpus / "f").write_bytes(bytes(CASE_LIMIT))
    made = prepare_seeds(corpus, tmp_path / "seeds")
    assert (made.used, made.repeated, made.empty, made.too_long) == (3, 1, 1, 1)
    digests = {
        hashlib.sha256(each.read_bytes()).digest() for each in (tmp_path / "seeds").iterdir()
    }
    wanted = (b"one", b"two!", bytes(CASE_LIMIT))
    assert digests == {hashlib.sha256(each).digest() for each in wanted}


def test_seeds_huge_corpus_is_cut_at_the_longest(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(1, 31):
        (corpus / f"{number}").write_bytes(bytes([number]) * number)
    made = prepare_seeds(corpus, tmp_path / "seeds", limit=20)
    assert (made.used, made.left_out) == (20, 10)
    assert max(each.stat().st_size for each in (tmp_path / "seeds").iterdir()) == 20
    assert "afl-cmin" in made.sentence()


def test_seeds_corpus_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a directory"):
        prepare_seeds(tmp_path / "nowhere", tmp_path / "seeds")
