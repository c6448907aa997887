# SPDX-License-Identifier: Apache-2.0
"""A slot without a VM: the bridge's side of a shim, and a small C program in the guest's place.

``null_vm.c`` says what the "guest" does with a case.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bridge.fuzz import messages
from bridge.fuzz.board import Board, BoardLayout, BoardState, BoardWord, Fold, TraceArea
from bridge.fuzz.lane import (
    LANE_BYTES,
    LANE_INPUT_BYTES,
    LANE_INPUT_OFFSET,
    LANE_OUTPUT_BYTES,
    LANE_OUTPUT_OFFSET,
    LaneWord,
)
from bridge.util.compile import CProgram
from bridge.util.resources import guest_directory
from bridge.vm.process import Process, spawn

__all__ = ["NullSlot", "null_vm_program"]

_LANE = 4096
_AREA_WORDS = 512
_AREAS = (_LANE + LANE_BYTES, _LANE + LANE_BYTES + 4096)
_BYTES = _AREAS[-1] + 4096


def null_vm_program() -> Path:
    """Return the compiled program that stands for the guest."""
    agent = guest_directory() / "agent"
    return CProgram(
        "the null VM",
        Path(__file__).with_name("null_vm.c"),
        ("-O2", "-Wall", "-Wextra", "-Werror", f"-I{agent}"),
        "tests",
        (agent / "lane.h",),
    ).build()


class NullSlot:
    """Serves shims one after another on :attr:`socket`, until it is closed.

    Attributes:
        received: what the shims said, each with the case that was in the lane.
        resets: how often the "guest" was started anew.
        replace_machine: a reset that the shim wants gives it another machine.
    """

    def __init__(
        self,
        directory: Path,
        *,
        noop: bool = False,
        covers: bool = True,
        map_size: int = 1 << 16,
        fold: Fold = Fold.EDGES,
        reset_every: int = 0,
        spin_ns: int = 50_000,
        blind: bool = False,
        exit_is_suspect: bool = False,
    ) -> None:
        self.socket = directory / "slot"
        self.received: list[tuple[messages.Message, bytes]] = []
        self.resets = 0
        self.replace_machine = False
        self._behaviour = "noop" if noop else "" if covers else "nothing"
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self._region = os.memfd_create("null-region")
            stack.callback(os.close, self._region)
            os.ftruncate(self._region, _BYTES)
            self._memory = mmap.mmap(self._region, _BYTES)
            stack.callback(lambda: self._memory.close())
            layout = BoardLayout(
                _LANE,
                LANE_BYTES,
                _LANE + LANE_INPUT_OFFSET,
                LANE_INPUT_BYTES,
                _LANE + LANE_OUTPUT_OFFSET,
                LANE_OUTPUT_BYTES,
                [TraceArea(offset, _AREA_WORDS) for offset in _AREAS],
                map_size=map_size,
                fold=fold,
                reset_every=reset_every,
                spin_ns=spin_ns,
                blind=blind,
                exit_is_suspect=exit_is_suspect,
            )
            self.board = stack.enter_context(Board(layout))
            self._listener = stack.enter_context(
                socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            )
            self._listener.bind(str(self.socket))
            self._listener.listen(8)
            self._connection: socket.socket | None = None
            self._closing = False
            self._vm = self._start_vm()
            stack.callback(lambda: self._vm.kill())
            self.board.state = BoardState.READY
            self._thread = threading.Thread(target=self._serve, name="null-slot")
            self._thread.start()
            stack.callback(self._thread.join)
            stack.callback(self._hang_up)
            self._stack = stack.pop_all()

    @property
    def stand_in(self) -> int:
        """The process that stands for the VM."""
        return self.board[BoardWord.STAND_IN]

    @property
    def vm_pid(self) -> int:
        """The process in the guest's place."""
        return self._vm.pid

    def cases(self, kind: type[messages.Message]) -> list[bytes]:
        """Return the cases about which shims sent messages of a kind."""
        return [case for message, case in self.received if isinstance(message, kind)]

    def word(self, word: LaneWord) -> int:
        """Return a word of the lane's control page."""
        place = _LANE + word * 8
        return int.from_bytes(self._memory[place : place + 8], "little")

    def present_case(self) -> bytes:
        """Return the case that lies in the lane."""
        return self._case()

    def counts(self) -> list[int]:
        """Return how many PCs each trace area has."""
        return [int.from_bytes(self._memory[each : each + 8], "little") for each in _AREAS]

    def wait_for(self, kind: type[messages.Message], seconds: float = 30) -> bytes:
        """Return the case of the first message of a kind, which may still come."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if cases := self.cases(kind):
                return cases[0]
            time.sleep(0.01)
        raise AssertionError(f"no {kind.__name__} in {seconds} s, but {self.received[-5:]}")

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment for a shim or its engine."""
        return {**os.environ, "KCOV_BRIDGE_SLOT": str(self.socket), **more}

    def reset(self) -> None:
        """Start the "guest" anew, as a slot does that resets for reasons of its own."""
        self.board.state = BoardState.RESETTING
        self._vm.kill()
        self.resets += 1
        self._vm = self._start_vm()
        self.board.add_epoch()
        self.board.state = BoardState.READY

    def _replace(self) -> None:
        """Take another region, as a slot whose machine is beyond a reset."""
        other = os.memfd_create("null-region")
        os.ftruncate(other, _BYTES)
        os.dup2(other, self._region)
        os.close(other)
        self._memory.close()
        self._memory = mmap.mmap(self._region, _BYTES)
        self.reset()
        self.board.last_case = 0

    def close(self) -> None:
        """End everything."""
        self._stack.close()

    def __enter__(self) -> NullSlot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_vm(self) -> Process:
        generation = self.word(LaneWord.GENERATION) + 1
        self._set(LaneWord.GENERATION, generation)
        words = [self._region, _LANE, _AREA_WORDS, *_AREAS]
        vm = spawn(
            [null_vm_program(), *map(str, words), *filter(None, [self._behaviour])],
            pass_fds=[self._region],
            on_end=lambda process: self._died(process),
        )
        while self.word(LaneWord.READY) != generation:
            assert vm.running, "the null VM did not start"
            time.sleep(0.001)
        return vm

    def _died(self, process: Process) -> None:
        if process.returncode == 0:  # it was not killed
            self.board.add_fault()

    def _set(self, word: LaneWord, value: int) -> None:
        place = _LANE + word * 8
        self._memory[place : place + 8] = value.to_bytes(8, "little")

    def _case(self) -> bytes:
        start = _LANE + LANE_INPUT_OFFSET
        return self._memory[start : start + self.word(LaneWord.LENGTH)]

    def _hang_up(self) -> None:
        self._closing = True
        self.board.state = BoardState.GONE
        for each in (self._listener, self._connection):
            if each is not None:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        """Serve the newest shim: afl-showmap starts a second one beside its first."""
        while not self._closing:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self._connection = connection
                with contextlib.suppress(ConnectionError):
                    for message in self._messages(connection):
                        self._answer(connection, message)
            if self.word(LaneWord.DONE) != self.word(LaneWord.CASE_NUMBER):
                self.reset()

    def _messages(self, connection: socket.socket) -> Iterator[messages.Message]:
        while not self._closing:
            ready, _, _ = select.select([connection, self._listener], [], [])
            if connection not in ready:
                return
            if (message := messages.receive(connection)) is None:
                return
            self.received.append((message, self._case()))
            yield message

    def _answer(self, connection: socket.socket, message: messages.Message) -> None:
        self.board.last_case = self.word(LaneWord.CASE_NUMBER)
        match message:
            case messages.Hello():
                messages.send_welcome(connection, self._region, self.board.fd, self._region)
                return
            case messages.ShimFailed():
                return
            case messages.NewCells():
                pass
            case messages.ResetWanted() if self.replace_machine:
                self._replace()
                messages.send_welcome(connection, self._region, self.board.fd, self._region)
                return
            case _:
                self.reset()
        messages.send_go(connection)
