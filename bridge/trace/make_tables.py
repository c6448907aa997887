# SPDX-License-Identifier: Apache-2.0
"""Make ``linux_x86_64.tsv`` from the headers of a kernel.

``python -m bridge.trace.make_tables /usr/src/linux-headers-VERSION-amd64 >FILE``

The file has the names of system calls and their parameters, errnos that only the kernel itself
uses, and flags, each as the headers have them. The tree is that of Debian's package
``linux-headers-VERSION-amd64``; flags come from the headers that gcc finds (linux-libc-dev).
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

__all__ = ["flags", "internal_errnos", "main", "system_calls"]

_NUMBER: Final = re.compile(r"^#define __NR_(\w+) (\d+)$", re.MULTILINE)
_ENTRY: Final = re.compile(r"^__SYSCALL(?:_NORETURN)?\((\d+), sys_(\w+)\)", re.MULTILINE)
_PROTOTYPE: Final = re.compile(r"^asmlinkage long sys_(\w+)\(([^;]*)\);", re.MULTILINE)
_ERRNO: Final = re.compile(r"^#define\s+(E\w+)\s+(5\d\d)\b", re.MULTILINE)
_WORDS: Final = re.compile(r"\w+|\*")

# Declared in headers of x86 or in C files, not in include/linux/syscalls.h.
_ELSEWHERE: Final[Mapping[str, str]] = {
    "mmap": "unsigned long addr, unsigned long len, unsigned long prot, unsigned long flags, "
    "unsigned long fd, unsigned long off",
    "modify_ldt": "int func, void *ptr, unsigned long bytecount",
    "iopl": "unsigned int level",
    "ioperm": "unsigned long from, unsigned long num, int turn_on",
    "arch_prctl": "int option, unsigned long arg2",
    "rt_sigreturn": "void",
    "clone": "unsigned long clone_flags, unsigned long newsp, int *parent_tidptr, "
    "int *child_tidptr, unsigned long tls",
    "rt_sigaction": "int sig, const struct sigaction *act, struct sigaction *oact, "
    "size_t sigsetsize",
}

_HEADERS: Final = (
    *("linux/fcntl.h", "linux/mman.h", "linux/sched.h", "linux/stat.h", "linux/mount.h"),
    *("asm/signal.h", "linux/fs.h", "linux/memfd.h", "linux/openat2.h"),
)
_GROUPS: Final[Mapping[str, str]] = {
    "open": r"O_(?!ACCMODE|NDELAY)\w+",
    "at": r"AT_(SYMLINK_NOFOLLOW|EACCESS|REMOVEDIR|SYMLINK_FOLLOW|NO_AUTOMOUNT|EMPTY_PATH)",
    "prot": r"PROT_(?!NONE|SEM)\w+",
    "map": r"MAP_(SHARED|PRIVATE|FIXED|ANONYMOUS|GROWSDOWN|DENYWRITE|LOCKED|NORESERVE|POPULATE"
    r"|NONBLOCK|STACK|HUGETLB|SYNC|FIXED_NOREPLACE|32BIT)",
    "clone": r"CLONE_(?!CLEAR_SIGHAND|INTO_CGROUP|NEWTIME|ARGS_SIZE)\w+",
    "mount": r"MS_(RDONLY|NOSUID|NODEV|NOEXEC|SYNCHRONOUS|REMOUNT|NOATIME|BIND|MOVE|REC|SILENT"
    r"|PRIVATE|SLAVE|SHARED|RELATIME|STRICTATIME)",
    "signal": r"SIG(?!RTMIN|RTMAX|STKSZ|POLL|UNUSED)[A-Z0-9]+",
    "seek": r"SEEK_(SET|CUR|END|DATA|HOLE)",
    "fcntl": r"F_(DUPFD|GETFD|SETFD|GETFL|SETFL|GETLK|SETLK|SETLKW|DUPFD_CLOEXEC|ADD_SEALS"
    r"|GET_SEALS)",
}


def system_calls(tree: Path) -> dict[int, tuple[str, list[tuple[str, str]]]]:
    """Return name and parameters (type, name) of each system call, by number."""
    generated = tree / "arch/x86/include/generated"
    names = _NUMBER.findall((generated / "uapi/asm/unistd_64.h").read_text())
    entries = dict(_ENTRY.findall((generated / "asm/syscalls_64.h").read_text()))
    common = _common(tree) / "include/linux/syscalls.h"
    prototypes = {**dict(_PROTOTYPE.findall(common.read_text())), **_ELSEWHERE}
    return {
        int(number): (name, list(_parameters(prototypes.get(entries.get(number, ""), ""))))
        for name, number in names
        # __NR_syscalls is their number.
        if name != "syscalls"
    }


def _common(tree: Path) -> Path:
    """Return the tree with the headers that all flavours of Debian's kernel share."""
    return tree.with_name(tree.name.rpartition("-")[0] + "-common")


def _parameters(prototype: str) -> Iterator[tuple[str, str]]:
    for parameter in prototype.split(","):
        words = [word for word in _WORDS.findall(parameter) if word != "__user"]
        if words in ([], ["void"]):
            continue
        if len(words) == 1 or words[-1] == "*" or words[-1] in ("int", "long"):
            yield " ".join(words), ""
        else:
            yield " ".join(words[:-1]), words[-1]


def internal_errnos(tree: Path) -> dict[int, str]:
    """Return the errnos from 512 on, by number."""
    text = (_common(tree) / "include/linux/errno.h").read_text()
    return {int(number): name for name, number in _ERRNO.findall(text)}


def flags() -> dict[str, dict[str, int]]:
    """Return the value of each flag, by group and name."""
    includes = "".join(f"#include <{header}>\n" for header in _HEADERS)
    macros = _compile(includes, "-E", "-dM", "-")
    names = re.findall(r"^#define (\w+) (?=.)", macros, re.MULTILINE)
    found: dict[str, dict[str, int]] = {}
    for group, pattern in _GROUPS.items():
        wanted = [name for name in names if re.fullmatch(pattern, name)]
        # An enumeration makes the compiler compute each value; gcc -S then shows it.
        source = includes + "".join(
            f"const long v_{name} = (long)({name});\n" for name in dict.fromkeys(wanted)
        )
        assembly = _compile(source, "-S", "-o", "-", "-")
        values = re.findall(r"^v_(\w+):\n\s+\.quad\s+(-?\d+)$", assembly, re.MULTILINE)
        zeros = set(wanted) - {name for name, _ in values}
        found[group] = {name: int(value) for name, value in values} | dict.fromkeys(zeros, 0)
    return found


def _compile(source: str, *arguments: str) -> str:
    command = ["gcc", "-x", "c", *arguments]
    return subprocess.run(command, input=source, check=True, capture_output=True, text=True).stdout


def main(arguments: list[str]) -> int:
    """Print the tables."""
    if len(arguments) != 1:
        print("usage: python -m bridge.trace.make_tables TREE >FILE", file=sys.stderr)
        return 2
    tree = Path(arguments[0])
    print("# SPDX-License-Identifier: Apache-2.0")
    print(f"# Made by bridge/trace/make_tables.py from {tree.name}.")
    for number, (name, parameters) in sorted(system_calls(tree).items()):
        print("call", number, name, *(f"{kind}:{at}" for kind, at in parameters), sep="\t")
    for number, name in sorted(internal_errnos(tree).items()):
        print("errno", number, name, sep="\t")
    for group, values in flags().items():
        for name, value in sorted(values.items(), key=lambda each: (each[1], each[0])):
            print(group, value, name, sep="\t")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
