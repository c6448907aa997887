# SPDX-License-Identifier: Apache-2.0
"""What a machine or a target did wrong, in one line that is equal for equal faults.

A fault of the guest's kernel has the kernel's own words as its title, without what differs from
one time to the next: addresses, process ids, numbers of processors, times, offsets, sizes. Where
these words name no place, the innermost function follows. A fault of the target or of the harness
is named after what ended it, and the innermost function of the code under test.
"""

from __future__ import annotations

import enum
import hashlib
import os
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from bridge.fuzz.slot_events import Suspect
from bridge.session.health import KERNEL_COMPLAINTS, sanitizer_reports

__all__ = [
    "STACK_FRAMES",
    "Fault",
    "Kind",
    "difference_fault",
    "faults_of",
    "hang_fault",
    "harness_fault",
    "kernel_faults",
    "memory_problem",
    "target_fault",
    "without_numbers",
]

STACK_FRAMES: Final = 5
"""How many functions tell two faults with the same title apart, from the innermost on."""

_TITLE_LIMIT: Final = 160
_REPORT_LINES: Final = 200
"""Lines of the kernel's log that belong to one report at most."""


class Kind(enum.StrEnum):
    """Who failed, and how; in the order of their weight: the first causes the others."""

    KERNEL = "kernel"
    """The guest's kernel reported a fault of its own."""
    TARGET_MEMORY = "target-memory"
    """The target took more memory than it may."""
    TARGET_DEATH = "target-death"
    """The process of the target ended, or a part of it that serves the guest."""
    TARGET_EXCEPTION = "target-exception"
    """The target did not catch an exception."""
    HARNESS = "harness"
    """The harness was killed by a signal, or raised."""
    DIFFERENCE = "difference"
    """The same case had another result elsewhere."""
    TARGET_HANG = "target-hang"
    """The target did not answer in time."""
    TIME_OUT = "time-out"
    """The case did not end in time, and the target is not to blame."""
    GUEST_LOST = "guest-lost"
    """The guest was switched off, suspended or reset, or does not answer."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        title: one line of printable text.
        stack: functions, the innermost first; :data:`STACK_FRAMES` of them at most.
        text: the report itself.
    """

    kind: Kind
    title: str
    stack: tuple[str, ...] = ()
    text: str = field(default="", compare=False)

    @property
    def key(self) -> str:
        """A name for directories, which differs where the title or the stack does."""
        words = re.sub(r"[^A-Za-z0-9]+", "-", self.title).strip("-").lower()[:60].rstrip("-")
        made_of = "\0".join([self.kind, self.title, *self.stack])
        digest = hashlib.sha256(made_of.encode(errors="replace")).hexdigest()
        return f"{words or 'finding'}-{digest[:12]}"


# ---- the guest's kernel

_STAMP: Final = re.compile(r"^(?:<\d+>)?\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ?")
"""The time of a message, and with CONFIG_PRINTK_CALLER its task or processor."""

_FRAME: Final = re.compile(
    r"^ *(?P<doubtful>\? )?(?P<name>[A-Za-z_][\w.]*)\+0x[0-9a-f]+/0x[0-9a-f]+(?P<module> \[\w+\])?"
)
_WHERE: Final = re.compile(r"RIP: 0010:(?P<name>[A-Za-z_][\w.]*)\+0x\S+(?P<module> \[\w+\])?")
_END: Final = re.compile(r"^---\[ end ")
_SAME: Final = re.compile(
    r"^Oops|^invalid opcode: |^KASAN: .* in range|^KASAN: maybe wild-memory-access|"
    r"^Kernel panic - not syncing: (?:Fatal exception|panic_on_warn set|\S+: panic_on_warn set|"
    r"hung_task: |softlockup: |RCU Stall|.*kernel BUG|Attempted to kill init! exitcode=0x0000000b)"
)
"""Lines that go on with the report before them: kernel/panic.c, arch/x86/kernel/dumpstack.c
(oops_end, __die_body), arch/x86/mm/kasan (kasan_non_canonical_hook)."""
_SAME_SOON: Final = re.compile(r"WARNING: |kernel BUG at ")
"""What comes right after words of its own: of WARN() and BUG_ON()."""
_SOON: Final = 3

