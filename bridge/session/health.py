# SPDX-License-Identifier: Apache-2.0
"""Whether a guest, and the target that serves it, are well.

A guest is sick if its kernel says so in its log (an oops, a warning, a hung task, a report of a
sanitizer, a process that was killed by a fault), if its taint mask has new bits, if a program
dumped core, or if the output of a command has a report of a sanitizer. For a target see
:mod:`bridge.targets.faults`.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bridge.errors import GuestLostError, RunTimeoutError
from bridge.guest.guest_image import CORE_DUMPS

if TYPE_CHECKING:
    from bridge.guest.guest import Guest

__all__ = [
    "KERNEL_COMPLAINTS",
    "LOOK_SECONDS",
    "CoreDump",
    "KernelLog",
    "Symptom",
    "in_guest",
    "new_taint",
    "sanitizer_reports",
    "symptoms",
]

KERNEL_COMPLAINTS: Final = re.compile(
    r"WARNING: |BUG: |BUG [a-z]|kernel BUG at|Oops|Kernel panic|"
    r"(?<!traps: )\bgeneral protection fault|refcount_t: |UBSAN: |KASAN: |KFENCE: |KMSAN: |KCSAN: |"
    r"ODEBUG|divide error: |invalid opcode: |INFO: task .* blocked for more than|"
    r"detected stall|self-detected stall|"
    r"watchdog: .* stuck|soft lockup|hard LOCKUP|INFO: trying to register|"
    r"possible recursive locking|possible circular locking|unreferenced object|"
    r"detected expedited stalls|usercopy: Kernel memory|list_(?:add|del) corruption"
)
"""What Linux writes to its log about itself: lib/bug.c, kernel/panic.c, kernel/hung_task.c,
kernel/watchdog.c, kernel/rcu/tree_stall.h, kernel/locking/lockdep.c, lib/ubsan.c, lib/refcount.c,
lib/list_debug.c, mm/kasan/report.c, mm/kfence/report.c, mm/usercopy.c, kernel/kcsan/report.c,
arch/x86/mm/fault.c, arch/x86/kernel/traps.c."""

_PROGRAM_COMPLAINTS: Final = re.compile(
    r"segfault at |traps: .* trap |traps: .* general protection|Out of memory: Killed process"
)
"""The same about programs: arch/x86/mm/fault.c (show_signal_msg), arch/x86/kernel/traps.c,
mm/oom_kill.c."""

LOOK_SECONDS: Final = 20.0
"""How long reading a guest's kernel log may take."""

_TAINTS: Final = {
    0: "a proprietary module was loaded",
    1: "a module was loaded by force",
    2: "a kernel runs on processors that it is not made for",
    3: "a module was removed by force",
    4: "a processor reported a machine check error",
    5: "a page is bad",
    6: "user space asked for it",
    7: "the kernel died: oops or BUG",
    8: "an ACPI table was overridden",
    9: "the kernel warned",
    10: "a staging driver was loaded",
    11: "a workaround for a firmware bug was applied",
    12: "a module from outside the kernel's tree was loaded",
    13: "an unsigned module was loaded",
    14: "a soft lockup occurred",
    15: "the kernel was patched live",
    17: "a struct was randomised",
    18: "an in-kernel test has run",
}
"""The bits of /proc/sys/kernel/tainted: Documentation/admin-guide/tainted-kernels.rst."""

_SHOWN: Final = 200

_SANITIZERS: Final = re.compile(
    rb"^.*(?:(?:ERROR|WARNING): \w*Sanitizer\b.*|:[0-9]+:[0-9]+: runtime error: .*)$", re.MULTILINE
)
"""What AddressSanitizer, ThreadSanitizer and others of LLVM and GCC print, and UBSan."""
_SANITIZER_WORDS: Final = (b"Sanitizer", b": runtime error: ")


