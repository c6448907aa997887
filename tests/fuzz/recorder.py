# SPDX-License-Identifier: Apache-2.0
"""Records findings until it is killed: ``python -m tests.fuzz.recorder DIRECTORY [SEED]``.

For each line on stdin it forks a child that records findings until it is killed, and announces each
on stdout when it is recorded: ``announced NAME TIMES SHA-256``. The parent says ``began PID`` and
``ended PID``. With a SEED it records itself, until that fails, and says why: ``failed MESSAGE``.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
from itertools import count
from pathlib import Path

from bridge.fuzz.findings import Findings, OutputError, Place
from bridge.fuzz.slot_events import Evidence, Suspect
from bridge.fuzz.titles import faults_of

KINDS = 5
CASES = 3


def suspect(number: int, rng: random.Random) -> Suspect:
    """A case that killed the harness; ``number`` says where."""
    output = f"harness: it.c:{number}: step_{'abcde'[number % KINDS]}: Assertion `x' failed."
    evidence = Evidence(console="[    1.0] all is well\n" * 200, dmesg="the same\n")
    return Suspect(rng.randbytes(rng.randrange(1, 4000)), 6, output.encode(), evidence=evidence)


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def record(directory: Path, seed: int) -> None:
    findings = Findings(directory, cases=CASES, readable=bytes.hex)
    rng = random.Random(seed)
    for number in count(seed):
        case = suspect(number, rng)
        finding = findings.record(case, faults_of(case), Place(settings={"memory": 256}))
        say("announced", finding.name, finding.times, hashlib.sha256(case.case).hexdigest())


def main() -> None:
    directory = Path(sys.argv[1])
    if len(sys.argv) > 2:
        try:
            record(directory, int(sys.argv[2]))
        except OutputError as error:
            say("failed", error.report().replace("\n", " "))
        return
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            record(directory, int(line))
        say("began", pid)
        os.waitpid(pid, 0)
        say("ended", pid)


if __name__ == "__main__":
    main()
