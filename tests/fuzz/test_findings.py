# SPDX-License-Identifier: Apache-2.0
"""Findings on the disk: whole, counted once each, and kept whatever ends the writer."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bridge.errors import UsageError
from bridge.fuzz.findings import CASE, FINDING, Finding, Findings, Place, load_finding
from bridge.fuzz.slot_events import Evidence, Suspect
from bridge.fuzz.titles import Fault, Kind, faults_of
from tests.fuzz import recorder

KILLS = int(os.environ.get("KCOV_BRIDGE_RECORDER_KILLS", "50"))
SEED = int(os.environ.get("KCOV_BRIDGE_KILLS_SEED", random.SystemRandom().getrandbits(32)))
LATEST = 0.06
"""Seconds after its start until which a recording process is killed: it records a few dozen."""

RECORDER = (sys.executable, "-m", "tests.fuzz.recorder")
ROOT = Path(__file__).resolve().parents[2]

PLACE = Place(
    harness="files",
    command=("a", "b"),
    differential=True,
    ignore=("stat.mode",),
    target_state="keep",
    settings={"memory": 300},
    versions={"kernel": "6.1.0"},
)


def aborted(case: bytes, where: str = "step") -> Suspect:
    output = f"harness: it.c:7: {where}: Assertion `x > 0' failed.\n"
    return Suspect(case, signal.SIGABRT, output.encode(), pcs=((1, 2), (0xFFFFFFFFF0000018,)))


def record(findings: Findings, suspect: Suspect) -> Finding:
    return findings.record(suspect, faults_of(suspect), PLACE, seconds=2.5, executions=70)


def check_whole(folder: Path) -> Finding:
    """A folder with a name is whole."""
    finding = load_finding(folder)
    assert finding.name == folder.name
    assert hashlib.sha256((folder / CASE).read_bytes()).hexdigest() == finding.sha256
    for more in folder.glob("case-*"):
        assert hashlib.sha256(more.read_bytes()).hexdigest()[:16] == more.name[5:]
    assert (folder / "console.log").stat().st_size > 0
    return finding


def test_record_new_finding_has_all_that_is_known(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "findings", readable=lambda case: f"{len(case)} bytes")
    evidence = Evidence(
        console="[    1.0] eth0: link up\n",
        dmesg="[    1.0] eth0: link up\n[    2.0] more\n",
        problems=("the thread x ended by an exception\nTraceback (most recent call last):\n",),
        stacks="12 D p9_client_rpc: kcov-runner",
    )
    suspect = aborted(b"\0case")
    suspect = Suspect(suspect.case, suspect.status, suspect.output, False, evidence, suspect.pcs)
    finding = record(findings, suspect)
    assert finding.kind is Kind.TARGET_EXCEPTION
    assert finding.others == (
        "the harness was killed by SIGABRT: Assertion `x > N' failed. in step",
    )
    folder = tmp_path / "findings" / finding.name
    assert load_finding(folder) == finding
    # Readers find the fields of both on one level.
    keys = json.loads((folder / FINDING).read_bytes()).keys()
    assert keys >= {"title", "kind", "times", "seconds", "executions", "harness", "settings"}
    assert (finding.times, finding.seconds, finding.executions) == (1, 2.5, 70)
    assert finding.place == PLACE
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files.pop(FINDING)
    assert files == {
        "case": b"\0case",
        "case.txt": b"5 bytes\n",
        "console.log": b"[    1.0] eth0: link up\n\n==== the kernel's log\n"
        b"[    1.0] eth0: link up\n[    2.0] more\n",
        "coverage.txt": b"0000000000000001\n0000000000000002\n\nfffffffff0000018\n",
        "output": suspect.output,
        "traceback.txt": b"the thread x ended by an exception\n"
        b"Traceback (most recent call last):\n\n12 D p9_client_rpc: kcov-runner\n",
    }
    assert list(findings) == [finding]


def test_record_same_fault_again_is_counted_and_a_few_cases_are_kept(tmp_path: Path) -> None:
    findings = Findings(tmp_path, cases=3)
    first = record(findings, aborted(b"first"))
    for case in (b"first", b"second", b"third", b"fourth", b"second"):
        again = record(findings, aborted(case))
    other = record(findings, aborted(b"first", where="other_step"))
    assert again == Finding.from_dict({**json.loads(first.as_json()), "times": 6})
    assert other.name != first.name
    folder = tmp_path / first.name
    assert (folder / CASE).read_bytes() == b"first"
    assert {path.read_bytes() for path in folder.glob("case-*")} == {b"second", b"third"}
    assert {each.name for each in findings} == {first.name, other.name}


def test_record_equal_titles_with_other_stacks_are_two_findings(tmp_path: Path) -> None:
    findings = Findings(tmp_path)
    suspect = aborted(b"x")
    one, two = (
        findings.record(suspect, [Fault(Kind.KERNEL, "BUG: x", (stack,))], PLACE)
        for stack in ("f", "g")
    )
    assert one.title == two.title
    assert {each.name for each in findings} == {one.name, two.name}


def test_record_hostile_title_stays_inside_the_directory(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "findings")
    for line in ("BUG: ../../../x", "BUG: \x00\n/", "BUG: " + "long " * 900, "BUG: \udc80\u2028"):
        suspect = Suspect(b"x", 0, evidence=Evidence(console=line))
        finding = record(findings, suspect)
        assert (tmp_path / "findings" / finding.name / FINDING).is_file()
        assert len(finding.title) <= 160
        assert finding.title.isprintable()
    assert {path.name for path in tmp_path.iterdir()} == {"findings"}


def test_record_readable_form_that_fails_does_not_cost_the_finding(tmp_path: Path) -> None:
    def fails(case: bytes) -> str:
        raise KeyError(case)

    finding = record(Findings(tmp_path, readable=fails), aborted(b"x"))
    text = (tmp_path / finding.name / "case.txt").read_text()
    assert text == "(the readable form cannot be made: KeyError: b'x')\n"


def test_record_by_several_processes_at_once_loses_no_count(tmp_path: Path) -> None:
    threads = 4
    with ThreadPoolExecutor(threads) as pool:
        # Each has its own lock, as processes do.
        for findings in [Findings(tmp_path, cases=2) for _ in range(threads)]:
            for number in range(10):
                pool.submit(record, findings, aborted(bytes([number])))
    (finding,) = Findings(tmp_path)
    assert finding.times == 10 * threads


def test_add_files_of_another_machine_are_merged_and_counted(tmp_path: Path) -> None:
    there, here = Findings(tmp_path / "there"), Findings(tmp_path / "here")
    record(here, aborted(b"first"))
    finding = record(there, aborted(b"second"))
    folder = there.directory / finding.name
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert here.add(files, times=5).times == 6
    assert here.count(finding.name, 4).times == 10
    (merged,) = here
    assert merged.times == 10
    assert [path.read_bytes() for path in (here.directory / merged.name).glob("case-*")] == [
        b"second"
    ]
    with pytest.raises(UsageError, match="is not the folder of a finding"):
        here.count("missing", 1)
    with pytest.raises(UsageError, match="cannot be read"):
        here.add({FINDING: b"[]", CASE: b""})
    outside = {**json.loads(finding.as_json()), "name": "../x"}
    with pytest.raises(UsageError, match=r"not a plain name: '\.\./x'"):
        here.add({FINDING: json.dumps(outside).encode(), CASE: b""})
    with pytest.raises(UsageError, match=r"not the plain name of a file: '\.\./x'"):
        here.add({**files, "../x": b""})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        ("{", "cannot be read"),
        ('{"format": "x", "version": 1}', "format 'x'"),
        ('{"format": "kcov-bridge finding", "version": 99}', "version 99"),
    ],
)
def test_load_finding_other_folder_says_what_it_is_not(
    tmp_path: Path, content: str | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / FINDING).write_text(content)
    with pytest.raises(UsageError, match=reason):
        load_finding(tmp_path)


def test_record_writer_killed_at_random_moments_keeps_what_it_announced(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    directory = tmp_path / "findings"
    announced: Counter[str] = Counter()
    left_behind = 0
    with subprocess.Popen(
        [*RECORDER, str(directory)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for kill in range(KILLS):
            where = f"seed {SEED}, kill {kill}"
            process.stdin.write(f"{rng.randrange(1000)}\n")
            words = process.stdout.readline().split()
            cases = []
            # The child may announce before the parent says that it began.
            while words[0] == "announced":
                cases.append(words[1:])
                words = process.stdout.readline().split()
            assert words[0] == "began"
            pid = int(words[1])
            if kill % 2 and not cases:
                # For a machine on which all others are killed before they record anything.
                cases.append(process.stdout.readline().split()[1:])
            time.sleep(rng.random() * LATEST)
            os.kill(pid, signal.SIGKILL)
            while (words := process.stdout.readline().split())[0] == "announced":
                cases.append(words[1:])
            assert words[0] == "ended", where
            for name, times, _ in cases:
                announced[name] = max(announced[name], int(times))
            left_behind += len(list(directory.glob(".new-*")))
            on_disk = {path.name: path for path in directory.glob("[!.]*")}
            assert announced.keys() <= on_disk.keys(), where
            for name, folder in on_disk.items():
                found = check_whole(folder)
                # One of them may have been recorded, and not announced any more.
                assert announced[name] <= found.times <= announced[name] + 1, where
                announced[name] = found.times
                assert len(list(folder.glob("case-*"))) < recorder.CASES, where
        process.stdin.close()
        assert process.wait(60) == 0
    assert sum(announced.values()) >= KILLS // 2
    # What the last one left behind goes when the next begins.
    findings = Findings(directory)
    assert not list(directory.glob(".new-*"))
    assert {each.name for each in findings} == {*announced}


def test_record_full_disk_stops_the_writer_and_keeps_what_it_announced(tmp_path: Path) -> None:
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    script = (
        f"mount -t tmpfs -o size=96k,nr_inodes=60 none '{small}' && "
        f"{' '.join(RECORDER)} '{small}/findings' 0 && cp -r '{small}/findings' '{kept}'"
    )
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    unshare = shutil.which("unshare")
    assert unshare is not None
    done = subprocess.run(
        [unshare, *as_root, "--mount", "--", "sh", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert {word for word, _ in lines[:-1]} == {"announced"}
    word, message = lines[-1]
    assert word == "failed"
    assert "the disk is full" in message
    assert "make room, then go on with --resume" in message
    assert "the case, " in message
    announced: Counter[str] = Counter(line.split()[0] for _, line in lines[:-1])
    on_disk = {path.name: check_whole(path).times for path in kept.glob("[!.]*")}
    assert on_disk == announced
    assert not list(kept.glob(".new-*"))
