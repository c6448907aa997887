# SPDX-License-Identifier: Apache-2.0
"""Runs the programs of ``tests/system/conformance`` in a guest and says which rules it keeps.

    python -m tests.system.conformance [--personality linux|gvisor] [--cpus N] [PROGRAM ...]

boots a guest for each personality and number of processors that is asked for (both, on 1 and on
4), prints a table, and ends with 1 if a line of any program is ``not ok``, or a program does not
end as it should. Where the device differs by decision (:data:`KNOWN_FAILURES`, with the reason) the
table says so; that such a rule is kept after all is a failure too.
With ``--kernel VARIANT`` the guest has a kernel of :mod:`tests.system.reference` instead of
Debian's; on ``debug``, what that kernel complains of is printed, and makes it end with 1 too.

    python -m tests.system.conformance --reference [--cpus N] [PROGRAM ...]

asks a kernel that was built with CONFIG_KCOV instead: each program runs on the kernel's own device
and, in the same guest, on the bridge's. The table has a column for each. It ends with 1 if the
kernel's own breaks a rule that is not in :data:`KNOWN_DIFFERENCES`, or keeps one that is.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import bridge
from bridge.errors import RunTimeoutError
from bridge.session.session import Session
from tests.support.guests import complaints, complaints_in_full
from tests.support.hangs import run_or_tell
from tests.support.programs import guest_program
from tests.system import reference

__all__ = [
    "KNOWN_DIFFERENCES",
    "KNOWN_FAILURES",
    "PERSONALITIES",
    "PROGRAMS",
    "Line",
    "Result",
    "compile_programs",
    "differences",
    "parse",
    "run_program",
    "side_by_side",
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

KNOWN_DIFFERENCES: dict[tuple[str, str], str] = {}
"""(program, rule as its line says it): why Linux' own kcov, as released, does not keep it."""

_MEMORY = {"kcov": 512, "plain": 256, "debug": 1024, "nosmp": 256}
"""MiB of guest memory for each reference kernel: KASAN alone takes an eighth."""
_REFERENCE_BOOT = 300.0
"""Seconds for a reference kernel to boot, the debugging one on a busy machine among them."""
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


def compile_programs(programs: Sequence[str] = PROGRAMS) -> dict[str, Path]:
    """Compile the programs for the default guest."""
    return {name: guest_program(SOURCES / f"{name}.c") for name in programs}


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
    device: str = DEVICE,
    rounds: int | None = None,
    timeout: float = 120.0,
) -> Result:
    """Run one uploaded program. ``rounds`` for those that repeat; ``timeout`` in seconds."""
    command = [f"{_GUEST_DIRECTORY}/{program}", device, personality]
    env = None if rounds is None else {"KCOV_ROUNDS": str(rounds)}
    try:
        done = run_or_tell(session, command, timeout, env)
    except RunTimeoutError as error:
        so_far = "\n".join([error.evidence or "", *getattr(error, "__notes__", ())])
        return Result(program, (), f"not done after {timeout:g} s\n{so_far}", timeout)
    text = (done.stdout + done.stderr).decode(errors="replace")
    return parse(program, text, done.exit_status, done.seconds)


def differences(
    results: Sequence[Result], known: Mapping[tuple[str, str], str]
) -> tuple[list[str], list[str]]:
    """What differs from the rules, of one boot of one kernel: with the reason it is known for, and
    unexplained. A known one that does not differ is unexplained too, if its program ran to its end.
    """
    explained, unexplained = [], []
    for result in results:
        if result.problem is not None:
            unexplained.append(f"{result.program}: {result.problem}")
        details = {line.rule: line.detail for line in result.lines if not line.ok}
        for rule, detail in details.items():
            what = f"{result.program}: {rule}" + (f" [{detail}]" if detail else "")
            if reason := known.get((result.program, rule)):
                explained.append(f"{what}: {reason}")
            else:
                unexplained.append(what)
        for program, rule in known:
            if program == result.program and rule not in details and result.problem is None:
                unexplained.append(f"{program}: {rule}: said to differ, but does not any more")
    return explained, unexplained


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


