# SPDX-License-Identifier: Apache-2.0
"""Services of the host that a guest reaches by UDP, and on Unix sockets."""

from __future__ import annotations

import pytest
from dnslib import DNSRecord

from bridge.session.session import Session
from bridge.targets import TARGET_ADDRESS
from tests.support.named_calls import make_calls

pytestmark = pytest.mark.vm

DNS = {"target": "tests.system.stream_targets:DnsTarget", "source": "python"}
SMTP = {"target": "tests.system.stream_targets:SmtpTarget", "source": "python"}
CONNECT_DNS = f"udp {TARGET_ADDRESS} 53"


def question(name: str) -> str:
    """A call that asks for an address."""
    return f"write 0x{DNSRecord.question(name).pack().hex()}"


@pytest.mark.guest(**DNS)
def test_udp_server_the_read_of_the_answer_has_its_code(session: Session) -> None:
    asked, answer = make_calls(session, CONNECT_DNS, question("meter.test"), "read 512")
    assert asked.result > 0
    record = DNSRecord.parse(answer.data)
    assert str(record.a.rdata) == "192.0.2.7"
    assert asked.functions | answer.functions >= {
        "dnslib/server.py:DNSHandler.handle",
        "dnslib/dns.py:DNSRecord.parse",
        "dnslib/zoneresolver.py:ZoneResolver.resolve",
    }


@pytest.mark.guest(**DNS)
def test_udp_server_answers_in_a_guest_that_was_reset(session: Session) -> None:
    # The answer to this one is on its way when the guest is reset.
    make_calls(session, CONNECT_DNS, question("other.test"))
    session.reset()
    _, answer = make_calls(session, CONNECT_DNS, question("meter.test"), "read 512")
    assert str(DNSRecord.parse(answer.data).a.rdata) == "192.0.2.7"


@pytest.mark.guest(**DNS)
def test_udp_port_without_a_service_is_refused_in_the_guest(session: Session) -> None:
    _, answer = make_calls(session, f"udp {TARGET_ADDRESS} 54", question("meter.test"), "read 512")
    assert answer.error == "ECONNREFUSED"


@pytest.mark.guest(**DNS)
def test_udp_the_guest_reaches_no_other_address(session: Session) -> None:
    script = "exec 3<>/dev/udp/10.0.2.2/53; echo >&3; timeout 2 head -c 1 <&3; echo $?"
    result = session.run(["bash", "-c", script], timeout=30)
    assert result.text.strip() != "0"


@pytest.mark.guest(**SMTP)
def test_unix_server_each_read_has_the_code_of_its_answer(session: Session) -> None:
    calls = make_calls(
        session,
        f"tcp {TARGET_ADDRESS} 25",
        "read 512",
        f"write 0x{b'HELO guest'.hex()}0d0a",
        "read 512",
        f"write 0x{b'NOOP'.hex()}0d0a",
        "read 512",
    )
    greeting, said, hello, asked, noop = calls
    assert greeting.data.startswith(b"220 ")
    assert hello.data.startswith(b"250 ")
    first, second = said.functions | hello.functions, asked.functions | noop.functions
    assert "aiosmtpd/smtp.py:SMTP.smtp_HELO" in first - second
    assert "aiosmtpd/smtp.py:SMTP.smtp_NOOP" in second - first
