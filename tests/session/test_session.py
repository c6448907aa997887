# SPDX-License-Identifier: Apache-2.0
"""A session as a library has it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import bridge
from bridge.config import Settings
from bridge.errors import (
    GuestLostError,
    GuestSetupError,
    MissingDependencyError,
    RunTimeoutError,
    UsageError,
)
from bridge.guest.guest import Word
from bridge.session.events import Booted, Event, GuestLost, Reset, TraceBegan, TraceEnded
from bridge.session.session import Session


def test_api_every_name_is_there_and_import_is_cheap() -> None:
    program = (
        "import sys, bridge; cheap = set(sys.modules);"
        "assert not {m for m in cheap if m.startswith('bridge.')}, cheap;"
        "assert not {'paramiko', 'coverage', 'asyncio', 'qemu'} & cheap, cheap;"
        "print(all(getattr(bridge, name) is not None for name in bridge.__all__));"
        "print(len(bridge.__all__) == len(set(bridge.__all__)), bridge.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first == "True"
    assert second.startswith("True ")
    assert second.split()[1][0].isdigit()


def test_api_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bridge.nothing


def test_session_without_qemu_says_so_before_an_image_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(tmp_path))
    with (
        pytest.raises(MissingDependencyError, match=r"QEMU \(/nowhere/qemu\) is not installed"),
        bridge.boot(target="none", source="python", qemu="/nowhere/qemu"),
    ):
        pass
    assert not list(tmp_path.rglob("*")), "an image was begun"


@pytest.mark.parametrize("source", ["python", "kernel"])
def test_session_with_a_vmlinux_that_does_not_exist_says_so(tmp_path: Path, source: str) -> None:
    missing = tmp_path / "vmlinux"
    with (
        pytest.raises(UsageError, match=f"there is no file {missing}"),
        bridge.boot(target="none", accel="tcg", source=source, vmlinux=missing),
    ):
        pass


def test_session_that_was_not_entered_has_no_guest() -> None:
    session = Session(Settings())
    for part in ("guest", "device", "machine", "ready", "snapshot", "kernel"):
        with pytest.raises(UsageError, match="not entered") as caught:
            getattr(session, part)
        assert "with statement" in caught.value.hint
    with pytest.raises(UsageError, match="not entered"):
        session.kcov(["true"])
    stats = session.stats()
    assert (stats.accel, stats.kernel, stats.pcs, stats.instances) == ("unknown", None, 0, [])


def test_session_whose_start_fails_says_what_it_knew_and_is_not_entered_again(
    tmp_path: Path,
) -> None:
    session = Session(Settings(target="none", image="no-such-image", accel="tcg"), tmp_path)
    with pytest.raises(UsageError, match="no image 'no-such-image'"), session:
        raise AssertionError("it must not begin")
    assert session.stats().accel == "tcg"
    with pytest.raises(UsageError, match="entered once"), session:
        raise AssertionError("it must not begin")


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with bridge.boot(target="none", source="python", syscall_pcs=True) as session:
        yield session


@pytest.mark.vm
class TestInAGuest:
    def test_session_put_and_get_take_text_paths_and_bytes(
        self, session: Session, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_bytes(b"\x00\xffcontent")
        session.put(tmp_path / "file", "/tmp/one")
        session.put(str(tmp_path / "file"), Path("/tmp/two"), 0o755)
        session.put(b"#!/bin/sh\necho written\n", "/tmp/it's three", 0o755)
        assert session.run(["/tmp/it's three"]).stdout == b"written\n"
        assert session.run("stat -c %a /tmp/one /tmp/two").text == "644\n755\n"
        session.get("/tmp/one", str(tmp_path / "back"))
        session.get(Path("/tmp/two"), tmp_path / "again")
        assert (tmp_path / "back").read_bytes() == b"\x00\xffcontent"
        assert (tmp_path / "again").read_bytes() == b"\x00\xffcontent"
        with pytest.raises(UsageError, match="cannot be read"):
            session.put(tmp_path / "none", "/tmp/none")
        with pytest.raises(GuestSetupError, match="cannot read /tmp/none"):
            session.get("/tmp/none", tmp_path / "none")
        assert not (tmp_path / "none").exists()

    def test_session_commands_are_text_bytes_or_paths(self, session: Session) -> None:
        words: list[Word] = ["printf", b"%s|", "it's", b"a\xffb", Path("/tmp/x"), "\udcfe", ""]
        for run in (session.run, session.kcov):
            result = run(words)
            assert result.stdout == b"it's|a\xffb|/tmp/x|\xfe||"
        assert session.run(b"echo a line \xff").stdout == b"a line \xff\n"
        traced = session.kcov("echo a line; exit 3")
        assert (traced.exit_status, traced.stdout) == (3, b"a line\n")
        assert traced.pcs
        with pytest.raises(UsageError, match="NUL"):
            session.run(["echo", "a\0b"])

    @pytest.mark.parametrize(
        "error",
        [
            GuestSetupError("no grep"),
            RunTimeoutError("too slow"),
            GuestLostError("gone"),
            KeyboardInterrupt(),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_session_kcov_without_the_names_of_modules_keeps_the_pcs(
        self,
        session: Session,
        error: BaseException,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(session._running.watch, "load_symbols", fail)
        if isinstance(error, GuestSetupError | RunTimeoutError):
            assert session.kcov(["true"]).pcs
            assert f"have no names: {error.message}" in caplog.text
            return
        session.partial_pcs = ()
        with pytest.raises(type(error)):
            session.kcov(["true"])
        assert session.partial_pcs

    def test_session_stats_are_those_of_status(self, session: Session) -> None:
        before = session.stats()
        session.kcov(["true"])
        after = session.stats()
        assert after.pcs > before.pcs
        assert after.returns > before.returns
        assert after.kernel == session.ready.kernel
        status = session.status()
        assert status["pid"] == os.getpid()
        assert {**status, "returns": 0} == {**after.as_dict(), "pid": os.getpid(), "returns": 0}

    def test_session_events_come_in_order(self, session: Session) -> None:
        seen: list[Event] = []
        leave = session.events.subscribe(seen.append)
        result = session.kcov(["sh", "-c", "exit 3"])
        with pytest.raises(bridge.RunTimeoutError):
            session.kcov(["sleep", "60"], timeout=1)
        session.reset()
        leave()
        session.kcov(["true"])
        command = ("sh", "-c", "exit 3")
        assert seen == [
            TraceBegan(command),
            TraceEnded(command, 3, len(result.pcs)),
            TraceBegan(("sleep", "60")),
            TraceEnded(("sleep", "60"), None, 0),
            Reset(session.resets),
        ]

    def test_session_beside_another_in_one_process(self, session: Session) -> None:
        """Each has a device, a region and a guest of its own."""
        settings = Settings(target="none", source="python", syscall_pcs=True)
        with Session(settings) as other:
            before = session.stats().pcs
            result = other.kcov(["true"])
            assert result.pcs
            assert session.stats().pcs == before
            assert other.stats().pcs >= len(result.pcs)
            other.reset()
            assert (other.resets, other.stats().resets) == (1, 1)
            assert session.kcov(["true"]).pcs
            assert other.machine.pid != session.machine.pid
        assert session.kcov(["true"]).pcs


@pytest.mark.vm
def test_session_whose_guest_is_lost_publishes_it_and_keeps_its_figures() -> None:
    session = bridge.boot(target="none", source="python", syscall_pcs=True)
    seen: list[Event] = []
    session.events.subscribe(seen.append)
    with session:
        session.kcov(["true"])
        os.kill(session.machine.pid, signal.SIGKILL)
        with pytest.raises(GuestLostError):
            session.run("sleep 60")
        end = time.monotonic() + 30
        while not isinstance(seen[-1], GuestLost) and time.monotonic() < end:
            time.sleep(0.01)
    booted, *_, lost = seen
    assert isinstance(booted, Booted)
    assert booted.kernel == session.ready.kernel
    assert isinstance(lost, GuestLost)
    assert "SIGKILL" in lost.error.report()
    stats = session.stats()
    assert stats.pcs > 0
    assert stats.instances == [], "those of a session that has ended are gone"


@pytest.mark.vm
def test_session_guest_whose_symbols_have_no_end_costs_no_pcs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    flood = "#!/bin/sh\nexec cat /dev/zero\n"
    with bridge.boot(target="none", source="kernel") as session:
        session.put(flood.encode(), "/tmp/flood", 0o755)
        session.run("mount --bind /tmp/flood $(command -v grep)")
        assert session.kernel is not None
        session.kernel.unnamed = True  # as after modprobe
        result = session.kcov(["true"])
        assert result.exit_status == 0
        assert result.pcs
        assert "have no names: the symbols of the guest's modules have more than" in caplog.text
        assert session.run(["true"]).exit_status == 0
