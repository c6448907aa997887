# SPDX-License-Identifier: Apache-2.0
"""Programs of others as targets, built from their projects' source: a system call reaches them."""

from __future__ import annotations

import pytest

from bridge.session.session import Session
from bridge.trace.table import rows
from bridge.trace.text import call_text
from tests.support.native import needs_clang

pytestmark = [pytest.mark.vm, needs_clang]


@pytest.mark.guest(target="nbdkit", source="python,kernel")
def test_nbdkit_calls_reach_it_through_the_kernels_driver(session: Session) -> None:
    script = (
        "dd if=/dev/zero of=/dev/nbd0 bs=4096 count=2 conv=fsync,notrunc\n"
        "dd if=/dev/nbd0 of=/dev/null bs=4096 count=2 iflag=direct\n"
    )
    done = session.kcov(["sh", "-c", script], trace=True)
    assert done.exit_status == 0, done.stderr
    reached = {
        name: [call for call in done.calls if call.name == name and "nbd" in dict(call.modules)]
        for name in ("fsync", "read")
    }
    (flushed,) = reached["fsync"]
    assert len(reached["read"]) == 2
    for call in (flushed, *reached["read"]):
        assert "nbd_queue_rq" in dict(call.modules)["nbd"]
        functions = {code.function for code in call.host}
        assert {"protocol_recv_request_send_reply", "validate_request"} <= functions
        text = call_text(call)
        assert text.index("→ kernel: ") < text.index("→ nbd: ") < text.index("protocol.c: ")

    # What the cache holds back reaches the plugin when it is flushed.
    by_name = {row.name: row for row in rows(done.calls)}
    fsync, read = by_name["fsync"], by_name["read"]
    assert {"cache_pwrite", "cache_flush", "plugin_pwrite", "do_write"} <= set(fsync.functions)
    assert "backend_pread" in read.functions
    assert "cache_flush" not in read.functions
    assert 0 < fsync.own < fsync.blocks < 300

    made = session.kcov(["mkfs.ext4", "-q", "-F", "/dev/nbd0"])
    assert made.exit_status == 0, made.stderr
    kept = session.run("mount /dev/nbd0 /mnt && echo kept >/mnt/file && umount /mnt")
    assert kept.exit_status == 0, kept.stderr
    stats = session.stats()
    assert 400 < stats.blocks_covered < stats.blocks_total
