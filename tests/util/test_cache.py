# SPDX-License-Identifier: Apache-2.0
"""Where the cache is, how it is written, and who may write."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridge.errors import CacheError
from bridge.util.cache import cache_directory, cache_errors, cache_folder, lock_file, locked
from tests.support import Program

ROOT = Path(__file__).resolve().parents[2]


def test_cache_directory_environment_set_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", "/some/where")
    assert cache_directory() == Path("/some/where")
    monkeypatch.delenv("KCOV_BRIDGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == Path("/xdg/kcov-bridge")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/somebody")
    assert cache_directory() == Path("/somebody/.cache/kcov-bridge")


HOLDER = """
import sys, time
from pathlib import Path
from bridge.util.cache import locked
with locked(Path(sys.argv[1]), "it", lambda text: print(text, flush=True)):
    print("held", flush=True)
    sys.stdin.read()
"""


def start_holder(path: Path) -> Program:
    return Program(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_locked_second_process_waits_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "it"
    with start_holder(path) as first:
        assert first.stdin is not None
        assert first.line() == "held\n"
        with start_holder(path) as second:
            assert second.stdin is not None
            assert second.stdout is not None
            assert second.line() == f"waiting for process {first.pid}, which is making it\n"
            first.stdin.close()
            assert second.line() == "held\n"
            second.stdin.close()
            assert second.stdout.read() == ""


def test_locked_holder_killed_lock_goes_with_its_last_child(tmp_path: Path) -> None:
    path = tmp_path / "it"
    # When the holder is killed, the program gets SIGTERM first (bridge.util.supervise).
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from bridge.util.commands import *\n"
        "from bridge.util.cache import locked\n"
        "with locked(Path(sys.argv[1]), 'it', print) as fd:\n"
        "    commands = Commands(Path(sys.argv[1] + '.log'), Phases(print), (fd,))\n"
        "    commands.run(['sh', '-c', 'trap \"\" TERM; echo on; exec sleep 2'], what='sleeping')\n"
    )
    builder = subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT)
    log = tmp_path / "it.log"
    while not log.exists() or "\non\n" not in log.read_text():
        time.sleep(0.01)
    builder.kill()
    builder.wait()
    with path.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lines: list[str] = []
    with locked(path, "it", lines.append):
        assert len(lines) == 1


def test_cache_folder_missing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path / "a" / "b"))
    assert cache_folder("kernels", private=True) == tmp_path / "a" / "b" / "kernels"
    assert (tmp_path / "a" / "b" / "kernels").stat().st_mode & 0o777 == 0o700
    assert cache_folder("kernels").is_dir()


def test_cache_folder_cannot_be_made_raises_cache_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(CacheError, match="Not a directory") as caught:
        cache_folder("plugins")
    assert "KCOV_BRIDGE_CACHE" in caught.value.hint
    with pytest.raises(CacheError, match="the lock of it"), locked(lock_file("it"), "it", print):
        pass


def test_cache_errors_disk_full_names_what_and_why() -> None:
    with pytest.raises(CacheError, match=r"cannot write it .*No space left"), cache_errors("it"):
        Path("/dev/full").write_bytes(b"x")