def _mark(line: Line | None) -> str:
    if line is None:
        return "-"
    return "not ok" if not line.ok else "skip" if line.skip is not None else "ok"


def side_by_side(kernel: Result, device: Result) -> str:
    """One program's rules: what a kernel's own kcov says, and the bridge's device beside it."""

    def numbered(result: Result) -> dict[tuple[str, int], Line]:
        """A program may say the same of several things, in order."""
        seen: Counter[str] = Counter()
        lines = {}
        for line in result.lines:
            lines[line.rule, seen[line.rule]] = line
            seen[line.rule] += 1
        return lines

    left, right = numbered(kernel), numbered(device)
    rows = [f"{kernel.program} ({kernel.seconds:.1f} s, {device.seconds:.1f} s)"]
    for key in {**left, **right}:
        pair = left.get(key), right.get(key)
        notes = [line.skip or line.detail for line in pair if line and (line.skip or line.detail)]
        note = f"  [{'; '.join(notes)}]" if notes else ""
        rows.append(f"  {_mark(pair[0]):7} {_mark(pair[1]):7} {key[0]}{note}")
    for who, result in (("kernel", kernel), ("bridge", device)):
        if result.problem is not None:
            rows.append(f"  failed on the {who}: {result.problem}")
    return "\n".join(rows)


def _boot(kernel: str | None, personality: str, cpus: int) -> Session:
    """``kernel``: a reference kernel's variant, None for the project's own image."""
    if kernel is None:
        return bridge.boot(
            target="none",
            source="python",
            syscall_pcs=True,
            personality=personality,
            cpus=cpus,
        )
    return bridge.boot(
        source="python",
        image=reference.build(kernel).name,
        memory=_MEMORY[kernel],
        boot_timeout=_REFERENCE_BOOT,
        target="none",
        syscall_pcs=True,
        personality=personality,
        cpus=cpus,
    )


def _run_all(
    binaries: dict[str, Path],
    kernel: str | None,
    personality: str,
    cpus: int,
    rounds: int | None,
) -> tuple[list[Result], str]:
    with _boot(kernel, personality, cpus) as session:
        upload(session, binaries)
        assert session.ready is not None
        device = session.ready.device
        results = []
        for name in binaries:
            result = run_program(
                session, name, personality, device=device, rounds=rounds, timeout=_LONG
            )
            results.append(result)
            print(table(results[-1:]), flush=True)
        if kernel is not None and (reports := complaints_in_full(session)):
            print(f"== the guest kernel's messages\n{reports}", flush=True)
        return results, complaints(session) + (_lockdep_off(session) if kernel == "debug" else "")


def _lockdep_off(session: Session) -> str:
    """Lockdep gives up for good when it has complained, or has run out of room: no news is good
    news only while it looks."""
    stats = session.run("cat /proc/lockdep_stats").text
    return "" if re.search(r"^ *debug_locks: +1$", stats, re.MULTILINE) else "lockdep is off\n"