@dataclass(frozen=True)
class Symptom:
    """One sign that something is wrong; ``text`` is a line that people read."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclass(frozen=True)
class CoreDump:
    """A core dump in the guest.

    Attributes:
        path: where it is.
        signal, pid, program: what ended which process.
    """

    path: str
    signal: int
    pid: int
    program: str

    @classmethod
    def from_path(cls, path: str) -> CoreDump | None:
        """Read a name that :data:`bridge.guest.guest_image.CORE_DUMPS` begins; None for others."""
        number, _, rest = path.removeprefix(CORE_DUMPS).partition(".")
        pid, _, program = rest.partition(".")
        if not (path.startswith(CORE_DUMPS) and number.isdecimal() and pid.isdecimal()):
            return None
        return cls(path, int(number), int(pid), program)

    def __str__(self) -> str:
        try:
            name = signal.Signals(self.signal).name
        except ValueError:
            name = f"signal {self.signal}"
        return f"{self.program} (process {self.pid}) dumped core: {name}"


@dataclass(frozen=True)
class KernelLog:
    """The kernel's log, line by line, its taint mask, and core dumps, at one moment."""

    lines: tuple[str, ...]
    taint: int
    cores: tuple[CoreDump, ...] = ()

    @classmethod
    def parse(cls, text: str) -> KernelLog:
        """Read what :meth:`bridge.guest.guest.Guest.look` returns.

        Raises:
            ValueError: it is something else.
        """
        first, _, rest = text.partition("\n")
        log, _, names = rest.partition("\0")
        found = (CoreDump.from_path(name) for name in names.split("\n"))
        cores = tuple(core for core in found if core is not None)
        return cls(tuple(log.splitlines()), int(first), cores)

    @classmethod
    def read(cls, guest: Guest, seconds: float = LOOK_SECONDS) -> KernelLog:
        """Read the log of a guest.

        Raises:
            GuestLostError: the guest does not answer.
        """
        try:
            result = guest.look(CORE_DUMPS, seconds)
        except RunTimeoutError:
            raise GuestLostError(
                f"the guest does not answer: its kernel log could not be read in {seconds:g} s",
                hint="is there something in it that takes all of its processors or memory?",
            ) from None
        try:
            return cls.parse(result.stdout.decode(errors="replace"))
        except ValueError:
            raise GuestLostError(
                f"the guest's kernel log cannot be read (exit status {result.exit_status})",
                evidence=result.stderr.decode(errors="replace"),
            ) from None

    def new_cores(self, before: KernelLog) -> tuple[CoreDump, ...]:
        """Return the core dumps that were added."""
        return tuple(core for core in self.cores if core not in before.cores)

    def since(self, before: KernelLog) -> tuple[str, ...]:
        """Return the lines that were added; all of them if the log began anew."""
        known = len(before.lines)
        if self.lines[:known] == before.lines:
            return self.lines[known:]
        # The ring buffer has dropped its oldest lines.
        last = before.lines[-1:]
        for at in range(len(self.lines) - 1, -1, -1):
            if self.lines[at : at + 1] == last:
                return self.lines[at + 1 :]
        return self.lines


def symptoms(lines: Iterable[str], ignore: Sequence[re.Pattern[str]]) -> list[Symptom]:
    """Return what the kernel complains about in these lines of its log."""
    return [
        Symptom("the guest's kernel", line.strip()[:_SHOWN])
        for line in lines
        if (KERNEL_COMPLAINTS.search(line) or _PROGRAM_COMPLAINTS.search(line))
        and not _ignored(line, ignore)
    ]


def sanitizer_reports(output: bytes) -> list[str]:
    """Return the lines of a command's output that are reports of a sanitizer."""
    if not any(word in output for word in _SANITIZER_WORDS):
        return []
    return [each.decode(errors="replace").strip()[:_SHOWN] for each in _SANITIZERS.findall(output)]


def in_guest(texts: Iterable[object], ignore: Sequence[re.Pattern[str]]) -> list[Symptom]:
    """Return a symptom for each of these texts about programs in the guest."""
    return [Symptom("the guest", str(text)) for text in texts if not _ignored(str(text), ignore)]


def new_taint(before: int, after: int, ignore: Sequence[re.Pattern[str]]) -> list[Symptom]:
    """Return a symptom for each bit that the taint mask has now and had not before."""
    new = after & ~before
    found = []
    for bit in range(new.bit_length()):
        if new >> bit & 1:
            text = f"new taint: {_TAINTS.get(bit, f'bit {bit}')}"
            if not _ignored(text, ignore):
                found.append(Symptom("the guest's kernel", text))
    return found


def _ignored(text: str, ignore: Sequence[re.Pattern[str]]) -> bool:
    return any(pattern.search(text) for pattern in ignore)
