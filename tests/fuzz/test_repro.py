# SPDX-License-Identifier: Apache-2.0
"""A defect that was planted into a target is found, kept, run again, and made small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.config import Settings
from bridge.fuzz.files_text import to_bytes, to_text
from bridge.fuzz.findings import Finding, Findings, Place
from bridge.fuzz.monitor import MachineMonitor
from bridge.fuzz.repro import CaseRunner, packages_of
from bridge.fuzz.slot import BuiltIn, Slot
from bridge.fuzz.titles import Kind
from bridge.session.session import Session
from bridge.session.target_host import TargetState
from tests.support.programs import guest_program

pytestmark = pytest.mark.vm

ROOT = Path(__file__).resolve().parents[2]
TARGET = "tests.fuzz.planted_files_target:PlantedFiles"
SETTINGS = {"target": TARGET, "source": "python"}
TITLE = "AssertionError in check_write (fuzz/planted_files.py)"
SECONDS = 60.0
"""For what takes milliseconds on a quiet machine."""

WELL = """\
open f0 a rw 0644
pwrite f0 50 7 65537
read f0 100
close f0
"""

BAD = """\
stat a
open f0 a rw 0644
pwrite f0 300 7 65537
list .
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finding]:
    """The folder of the finding."""
    directory = tmp_path_factory.mktemp("campaign")
    findings = Findings(directory / "findings", readable=to_text)
    kept: list[Finding] = []
    harness = BuiltIn("files", ("/mnt/target",))
    with (
        MachineMonitor() as monitor,
        Slot(
            Settings(target=TARGET, source="python", diagnose=True),
            harness,
            directory / "slot",
            target_state=TargetState.FORK,
            monitor=monitor,
        ) as slot,
    ):
        runner = CaseRunner(slot, timeout=SECONDS, packages=packages_of(slot))
        for text in (WELL, BAD, WELL, BAD):
            attempt = runner.run(to_bytes(text))
            assert bool(attempt.faults) == (text is BAD), attempt.faults
            if attempt.faults:
                place = Place("files", settings=SETTINGS)
                kept.append(findings.record(attempt.suspect, attempt.faults, place))
        assert runner.resets == len(kept) == 2
    assert kept[1].times == 2
    assert kept[0].name == kept[1].name
    return directory / "findings" / kept[0].name, kept[0]


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bridge", "fuzz", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_finding_of_a_planted_defect_has_its_title(found: tuple[Path, Finding]) -> None:
    folder, finding = found
    assert (finding.kind, finding.title) == (Kind.TARGET_EXCEPTION, TITLE)
    assert finding.stack[:2] == (
        "check_write (fuzz/planted_files.py)",
        "check_message (fuzz/planted_files.py)",
    )
    assert to_bytes((folder / "case.txt").read_text()) == to_bytes(BAD)
    assert "assert offset < FAR" in (folder / "traceback.txt").read_text()
    assert (folder / "coverage.txt").stat().st_size > 0


def test_repro_says_how_often_the_title_comes_again(found: tuple[Path, Finding]) -> None:
    folder, _ = found
    done = command("repro", "-n", "3", "--json", "--timeout", "60", folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "title": TITLE,
        "same": 3,
        "times": 3,
        "titles": [TITLE] * 3,
    }


def test_repro_case_that_is_well_never_leads_there(
    found: tuple[Path, Finding], tmp_path: Path
) -> None:
    folder, _ = found
    other = tmp_path / folder.name
    other.mkdir()
    (other / "finding.json").write_bytes((folder / "finding.json").read_bytes())
    (other / "case").write_bytes(to_bytes(WELL))
    done = command("repro", "-n", "2", "--timeout", "60", other)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert [line.rpartition(" (")[0] for line in lines[:2]] == [
        "1 of 2: nothing was wrong",
        "2 of 2: nothing was wrong",
    ]
    assert lines[2] == f"0 of 2 runs led to: {TITLE}"


def test_minimize_leaves_what_leads_there_and_a_program_that_does(
    found: tuple[Path, Finding],
) -> None:
    folder, _ = found
    done = command("minimize", "-n", "2", "--timeout", "60", "--time", "200", folder)
    assert done.returncode == 0, done.stderr
    assert "reproducer.c" in done.stdout
    calls = (folder / "minimized.txt").read_text().splitlines()
    # Access and mode may be any in which one may write; so may the name and the slot.
    assert [line.split()[0] for line in calls] == ["open", "pwrite"]
    assert (folder / "minimized").stat().st_size < len(to_bytes(BAD))
    program = guest_program(folder / "reproducer.c", flags=("-O1", "-w"))
    settings = Settings(target=TARGET, source="python")
    with MachineMonitor() as monitor, Session(
        settings, target_state=TargetState.FORK
    ) as session:  # fmt: skip
        monitor.began(session)
        session.put(program, "/root/reproducer", 0o755)
        result = session.run("/root/reproducer /mnt/target", timeout=SECONDS)
        assert result.text.startswith("open ")
        assert monitor.trouble()
        problems = monitor.collect(timed_out=False).problems
        assert any("in check_write" in problem for problem in problems)


def test_repro_folder_without_a_finding_is_wrong_usage(tmp_path: Path) -> None:
    done = command("repro", tmp_path)
    assert done.returncode == 2
    assert "is not the folder of a finding" in done.stderr
