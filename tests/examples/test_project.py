# SPDX-License-Identifier: Apache-2.0
"""The example project, copied and run with make as its page says, and its jobs for CI."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.programs import guest_image
from tests.test_makefile import sh

PROJECT = ROOT / "examples" / "power_supply"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(PROJECT, tmp_path_factory.mktemp("copy") / "power_supply"))


def make(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # In place of `pip install -e`, which would change the environment of these tests.
    return sh(
        "make", *words, f"PYTHON={sys.executable}", cwd=project, PYTHONPATH=str(project / "src")
    )


def test_check_runs_the_tests_without_a_guest(project: Path) -> None:
    done = make(project, "check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed, 4 deselected" in done.stdout


@pytest.fixture
def image() -> None:
    """The default image is there: it takes longer to build than make is given here."""
    guest_image()


@pytest.mark.vm
@pytest.mark.usefixtures("image")
def test_check_guest_runs_the_tests_with_one(project: Path) -> None:
    done = make(project, "check-guest", "ARGS=--junit-xml=junit.xml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed, 6 deselected" in done.stdout
    assert 'name="guest_kernel"' in (project / "junit.xml").read_text()


@pytest.mark.vm
@pytest.mark.usefixtures("image")
def test_run_command_covers_the_supply_and_its_status_is_told(project: Path) -> None:
    ask = "stty -F /dev/target/supply raw -echo; exec 3<>/dev/target/supply; "
    ask += "echo 'VOLT?' >&3; head -n 1 <&3; exit 7"
    done = make(project, "run", f"CMD={ask}")
    assert done.stdout.splitlines()[-1] == "0.000"
    assert "Error 7" in done.stderr
    assert done.returncode == 2
    covered = (project / "build" / "run" / "lcov.info").read_text()
    assert "power_supply/model.py" in covered


def test_jobs_and_page_have_the_same_commands() -> None:
    def commands(path: Path, begin: str) -> list[str]:
        _, _, text = path.read_text().partition(begin)
        return re.findall(
            r"^(?:    - |          )?((?:apt-get|python3|\.|pip|kcov-bridge|make) .*)$", text, re.M
        )

    page = commands(ROOT / "docs" / "ci.md", "## CI")
    assert len(page) == 8
    assert commands(PROJECT / ".gitlab-ci.yml", "script:") == page
    assert commands(PROJECT / ".github" / "workflows" / "guest-tests.yml", "- run: |") == page
