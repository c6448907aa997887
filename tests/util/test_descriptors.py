# SPDX-License-Identifier: Apache-2.0
"""What is written is written whole."""

from __future__ import annotations

import os
import threading

import pytest

from bridge.util.descriptors import write_all


def test_write_all_waits_for_a_pipe_that_does_not_block() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    data = os.urandom(1 << 20)
    received = bytearray()

    def read() -> None:
        while chunk := os.read(reading, 10_000):
            received.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    write_all(writing, data)
    os.close(writing)
    reader.join()
    os.close(reading)
    assert received == data


def test_write_all_raises_what_cannot_be_written() -> None:
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space"):  # noqa: PTH123
        write_all(full.fileno(), b"data")
