# SPDX-License-Identifier: Apache-2.0
"""What guest and user see of a target that fails, or that lacks something in the guest."""

from __future__ import annotations

from pathlib import Path

import pytest

import bridge
from bridge.errors import BridgeError, GuestSetupError, TargetError
from bridge.session.session import Session
from bridge.sources.python.hooks import MEASURING
from bridge.targets import TARGET_ADDRESS
from tests.support.coverage_data import executed
from tests.support.named_calls import NamedCall, make_calls
from tests.system import fault_targets

pytestmark = pytest.mark.vm

SERVICE = "tests/system/faulty_service.py"
FAULTY = {"target": "tests.system.fault_targets:FaultyTarget", "source": "python"}
WAYS = {
    "serial": "open /dev/target/serial w",
    "virtio": "open /dev/target/virtio w",
    "unix": f"tcp {TARGET_ADDRESS} 70",
    "udp": f"udp {TARGET_ADDRESS} 70",
}


def ask(session: Session, way: str, request: str) -> tuple[NamedCall, frozenset[str]]:
    """Send a line; return the read of the answer, and what both calls reached."""
    line = f"{request}\n".encode().hex()
    *_, written, answer = make_calls(session, WAYS[way], f"write 0x{line}", "read 64")
    return answer, written.functions | answer.functions


def tell(session: Session, way: str, request: str) -> None:
    """Send a line to which no answer comes."""
    make_calls(session, WAYS[way], f"write 0x{request.encode().hex()}0a")


@pytest.mark.guest(**FAULTY)
@pytest.mark.parametrize("way", WAYS)
def test_target_that_answers_late_is_found_by_the_call_that_waited(
    session: Session, way: str
) -> None:
    answer, reached = ask(session, way, "late")
    assert answer.data.strip() == b"etal"
    assert f"{SERVICE}:after_a_while" in reached


@pytest.mark.guest(**FAULTY)
@pytest.mark.parametrize(
    ("way", "fault"),
    [
        (way, fault)
        for way in WAYS
        for fault in ("raise", "exit", "close")
        # A datagram has no connection that could be closed.
        if (way, fault) != ("udp", "close")
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_target_that_fails_in_a_request_serves_a_guest_that_was_reset(
    session: Session, way: str, fault: str
) -> None:
    tell(session, way, fault)
    session.reset()
    answer, _ = ask(session, way, "hello")
    assert answer.data.strip() == b"HELLO"


@pytest.mark.guest(**FAULTY)
def test_guest_files_are_there_after_a_reset_too(session: Session) -> None:
    session.run("rm /etc/target")
    session.reset()
    assert session.run("cat /etc/target; stat -c %a /etc/target").text == "the target's\n600\n"


@pytest.mark.parametrize(
    ("target", "error", "message", "hint"),
    [
        (
            "DeafTarget",
            TargetError,
            "QEMU cannot connect a device to the target faulty",
            "must listen at the address",
        ),
        (
            "NoModule",
            GuestSetupError,
            "has no kernel module floppy, which the target needs",
            "kcov-bridge image build --module floppy",
        ),
        (
            "NoPackage",
            GuestSetupError,
            "lacks packages that the target faulty needs: cifs-utils",
            "kcov-bridge image build --include cifs-utils",
        ),
        ("NoMount", GuestSetupError, "could not set up the target faulty", ""),
    ],
)
def test_start_without_what_the_target_needs_says_what_to_do(
    target: str, error: type[BridgeError], message: str, hint: str
) -> None:
    name = f"{fault_targets.__name__}:{target}"
    with pytest.raises(error) as caught, bridge.boot(target=name, source="python"):
        pass
    assert message in caught.value.message
    assert hint in caught.value.hint
    if target == "NoMount":
        assert "nosuchdisk" in caught.value.evidence


def test_start_that_does_not_return_is_shown_where_it_is(tmp_path: Path) -> None:
    name = f"{fault_targets.__name__}:NeverReady"
    with (
        pytest.raises(TargetError, match="did not return on start within 1 s") as caught,
        bridge.boot(target=name, source="python", target_timeout=1.0, out=tmp_path),
    ):
        pass
    assert MEASURING.feeds == [], "the measurement ends, although the target's thread is stuck"
    assert executed(tmp_path / ".coverage"), "the coverage data is written"
    assert "self.servers[0].serve_forever()" in caught.value.evidence
    assert "thread of its own" in caught.value.hint
