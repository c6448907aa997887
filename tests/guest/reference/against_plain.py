# SPDX-License-Identifier: Apache-2.0
"""kcov in a kernel that was built with it against the source on the same kernel built without.

    python -m tests.guest.reference.against_plain [--rounds N]

boots the reference kernels ``kcov`` and ``plain``, which differ in CONFIG_KCOV alone, and makes the
same system calls of 36 kinds in both, traced by the kernel's own kcov in the one and by the bridge
in the other. Addresses differ, so blocks are compared by the function that they were written in:
the innermost at the block's address by DWARF (``addr2line -i``), whatever was inlined where.

For each kind, a block is also the other side's if any of the other side's calls of this kind has a
block of that function. Printed are the share of kcov's blocks that the source has too, the share of
the source's that kcov does not have, and the agreement of order: of the sequences of functions of
two calls (repeats in a row as one) the longest common subsequence, to the mean of their lengths;
the best of the calls of this kind for each of kcov's, the median of these.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import bridge
from bridge.image import Image
from tests.guest import reference
from tests.guest.reference.traces import Trace, record

_HAVE_AIM, _EXTRA_AIM = 0.99, 0.01
_CALL = 5
"""Bytes of the call that kcov's PC is the return address of."""
_ORDER_CALLS = 3
"""How many calls of a kind the order is compared of: it takes time."""
_LONGEST = 3000
"""Sequences are compared up to this length, for the same reason."""


def functions(vmlinux: Path, addresses: Iterable[int]) -> dict[int, str]:
    """The function that the code at each address was written in, without what inlined it."""
    wanted = sorted(set(addresses))
    lines = subprocess.run(
        ["addr2line", "-a", "-f", "-i", "-e", str(vmlinux)],
        input="\n".join(f"{address:#x}" for address in wanted),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    # An address, then two lines for each function, the innermost first.
    return {
        int(line, 16): lines[at + 1].partition(".")[0]
        for at, line in enumerate(lines)
        if line.startswith("0x")
    }


def _traces(variant: str, rounds: int) -> tuple[Image, list[Trace]]:
    image = reference.build(variant)
    own = variant == "kcov"
    with bridge.boot(
        target="none",
        source="python" if own else "kernel",
        memory=512,
        image=image.name,
        boot_timeout=300,
    ) as session:
        return image, record(session, "/sys/kernel/debug/kcov", rounds)


def named(variant: str, rounds: int) -> dict[str, list[list[str]]]:
    """By kind of call, the functions of each call's blocks in order."""
    image, traces = _traces(variant, rounds)
    back = _CALL if variant == "kcov" else 0
    names = functions(
        image.directory / "vmlinux.debug", {pc - back for trace in traces for pc in trace.pcs}
    )
    found: dict[str, list[list[str]]] = defaultdict(list)
    for trace in traces:
        found[trace.kind].append([names[pc - back] for pc in trace.pcs])
    return found


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence.

    With the rows of the table as bits of one integer: Hyyrö, "Bit-parallel LCS-length computation
    revisited", 2004.
    """
    where: dict[str, int] = defaultdict(int)
    for at, item in enumerate(one):
        where[item] |= 1 << at
    mask = (1 << len(one)) - 1
    row = mask
    for item in other:
        matches = row & where[item]
        row = (row + matches | row - matches) & mask
    return len(one) - row.bit_count()


def _order(ours: list[list[str]], theirs: list[list[str]]) -> float:
    def runs(calls: list[list[str]]) -> list[list[str]]:
        return [[name for name, _ in groupby(call)][:_LONGEST] for call in calls[-_ORDER_CALLS:]]

    def agreement(one: list[str], other: list[str]) -> float:
        return 2 * longest_common(one, other) / max(len(one) + len(other), 1)

    mine = runs(ours)
    return statistics.median(max(agreement(one, other) for other in mine) for one in runs(theirs))


def main() -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m tests.guest.reference.against_plain")
    parser.add_argument("--rounds", type=int, default=20, help="calls of each kind (default: 20)")
    arguments = parser.parse_args()
    theirs = named("kcov", arguments.rounds)
    ours = named("plain", arguments.rounds)
    totals: Counter[str] = Counter()
    lacking: Counter[str] = Counter()
    extra: Counter[str] = Counter()
    orders = []
    print(f"{'kind':<12}{'kcov':>9}{'source':>9}{'had':>9}{'extra':>9}{'order':>8}")
    for kind, calls in theirs.items():
        their = Counter(name for call in calls for name in call)
        our = Counter(name for call in ours[kind] for name in call)
        lacks = {name: count for name, count in their.items() if name not in our}
        adds = {name: count for name, count in our.items() if name not in their}
        lacking.update(lacks)
        extra.update(adds)
        totals.update(
            kcov=their.total(), source=our.total(), lacks=sum(lacks.values()),
            adds=sum(adds.values()),
        )  # fmt: skip
        orders.append(_order(ours[kind], calls))
        print(
            f"{kind:<12}{their.total() / len(calls):>9.0f}{our.total() / len(calls):>9.0f}"
            f"{1 - sum(lacks.values()) / their.total():>9.2%}"
            f"{sum(adds.values()) / our.total():>9.2%}{orders[-1]:>8.3f}"
        )
    had = 1 - totals["lacks"] / totals["kcov"]
    added = totals["adds"] / totals["source"]
    print(f"of kcov's blocks the source has {had:.2%}; kcov lacks {added:.2%} of the source's")
    print(f"order: median of the kinds {statistics.median(orders):.3f}, least {min(orders):.3f}")
    for what, counts in (("lacks", lacking), ("has alone", extra)):
        print(f"the source {what}: " + ", ".join(f"{n} {c}" for n, c in counts.most_common(25)))
    return 0 if had >= _HAVE_AIM and added <= _EXTRA_AIM else 1


if __name__ == "__main__":
    sys.exit(main())
