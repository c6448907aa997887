# SPDX-License-Identifier: Apache-2.0
"""A source and a guest for tests of the doorbell, without a virtual machine."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Sequence

from bridge.device import abi
from bridge.device.abi import HeaderWord, HostState, Op, RequestWord, ResponseWord
from bridge.device.region import Region

WORDS = 512
TASK = 0x1_0000_0010


class Counting:
    """Each collect hands over the next number; ``broken`` makes it raise."""

    def __init__(self) -> None:
        self.next = 0
        self.broken = False
        self.delay = 0.0

    def open_cursor(self) -> int:
        return 0

    def collect(self, cursor: int, since: int = 0) -> Sequence[int]:
        if self.broken:
            raise RuntimeError("the source is broken")
        if self.delay:
            time.sleep(self.delay)
        self.next += 1
        return [self.next]

    def close_cursor(self, cursor: int) -> None:
        assert cursor == 0


class FakeGuest:
    """What the module does, over a mapping of its own of the same memory."""

    def __init__(self, region: Region, bell: int) -> None:
        self.control = region.control
        self.bell = bell
        self.sequence = random.getrandbits(32)
        self.lock = threading.Lock()

    def post(self, slot: int, op: int, generation: int, *, task: int = TASK, **args: int) -> int:
        with self.lock:
            self.sequence += 1
            sequence = self.sequence
        at = abi.REQUESTS_OFFSET // 8 + slot * abi.SLOT_WORDS
        self.control[at + RequestWord.OP] = op
        self.control[at + RequestWord.GENERATION] = generation
        self.control[at + RequestWord.TASK] = task
        for index in range(3):
            self.control[at + RequestWord.ARG0 + index] = args.get(f"arg{index}", 0)
        self.control[at + RequestWord.SEQ] = sequence
        return sequence

    def kick(self, slot: int) -> None:
        with self.lock:
            count = self.control[HeaderWord.KICK] >> abi.KICK_SLOT_BITS
            self.control[HeaderWord.KICK] = (count + 1) << abi.KICK_SLOT_BITS | slot
        if self.control[HeaderWord.HOST_STATE] != HostState.AWAKE:
            os.eventfd_write(self.bell, 1)

    def answer(self, slot: int, word: ResponseWord) -> int:
        value: int = self.control[abi.RESPONSES_OFFSET // 8 + slot * abi.SLOT_WORDS + word]
        return value

    def wait(self, slot: int, sequence: int, seconds: float = 10) -> bool:
        end = time.monotonic() + seconds
        while self.answer(slot, ResponseWord.SEQ) != sequence:
            if time.monotonic() > end:
                return False
            time.sleep(0)
        return True

    def call(self, slot: int, op: int, generation: int = 1, **args: int) -> int:
        sequence = self.post(slot, op, generation, **args)
        self.kick(slot)
        assert self.wait(slot, sequence), "no answer"
        return self.answer(slot, ResponseWord.ERROR)

    def trace(self, slot: int, generation: int = 1, task: int = TASK) -> None:
        assert self.call(slot, Op.INIT, generation, arg0=WORDS) == 0
        assert self.call(slot, Op.MAP, generation, arg0=WORDS * 8) == 0
        assert self.call(slot, Op.ENABLE, generation, task=task) == 0
