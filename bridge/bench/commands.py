# SPDX-License-Identifier: Apache-2.0
"""Measure the time from a command's start until it prints an answer."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bridge.errors import InfrastructureError
from bridge.vm.process import Process, spawn

__all__ = ["seconds_to_answer"]

_REDIRECT = 'fd=$1; shift; exec "$@" >"/proc/self/fd/$fd"'
_END_SECONDS = 30.0
_EVIDENCE = 2048


def seconds_to_answer(
    command: Sequence[str],
    answer: bytes,
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
) -> float:
    """Return the seconds from the start of ``command`` until it prints ``answer``.

    Afterwards it has some seconds to end by itself, then it is killed.

    Raises:
        InfrastructureError: there is no answer within ``timeout`` seconds; the evidence is the end
            of the output.
    """
    reading, writing = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reading)
        begun = time.perf_counter()
        try:
            process = spawn(
                ["sh", "-c", _REDIRECT, "sh", str(writing), *command],
                name=Path(command[0]).name,
                pass_fds=(writing,),
                env=env,
            )
        finally:
            os.close(writing)
        stack.callback(_end, process)
        printed = b""
        while answer not in printed:
            left = begun + timeout - time.perf_counter()
            if left <= 0 or not select.select([reading], [], [], left)[0]:
                raise _silent(process, printed, f"has not answered after {timeout:g} s")
            chunk = os.read(reading, 65536)
            if not chunk:
                process.wait(_END_SECONDS)
                raise _silent(process, printed, f"{process.how_it_ended} without an answer")
            printed += chunk
        seconds = time.perf_counter() - begun
        process.wait(_END_SECONDS)
        return seconds


def _silent(process: Process, printed: bytes, what: str) -> InfrastructureError:
    evidence = printed[-_EVIDENCE:].decode(errors="replace") + process.stderr_text[-_EVIDENCE:]
    return InfrastructureError(f"{process.name} {what}", evidence=evidence)


def _end(process: Process) -> None:
    """Kill the program, and its process group."""
    process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
