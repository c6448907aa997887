# SPDX-License-Identifier: Apache-2.0
"""The engine's side of the fork-server protocol, for tests that look at each word of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import struct
import subprocess
from pathlib import Path

from bridge.fuzz.shim import shim_program

__all__ = ["EngineDriver"]

_REQUESTS, _ANSWERS = 198, 199
_CASE_BYTES = (1 << 20) + 4
_IPC_CREAT, _IPC_RMID = 0o1000, 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.shmat.restype = ctypes.c_void_p
_libc.shmat.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_libc.shmdt.argtypes = (ctypes.c_void_p,)


class _SharedMemory:
    """A segment of System V's, which ends with the last process that has it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.number = _libc.shmget(0, size, _IPC_CREAT | 0o600)
        assert self.number >= 0, os.strerror(ctypes.get_errno())
        self.address = _libc.shmat(self.number, None, 0)
        _libc.shmctl(self.number, _IPC_RMID, None)
        self.bytes = (ctypes.c_ubyte * size).from_address(self.address)

    def close(self) -> None:
        _libc.shmdt(self.address)


class EngineDriver:
    """Starts a shim as an engine does, and executes cases one by one.

    Attributes:
        hello: the first word of the shim.
        options: the new protocol's options, map size and last word.
        stand_in: the process id that the last execution reported.
    """

    def __init__(
        self,
        environment: dict[str, str],
        *,
        map_size: int = 1 << 16,
        shared_cases: bool = True,
        new: bool = False,
        program: Path | None = None,
    ) -> None:
        with contextlib.ExitStack() as stack:
            self._map = _SharedMemory(map_size)
            stack.callback(self._map.close)
            environment = {**environment, "__AFL_SHM_ID": str(self._map.number)}
            self._case = None
            if shared_cases:
                self._case = _SharedMemory(_CASE_BYTES)
                stack.callback(self._case.close)
                environment["__AFL_SHM_FUZZ_ID"] = str(self._case.number)
            if new:
                environment["KCOV_BRIDGE_PROTOCOL"] = "new"
            self._file = os.memfd_create("case")
            stack.callback(os.close, self._file)
            requests, self._requests = os.pipe()
            self._answers, answers = os.pipe()
            stack.callback(os.close, self._answers)
            stack.callback(os.close, self._requests)
            os.dup2(requests, _REQUESTS)
            os.dup2(answers, _ANSWERS)
            try:
                self.shim = subprocess.Popen(
                    [program or shim_program()],
                    stdin=self._file,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=(_REQUESTS, _ANSWERS),
                    env=environment,
                )
            finally:
                for fd in (requests, answers, _REQUESTS, _ANSWERS):
                    os.close(fd)
            stack.callback(self._end_shim)
            self.stand_in = 0
            self.options: tuple[int, ...] = ()
            self.hello = self._hear()
            if new:
                self._say(self.hello ^ 0xFFFFFFFF)
                self.options = (self._hear(), self._hear(), self._hear())
            elif shared_cases:
                self._say(0x80000001 | 0x01000000)
            self._stack = stack.pop_all()

    def begin(self, case: bytes, *, timed_out: bool = False) -> None:
        """Start an execution and learn the stand-in's process id."""
        ctypes.memset(self._map.address, 0, self._map.size)
        if self._case is not None:
            ctypes.memmove(self._case.address, struct.pack("<I", len(case)) + case, 4 + len(case))
        else:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, case, 0)
        self._say(int(timed_out))
        self.stand_in = self._hear()

    def claim_length(self, length: int) -> None:
        """Write a length that the case does not have."""
        assert self._case is not None
        ctypes.memmove(self._case.address, struct.pack("<I", length), 4)

    def end(self) -> int:
        """Wait for the end of an execution; return its wait status."""
        return self._hear()

    def run(self, case: bytes, *, timed_out: bool = False) -> int:
        """Execute a case; return its wait status."""
        self.begin(case, timed_out=timed_out)
        return self.end()

    def run_again(self) -> int:
        """Execute what lies in the memory for cases; return its wait status."""
        self._say(0)
        self.stand_in = self._hear()
        return self.end()

    def hang_up(self) -> None:
        """Close the pipe of requests, as an engine that ends."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._requests)
        os.close(null)

    def kill_stand_in(self) -> None:
        """Do what an engine does when a case takes too long."""
        os.kill(self.stand_in, signal.SIGKILL)

    def cells(self) -> dict[int, int]:
        """Return the cells of the map that are not 0."""
        return {number: value for number, value in enumerate(bytes(self._map.bytes)) if value}

    def close(self) -> None:
        """End the shim."""
        self._stack.close()

    def __enter__(self) -> EngineDriver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end_shim(self) -> None:
        with self.shim:
            self.shim.kill()

    def _say(self, word: int) -> None:
        os.write(self._requests, struct.pack("<I", word))

    def _hear(self, seconds: float = 30) -> int:
        assert select.select([self._answers], [], [], seconds)[0], "the shim does not answer"
        word = os.read(self._answers, 4)
        if len(word) != 4:
            self.shim.wait(seconds)
            assert self.shim.stderr is not None
            raise AssertionError(f"the shim ended: {self.shim.stderr.read().decode()}")
        return int.from_bytes(word, "little")
