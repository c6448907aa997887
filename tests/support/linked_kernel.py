# SPDX-License-Identifier: Apache-2.0
"""A kernel and a module of a few lines, made by gcc and ld, with debug information."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bridge.sources.guest_kernel.placement import MODULES_BASE, core_text_size
from bridge.sources.guest_kernel.symbols import KernelSymbols, ModuleText

MAIN = """\
#include "mill.h"
int turn(int n)
{
        if (n > 3)
                return grind(n);
        return n + 1;
}
"""
MILL_H = """\
int grain(int);
static inline __attribute__((always_inline)) int grind(int n)
{
        return grain(n) * 7;
}
"""
GRAIN = """\
__attribute__((section(".init.text"))) int early(int n)
{
        return n ^ 5;
}

int grain(int n)
{
        return n - 2;
}
"""

MODULE_A = """\
int helper(int);
__attribute__((section(".init.text"))) int start(int n)
{
        return helper(n);
}
__attribute__((section(".exit.text"))) int leave(int n)
{
        return helper(n) ^ 1;
}
"""
MODULE_B = """\
#include "../init/mill.h"
int grain(int n)
{
        return n * 3;
}
__attribute__((section(".text.unlikely"))) int rare(int n)
{
        return n - 7;
}
int helper(int n)
{
        return grind(n) + rare(n);
}
"""

TEXT = 0xFFFF_FFFF_8100_0000
CANONICAL = MODULES_BASE + 0x5000
LOADED = 0xFFFF_FFFF_C001_2000
RELEASE = "6.1.0-x"


def link(directory: Path, *flags: str, sources: tuple[str, str] = ("init", "fs")) -> Path:
    """A program with two compile units, at the address of a kernel."""
    tree = directory / "tree"
    first, second = (tree / name for name in sources)
    for folder in (first, second, directory / "out"):
        folder.mkdir(parents=True, exist_ok=True)
    (first / "main.c").write_text(MAIN)
    (first / "mill.h").write_text(MILL_H)
    (second / "grain.c").write_text(GRAIN)
    out = directory / "out"
    for source in (first / "main.c", second / "grain.c"):
        compile_to(out, source, *flags)
    command = ["ld", "-static", f"-Ttext={TEXT:#x}", "-e", "turn", "-o", "vmlinux"]
    command += ["--section-start=.init.text=0xffffffff82000000", "main.o", "grain.o"]
    subprocess.run(command, check=True, cwd=out)
    return out / "vmlinux"


def compile_to(out: Path, source: Path, *flags: str) -> None:
    command = ["gcc", "-g", "-O1", "-mcmodel=kernel", "-fno-pic", "-ffreestanding", *flags]
    command += ["-fcf-protection=none", "-c", str(source), "-o", f"{source.stem}.o"]
    subprocess.run(command, check=True, cwd=out)


def link_module(vmlinux: Path, *flags: str) -> Path:
    """A relocatable file of two units beside a linked kernel, where a package has modules."""
    out, tree = vmlinux.parent, vmlinux.parent.parent / "tree"
    place = out / "lib/modules" / RELEASE / "kernel/drivers"
    for directory in (tree / "drivers", place):
        directory.mkdir(parents=True, exist_ok=True)
    (tree / "drivers" / "one.c").write_text(MODULE_A)
    (tree / "drivers" / "two.c").write_text(MODULE_B)
    for name in ("one", "two"):
        compile_to(out, tree / "drivers" / f"{name}.c", *flags)
    module = place / "my-mill.ko"
    subprocess.run(["ld", "-r", "-o", str(module), "one.o", "two.o"], check=True, cwd=out)
    return module


def sections(module: Path) -> list[tuple[str, int, int]]:
    """The module's sections that stay, as readelf has them: name, offset in the text, size."""
    text = subprocess.run(
        ["readelf", "-SW", str(module)], capture_output=True, text=True, check=True
    ).stdout
    found, at = [], 0
    for line in text.splitlines():
        words = line.partition("]")[2].split()
        if len(words) == 10 and "X" in words[6] and not words[0].startswith(".init"):
            size, align = int(words[4], 16), int(words[9])
            at = -(-at // align) * align
            found.append((words[0], at, size))
            at += size
    return found


def loaded(vmlinux: Path, module: Path) -> KernelSymbols:
    """The symbols of a guest with the kernel and the module in it."""
    text = subprocess.run(["nm", str(vmlinux)], capture_output=True, text=True, check=True).stdout
    places = {name: at for name, at, _ in sections(module)}
    table = subprocess.run(
        ["objdump", "-t", str(module)], capture_output=True, text=True, check=True
    ).stdout
    for line in table.splitlines():
        head, _, tail = line.partition("\t")
        if " F " in head and (section := head.split()[-1]) in places:
            address = LOADED + places[section] + int(head.split()[0], 16)
            text += f"{address:x} t {tail.split()[-1]}\t[my_mill]\n"
    size = -(-core_text_size(module) // 4096) * 4096
    return KernelSymbols.from_kallsyms(text, 0, {"my_mill": ModuleText(LOADED, CANONICAL, size)})


def addresses(vmlinux: Path) -> dict[str, int]:
    text = subprocess.run(["nm", str(vmlinux)], capture_output=True, text=True, check=True).stdout
    return {line.split()[2]: int(line.split()[0], 16) for line in text.splitlines()}
