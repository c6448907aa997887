# SPDX-License-Identifier: Apache-2.0
"""pyroute2's 9P server under atheris, in this process, without socket, kernel or VM.

    python -m tests.bench.atheris_plan9 MESSAGES SECONDS DIRECTORY

MESSAGES is JSON: ``before``, the messages (hex) that a mount has sent when it is ready, and
``case``, those of one execution. Each is given to the server as the target gives it one: whole.
For SECONDS the case itself is executed, which is equal work, then as long what atheris makes of it,
which is fuzzing. Prints the executions per second of both as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["pyroute2.plan9"]):
    import pyroute2.plan9.server as plan9

from bridge.targets.tree import built_in


class _Answers:
    """Where the server writes its answers."""

    def write(self, data: bytes) -> None:
        """Take an answer."""

    def abort(self) -> None:
        """Do nothing: there is no connection."""

    def close(self) -> None:
        """Do nothing: there is no connection."""


def _protocol(before: list[bytes]) -> Any:
    """Return the server's side of a connection, as it is when the mount is ready."""
    from bridge.targets.plan9 import _fill

    filesystem = plan9.Filesystem()
    _fill(filesystem, built_in())
    protocol = plan9.Plan9ServerProtocol(None, plan9.Marshal9P(), filesystem)
    protocol.connection_made(_Answers())
    for message in before:
        protocol.data_received(message)
    return protocol


def _messages(data: bytes) -> Iterator[bytes]:
    """Cut data into messages, as the target does, up to one whose size makes no sense."""
    at = 0
    while at + 4 <= len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        if not 7 <= size <= len(data) - at:
            return
        yield data[at : at + size]
        at += size


def main(messages: Path, seconds: float, directory: Path) -> None:
    """Measure, print, and end the process; atheris does not return."""
    recorded = json.loads(messages.read_text())
    before, case = ([bytes.fromhex(each) for each in recorded[key]] for key in ("before", "case"))
    seeds = directory / "seeds"
    seeds.mkdir()
    (seeds / "case").write_bytes(b"".join(case))
    protocol = _protocol(before)
    whole = b"".join(case)

    def execute(data: bytes) -> None:
        for message in _messages(data):
            # As asyncio does with what a protocol raises, except that it would log it.
            with contextlib.suppress(Exception):
                protocol.data_received(message)

    rates: dict[str, float] = {}
    state = {"runs": 0, "begun": 0.0}

    def count(name: str, run: Callable[[bytes], None]) -> Callable[[bytes], None]:
        def one(data: bytes) -> None:
            if state["runs"] == 0:
                state["begun"] = time.perf_counter()
            run(data)
            state["runs"] += 1
            passed = time.perf_counter() - state["begun"]
            if passed >= seconds:
                rates[name] = state["runs"] / passed

        return one

    equal, fuzzing = count("equal", lambda data: execute(whole)), count("fuzzing", execute)

    def test(data: bytes) -> None:
        if "equal" not in rates:
            equal(data)
            if "equal" in rates:
                state["runs"] = 0
        elif "fuzzing" not in rates:
            fuzzing(data)
        else:
            # libFuzzer ends without the interpreter's own end.
            print(json.dumps(rates), flush=True)
            os._exit(0)

    atheris.Setup([sys.argv[0], "-verbosity=0", f"-max_len={2 * len(whole)}", str(seeds)], test)
    atheris.Fuzz()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]))
