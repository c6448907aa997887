# SPDX-License-Identifier: Apache-2.0
"""The examples and the README's library quick start, as their pages say to run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, sources
from tests.support.native import CARGO, needs_cargo

pytestmark = pytest.mark.vm

EXAMPLES = ROOT / "examples"


def _blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of ``examples/``, since they leave results where they run."""
    return Path(shutil.copytree(EXAMPLES, tmp_path_factory.mktemp("copy") / "examples"))


def _shell(block: str, cwd: Path, *places: Path) -> subprocess.CompletedProcess[str]:
    """Run a block of a page; ``places`` come first on its PATH."""
    path = os.pathsep.join(
        [*map(str, places), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=cwd,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def _block_that_has(word: str) -> str:
    (found,) = [block for block in _blocks(EXAMPLES / "README.md", "sh") if word in block]
    return found


@pytest.mark.parametrize("tests", ["test_key_value.py", "test_lm75.py"])
def test_example_tests_pass(directory: Path, tests: str) -> None:
    done = _shell(_block_that_has(f"pytest {tests}"), directory)
    assert "3 passed" in done.stdout


def test_example_target_is_covered_by_a_guest_that_uses_it(directory: Path) -> None:
    done = _shell(_block_that_has("key_value_target"), directory)
    lines = done.stdout.splitlines()
    assert lines[0] == "stored"
    assert any(line.startswith("key_value.py:") for line in lines)


@needs_cargo
def test_example_server_in_rust_is_covered_by_a_guest_that_uses_it(directory: Path) -> None:
    done = _shell(_block_that_has("native_rust"), directory, Path(str(CARGO)).parent)
    assert "42" in done.stdout.splitlines()
    symbolized = _shell("kcov-bridge symbolize <build/run/pcs.txt", directory)
    assert "main.rs:" in symbolized.stdout
    assert "lines::add" in symbolized.stdout


def test_example_sensor_is_read_through_its_driver(directory: Path) -> None:
    done = _shell(_block_that_has("lm75_target"), directory)
    assert done.stdout.splitlines()[0].isdecimal()
    assert "lm75.py" in (directory / "build" / "run" / "lcov.info").read_text(encoding="utf-8")


def test_example_program_prints_pcs_of_the_target(directory: Path) -> None:
    done = _shell(_block_that_has("run_program"), directory)
    lines = done.stdout.splitlines()
    assert lines
    for line in lines:
        assert re.fullmatch(r"0x[0-9a-f]{16} pyroute2/plan9/\S+:\d+\.\d+,\d+\.\d+", line), line


def test_example_script_tells_what_each_command_reached_first(directory: Path) -> None:
    done = _shell(_block_that_has("new_blocks"), directory)
    heads = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert len(heads) == 2
    for head, command in zip(heads, ("ls /mnt/target", "cat /mnt/target/README"), strict=True):
        match = re.fullmatch(rf"{command}: status 0, (\d+) new blocks", head)
        assert match
        assert int(match[1]) > 0


def test_example_commands_are_all_run_by_these_tests() -> None:
    assert len(_blocks(EXAMPLES / "README.md", "sh")) == 7
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+\.(?:py|c)\b", page))
    assert named == {path.name for path in sources() if path.parent == EXAMPLES} - {"README.md"}


def test_readme_library_quick_start_prints_status_and_places(tmp_path: Path) -> None:
    block, _ = _blocks(ROOT / "README.md", "python")
    (tmp_path / "quick.py").write_text(block)
    done = _shell("python quick.py", tmp_path)
    first, *places = done.stdout.splitlines()
    status, count = map(int, first.split())
    assert status == 0
    assert count > 50
    assert len(places) == 5
    place = r"0xf[0-9a-f]{15} (\S+\+0x\w+( \[\w+\])?|pyroute2/plan9/\w+\.py:\S+)"
    assert all(re.fullmatch(place, line) for line in places), places


def test_readme_pytest_quick_start_passes_and_writes_the_report(tmp_path: Path) -> None:
    _, block = _blocks(ROOT / "README.md", "python")
    (command,) = [each for each in _blocks(ROOT / "README.md", "sh") if "pytest" in each]
    (tmp_path / "test_readme.py").write_text(block)
    done = _shell(command, tmp_path)
    assert "1 passed" in done.stdout
    assert "test_readme" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
