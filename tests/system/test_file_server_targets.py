# SPDX-License-Identifier: Apache-2.0
"""File servers in Python, mounted by the real clients of a guest: cifs."""

from __future__ import annotations

import pytest

from bridge.session.session import Session
from tests.support.named_calls import make_calls
from tests.system.file_server_targets import TEXT

pytestmark = [
    pytest.mark.vm,
    pytest.mark.guest(target="tests.system.file_server_targets:Smb", source="python"),
]

FILES = "quicksand_smb/_files.py"
QUERY = "quicksand_smb/_query.py"


def test_smb_each_call_reaches_its_request(session: Session) -> None:
    opened, read, closed, listed, missing = make_calls(
        session,
        "open /mnt/target/file r",
        "read 64",
        "close",
        "list /mnt/target",
        "stat /mnt/target/missing",
    )
    assert f"{FILES}:handle_create" in opened.functions
    assert read.data == TEXT.encode()
    assert f"{FILES}:handle_read" in read.functions - opened.functions
    assert f"{FILES}:handle_close" in closed.functions
    assert f"{QUERY}:handle_query_directory" in listed.functions - opened.functions
    assert missing.error == "ENOENT"
    assert f"{FILES}:handle_create" in missing.functions


def test_smb_files_are_made_renamed_and_removed(session: Session) -> None:
    made, written, closed, renamed, removed = make_calls(
        session,
        "open /mnt/target/new wct",
        "write text",
        "close",
        "rename /mnt/target/new /mnt/target/newer",
        "unlink /mnt/target/newer",
    )
    for call in (made, written, closed, renamed, removed):
        assert not call.error, call
    assert f"{FILES}:handle_write" in written.functions
    assert f"{QUERY}:handle_set_info" in renamed.functions - written.functions
    # The client asks for a removal when it opens the file; closing it does it.
    assert f"{FILES}:handle_close" in removed.functions


def test_smb_share_is_mounted_again_after_a_reset(session: Session) -> None:
    session.guest.run("echo text >/mnt/target/kept", check=True)
    session.reset()
    assert session.run("cat /mnt/target/kept").text == "text\n"
