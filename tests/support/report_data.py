# SPDX-License-Identifier: Apache-2.0
"""A report directory of any size, written by the writers that real runs use."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from coverage import CoverageData

from bridge.results.test_record import FailureKind, Outcome, RecordedTest, RecordWriter
from bridge.trace import Call, HostCode, HostThread, TraceHeader, TraceWriter

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
"""A text that becomes a program where it is taken for markup."""

_NAMES = ("read", "write", "openat", "close", "newfstatat", "getdents64", "mmap", "futex", "ioctl")
_SERVER: Final = HostThread(1000, 1001, "serve-clients")
"""The thread of the target that runs half of the host code."""
_COMMANDS = ("cat", "ls", "dd", "sh", "kworker", "mount")


def write_sources(directory: Path, *, files: int, functions: int) -> list[Path]:
    """Write modules of some functions, of 6 lines and a blank one each, and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(files):
        lines = [f'"""Module {number}: {HOSTILE}"""', "", ""]
        for each in range(functions):
            lines += [
                f"def handle_{each}(request, reply):",
                "    value = request.get(",
                f'        "key {each} {HOSTILE}"',
                "    )",
                "    if value is None:",
                "        return reply",
                "    return value",
                "",
                "",
            ]
        path = directory / f"service_{number}.py"
        path.write_text("\n".join(lines), encoding="utf-8")
        paths.append(path)
    return paths


def write_report_data(
    directory: Path,
    *,
    tests: int = 12,
    files: int = 3,
    functions: int = 8,
    calls: int = 400,
    threads: int = 5,
    workers: Sequence[str] = ("",),
    lost: int = 0,
    seed: int = 1,
) -> None:
    """Write a pytest run's directory: sources, ``.coverage``, the record, a trace for each worker.

    Args:
        files: source files.
        functions: functions of each file; each has 3 statements after its first line.
        lost: PCs that the first test lost.
    """
    chance = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    paths = write_sources(directory / "src", files=files, functions=functions)
    places = [(path, 4 + 9 * each) for path in paths for each in range(functions)]
    data = CoverageData(basename=str(directory / ".coverage"))
    data.set_context("")
    # The import of the modules: the docstring and each "def".
    data.add_lines({str(path): {1, *range(4, 4 + 9 * functions, 9)} for path in paths})
    nodes = [f"tests/test_{n % 7}.py::test_{n}[{HOSTILE if n == 3 else n}]" for n in range(tests)]
    writers = [RecordWriter(directory, worker) for worker in workers]
    for number, node in enumerate(nodes):
        reached: dict[str, set[int]] = {}
        wanted = max(1, len(places) * 2 // 3)
        for path, line in chance.sample(places, chance.randint(1, wanted)):
            # One of two ways through the function.
            reached.setdefault(str(path), set()).update(
                {line + 1, line + 4, chance.choice((line + 5, line + 6))}
            )
        data.set_context(f"{node}|run")
        data.add_lines(reached)
        bad = number % 6 == 5
        writers[number % len(writers)].write(
            RecordedTest(
                node,
                Outcome.FAILED if bad else Outcome.SKIPPED if number % 11 == 10 else Outcome.PASSED,
                kind_of_failure=(
                    FailureKind.MACHINE if number % 12 == 11 else FailureKind.ASSERTION
                )
                if bad
                else None,
                seconds=round(chance.uniform(0.05, 2.0), 3),
                reset_seconds=0.1,
                began=1_700_000_000.0 + number * 2,
                image="bookworm",
                kernel="6.1.0-1-amd64",
                accelerator="tcg",
                worker=workers[number % len(workers)],
                lines={file: tuple(sorted(lines)) for file, lines in reached.items()},
                calls=chance.randint(1, 900),
                message=f"AssertionError: {HOSTILE}\nsecond line" if bad else "",
                pcs=chance.randint(100, 9000),
                lost=lost if number == 0 else 0,
            )
        )
    data.write()
    for writer in writers:
        writer.close()
    for at, worker in enumerate(workers):
        name = f"trace.{worker}.jsonl" if worker else "trace.jsonl"
        header = TraceHeader("kernel,python", "bookworm", "6.1.0-1-amd64")
        with TraceWriter(directory / name, header) as trace:
            for number in range(at, calls, len(workers)):
                test = number * tests // calls
                # The clock of a trace begins with it, and each test has a trace of its own.
                start = (number - -(-test * calls // tests)) * 0.001
                trace.write(_call(chance, number, start, threads, places, nodes[test]))


def _call(
    chance: random.Random,
    number: int,
    start: float,
    threads: int,
    places: list[tuple[Path, int]],
    node: str,
) -> Call:
    thread = chance.randrange(threads)
    host: list[HostCode] = []
    if number % 3 == 0:
        for path, line in sorted(chance.sample(places, 2)):
            lines = (line + 1, line + 2, line + 3, line + 4, line + 6)
            host.append(
                HostCode(
                    str(path), f"handle_{(line - 4) // 9}", lines, _SERVER if number % 2 else None
                )
            )
    failed = number % 10 == 9
    name = _NAMES[number % len(_NAMES)]
    return Call(
        start=start,
        seconds=None if number % 97 == 96 else chance.uniform(1e-6, 5e-3),
        thread=100 + thread,
        command=_COMMANDS[thread % len(_COMMANDS)] if thread else HOSTILE[:15],
        number=number % 300,
        name=name,
        arguments=("3", f'"/mnt/target/file-{number % 50}"', HOSTILE if number == 7 else "0x10"),
        result=-2 if failed else number,
        error="ENOENT" if failed else None,
        host=tuple(host),
        kernel=tuple(f"kernel_function_{each}" for each in sorted({number % 13, number % 7, 20})),
        test=node,
    )
