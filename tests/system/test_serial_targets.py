# SPDX-License-Identifier: Apache-2.0
"""Devices of the host at a guest's serial port and virtio port.

A write() to such a device may return when the host has answered already; then it, not the read() of
the answer, has the code of the answer.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest

from bridge.session.session import Session
from tests.support.named_calls import make_calls

pytestmark = pytest.mark.vm

EXAMPLES = Path(__file__).parents[2] / "examples"
METER = {"target": "modbus_target:MeterTarget", "source": "python"}
AGENT = {"target": "tests.system.stream_targets:AgentTarget", "source": "python"}
OPEN_METER = "open /dev/target/meter w"
READ_REGISTERS = 3
READ_TWO_REGISTERS = struct.pack(">BBHH", 1, READ_REGISTERS, 0, 2)


@pytest.fixture(autouse=True, scope="module")
def _examples_are_found() -> None:
    # To stay: the guest may be started again later.
    sys.path.append(str(EXAMPLES))


def checksum(frame: bytes) -> bytes:
    """The CRC-16 of "MODBUS over serial line", 2.5.1.2."""
    register = 0xFFFF
    for byte in frame:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0xA001 if register & 1 else 0)
    return struct.pack("<H", register)


def request(frame: bytes) -> str:
    return f"write 0x{(frame + checksum(frame)).hex()}"


def whole(size: int) -> str:
    """A command after which read() waits for so many bytes."""
    return f"stty -F /dev/target/meter min {size}"


@pytest.mark.guest(**METER)
def test_serial_meter_the_read_of_the_answer_has_its_code(session: Session) -> None:
    session.guest.run(whole(9), check=True)
    opened, written, answer = make_calls(session, OPEN_METER, request(READ_TWO_REGISTERS), "read 9")
    assert not opened.error
    assert written.result == len(READ_TWO_REGISTERS) + 2
    frame = struct.pack(">BBBHH", 1, READ_REGISTERS, 4, 2301, 523)
    assert answer.data == frame + checksum(frame)
    assert written.functions | answer.functions >= {
        "pymodbus/framer/rtu.py:FramerRTU.decode",
        "pymodbus/server/requesthandler.py:ServerRequestHandler.handle_request",
    }


@pytest.mark.guest(**METER)
def test_serial_meter_another_function_is_other_code(session: Session) -> None:
    session.guest.run(whole(5), check=True)
    # A register that the meter does not have.
    beyond = struct.pack(">BBHH", 1, READ_REGISTERS, 100, 1)
    _, written, answer = make_calls(session, OPEN_METER, request(beyond), "read 5")
    frame = struct.pack(">BBB", 1, READ_REGISTERS | 0x80, 2)
    assert answer.data == frame + checksum(frame)
    reached = written.functions | answer.functions
    assert "pymodbus/pdu/exceptionresponse.py:ExceptionResponse.encode" in reached


@pytest.mark.guest(**METER)
def test_serial_meter_a_reset_in_the_middle_of_a_request_leaves_nothing(session: Session) -> None:
    half = READ_TWO_REGISTERS[:4].hex()
    make_calls(session, OPEN_METER, f"write 0x{half}")
    session.reset()
    session.guest.run(whole(9), check=True)
    _, _, answer = make_calls(session, OPEN_METER, request(READ_TWO_REGISTERS), "read 9")
    assert answer.data[:3] == bytes([1, READ_REGISTERS, 4])


@pytest.mark.guest(**METER)
def test_serial_port_has_the_speed_that_was_set(session: Session) -> None:
    assert session.run("stty -F /dev/target/meter speed").text.strip() == "19200"
    assert "ttyS" in session.run("readlink /dev/target/meter").text


def message(**members: object) -> bytes:
    body = json.dumps({"jsonrpc": "2.0", **members}).encode()
    return f"Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.guest(**AGENT)
def test_virtio_agent_the_read_of_the_answer_has_its_code(session: Session) -> None:
    add = message(id=1, method="add", params={"left": 2, "right": 40})
    opened, written, answer = make_calls(
        session, "open /dev/target/agent w", f"write 0x{add.hex()}", "read 4096"
    )
    assert not opened.error
    assert written.result == len(add)
    assert json.loads(answer.data.partition(b"\r\n\r\n")[2])["result"] == 42
    assert written.functions | answer.functions >= {
        "pylsp_jsonrpc/endpoint.py:Endpoint._handle_request",
        "pylsp_jsonrpc/streams.py:JsonRpcStreamReader._read_message",
        "pylsp_jsonrpc/streams.py:JsonRpcStreamWriter.write",
    }


@pytest.mark.guest(**AGENT)
def test_virtio_agent_sees_a_new_connection_after_a_reset(session: Session) -> None:
    # The rest of the message would be taken for the next one's beginning.
    make_calls(session, "open /dev/target/agent w", f"write 0x{message(id=1)[:20].hex()}")
    session.reset()
    add = message(id=2, method="add", params={"left": 1, "right": 1})
    *_, answer = make_calls(
        session, "open /dev/target/agent w", f"write 0x{add.hex()}", "read 4096"
    )
    assert json.loads(answer.data.partition(b"\r\n\r\n")[2]) == {
        "jsonrpc": "2.0",
        "id": 2,
        "result": 2,
    }
