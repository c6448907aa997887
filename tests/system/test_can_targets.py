# SPDX-License-Identifier: Apache-2.0
"""Nodes on a CAN bus in Python, behind the real drivers of a guest: slcan and can_raw."""

from __future__ import annotations

import struct

import pytest

from bridge.session.session import Session
from bridge.targets.can import INTERFACE
from tests.support.named_calls import NamedCall, make_calls
from tests.system.can_targets import NAME, NODE, SPEED

pytestmark = [
    pytest.mark.vm,
    pytest.mark.guest(target="tests.system.can_targets:Drive", source="python"),
]

SERVER = "canopen/sdo/server.py:SdoServer"
FRAME = struct.Struct("=IB3x8s")
"""``struct can_frame`` of linux/can.h."""
READ, WRITE_2_BYTES, ABORT = 0x40, 0x2B, 0x80


def ask(session: Session, *requests: bytes) -> list[tuple[bytes, frozenset[str]]]:
    """Send requests to the node's SDO server; return each answer, and what ran for it."""
    calls = [f"can {INTERFACE}"]
    for request in requests:
        calls += [f"write 0x{FRAME.pack(0x600 + NODE, 8, request).hex()}", "read 16"]
    done: list[NamedCall] = list(make_calls(session, *calls))
    found = []
    for sent, received in zip(done[::2], done[1::2], strict=True):
        assert sent.result == received.result == FRAME.size, (sent, received)
        number, length, data = FRAME.unpack(received.data)
        assert (number, length) == (0x580 + NODE, 8)
        found.append((data, sent.functions | received.functions))
    return found


def request(command: int, index: int, data: bytes = b"") -> bytes:
    return struct.pack("<BHB4s", command, index, 0, data)


def test_can_node_answers_and_shows_what_ran(session: Session) -> None:
    (name, reading), (unknown, refusing) = ask(session, request(READ, NAME), request(READ, 0x5555))
    assert name[4:7] == b"drv"
    assert reading >= {f"{SERVER}.on_request", f"{SERVER}.init_upload"}
    assert f"{SERVER}.abort" not in reading
    assert unknown[0] == ABORT
    assert f"{SERVER}.abort" in refusing


def test_can_node_after_a_reset_is_on_the_bus_again(session: Session) -> None:
    ((done, writing),) = ask(session, request(WRITE_2_BYTES, SPEED, b"\x39\x30"))
    assert done[0] == 0x60
    assert f"{SERVER}.init_download" in writing
    session.reset()
    ((speed, _),) = ask(session, request(READ, SPEED))
    assert speed[4:6] == b"\x39\x30", "the node keeps what it was told"
