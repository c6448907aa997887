# SPDX-License-Identifier: Apache-2.0
"""How alike the traces of the same work are: the guest kernel as a source, on the stock image.

    python -m tests.bench.bench_stability [--rounds N] [--cpus N] [--warm N] [--own]

* "calls": system calls of 36 kinds (``tests/system/calls.c``), each N times in one program;
* "programs": whole programs, each N times, with ``kcov-exec`` (the children of a shell too).

For each, the Jaccard index of the set of PCs of the first time against that of each other time:
the number of PCs in both to the number in either. Before the first there are as many as --warm
says (3): work that fills caches and touches memory for the first time is other work. Printed are
the least and the median, and for what lies below 0.98 the functions of the PCs that are not in
both, most frequent first. --own: the calls alone, as the kcov of the reference kernel that is built
with CONFIG_KCOV sees them, for comparison.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter, defaultdict

import bridge
from bridge.sources.guest_kernel.symbols import KernelSymbols
from tests.system import reference
from tests.system.reference.traces import record

PROGRAMS = {
    "cat": "cat /etc/passwd",
    "ls": "ls -l /usr/bin",
    "cp": "cp /etc/passwd /tmp/passwd",
    "find": "find /etc -type f",
}
_AIM = 0.98


def _report(symbols: KernelSymbols, name: str, sets: list[set[int]]) -> bool:
    first, *rest = sets
    indices = [len(first & other) / len(first | other) if first | other else 1.0 for other in rest]
    least, median = min(indices), statistics.median(indices)
    print(f"  {name:<12}{len(first):>7}{least:>9.3f}{median:>9.3f}")
    if median >= _AIM:
        return True
    names = Counter(
        symbol.name
        for other in rest
        for pc in first ^ other
        if (symbol := symbols.lookup(pc)) is not None
    )
    print("    " + ", ".join(f"{name} {count}" for name, count in names.most_common(12)))
    return False


def main() -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100, help="of each (default: 100)")
    parser.add_argument("--cpus", type=int, default=1, help="vCPUs (default: 1)")
    parser.add_argument("--warm", type=int, default=3, help="before the first (default: 3)")
    parser.add_argument("--own", action="store_true", help="the reference kernel's own kcov")
    arguments = parser.parse_args()
    image = reference.build("kcov") if arguments.own else None
    stable = []
    with bridge.boot(
        target="none",
        accel="tcg",
        source="python" if image else "kernel",
        image=image.name if image else None,
        cpus=arguments.cpus,
        memory=512,
    ) as session:
        if image:
            symbols = KernelSymbols.from_system_map(image.system_map)
        else:
            assert session.kernel is not None
            symbols = session.kernel.code.symbols
        times = arguments.warm + arguments.rounds
        calls: dict[str, list[set[int]]] = defaultdict(list)
        for trace in record(session, "/sys/kernel/debug/kcov", times):
            calls[trace.kind].append(set(trace.pcs))
        programs: dict[str, list[set[int]]] = defaultdict(list)
        for number in range(0 if image else times):
            print(f"programs: {number + 1} of {times}", file=sys.stderr)
            for name, command in PROGRAMS.items():
                result = session.kcov(["sh", "-c", command])
                assert result.exit_status == 0, result.stderr.decode()
                programs[name].append(set(result.pcs))
        for what, found in (("calls", calls), ("programs", programs)):
            print(f"{what:<14}{'PCs':>7}{'least':>9}{'median':>9}")
            stable += [
                _report(symbols, name, sets[arguments.warm :]) for name, sets in found.items()
            ]
    print(f"{sum(stable)} of {len(stable)} at {_AIM} or above, by the median")
    return 0


if __name__ == "__main__":
    sys.exit(main())
