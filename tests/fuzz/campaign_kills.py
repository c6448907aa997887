# SPDX-License-Identifier: Apache-2.0
"""A campaign that is killed with SIGKILL again and again loses nothing that it announced.

``make fuzz-kills`` runs it: it takes minutes, and is no part of the whole suite, where
``test_campaign.py`` kills a campaign once. ``KCOV_BRIDGE_FUZZ_KILLS`` is the number of kills.
``KCOV_BRIDGE_KILLS_SEED`` repeats the moments of a run that failed.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bridge.fuzz.findings import FINDING
from bridge.fuzz.progress import PROGRESS_FILE, read_progress
from bridge.fuzz.store import CAMPAIGN_FILE, CASES_FILE, case_name, read_cases
from tests.support import COMMAND, MARK, ROOT, held_by, started_by, still_there, wait_until_gone
from tests.support.programs import guest_image

pytestmark = pytest.mark.vm

KILLS = int(os.environ.get("KCOV_BRIDGE_FUZZ_KILLS", "50"))
SEED = int(os.environ.get("KCOV_BRIDGE_KILLS_SEED", random.SystemRandom().getrandbits(32)))
LATEST = 8.0
"""Seconds after the start until which a campaign is killed, for every other kill."""
LATEST_OF_THE_FUZZING = 4.0
"""Seconds after its VM is ready, for the others."""
READY_SECONDS = 300.0
ENGINE_EXECUTIONS = 10
"""A run with so many has executed more than the few seeds that come before the engine."""


@dataclass
class Announced:
    """What the lines of a campaign said, in all its runs."""

    corpus: int = 0
    blocks: int = 0
    findings: int = 0
    executions: int = 0
    folders: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)
    """What was said of jobs that failed: a VM may have stopped executing cases then."""
    before: int | None = field(default=None, repr=False)
    """Executions when the present run began."""
    fuzzing: threading.Event = field(default_factory=threading.Event, repr=False)
    """The engine executes cases, in the present run."""

    def begin(self) -> None:
        """Begin with another run."""
        self.before = None
        self.fuzzing.clear()

    def take(self, line: str) -> None:
        """Note a line; each is an object of JSON."""
        values: dict[str, Any] = json.loads(line)
        if "said" in values:
            if found := re.match(r"finding: .* \(in (.*)\)$", values["said"]):
                self.folders.add(found[1])
            if re.match(r"job \d+ failed: ", values["said"]):
                self.failures.append(values["said"])
            return
        for name in ("corpus", "blocks", "findings", "executions"):
            setattr(self, name, max(getattr(self, name), values[name]))
        if self.before is None:
            self.before = values["executions"]
        if values["executions"] >= self.before + ENGINE_EXECUTIONS:
            self.fuzzing.set()


def kill_one(
    out: Path, moment: float, wait: bool, announced: Announced, options: Sequence[str]
) -> str:
    """Run the campaign, kill it, compare; return how far it had come."""
    temporary = out.with_name("tmp")
    temporary.mkdir(exist_ok=True)
    resume = (out / CAMPAIGN_FILE).exists()
    options = ["--resume"] if resume else options
    announced.begin()
    with subprocess.Popen(
        [*COMMAND, "fuzz", "--json", "--out", str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, MARK: str(out), "TMPDIR": str(temporary)},
        start_new_session=True,
    ) as process:
        lines: list[str] = []

        def read() -> None:
            for line in process.stdout or ():
                # One that is cut was not announced.
                if line.endswith("\n"):
                    lines.append(line)
                    announced.take(line)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            if wait:
                assert announced.fuzzing.wait(READY_SECONDS), lines
            time.sleep(moment * (LATEST_OF_THE_FUZZING if wait else LATEST))
            held = held_by(out)
            names = set(started_by(out).values())
        finally:
            process.kill()
            reader.join()
        assert process.stderr is not None
        errors = process.stderr.read()
    # Python says that it removes semaphores of a process that was killed.
    tracker = r".*resource_tracker: There appear to be \d+ leaked semaphore objects.*\n.*warn.*\n"
    assert not re.sub(tracker, "", errors), errors
    wait_until_gone(out)
    end = time.monotonic() + 10
    while (left := still_there(held)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left
    assert not list(temporary.iterdir())
    compare(out, announced)
    assert not announced.failures
    if announced.fuzzing.is_set():
        assert "afl-fuzz" in names
        return "fuzzing"
    return "booting" if any(name.startswith("qemu") for name in names) else "starting"


def compare(out: Path, announced: Announced) -> None:
    """What was announced is on the disk, and whole."""
    if not (out / CASES_FILE).exists():
        assert not announced.corpus
        return
    files = {path.name for path in (out / "corpus").iterdir()}
    assert all(case_name((out / "corpus" / name).read_bytes()) == name for name in files)
    record = read_cases(out)
    assert {case.name for case in record.cases} <= files
    assert announced.corpus <= len({case.name for case in record.cases})
    assert announced.blocks <= len({pc for case in record.cases for pc in case.pcs})
    folders = {path.parent for path in (out / "findings").glob(f"*/{FINDING}")}
    assert announced.findings <= len(folders)
    assert {Path(each) for each in announced.folders} <= folders
    for folder in folders:
        assert json.loads((folder / FINDING).read_text())["sha256"]
        assert (folder / "case").is_file()


def harness_that_fails(directory: Path) -> Path:
    """Return a harness that finds something many times a minute."""
    program = directory / "failing.so"
    source = Path(__file__).with_name("failing_harness.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", program, source], check=True)
    return program


@pytest.mark.parametrize("kind", ["target", "findings"])
def test_campaign_killed_at_random_moments_keeps_what_it_announced(
    tmp_path: Path, kind: str
) -> None:
    """With a target in a process of its own, and with findings many times a minute."""
    guest_image()
    options = ["--reset-every", "100", "--target"]
    if kind == "target":
        options += ["tests.fuzz.planted_files_target:PlantedFiles", "--no-learn"]
    else:
        harness = harness_that_fails(tmp_path)
        options += ["none", "--source", "kernel", "--harness", str(harness)]
    moments = random.Random(SEED)
    announced = Announced()
    out = tmp_path / "out"
    phases: Counter[str] = Counter()
    try:
        for number in range(KILLS):
            # The last one, too, so that the campaign has come somewhere.
            wait = (KILLS - number) % 2 == 1
            phases[kill_one(out, moments.random(), wait, announced, options)] += 1
            print(f"kill {number + 1}: {dict(phases)}, {announced}", flush=True)
    except BaseException as error:
        error.add_note(f"KCOV_BRIDGE_FUZZ_KILLS={KILLS} KCOV_BRIDGE_KILLS_SEED={SEED} {phases}")
        raise
    print(f"{KILLS} kills with seed {SEED}: {dict(phases)}")
    assert phases["fuzzing"] >= KILLS // 2
    last = read_progress(out / PROGRESS_FILE).last
    assert last is not None
    assert last.executions > 0
    assert kind == "target" or announced.findings > 0
