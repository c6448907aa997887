# SPDX-License-Identifier: Apache-2.0
"""Executions per second: a VM with the 9P target, beside atheris with the same server in a process.

    python -m tests.bench.bench_atheris [--rounds N] [--seconds N]

A case is ten system calls on a file of the mount (the runner's harness ``file``: four times open
and close, fstat, read). The messages that they become are recorded once, and atheris gives these
to pyroute2's server in its own process: equal work for the target, without system calls, kernel,
network and VM. Both cover the target's code alone. Then atheris fuzzes, from these messages as
seed. VM and atheris take turns, first with a VM whose messages travel by the network, then with one
where they travel by the region. Each part of a turn ends after some seconds, however many cases
that was, so a busy machine makes the figures worse and hardly the command longer.

The VM's cases come from Python (``Lane.execute``), which adds some 50 us to each; there is no
engine on this side. Needs atheris: pip install 'kcov-bridge[bench]'.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyroute2.plan9.server as plan9

from bridge import Session, Settings
from bridge.fuzz.lane import Lane
from tests.support import ROOT

FILE = "/mnt/target/sizes/64"
WAYS = ("network", "region")
"""Values of the setting ``transport``."""
_READY_SECONDS = 600
_CASE_SECONDS = 600


class Recorder:
    """Keeps the messages that the server gets, while it is on."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self._inner: Any = plan9.Plan9ServerProtocol.data_received

    def __enter__(self) -> Recorder:
        inner, messages = self._inner, self.messages

        def received(protocol: Any, data: bytes) -> None:
            messages.append(bytes(data))
            inner(protocol, data)

        plan9.Plan9ServerProtocol.data_received = received
        return self

    def __exit__(self, *_: object) -> None:
        plan9.Plan9ServerProtocol.data_received = self._inner


@contextlib.contextmanager
def running_lane(session: Session) -> Iterator[Lane]:
    """Start the runner with the harness, and stop it at the end by a reset."""
    areas = session.open_lane(Lane.sizes(1, 1 << 16))
    lane = Lane(areas)
    lane.prepare()
    command = ["kcov-runner", hex(lane.number), "file", FILE]

    def run() -> None:
        # The reset ends it.
        with contextlib.suppress(Exception):
            session.guest.run(command)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        deadline = time.monotonic() + _READY_SECONDS
        while not lane.ready:
            if time.monotonic() > deadline or not thread.is_alive():
                raise RuntimeError("the runner is not ready")
            time.sleep(1e-3)
        yield lane
    finally:
        session.reset()
        thread.join()
        lane.close()
        session.close_lane(areas)


def execute(lane: Lane, seconds: float) -> float:
    """Execute cases for a time, at least one; return the executions per second."""
    begun = time.perf_counter()
    executions = 0
    while not executions or time.perf_counter() - begun < seconds:
        done = lane.execute(b"", _CASE_SECONDS)
        if done.status != 0 or not any(done.pcs):
            raise RuntimeError(f"a case failed: status {done.status}, {len(done.pcs)} areas")
        executions += 1
    return executions / (time.perf_counter() - begun)


def said(text: str) -> None:
    """Say on stderr what goes on."""
    print(text, file=sys.stderr, flush=True)


def shown(turn: dict[str, float]) -> str:
    """Return the rates of a turn as text."""
    return ", ".join(f"{name} {rate:,.0f} /s" for name, rate in turn.items())


def peer(messages: dict[str, list[str]], seconds: float) -> dict[str, float]:
    """Return executions per second of atheris: of equal work, and fuzzing."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "messages.json")
        path.write_text(json.dumps(messages))
        module = "tests.bench.atheris_plan9"
        done = subprocess.run(
            [sys.executable, "-m", module, path, str(seconds), scratch],
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"atheris failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return rates


def main() -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each part (default: 3)")
    parser.add_argument("--json", action="store_true", help="print the values of all turns")
    args = parser.parse_args()
    messages: dict[str, list[str]] = {}
    values: dict[str, dict[str, list[float]]] = {}
    accelerator = ""
    for way in WAYS:
        said(f"a VM, 9p by the {way}")
        found = values[way] = {"vm": [], "equal": [], "fuzzing": []}
        recorder = Recorder()
        with (
            recorder,
            Session(Settings(source="python", transport=way)) as session,
            running_lane(session) as lane,
        ):
            accelerator = session.accelerator.name.upper()
            execute(lane, 1.0)
            before = len(recorder.messages)
            execute(lane, 0)
            # Those of the first VM are for both: equal work.
            messages = messages or {
                "before": [each.hex() for each in recorder.messages[:before]],
                "case": [each.hex() for each in recorder.messages[before:]],
            }
            recorder.__exit__()
            for number in range(1, args.rounds + 1):
                turn = {"vm": execute(lane, args.seconds), **peer(messages, args.seconds)}
                for name, rate in turn.items():
                    found[name].append(rate)
                said(f"turn {number} of {args.rounds}, by the {way}: " + shown(turn))
    if args.json:
        print(json.dumps({"messages": len(messages["case"]), **values}))
        return 0
    print(f"a case: 10 system calls, {len(messages['case'])} messages to the target")
    lines = [
        (f"a VM under {accelerator}, 9p by the {way}, kcov on", found["vm"])
        for way, found in values.items()
    ]
    for name, text in (
        ("equal", "atheris, the same messages"),
        ("fuzzing", "atheris, fuzzing from these messages"),
    ):
        lines.append((text, [rate for found in values.values() for rate in found[name]]))
    for text, rates in lines:
        print(
            f"{text:<44}{statistics.median(rates):>10,.0f} /s  [{min(rates):,.0f} - "
            f"{max(rates):,.0f}]"
        )
    for way, found in values.items():
        ratios = [there / here for here, there in zip(found["vm"], found["equal"], strict=True)]
        text = f"atheris to the VM by the {way}, equal work"
        print(f"{text:<44}{statistics.median(ratios):>10.1f} x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