_HELPERS: Final = re.compile(
    # Reports about their callers.
    r"dump_stack|show_stack|panic$|_?_warn|report_bug|handle_bug|print_\w*report|kasan_|__asan_|"
    r"__kasan|kcsan_|__tsan_|ubsan_|__ubsan_|handle_overflow|kfence_|end_report|"
    r"refcount_warn_saturate|__list_(?:add|del)\w*valid|usercopy_abort|__check_\w*object|"
    r"__copy_overflow|__might_|__schedule_bug|lockdep_|check_noncircular|__lock_acquire|"
    r"lock_acquire|validate_chain|print_circular|_raw_(?:spin|read|write)_|object_err|slab_err|"
    r"sched_show_task|rcu_\w*stall|"
    r"die$|oops_|exc_|asm_exc_|asm_sysvec|sysvec_|page_fault_oops|do_user_addr_fault|"
    r"search_module|fixup_exception|mem\w+$|"
    # Where a task sleeps on behalf of its caller.
    r"__?schedule|schedule|io_schedule|context_switch|(?:__)?mutex_lock|(?:__)?down_|rwsem_|"
    r"(?:__)?wait_for_|wait_on_|bit_wait|out_of_line_wait|__wait_on|folio_wait"
)
"""The functions that a report is not about."""


