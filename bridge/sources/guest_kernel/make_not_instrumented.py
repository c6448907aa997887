# SPDX-License-Identifier: Apache-2.0
"""Make ``not_instrumented_VERSION.txt`` from a kernel's source tree.

``python -m bridge.sources.guest_kernel.make_not_instrumented TREE KERNEL >FILE``

The list has the functions that CONFIG_KCOV does not instrument, by file: those of C files that a
Makefile excludes (``KCOV_INSTRUMENT := n`` for a directory, ``KCOV_INSTRUMENT_file.o := n`` for a
file), and those of all assembler files. Only code of an x86-64 kernel or its modules counts. A name
that another file also uses gets a question mark. Needs Universal Ctags (Debian: universal-ctags);
takes a minute.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["excluded_files", "functions_of_assembler", "generated_functions", "main"]

# Code for other machines, code that runs before the kernel, and code for user mode.
_ELSEWHERE = re.compile(
    r"arch/(?!x86/)|arch/x86/(?:um|boot|purgatory|realmode|tools)/|drivers/s390/"
    r"|drivers/firmware/efi/libstub/|drivers/gpu/|(?:tools|scripts|samples|Documentation|usr)/"
)
_SETTING = re.compile(r"^\s*KCOV_INSTRUMENT(?:_(\S+)\.o)?\s*:?=\s*(\w+)", re.MULTILINE)
_CONTINUED = 100

_ASSEMBLER = re.compile(
    r"^\s*(?:SYM_(?:TYPED_)?(?:FUNC_|CODE_)?START\w*|SYM_INNER_LABEL\w*|SYM_FUNC_ALIAS\w*"
    r"|ENTRY|STATIC_STACK_FRAME_NON_STANDARD|THUNK)[ \t(]+([A-Za-z_]\w*)",
    re.MULTILINE,
)
_SYSCALL = re.compile(r"^(COMPAT_|COND_)?SYSCALL(?:_DEFINE\d)?(_COMPAT)?\((\w+)", re.MULTILINE)
_INTERRUPT = re.compile(r"^DEFINE_IDTENTRY\w*\((\w+)", re.MULTILINE)
_TRACES = re.compile(
    r"^#define CREATE_TRACE_POINTS\n(?:.*\n)*?#include [<\"]((?:asm/trace|trace/events)/\w+\.h)",
    re.MULTILINE,
)
_EVENT = re.compile(
    r"^(?:(?:TRACE_EVENT\w*|DECLARE_EVENT_CLASS)\(\s*(\w+)|DEFINE_EVENT\w*\(\s*\w+,\s*(\w+))",
    re.MULTILINE,
)
_PAIR_OF_EVENTS = re.compile(r"^DEFINE_\w+_EVENT\((\w+)\);", re.MULTILINE)
_ENDS = ("entry", "exit")
_INCLUDE = re.compile(r"^#\s*include \"(\w[\w.-]*\.[hc])\"", re.MULTILINE)


def excluded_files(tree: Path) -> Iterator[str]:
    """Return the C files that a Makefile of the tree excludes, by their path in it."""
    for makefile in sorted([*tree.rglob("Makefile"), *tree.rglob("Kbuild")]):
        directory = makefile.parent.relative_to(tree).as_posix()
        if _ELSEWHERE.match(f"{directory}/"):
            continue
        settings = dict(_SETTING.findall(makefile.read_text(encoding="utf-8")))
        everything = settings.pop("", "")
        names = set(settings)
        if everything:
            names |= {path.stem for path in makefile.parent.glob("*.c")}
        for name in sorted(names):
            # As in scripts/Makefile.lib, the file's setting precedes its directory's.
            if f"{settings.get(name, '')}{everything}".startswith("n"):
                path = makefile.parent / f"{name}.c"
                if path.is_file():
                    yield path.relative_to(tree).as_posix()


def functions_of_assembler(text: str) -> set[str]:
    """Return the functions of an assembler file, and the labels within them."""
    return set(_ASSEMBLER.findall(text)) - {"name"}


def generated_functions(text: str, tree: Path) -> set[str]:
    """Return the functions that macros generate in a C file.

    These are system calls, interrupt handlers and trace events.
    """
    found = set()
    for compat, also_compat, name in _SYSCALL.findall(text):
        infix = "_compat_sys_" if compat == "COMPAT_" or also_compat else "_sys_"
        found |= {f"__{abi}{infix}{name}" for abi in ("ia32", "x64", "se", "do")}
    for name in _INTERRUPT.findall(text):
        found |= {name, f"__{name}", f"fred_{name}"}
    for header in _TRACES.findall(text):
        root = "arch/x86/include" if header.startswith("asm/") else "include"
        events = (tree / root / header).read_text(encoding="utf-8")
        names = [f"{pair}_{end}" for pair in _PAIR_OF_EVENTS.findall(events) for end in _ENDS]
        for event, of_class in _EVENT.findall(events):
            names.append(event or of_class)
            if event:
                prefixes = ("trace_event_raw_event_", "perf_trace_", "trace_raw_output_")
                found |= {f"{prefix}{event}" for prefix in prefixes}
        found |= {
            f"{prefix}{name}" for prefix in ("__traceiter_", "__bpf_trace_") for name in names
        }
    return found


def _functions(tree: Path, files: Iterable[str]) -> dict[str, set[str]]:
    """Return the functions of C files as Universal Ctags finds them, by file."""
    answer = subprocess.run(
        [
            *("ctags", "-L", "-", "-f", "-", "--languages=C", "--c-kinds=f", "--sort=no"),
            *("--output-format=u-ctags", "--fields="),
        ],
        input="\n".join(files).encode(),
        capture_output=True,
        check=True,
        cwd=tree,
    ).stdout.decode("utf-8", "replace")
    found: dict[str, set[str]] = {}
    for line in answer.splitlines():
        name, file, *_ = line.split("\t")
        if not name.startswith("!_"):
            found.setdefault(file, set()).add(name)
    return found


def _counts(file: str) -> bool:
    """Return whether other files may have functions of the same name.

    Headers in a directory that is excluded as a whole are included only there.
    """
    return not file.endswith(".h") or file.startswith(("include/", "arch/x86/include/"))


def main(tree: Path, kernel: str) -> None:
    """Print the list for the source tree of ``kernel``."""
    sources = [
        name
        for path in sorted([*tree.rglob("*.c"), *tree.rglob("*.h")])
        if not _ELSEWHERE.match(name := path.relative_to(tree).as_posix())
    ]
    everywhere = _functions(tree, sources)
    taken_out = list(excluded_files(tree))
    listed: dict[str, set[str]] = {}
    for name in taken_out:
        text = (tree / name).read_text(encoding="utf-8")
        # A name in capitals is a macro that generates functions.
        functions = {f for f in everywhere.get(name, ()) if not f.isupper()}
        listed[name] = functions | generated_functions(text, tree)
        for included in _INCLUDE.findall(text):
            beside = (tree / name).with_name(included).relative_to(tree).as_posix()
            listed[name] |= {f for f in everywhere.get(beside, ()) if not f.isupper()}
    for path in sorted((tree / "arch/x86").rglob("*.S")):
        name = path.relative_to(tree).as_posix()
        if not _ELSEWHERE.match(name) and "/vdso/" not in name:
            listed[name] = functions_of_assembler(path.read_text(encoding="utf-8"))
    # Ambiguous names: a header's function may become part of any file.
    calls = generated_functions((tree / "kernel/sys_ni.c").read_text(encoding="utf-8"), tree)
    elsewhere = calls.union(
        *(found for file, found in everywhere.items() if file not in listed and _counts(file))
    )
    print("# SPDX-License-Identifier: Apache-2.0")
    print("# Functions that a kernel with CONFIG_KCOV does not instrument, by file:")
    print(f"# {kernel}, x86-64.")
    print("# A question mark: another file has a function of this name, too. Made by")
    print("# bridge/sources/guest_kernel/make_not_instrumented.py with Universal Ctags.")
    for name, functions in sorted(listed.items()):
        if not functions:
            continue
        words = (f"?{f}" if f in elsewhere else f for f in sorted(functions))
        print(f"{name}:")
        lines = textwrap.wrap(
            " ".join(words), _CONTINUED, break_long_words=False, break_on_hyphens=False
        )
        print("\n".join(f" {line}" for line in lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
