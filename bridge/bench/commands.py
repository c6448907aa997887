# SPDX-License-Identifier: Apache-2.0
"""Timing a command from its start to the first line that it prints."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Mapping, Sequence

from bridge.errors import InfrastructureError
from bridge.vm.process import spawn

__all__ = ["seconds_to_answer"]

_REDIRECT = 'fd=$1; shift; exec "$@" >"/proc/self/fd/$fd"'
_END_SECONDS = 30.0


def seconds_to_answer(
    command: Sequence[str],
    answer: bytes,
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
) -> float:
    """Seconds from the start of ``command`` until it prints ``answer``; then it may end.

    The command's whole session is killed where it does not end by itself. Raises
    :class:`bridge.errors.InfrastructureError` where the answer does not come in ``timeout``
    seconds, with the end of what was printed.
    """
    reading, writing = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reading)
        try:
            begun = time.perf_counter()
            process = spawn(
                ["sh", "-c", _REDIRECT, "sh", str(writing), *command],
                name=command[0],
                pass_fds=(writing,),
                env=env,
            )
        finally:
            os.close(writing)
        stack.callback(_end, process.pid)
        stack.callback(process.kill)
        stack.callback(process.wait, _END_SECONDS)
        printed = b""
        while answer not in printed:
            left = begun + timeout - time.perf_counter()
            if left <= 0 or not select.select([reading], [], [], left)[0]:
                # Not worth waiting for its end.
                process.kill()
                raise InfrastructureError(
                    f"{command[0]} has not answered after {timeout:g} s",
                    evidence=(printed[-2048:].decode(errors="replace") + process.stderr_text),
                )
            chunk = os.read(reading, 65536)
            if not chunk:
                process.wait(_END_SECONDS)
                raise InfrastructureError(
                    f"{command[0]} {process.how_it_ended} without an answer",
                    evidence=(printed[-2048:].decode(errors="replace") + process.stderr_text),
                )
            printed += chunk
        return time.perf_counter() - begun


def _end(session: int) -> None:
    """Kill what a command that was killed has left: it was the leader of its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
