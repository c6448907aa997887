# SPDX-License-Identifier: Apache-2.0
"""The directory of a campaign of any size, written by the writers that real campaigns use."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge.fuzz.findings import FINDING, Finding, Findings
from bridge.fuzz.progress import PROGRESS_FILE, ProgressWriter, Sample
from bridge.fuzz.store import Offer, Store
from bridge.fuzz.titles import Kind
from bridge.sources.pcs import BlockTable, syscall_pc
from bridge.sources.symbolize import BLOCKS_FILE
from tests.support.report_data import HOSTILE

FACTS: Mapping[str, Any] = {
    "target": "plan9",
    "harness": "files",
    "sources": ["python"],
    "engine": "AFL++ 4.04c",
    "accel": "tcg",
    "jobs": 2,
    "feedback": True,
}

SOURCE = f'''"""A parser: {HOSTILE}"""


def parse(data):
    kind = data[:1]
    if kind == b"a":
        first = "{HOSTILE}"
        for each in data:
            if each > 200:
                first = each
        return first
    try:
        return int(data)
    except ValueError:
        return None


def never(data):
    return data
'''
"""A target; see LINES."""

LINES = {"module": 1, "kind": 5, "a": 7, "loop": 8, "if": 9, "above": 10, "try": 13, "except": 14}
"""A line of each block of interest."""


def write_source(directory: Path, *, functions: int = 0) -> tuple[Path, str]:
    """Write a target with SOURCE and further functions; return its path and text."""
    directory.mkdir(parents=True, exist_ok=True)
    text = SOURCE + "".join(
        f"\n\ndef handle_{number}(request):\n    if request:\n        return {number}\n"
        f"    return None\n"
        for number in range(functions)
    )
    path = directory / "parser_target.py"
    path.write_text(text)
    return path, text


def write_campaign(
    directory: Path,
    *,
    source: str = SOURCE,
    blocks: Sequence[int] | None = None,
    seeds: int = 2,
    samples: int = 20,
    seconds: float = 100.0,
    executions: int = 50_000,
    findings: int = 2,
    facts: Mapping[str, Any] = FACTS,
    stability: float | None = 0.97,
    seed: int = 1,
) -> BlockTable:
    """Write the directory of a campaign; return its block table.

    Args:
        source: of the target.
        blocks: numbers of the blocks that were reached, in this order; the first half by seeds.
            By default all but the last third.
        samples: of the progress; the last one is at ``seconds`` and ``executions``.
    """
    chance = random.Random(seed)
    table = BlockTable()
    file = table.add("parser_target.py", source)
    reached = list(blocks if blocks is not None else range(len(file) * 2 // 3))
    with Store.create(directory, facts) as store:
        table.save(directory / BLOCKS_FILE)
        halves = reached[: len(reached) // 2], reached[len(reached) // 2 :]
        for number in range(seeds):
            pcs = [file.pc(each) for each in halves[0][number::seeds]]
            store.add([Offer(f"seed {number}".encode(), 0.0, number, (*pcs, _syscall(0)), True)])
        times: list[tuple[float, int]] = []
        for number, each in enumerate(halves[1], 1):
            part = number / (len(halves[1]) + 1)
            times.append((round(seconds * part**2, 3), int(executions * part**2)))
            store.add([Offer(f"case {number}".encode(), *times[-1], (file.pc(each),))])
        for number in range(findings):
            part = (number + 1) / (findings + 1)
            finding = Finding(
                name=f"finding-{number}",
                title=f"KASAN: use-after-free in v9fs_{number} {HOSTILE if number == 0 else ''}",
                kind=Kind.KERNEL if number % 2 else Kind.TARGET_EXCEPTION,
                stack=("v9fs_read", HOSTILE),
                times=3 + number,
                seconds=seconds * part,
                executions=int(executions * part),
            )
            files = {
                FINDING: finding.as_json(),
                "case": bytes((number, 1)),
                "case.txt": f'open "a{number}" {HOSTILE}\n'.encode(),
                "traceback.txt": b"Traceback (most recent call last):\n\x00\xff",
                "console.log": b"BUG: KASAN",
            }
            Findings(store.findings).add(files, finding.times)
        with ProgressWriter(directory / PROGRESS_FILE) as progress:
            for number in range(samples):
                part = number / max(1, samples - 1)
                now = seconds * part
                done = [each for each in times if each[0] <= now]
                progress.write(
                    Sample(
                        now,
                        int(executions * part) if number < samples - 1 else executions,
                        len(halves[0]) + len(done),
                        seeds + len(done),
                        int(part * (findings + 1)) if part < 1 else findings,
                        2 if number else 1,
                        None
                        if stability is None or number == 0
                        else stability - chance.random() / 99 * (number < samples - 1),
                    )
                )
    return table


def _syscall(number: int) -> int:
    pc = syscall_pc(number)
    assert pc is not None
    return pc
