# SPDX-License-Identifier: Apache-2.0
"""Services of others as targets, behind drivers of the guest: what system calls reached in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from bridge.config import Settings
from bridge.session.session import Session
from bridge.targets import MOUNT_POINT
from bridge.targets.programs.build import Program
from bridge.targets.programs.gonfs import GONFS
from bridge.targets.programs.mstpm import MSTPM
from bridge.targets.programs.virtiofsd import VIRTIOFSD
from bridge.trace import Call
from bridge.vm.network import served_devices

pytestmark = pytest.mark.vm


GET_RANDOM = r"\200\001\0\0\0\014\0\0\001\173\0\010"
"""TPM2_GetRandom for 8 bytes, for printf."""


def traced(session: Session, script: str) -> Mapping[str, Sequence[Call]]:
    """Run a script of the guest's; return its system calls that reached the target, by name."""
    done = session.kcov(["sh", "-c", f"set -e\n{script}"], trace=True)
    assert done.exit_status == 0, done.stderr
    found: dict[str, list[Call]] = {}
    for call in done.calls:
        if call.host:
            found.setdefault(call.name, []).append(call)
    return found


def functions(calls: Sequence[Call]) -> set[str]:
    """The functions of the target that calls reached."""
    return {code.function for call in calls for code in call.host}


def needs_tools(program: Program) -> pytest.MarkDecorator:
    """Skip where a program cannot be built."""
    missing = " ".join(program.missing())
    return pytest.mark.skipif(bool(missing), reason=f"no {missing}: apt-get install {missing}")


@needs_tools(GONFS)
@pytest.mark.guest(target="gonfs")
def test_gonfs_each_call_has_the_handler_of_its_operation(session: Session) -> None:
    work = "mkdir d; rmdir d; ln -s README l; echo text >f; mv f g; cat README; rm g l"
    calls = traced(session, f"cd {MOUNT_POINT}; {work}")
    for name, handler in (
        ("mkdir", "onMkdir"),
        ("symlinkat", "onSymlink"),
        ("rmdir", "onRmDir"),
        ("write", "onWrite"),
        ("read", "onRead"),
        ("renameat", "onRename"),
        ("unlinkat", "onRemove"),
    ):
        assert f"github.com/willscott/go-nfs.{handler}" in functions(calls[name]), name
    others = set(calls) - {"mkdir"}
    assert not any("onMkdir" in each for name in others for each in functions(calls[name]))
    (code,) = (each for each in calls["mkdir"][0].host if each.function.endswith(".onMkdir"))
    assert code.file.endswith("github.com/willscott/go-nfs/nfs_onmkdir.go")
    stats = session.stats()
    assert 300 < stats.blocks_covered < stats.blocks_total


@needs_tools(VIRTIOFSD)
def test_virtiofsd_each_call_has_the_handler_of_its_operation(tmp_path: Path) -> None:
    settings = Settings(target="virtiofsd", source="python", target_dir=tmp_path / "served")
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "README").write_text("text\n")
    with Session(settings, tmp_path / "out") as session:
        work = "mkdir d; rmdir d; echo text >f; mv f g; cat README"
        calls = traced(session, f"cd {MOUNT_POINT}; {work}")
        stats = session.stats()
        assert not session.target_problems()
        assert served_devices(session.target.devices) == {"files"}
    for name, handler in (
        ("mkdir", "mkdir"),
        ("rmdir", "rmdir"),
        ("write", "write"),
        ("renameat2", "rename2"),
        ("read", "read"),
    ):
        assert f"{handler}<virtiofsd::passthrough::PassthroughFs>" in functions(calls[name]), name
    others = functions([call for name in set(calls) - {"mkdir"} for call in calls[name]])
    assert "mkdir<virtiofsd::passthrough::PassthroughFs>" not in others
    assert 1000 < stats.blocks_covered < stats.blocks_total


@needs_tools(MSTPM)
def test_mstpm_a_command_is_executed_during_its_write(tmp_path: Path) -> None:
    script = f"exec 3<>/dev/target/tpm; printf '{GET_RANDOM}' >&3; head -c 20 <&3 | od -An -v -tx1"
    with Session(Settings(target="mstpm", source="python"), tmp_path) as session:
        done = session.kcov(["sh", "-c", script], trace=True)
        stats = session.stats()
    # TPM_ST_NO_SESSIONS, the size, no error, and 8 bytes.
    assert done.stdout.decode().strip().startswith("80 01 00 00 00 14 00 00 00 00 00 08")
    (write,) = (call for call in done.calls if "TPM2_GetRandom" in functions([call]))
    assert write.name == "write"
    assert {"ExecuteCommand", "CommandDispatcher", "DRBG_Generate"} <= functions([write])
    assert 500 < stats.blocks_covered < stats.blocks_total
