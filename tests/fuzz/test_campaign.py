# SPDX-License-Identifier: Apache-2.0
"""A whole campaign by its command: a real engine, a real guest, the default target."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bridge.fuzz.progress import PROGRESS_FILE, read_progress
from bridge.fuzz.store import CASES_FILE, case_name, read_campaign, read_cases
from tests.support import COMMAND, MARK, wait_until_gone

pytestmark = pytest.mark.vm

WAIT_SECONDS = 300


def fuzz(out: Path, *options: str, status: tuple[int, ...] = (0, 1)) -> str:
    """Run `kcov-bridge fuzz` to its end; what it found is a matter of luck."""
    done = subprocess.run(
        [*COMMAND, "fuzz", "--out", str(out), *options],
        capture_output=True,
        env={**os.environ, MARK: str(out)},
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert done.returncode in status, done.stdout + done.stderr
    return done.stdout + done.stderr


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "fuzz", "--out", str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, MARK: str(out)},
    )


def test_campaign_killed_goes_on_with_all_that_was_announced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with start(out, "--json", "--random-seed", "1") as campaign:
        try:
            deadline = time.monotonic() + WAIT_SECONDS
            lines = []
            for line in campaign.stdout or ():
                lines.append(line)
                figures = json.loads(line) if line.startswith("{") else {}
                if figures.get("executions", 0) >= 60 and figures["corpus"] > 10:
                    break
                assert time.monotonic() < deadline, "".join(lines)
            else:
                pytest.fail("".join(lines))
        finally:
            campaign.kill()
    assert any("the dictionary has" in line for line in lines), lines
    wait_until_gone(out)
    announced = {case.name for case in read_cases(out).cases}
    assert len(announced) > 10
    assert announced <= {path.name for path in (out / "corpus").iterdir()}
    before = read_progress(out / PROGRESS_FILE).last
    assert before is not None

    assert "--resume" in fuzz(out, status=(2,)), "a second campaign in it is refused"

    more = before.executions + 100
    text = fuzz(out, "--resume", "--executions", str(more), "--plain")
    assert "executions" in text
    wait_until_gone(out)
    record = read_cases(out)
    names = {case.name for case in record.cases}
    assert announced <= names
    assert names == {path.name for path in (out / "corpus").iterdir()}
    assert all(case_name(path.read_bytes()) == path.name for path in (out / "corpus").iterdir())
    after = read_progress(out / PROGRESS_FILE).last
    assert after is not None
    assert after.executions >= more
    assert after.seconds > before.seconds
    assert after.blocks == len({pc for case in record.cases for pc in case.pcs}) > 1000
    facts = read_campaign(out)
    assert len(facts.resumed) == 1
    assert facts.facts["sources"] == ["kernel", "python"]
    assert f'"blocks":{after.blocks},' in (out / "report.html").read_text().replace(": ", ":")
    assert (out / CASES_FILE).is_file()


def test_campaign_interrupted_ends_in_order(tmp_path: Path) -> None:
    """With a command as harness, which is executed anew for each case, and with seeds."""
    out = tmp_path / "out"
    corpus = tmp_path / "seeds"
    corpus.mkdir()
    seeds = {b"first\n", b"a second seed\n"}
    for number, seed in enumerate(sorted(seeds)):
        (corpus / str(number)).write_bytes(seed)
    options = ("--target", "none", "--source", "kernel", "--corpus", str(corpus), "--plain")
    with start(out, *options, "--", "cat", "@@") as campaign:
        try:
            deadline = time.monotonic() + WAIT_SECONDS
            while not (out / CASES_FILE).is_file() or len(read_cases(out).cases) < 3:
                assert campaign.poll() is None, campaign.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.2)
            campaign.send_signal(signal.SIGINT)
            text, _ = campaign.communicate(timeout=WAIT_SECONDS)
        finally:
            campaign.kill()
    assert campaign.returncode == 130, text
    assert "Traceback" not in text
    wait_until_gone(out)
    last = read_progress(out / PROGRESS_FILE).last
    assert last is not None
    assert last.corpus == len(list((out / "corpus").iterdir())) >= len(seeds)
    engine = next(out.glob("jobs/0/engine/job*/queue"))
    assert seeds <= {path.read_bytes() for path in engine.glob("id:*")}
    assert (out / "report.html").is_file()


def test_campaign_over_before_a_vm_is_ready_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = fuzz(out, "--time", "1s", "--target", "none", "--source", "kernel", status=(0,))
    assert "no case was executed before the limit: give a longer --time" in text
    wait_until_gone(out)
