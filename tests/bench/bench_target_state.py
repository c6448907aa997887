# SPDX-License-Identifier: Apache-2.0
"""What it costs to give a target its first state again, beside the guest's reset.

``python -m tests.bench.bench_target_state [--rounds N]``

Three guests have the same target, a key-value server: one whose target is kept, one whose target is
started again with each reset, one whose process is forked anew. They are reset in turn. Then the
fork and the restart alone are measured, without a guest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bridge import config
from bridge.session.isolated import IsolatedTarget
from bridge.session.session import Session
from bridge.session.target_host import InProcessTarget, TargetHost, TargetState
from bridge.targets.services import Service, Services

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TARGET = "key_value_target:KeyValueTarget"


def milliseconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - started)


def show(name: str, taken: list[float]) -> None:
    print(f"{name:<28} {statistics.median(taken):8.1f} ms  ({min(taken):.1f} to {max(taken):.1f})")


def resets(rounds: int) -> None:
    settings = config.load({"source": "python"})
    with ExitStack() as stack:
        sessions = {
            state: stack.enter_context(
                Session(settings, target=Services([Service(TARGET)]), target_state=state)
            )
            for state in TargetState
        }
        taken: dict[TargetState, list[float]] = {state: [] for state in TargetState}
        for number in range(rounds + 1):
            for state, session in sessions.items():
                session.run("touch /root/file")
                seconds = milliseconds(session.reset)
                if number:  # the first one also loads code
                    taken[state].append(seconds)
    for state in TargetState:
        show(f"reset, target {state.value}", taken[state])


def alone(rounds: int) -> None:
    services = Services([Service(TARGET)])
    hosts: dict[str, TargetHost] = {
        "restart alone": InProcessTarget(services, None),
        "fork alone": IsolatedTarget(services, None, None, state=TargetState.FORK),
    }
    for name, host in hosts.items():
        host.start(lambda handle, pcs: None)
        show(name, [milliseconds(host.renew) for _ in range(rounds)])
        host.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    sys.path.insert(0, str(EXAMPLES))
    alone(rounds)
    resets(rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
