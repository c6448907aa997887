# SPDX-License-Identifier: Apache-2.0
"""Services of others as targets, behind drivers of the guest: what system calls reached in them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence

import pytest

from bridge.session.session import Session
from bridge.targets import MOUNT_POINT
from bridge.trace import Call

pytestmark = pytest.mark.vm


def traced(session: Session, script: str) -> Mapping[str, Sequence[Call]]:
    """Run a script of the guest's; return its system calls that reached the target, by name."""
    done = session.kcov(["sh", "-c", f"set -e; cd {MOUNT_POINT}\n{script}"], trace=True)
    assert done.exit_status == 0, done.stderr
    found: dict[str, list[Call]] = {}
    for call in done.calls:
        if call.host:
            found.setdefault(call.name, []).append(call)
    return found


def functions(calls: Sequence[Call]) -> set[str]:
    """The functions of the target that calls reached."""
    return {code.function for call in calls for code in call.host}


def needs(program: str, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        shutil.which(program) is None, reason=f"{program} is missing: apt-get install {package}"
    )


@needs("go", "golang-go")
@pytest.mark.guest(target="gonfs")
def test_gonfs_each_call_has_the_handler_of_its_operation(session: Session) -> None:
    calls = traced(
        session, "mkdir d; rmdir d; ln -s README l; echo text >f; mv f g; cat README; rm g l"
    )
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
