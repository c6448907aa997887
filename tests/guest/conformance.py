# SPDX-License-Identifier: Apache-2.0
"""Runs the programs of ``tests/guest/conformance`` in a guest and says which rules it keeps.

    python -m tests.guest.conformance [--personality linux|gvisor] [--cpus N] [PROGRAM ...]

boots a guest for each personality and number of processors that is asked for (both, on 1 and on
4), prints a table, and ends with 1 if a line of any program is ``not ok``, or a program does not
end as it should. What is known to fail is in :data:`KNOWN_FAILURES`; it fails here all the same.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bridge
from bridge.errors import RunTimeoutError
from bridge.image import build, compile_for_guest
from bridge.session import Session

__all__ = [
    "KNOWN_FAILURES",
    "PERSONALITIES",
    "PROGRAMS",
    "Line",
    "Result",
    "compile_programs",
    "complaints",
    "parse",
    "run_program",
    "table",
    "upload",
]

PERSONALITIES = ("linux", "gvisor")
SOURCES = Path(__file__).parent / "conformance"
PROGRAMS = tuple(sorted(path.stem for path in SOURCES.glob("*.c")))
DEVICE = "/sys/kernel/debug/kcov"

_NO_PAGES = "the area is device memory: the kernel has no pages of it to pin for others"

KNOWN_FAILURES: dict[tuple[str, str, str], str] = {
    ("linux", "area_access", "process_vm_readv"): _NO_PAGES,
    ("gvisor", "area_access", "process_vm_readv"): _NO_PAGES,
}
"""(personality, program, rule as its line says it): why the device does not keep it yet."""

_LONG = 1200.0
"""Seconds for a program at its full number of rounds, on a machine with other things to do."""
_GUEST_DIRECTORY = "/tmp/conformance"
_LINE = re.compile(r"(?P<not>not )?ok (?P<number>\d+) - (?P<rule>.*?)(?: # SKIP (?P<skip>.*))?")
_PLAN = re.compile(r"1\.\.(\d+)")


@dataclass(frozen=True)
class Line:
    """One rule and how it went: ``skip`` says what the guest lacks, None where it was tested."""

    rule: str
    ok: bool
    skip: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Result:
    """What one program reported; ``problem`` is what is wrong with the report itself."""

    program: str
    lines: tuple[Line, ...]
    problem: str | None = None
    seconds: float = 0.0

    @property
    def failed(self) -> list[str]:
        """The rules that are ``not ok``."""
        return [line.rule for line in self.lines if not line.ok]

    @property
    def ok(self) -> bool:
        """Whether each rule is kept and the program ended as it should."""
        return self.problem is None and not self.failed


def parse(program: str, text: str, exit_status: int, seconds: float = 0.0) -> Result:
    """Read a report in TAP. A report without a plan, or with another number of lines, is wrong."""
    lines: list[Line] = []
    problem: str | None = None
    plan: int | None = None
    for row in text.splitlines():
        if match := _LINE.fullmatch(row):
            if int(match["number"]) != len(lines) + 1:
                problem = problem or f"out of order: {row}"
            lines.append(Line(match["rule"], not match["not"], match["skip"]))
        elif match := _PLAN.fullmatch(row):
            plan = int(match[1])
        elif row.startswith("#"):
            if lines and not lines[-1].ok:
                last = lines.pop()
                lines.append(Line(last.rule, last.ok, last.skip, row[1:].strip()))
        else:
            problem = problem or row
    if problem is None and plan is None:
        problem = f"no plan: the program ended with status {exit_status}"
    if problem is None and plan != len(lines):
        problem = f"{len(lines)} lines instead of {plan}"
    if problem is None and (plan == 0 or exit_status != any(not line.ok for line in lines)):
        problem = f"exit status {exit_status}"
    return Result(program, tuple(lines), problem, seconds)


def compile_programs(out: Path, programs: Sequence[str] = PROGRAMS) -> dict[str, Path]:
    """Compile the programs for the default guest, into the directory ``out``."""
    image = build()
    return {name: compile_for_guest(image, SOURCES / f"{name}.c", out / name) for name in programs}


def upload(session: Session, binaries: dict[str, Path]) -> None:
    """Bring the compiled programs into the guest, where :func:`run_program` looks for them."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, path in binaries.items():
            tar.add(path, name)
    # One archive: a file at a time takes longer than the programs do.
    unpack = f"mkdir -p {_GUEST_DIRECTORY} && tar -xzC {_GUEST_DIRECTORY}"
    session.guest.run(unpack, stdin=archive.getvalue(), check=True)


