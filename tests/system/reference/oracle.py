# SPDX-License-Identifier: Apache-2.0
"""The guest kernel's own kcov against the source that watches it from QEMU, call by call.

    python -m tests.system.reference.oracle [--cpus N] [--calls N] [--busy N] [--rules]

boots the reference kernel that is built with CONFIG_KCOV, where ``tests/system/oracle.c`` enables
both for the same thread. Each PC of kcov's is the address behind a call of
``__sanitizer_cov_trace_pc``, so it begins a translation block: of the source's trace those that
follow on that function must be kcov's, PC by PC, in order. Prints the calls that are not identical,
and the functions around the first differences. Ends with 1 if fewer than 99.9 % are identical.

Of kcov's PCs one function's may be missing: it shows a part of the way out of an interrupt. In how
many calls they are is printed as "leaked".
"""

from __future__ import annotations

import argparse
import re
import struct
import sys
import tempfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

import bridge
from bridge.guest.images import Image, build, compile_for_guest
from bridge.sources.guest_kernel import filters
from bridge.sources.guest_kernel.symbols import KernelSymbols
from tests.system import reference

SOURCE = Path(__file__).parents[1] / "oracle.c"
_TRACER = "__sanitizer_cov_trace_pc"
_LEAK = "__kthread_should_park"
"""What ``__irq_exit_rcu`` calls (in ``ksoftirqd_running``) once ``in_task()`` is true again, so
that kcov shows it as the task's, which it is not; the source leaves it out."""
_ANYTHING = "addr:0xffffffff00000000-0xffffffff00000001"
"""Excludes nothing; with it the filter is another than that which is kept in the cache."""
_EXECUTABLE = 4
"""SHF_EXECINSTR"""
_AIM = 0.999


def return_addresses(vmlinux: Path, function: int) -> list[int]:
    """The addresses behind each ``call rel32`` of the function at this address."""
    found = []
    with vmlinux.open("rb") as file:
        for section in ELFFile(file).iter_sections():
            if not section["sh_flags"] & _EXECUTABLE or section["sh_type"] != "SHT_PROGBITS":
                continue
            code, base = section.data(), section["sh_addr"]
            for match in re.finditer(rb"\xe8(?=(.{4}))", code, re.DOTALL):
                (distance,) = struct.unpack("<i", match[1])
                behind = base + match.start() + 5
                if behind + distance & 2**64 - 1 == function:
                    found.append(behind)
    return found


def record_tracer() -> None:
    """From now on filters do not take out the function that tells kcov's PCs from others."""
    original = filters.not_instrumented

    def without_tracer(symbols: KernelSymbols) -> filters.Ranges:
        tracer = [(symbol.start, symbol.end) for symbol in symbols.matching(_TRACER)]
        return filters.subtraction(original(symbols), tracer)

    filters.not_instrumented = without_tracer


def addresses(image: Image, symbols: KernelSymbols) -> bytes:
    """The file that ``oracle.c`` reads."""
    tracer = next(iter(symbols.matching(_TRACER)))
    behind = return_addresses(image.kernel, tracer.start)
    leak = next(iter(symbols.matching(_LEAK)))
    return struct.pack(
        f"<{len(behind) + 4}Q", tracer.start, tracer.end, leak.start, leak.end, *behind
    )


def main() -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m tests.system.reference.oracle")
    parser.add_argument("--cpus", type=int, default=1, help="vCPUs (default: 1)")
    parser.add_argument("--calls", type=int, default=10_000, help="system calls (default: 10,000)")
    parser.add_argument(
        "--rules",
        action="store_true",
        help="the source records what kcov does (and the function that kcov calls), not all",
    )
    parser.add_argument("--busy", type=int, default=1, help="busy tasks beside it (default: 1)")
    arguments = parser.parse_args()
    if arguments.rules:
        record_tracer()
    image = reference.build("kcov")
    symbols = KernelSymbols.from_system_map(image.system_map)
    with (
        tempfile.TemporaryDirectory(prefix="kcov-bridge-") as directory,
        bridge.boot(
            target="none",
            source="kernel",
            kernel_all=not arguments.rules,
            kernel_exclude=_ANYTHING if arguments.rules else "",
            cpus=arguments.cpus,
            memory=512,
            image=image.name,
            boot_timeout=300,
        ) as session,
    ):
        program = compile_for_guest(build(), SOURCE, Path(directory) / "oracle")
        known = Path(directory) / "addresses"
        known.write_bytes(addresses(image, symbols))
        session.put(program, "/tmp/oracle", 0o755)
        session.put(known, "/tmp/addresses")
        devices = ("/sys/kernel/debug/kcov", "/sys/kernel/debug/kcov_bridge")
        result = session.run(
            ["/tmp/oracle", *devices, "/tmp/addresses", str(arguments.calls), str(arguments.busy)],
            timeout=3600,
        )
    if result.exit_status:
        print(result.text, result.stderr.decode(), sep="\n", file=sys.stderr)
        return 2

    def name(match: re.Match[str]) -> str:
        symbol = symbols.lookup(pc := int(match[0], 16))
        return f"{symbol.name}+{pc - symbol.start:#x}" if symbol is not None else match[0]

    print(re.sub(r"0xffffffff[0-9a-f]{8}", name, result.text), end="")
    (same,) = re.findall(r"^same (\d+)$", result.text, re.M)
    share = int(same) / arguments.calls
    print(f"identical: {same} of {arguments.calls} calls, {100 * share:.3f} %")
    return 0 if share >= _AIM else 1


if __name__ == "__main__":
    sys.exit(main())
