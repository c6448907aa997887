# SPDX-License-Identifier: Apache-2.0
"""Tests of the key-value server through the sockets of a real Linux: ``pytest test_key_value.py``.

Each test finds the guest as it was when it became ready.
"""

from __future__ import annotations

import pytest

from bridge.pytest_plugin import Guest, Kcov

pytestmark = pytest.mark.guest(target="key_value_target:KeyValueTarget", source="python")

ASK = 'exec 3<>/dev/tcp/target/7000; echo "$0" >&3; head -n 1 <&3'


def ask(guest: Guest, line: str) -> str:
    return guest.succeed(["bash", "-c", ASK, line]).strip()


def test_value_is_kept(guest: Guest) -> None:
    assert ask(guest, "set colour blue") == "stored"
    assert ask(guest, "get colour") == "blue"


def test_wrong_line_is_answered(guest: Guest, kcov: Kcov) -> None:
    with kcov.trace() as trace:
        assert ask(guest, "what is this") == "error"
    trace.assert_covered("key_value.py:Handler.handle", "key_value.py:Store.answer")
    # The line that stores a value.
    trace.assert_not_covered("key_value.py:20")


def test_get_reaches_other_lines_than_set(guest: Guest, kcov: Kcov) -> None:
    with kcov.trace() as setting:
        ask(guest, "set size 3")
    with kcov.trace() as getting:
        ask(guest, "get size")
    assert getting.new_since(setting)
