# SPDX-License-Identifier: Apache-2.0
"""Runs killed with SIGKILL at random moments leave nothing behind.

``KCOV_BRIDGE_KILLS=200`` makes it as many; ``make kills`` does. ``KCOV_BRIDGE_KILLS_SEED`` repeats
the moments of a run that failed.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import held_by, start, started_by, still_there, wait_until_gone
from tests.support.programs import guest_image

KILLS = int(os.environ.get("KCOV_BRIDGE_KILLS", "6"))
SEED = int(os.environ.get("KCOV_BRIDGE_KILLS_SEED", random.SystemRandom().getrandbits(32)))
AT_ONCE = 2
LATEST = 8.0
"""Seconds after the start until which a run is killed: it is up after two or three of them."""

LATEST_OF_THE_READY = 3.0
"""Seconds after "ready", for every other run: so that a slow machine's are not all booting."""

LONG = "while :; do cat /mnt/target/*/* >/dev/null 2>&1; done"
SHORT = "cat /mnt/target/many/* >/dev/null"
"""Its run comes to its end, and to writing its results, before some of the kills."""

RESULTS = {
    *("console.log", ".coverage", "blocks.tsv", "pcs.txt", "summary.json", "lcov.info", "html"),
    *("kernel-symbols.tsv", "kernel-blocks.tsv"),
}


def kill_one(directory: Path, moment: float, when_ready: bool, *arguments: str) -> str:
    """Run, kill, look for what is left; returns how far the run had come.

    ``moment``, from 0 to 1, says when between the earliest and the latest.
    """
    seconds = moment * (LATEST_OF_THE_READY if when_ready else LATEST)
    where = f"killed {seconds:.3f} s after {'ready' if when_ready else 'start'}"
    out, temporary = directory / "out", directory / "tmp"
    temporary.mkdir(parents=True)
    phase, stderr = "started", ""
    with start(out, *arguments, env={"TMPDIR": str(temporary)}) as process:
        assert process.stderr is not None
        while when_ready and "guest ready" not in stderr and (line := process.stderr.readline()):
            stderr += line
        time.sleep(seconds)
        before = started_by(out)
        held = held_by(out)
        # Alive in both looks, so in the one between them too.
        names = {name for pid, name in started_by(out).items() if before.get(pid) == name}
        process.kill()
        stderr += process.communicate(timeout=60)[1]
    wait_until_gone(out)
    end = time.monotonic() + 10
    while (left := still_there(held)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left, f"{where}: {left}"
    assert not list(temporary.iterdir()), where
    for path in out.glob("*") if out.is_dir() else ():
        # What is half written when the end comes is named after what it was to be.
        name = path.name
        known = name in RESULTS or any(name.startswith(f".{each}.") for each in RESULTS)
        assert known, f"{where}: {name}"
    if any(name.startswith("qemu") for name in names):
        assert held.memory, "the region is a memfd"
        assert held.sockets, "the guest's console is one"
        phase = "ready" if "guest ready" in stderr else "booting"
    elif "results in" in stderr:
        phase = "ended"
    elif "guest ready" in stderr:
        phase = "reporting"
    return phase


@pytest.mark.vm
def test_run_killed_leaves_nothing(tmp_path: Path) -> None:
    guest_image()
    moments = random.Random(SEED)
    runs = [
        (
            *(tmp_path / str(number), moments.random(), number % 2 == 1),
            *(["--isolate"] if number % 3 == 2 else []),
            *(["--source", "python"] if number % 4 in (0, 3) else []),
            *("--", "sh", "-c", SHORT if number & 2 else LONG),
        )
        for number in range(KILLS)
    ]
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            phases = Counter(pool.map(lambda each: kill_one(*each), runs))
    except BaseException as error:
        error.add_note(f"KCOV_BRIDGE_KILLS={KILLS} KCOV_BRIDGE_KILLS_SEED={SEED}")
        raise
    print(f"{KILLS} kills with seed {SEED}: {dict(phases)}")
    # Some must have come so far that there was something to leave.
    assert sum(phases.values()) == KILLS
    assert phases["started"] < KILLS or KILLS < 4


def test_run_after_a_kill_removes_partial_files(tmp_path: Path) -> None:
    """A directory of pages cannot be made without a name: a kill in that moment leaves it."""
    (tmp_path / ".html.0abc" / "html").mkdir(parents=True)
    for name in (".summary.json.xyz", ".lcov.info.d"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".mine").write_text("not ours")
    (tmp_path / "notes.txt").write_text("not ours")
    result = run_without_qemu(tmp_path)
    assert result == 125
    left = {path.name for path in tmp_path.iterdir()}
    assert not {name for name in left if name.startswith((".html.", ".summary", ".lcov"))}
    assert {".mine", "notes.txt"} <= left


def run_without_qemu(out: Path) -> int:
    """A run that ends as soon as it has cleared its directory."""
    with start(out, "--qemu", "/nowhere/qemu", "--target", "none", "--", "true") as process:
        process.communicate(timeout=120)
    return process.returncode