def _reference(
    binaries: dict[str, Path], all_cpus: Sequence[int], rounds: int | None
) -> tuple[bool, list[str]]:
    """Runs the programs on a kernel's own kcov. Returns whether all is explained, and a summary."""
    good = True
    summary = []
    for cpus in all_cpus:
        with _boot("kcov", "linux", cpus) as session:
            upload(session, binaries)
            assert session.ready is not None
            where = f"Linux {session.ready.kernel}, {cpus} vCPU"
            print(f"== {where}: the kernel's own kcov, the bridge's", flush=True)
            own: list[Result] = []
            bridged: list[Result] = []
            for name in binaries:
                for device, results in ((DEVICE, own), (session.ready.device, bridged)):
                    result = run_program(
                        session, name, "linux", device=device, rounds=rounds, timeout=_LONG
                    )
                    results.append(result)
                print(side_by_side(own[-1], bridged[-1]), flush=True)
            dmesg = complaints(session)
        explained, unexplained = differences(own, KNOWN_DIFFERENCES)
        _, wrong = differences(
            bridged,
            {
                (name, rule): why
                for (who, name, rule), why in KNOWN_FAILURES.items()
                if who == "linux"
            },
        )
        if dmesg:
            wrong.append(f"the guest kernel complains: {dmesg}")
        good = good and not unexplained and not wrong
        rules = sum(len(result.lines) for result in own)
        summary.append(f"{where}: {len(own)} programs, {rules} rules")
        skipped = [
            f"{result.program}: {line.rule}: {line.skip}"
            for result in own
            for line in result.lines
            if line.skip is not None
        ]
        for what, lines in (
            ("what this kernel cannot be asked", skipped),
            ("where the real kernel differs from the rules", explained),
            ("differences that nobody has explained", unexplained),
            ("what is wrong with the bridge's device on this kernel", wrong),
        ):
            summary += [f"  {what}: {'none' if not lines else ''}".rstrip()]
            summary += [f"    {line}" for line in lines]
    return good, summary


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.system.conformance", description="kcov's rules, in a guest."
    )
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help="all without")
    parser.add_argument("--personality", choices=PERSONALITIES, action="append")
    parser.add_argument("--cpus", type=int, action="append", metavar="N")
    parser.add_argument("--rounds", type=int, help="of the programs that repeat (10,000)")
    parser.add_argument("--kernel", choices=reference.VARIANTS, help="a reference kernel")
    parser.add_argument(
        "--reference", action="store_true", help="ask the own kcov of a kernel built with it"
    )
    arguments = parser.parse_args(argv)
    if arguments.reference and (arguments.kernel or arguments.personality):
        parser.error("--reference is about Linux, on the kernel kcov")
    programs = arguments.programs or PROGRAMS
    if unknown := sorted(set(programs) - set(PROGRAMS)):
        parser.error(f"no such program: {', '.join(unknown)}; there are {', '.join(PROGRAMS)}")
    good = True
    summary: list[str] = []
    binaries = compile_programs(programs)
    if arguments.reference:
        good, summary = _reference(binaries, arguments.cpus or (1, 4), arguments.rounds)
        print("\n".join(["==", *summary]))
        return 0 if good else 1
    for personality in arguments.personality or PERSONALITIES:
        for cpus in arguments.cpus or (1, 4):
            where = f"{personality}, {cpus} vCPU"
            if arguments.kernel:
                where += f", kernel {arguments.kernel}"
            print(f"== {where}", flush=True)
            results, dmesg = _run_all(
                binaries, arguments.kernel, personality, cpus, arguments.rounds
            )
            lines = [line for result in results for line in result.lines]
            found = {(personality, r.program, rule) for r in results for rule in r.failed}
            known = {
                key
                for key in KNOWN_FAILURES
                if key[0] == personality and key[1] in {r.program for r in results}
            }
            failed = [f"{name}: {rule}" for _, name, rule in sorted(found - known)]
            failed += [f"{name}: kept after all: {rule}" for _, name, rule in known - found]
            failed += [f"{r.program}: {r.problem}" for r in results if r.problem]
            if dmesg:
                failed.append(f"the guest kernel complains: {dmesg}")
            good = good and not failed
            skipped = sum(line.skip is not None for line in lines)
            summary.append(
                f"{where}: {len(results)} programs, {len(lines)} rules, "
                f"{sum(line.ok for line in lines) - skipped} ok, {skipped} skipped, "
                f"{len(known & found)} differ by decision, {len(failed)} failed"
            )
            summary += [f"  {line}" for line in failed]
            summary += [
                f"  differs: {key[1]}: {key[2]} ({KNOWN_FAILURES[key]})"
                for key in sorted(known & found)
            ]
    print("\n".join(["==", *summary]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