def _without_stamps(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield _STAMP.sub("", line).rstrip()


def kernel_faults(text: str) -> list[Fault]:
    """Return the faults that a guest's kernel reports, in order.

    Args:
        text: console output or the kernel's log.
    """
    reports: list[list[str]] = []
    open_for = 0  # lines that still belong to the last report
    for line in _without_stamps(text):
        if KERNEL_COMPLAINTS.search(line) and not _FRAME.match(line):
            report = reports[-1] if reports else []
            soon = open_for > 0 and len(report) <= _SOON and bool(_SAME_SOON.search(line))
            if report and (soon or _SAME.search(line)):
                report.append(line)
                continue
            reports.append([line])
            open_for = _REPORT_LINES
        elif open_for > 0:
            reports[-1].append(line)
            open_for = 0 if _END.match(line) else open_for - 1
    return [_kernel_fault(report) for report in reports]


def _kernel_fault(report: Sequence[str]) -> Fault:
    headline = report[0].strip()
    frames = list(_frames(report))
    title = _kernel_words(headline)
    names = [name for name, _ in frames]
    if frames and not _names_a_place(headline):
        name, module = frames[0]
        title = f"{title} in {name}{module}"
    return Fault(Kind.KERNEL, _bounded(title), tuple(names[:STACK_FRAMES]), "\n".join(report))


def _names_a_place(headline: str) -> bool:
    return re.search(r"\bin \w+|\.[chS]:\d+", headline) is not None


def _frames(report: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield functions and modules, the innermost first, without those that only report."""
    found: list[tuple[str, str]] = []
    in_interrupt = False
    traced = False
    for line in report:
        if (where := _WHERE.search(line)) is not None:
            if not found:
                found.append((where["name"], where["module"] or ""))
            continue
        word = line.strip()
        if word in ("<IRQ>", "<NMI>", "<#DF>"):
            in_interrupt = True
        elif word in ("</IRQ>", "</NMI>", "</#DF>"):
            in_interrupt = False
        elif word.startswith(("Call Trace:", "Call trace:")):
            if traced:
                break  # that of another task
        elif not in_interrupt and (frame := _FRAME.match(line)) is not None:
            traced = True
            if not frame["doubtful"]:
                found.append((frame["name"], frame["module"] or ""))
        elif word.startswith(("Allocated by task", "Freed by task", "Last potentially related")):
            break
    before = ""
    for name, module in found:
        name = re.sub(r"\.(?:constprop|isra|part|cold)\b.*", "", name)
        if not _HELPERS.match(name) and name != before:
            before = name  # how deep a recursion went is of no account
            yield name, module


def _kernel_words(headline: str) -> str:
    """Return the kernel's words without what differs from one time to the next."""
    text = headline
    text = re.sub(r": [0-9a-f]{4} \[#\d+\].*", "", text)  # an oops: error code, count, kernel
    text = re.sub(r"\+0x[0-9a-f]+/0x[0-9a-f]+", "", text)
    text = re.sub(r": CPU: \d+ (?:UID: \d+ )?PID: \d+ (?:Comm: .{1,16} )?at ", " at ", text)
    text = re.sub(r", address: [0-9a-fx]+$", "", text)
    text = re.sub(r"self-detected stall on CPU.*", "detected stalls on CPUs/tasks:", text)
    text = re.sub(r"blocked for more than \d+ seconds?\.?", "blocked for more than N seconds", text)
    return without_numbers(text).rstrip(" :.")


_ADDRESS: Final = re.compile(
    r"\b0x[0-9a-f]+\b|\(____ptrval____\)|\b(?=[0-9a-f]*[0-9])(?=[0-9a-f]*[a-f])[0-9a-f]{8,16}\b|"
    r"\b[0-9]{16}\b"
)
_POSITION: Final = re.compile(r"[\w./+-]+\.(?:[chS]|cc|cpp|rs|go|py):\d+(?::\d+)?")
_NUMBER: Final = re.compile(r"(?<![A-Za-z0-9_])\d+(?=s\b|(?![A-Za-z0-9_]))")


def without_numbers(text: str) -> str:
    """Return a line with ``ADDRESS`` and ``N`` for what looks like addresses and numbers.

    Names with digits in them stay, and so do places in source files.
    """
    pieces = []
    end = 0
    for position in _POSITION.finditer(text):
        pieces.append(_NUMBER.sub("N", _ADDRESS.sub("ADDRESS", text[end : position.start()])))
        pieces.append(position[0])
        end = position.end()
    pieces.append(_NUMBER.sub("N", _ADDRESS.sub("ADDRESS", text[end:])))
    return "".join(pieces)


def _bounded(title: str) -> str:
    """Return a title that is one printable line; the guest may have written any text."""
    text = "".join(each if each.isprintable() else " " for each in title)
    text = " ".join(text.split())
    return text if len(text) <= _TITLE_LIMIT else text[: _TITLE_LIMIT - 1] + "…"


# ---- the target

_EXCEPTION: Final = re.compile(r"^(?:[|+ -]*)([A-Za-z_][\w.]*)(?::.*)?$")
_PYTHON_FRAME: Final = re.compile(
    r'^[|+ ]*File "(?P<file>[^"]+)", line (?P<line>\d+),? in (?P<name>.+)$'
)
_DEATH: Final = re.compile(
    r"the process of .* (?:was killed by|exited with)|which serves the guest, has ended|"
    r"no longer listens|closed its connection"
)
_NO_ANSWER: Final = re.compile(r"did not answer within|does not answer")

_WAITS: Final = re.compile(
    r"\b(?:accept|epoll|get|poll|pselect|read|readexactly|readinto|readline|readuntil|recv|"
    r"recv_into|recvfrom|recvfrom_into|recvmsg|select|wait|wait_for)\("
)
"""In a line of source: a call that waits for something to do."""
_WAITING_FILES: Final = ("selectors.py", "socketserver.py", "threading.py", "queue.py", "ssl.py")


@dataclass(frozen=True)
class _Frame:
    """A place in a Python traceback."""

    file: str
    name: str
    source: str = ""

    def __str__(self) -> str:
        parts = self.file.split("/")
        for top in ("site-packages", "dist-packages", "lib"):
            if top in parts:
                at = len(parts) - 1 - parts[::-1].index(top)
                return f"{self.name} ({'/'.join(parts[at + 1 :])})"
        return f"{self.name} ({'/'.join(parts[-2:])})"

    def of(self, packages: Sequence[str]) -> bool:
        """Whether it is in one of these packages or modules."""
        path = self.file.removesuffix(".py").removesuffix("/__init__")
        slashed = f"{path}/"
        return any(f"/{each.replace('.', '/')}/" in slashed for each in packages)


def _python_frames(lines: Sequence[str]) -> list[_Frame]:
    found = []
    for number, line in enumerate(lines):
        if (frame := _PYTHON_FRAME.match(line)) is not None:
            following = lines[number + 1].strip(" |+") if number + 1 < len(lines) else ""
            source = "" if _PYTHON_FRAME.match(following) else following
            found.append(_Frame(frame["file"], frame["name"].strip(), source))
    return found


def _innermost_first(frames: Sequence[_Frame], packages: Sequence[str]) -> list[_Frame]:
    """Return the frames from the innermost one in ``packages`` on; all if none is in them."""
    inner = list(reversed(frames))
    for at, frame in enumerate(inner):
        if frame.of(packages):
            return inner[at:]
    return inner


def _stack_of(frames: Sequence[_Frame]) -> tuple[str, ...]:
    return tuple(str(frame) for frame in frames[:STACK_FRAMES])


def target_fault(problem: str, packages: Sequence[str] = ()) -> Fault:
    """Return the fault of a target.

    Args:
        problem: one of :meth:`bridge.session.session.Session.target_problems`, or of
            :meth:`bridge.targets.faults.TargetFaults.take`: a line, and a traceback below it.
        packages: what the target runs; other code is only what it runs on.
    """
    first, _, rest = problem.partition("\n")
    lines = rest.splitlines()
    if _MEMORY.match(first):
        return Fault(Kind.TARGET_MEMORY, first, (), problem)
    if _NO_ANSWER.search(first):
        return hang_fault("", rest, packages, text=problem)
    if _DEATH.search(first):
        frames = _innermost_first(_fatal_frames(lines), packages)
        place = f" in {frames[0]}" if frames else ""
        title = f"{without_numbers(first)}{place}"
        return Fault(Kind.TARGET_DEATH, _bounded(title), _stack_of(frames), problem)
    name, frames = _exception(lines)
    if not name:
        return Fault(Kind.TARGET_EXCEPTION, _bounded(without_numbers(first)), (), problem)
    frames = _innermost_first(frames, packages)
    place = f" in {frames[0]}" if frames else ""
    return Fault(Kind.TARGET_EXCEPTION, _bounded(f"{name}{place}"), _stack_of(frames), problem)


def _fatal_frames(lines: Sequence[str]) -> list[_Frame]:
    """Return the frames of the thread that a fault hit, the outermost first.

    faulthandler writes the innermost function of each thread first.
    """
    begins = [at for at, line in enumerate(lines) if line.startswith("Current thread ")]
    begin = begins[0] + 1 if begins else 0
    ends = [at for at in range(begin, len(lines)) if lines[at].startswith("Thread ")]
    return _python_frames(lines[begin : ends[0] if ends else len(lines)])[::-1]


def _exception(lines: Sequence[str]) -> tuple[str, list[_Frame]]:
    """Return the name and the frames of the last exception that a text shows."""
    begin = 0
    for number, line in enumerate(lines):
        if line.strip(" |+-").startswith("Traceback (most recent call last)"):
            begin = number
    name = ""
    for line in lines[begin + 1 :]:
        # Frames, their source and notes are indented; in a group all of it is.
        plain = re.sub(r"^[ ]*\| ", "", line)
        if plain[:1] not in ("", " ") and (found := _EXCEPTION.match(plain)) is not None:
            name = found[1]
            break
    return name, _python_frames(lines[begin:])


_MEMORY: Final = re.compile(r"the target takes more memory than \d+ MiB")


def memory_problem(mebibytes: int, stacks: str = "") -> str:
    """Return the problem of a target that takes more memory than it may."""
    return f"the target takes more memory than {mebibytes} MiB\n{stacks}".rstrip()


_KERNEL_FRAME: Final = re.compile(r"^\s*\[<0>\] (?P<name>[\w.]+)\+0x")


def _busy_threads(stacks: str, packages: Sequence[str]) -> Iterator[list[_Frame]]:
    """Yield the frames of threads that are in the target's code and do not wait for work.

    The innermost function of the target is the first one.
    """
    for thread in re.split(r"^(?=thread |Thread |Current thread )", stacks, flags=re.MULTILINE):
        lines = thread.splitlines()
        frames = _python_frames(lines)
        if lines and re.match(r"(?:Thread|Current thread) 0x", lines[0]):
            frames.reverse()  # of faulthandler
        if not frames or not any(frame.of(packages) for frame in frames):
            continue
        innermost = frames[-1]
        if os.path.basename(innermost.file) in _WAITING_FILES:  # noqa: PTH119
            continue
        if innermost.of(packages) and _WAITS.search(innermost.source):
            continue
        yield _innermost_first(frames, packages)


def hang_fault(
    processes: str,
    stacks: str,
    packages: Sequence[str] = (),
    *,
    later: str | None = None,
    text: str = "",
) -> Fault:
    """Return the fault of a case that did not end in time.

    The target is to blame if one of its threads is in its own code and does not wait for
    something to do; and a moment later is still in the same function.

    Args:
        processes: the guest's processes as :data:`bridge.session.evidence.PROCESSES` prints them.
        stacks: where the target's threads are.
        packages: what the target runs.
        later: where its threads are a moment later; None for a target that gave no answer for
            seconds.
    """
    whole = text or "\n".join(filter(None, [processes, stacks]))
    still = {str(inner[0]) for inner in _busy_threads(later or "", packages)}
    for inner in _busy_threads(stacks, packages):
        if later is not None and str(inner[0]) not in still:
            continue
        return Fault(
            Kind.TARGET_HANG, _bounded(f"the target hangs in {inner[0]}"), _stack_of(inner), whole
        )
    if _NO_ANSWER.search(text.partition("\n")[0]):
        return Fault(Kind.TARGET_HANG, "the target does not answer", (), whole)
    names = _waiting_harness(processes)
    place = f": the harness waits in {names[0]}" if names else ""
    return Fault(Kind.TIME_OUT, f"the case did not end in time{place}", names, whole)


def _waiting_harness(processes: str) -> tuple[str, ...]:
    """Return where in the kernel the harness is, of all processes the last that waits there."""
    found: tuple[str, ...] = ()
    names: list[str] = []
    header = ""
    for line in [*processes.splitlines(), "0 end"]:
        if (frame := _KERNEL_FRAME.match(line)) is not None:
            names.append(frame["name"])
            continue
        kept = [each for each in names if not _HELPERS.match(each)]
        if kept and "kcov-runner" in header:
            found = tuple(kept[:STACK_FRAMES])
        header, names = line, []
    return found


# ---- the harness and the guest

_SUMMARY: Final = re.compile(
    r"SUMMARY: (?P<sanitizer>\w*Sanitizer): (?P<what>[\w-]+)"
    r"(?: \(?[^ ]*?(?P<file>[\w.-]+:\d+)[^ ]*)?(?: in (?P<name>[\w:~]+))?"
)
_SANITIZER_FRAME: Final = re.compile(r"^\s*#\d+ 0x[0-9a-f]+ in (\S+)")
_ASSERTION: Final = re.compile(
    r"^(?:\S+: )?(?P<where>\S+:\d+): (?P<name>.+): (?P<what>Assertion .*)$"
)


def harness_fault(status: int, output: bytes) -> Fault | None:
    """Return the fault of a harness by its wait status; None if it ended well.

    Args:
        output: the end of its stderr.
    """
    if status == 0:
        return None
    text = output.decode(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        try:
            how = f"the harness was killed by {signal.Signals(-code).name}"
        except ValueError:
            how = f"the harness was killed by signal {-code}"
    else:
        how = f"the harness exited with {code}"
    lines = text.splitlines()
    if (summary := _SUMMARY.search(text)) is not None:
        frames = tuple(
            found[1] for line in lines if (found := _SANITIZER_FRAME.match(line)) is not None
        )
        place = summary["name"] or summary["file"]
        title = f"{summary['sanitizer']}: {summary['what']}" + (f" in {place}" if place else "")
        return Fault(Kind.HARNESS, _bounded(title), frames[:STACK_FRAMES], text)
    if reports := sanitizer_reports(output):
        return Fault(Kind.HARNESS, _bounded(without_numbers(reports[0])), (), text)
    for line in lines:
        if (assertion := _ASSERTION.match(line)) is not None:
            title = f"{how}: {assertion['what']} in {assertion['name']}"
            return Fault(Kind.HARNESS, _bounded(without_numbers(title)), (), text)
    name, frames_of = _exception(lines) if "Traceback (most" in text else ("", [])
    if name:
        inner = frames_of[::-1]
        place = f" in {inner[0]}" if inner else ""
        return Fault(Kind.HARNESS, _bounded(f"{name}{place}"), _stack_of(inner), text)
    return Fault(Kind.HARNESS, how, (), text)


def difference_fault(text: str) -> Fault:
    """Return the fault of a case with another result elsewhere.

    Args:
        text: begins with the call and the field that differ; what they were is another each time.
    """
    first = text.partition("\n")[0].partition(": ")[0].strip()
    return Fault(Kind.DIFFERENCE, _bounded(without_numbers(first)), (), text)


# ---- a case after which something is wrong

_DIFFERENCE: Final = re.compile(rb"difference in ([^:\s]+)")
"""How the output of a harness begins that found a difference."""


def faults_of(suspect: Suspect, packages: Sequence[str] = ()) -> list[Fault]:
    """Return the faults that a case led to, the one that causes the others first.

    Args:
        packages: what the target runs.
    """
    evidence = suspect.evidence
    found = kernel_faults(evidence.console) or kernel_faults(evidence.dmesg)
    found += [target_fault(problem, packages) for problem in evidence.problems]
    if suspect.status and _DIFFERENCE.match(suspect.output):
        found.append(difference_fault(suspect.output.decode(errors="replace")))
    elif suspect.status is not None and not suspect.timed_out:
        harness = harness_fault(suspect.status, suspect.output)
        found += [harness] if harness is not None else []
    if suspect.timed_out:
        stacks = evidence.stacks
        found.append(hang_fault(stacks, stacks, packages, later=evidence.later))
    if evidence.lost and not found:
        title = _bounded(without_numbers(evidence.lost.partition("\n")[0]))
        found.append(Fault(Kind.GUEST_LOST, title, (), evidence.lost))
    # The first of equal ones, in the order in which they came.
    unique = list(dict.fromkeys(found))
    weights = list(Kind)
    return sorted(unique, key=lambda fault: weights.index(fault.kind))