def run_program(
    session: Session,
    program: str,
    personality: str,
    *,
    rounds: int | None = None,
    timeout: float = 120.0,
) -> Result:
    """Run one uploaded program. ``rounds`` for those that repeat; ``timeout`` in seconds."""
    command = [f"{_GUEST_DIRECTORY}/{program}", DEVICE, personality]
    env = None if rounds is None else {"KCOV_ROUNDS": str(rounds)}
    try:
        done = session.guest.run(command, timeout=timeout, env=env)
    except RunTimeoutError as error:
        so_far = error.evidence or ""
        return Result(program, (), f"not done after {timeout:g} s\n{so_far}", timeout)
    text = (done.stdout + done.stderr).decode(errors="replace")
    return parse(program, text, done.exit_status, done.seconds)


def complaints(session: Session) -> str:
    """What the guest kernel had to complain about."""
    pattern = "WARNING:|BUG:|Oops|stall|hung task|refcount_t|general protection"
    return session.run(f"dmesg | grep -E {pattern!r}").text


def table(results: Sequence[Result]) -> str:
    """Rule by rule, for people."""
    rows = []
    for result in results:
        rows.append(f"{result.program} ({result.seconds:.1f} s)")
        for line in result.lines:
            mark = "not ok" if not line.ok else "skip" if line.skip is not None else "ok"
            note = f"  [{line.skip or line.detail}]" if line.skip or line.detail else ""
            rows.append(f"  {mark:6} {line.rule}{note}")
        if result.problem is not None:
            rows.append(f"  failed {result.problem}")
    return "\n".join(rows)


def _run_all(
    binaries: dict[str, Path], personality: str, cpus: int, rounds: int | None
) -> tuple[list[Result], str]:
    with bridge.boot(
        target="none", syscall_pcs=True, personality=personality, cpus=cpus
    ) as session:
        upload(session, binaries)
        results = []
        for name in binaries:
            results.append(run_program(session, name, personality, rounds=rounds, timeout=_LONG))
            print(table(results[-1:]), flush=True)
        return results, complaints(session)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.guest.conformance", description="kcov's rules, in a guest."
    )
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help="all without")
    parser.add_argument("--personality", choices=PERSONALITIES, action="append")
    parser.add_argument("--cpus", type=int, action="append", metavar="N")
    parser.add_argument("--rounds", type=int, help="of the programs that repeat (10,000)")
    arguments = parser.parse_args(argv)
    programs = arguments.programs or PROGRAMS
    if unknown := sorted(set(programs) - set(PROGRAMS)):
        parser.error(f"no such program: {', '.join(unknown)}; there are {', '.join(PROGRAMS)}")
    good = True
    summary = []
    with tempfile.TemporaryDirectory(prefix="kcov-bridge-") as directory:
        binaries = compile_programs(Path(directory), programs)
        for personality in arguments.personality or PERSONALITIES:
            for cpus in arguments.cpus or (1, 4):
                where = f"{personality}, {cpus} vCPU"
                print(f"== {where}", flush=True)
                results, dmesg = _run_all(binaries, personality, cpus, arguments.rounds)
                lines = [line for result in results for line in result.lines]
                failed = [f"{r.program}: {rule}" for r in results for rule in r.failed]
                failed += [f"{r.program}: {r.problem}" for r in results if r.problem]
                if dmesg:
                    failed.append(f"the guest kernel complains: {dmesg}")
                good = good and not failed
                skipped = sum(line.skip is not None for line in lines)
                summary.append(
                    f"{where}: {len(results)} programs, {len(lines)} rules, "
                    f"{sum(line.ok for line in lines) - skipped} ok, {skipped} skipped, "
                    f"{len(failed)} failed"
                )
                summary += [f"  {line}" for line in failed]
    print("\n".join(["==", *summary]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
