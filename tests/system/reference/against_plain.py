# SPDX-License-Identifier: Apache-2.0
"""kcov in a kernel that was built with it against the source on the same kernel built without.

    python -m tests.system.reference.against_plain [--rounds N]

boots the reference kernels ``kcov`` and ``plain``, which differ in CONFIG_KCOV alone, and makes the
same system calls of 36 kinds in both, traced by the kernel's own kcov in the one and by the bridge
in the other. Addresses differ, so blocks are compared by function. What is inlined where differs as
well, so DWARF is asked (``addr2line -i``): the function that a block is in is the outermost, and
the other side has it if any of its own, in any of its calls of this kind, is in that function or in
code that was inlined from it.

Printed for each kind are the share of kcov's blocks that the source has too, the share of the
source's that kcov does not have, and the agreement of order: of the sequences of functions of two
calls (repeats in a row as one, functions that one side alone has left out) the longest common
subsequence, to the mean of their lengths; the best of the calls of this kind for each of kcov's,
the median of these.
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
from bridge.guest.images import Image
from tests.system import reference
from tests.system.reference.traces import Trace, record

_HAVE_AIM, _EXTRA_AIM = 0.99, 0.01
_CALL = 5
"""Bytes of the call that kcov's PC is the return address of."""
_ORDER_CALLS = 3
"""How many calls of a kind the order is compared of: it takes time."""
_LONGEST = 3000
"""Sequences are compared up to this length, for the same reason."""


Chain = tuple[str, ...]
"""The function that a block is in, after those that were inlined there, innermost first."""


def chains(vmlinux: Path, addresses: Iterable[int]) -> dict[int, Chain]:
    """What function the code at each address is of; parts and clones of one go by its name."""
    wanted = sorted(set(addresses))
    lines = subprocess.run(
        ["addr2line", "-a", "-f", "-i", "-e", str(vmlinux)],
        input="\n".join(f"{address:#x}" for address in wanted),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    # An address, then two lines for each function: name and place.
    found: dict[int, list[str]] = {}
    for line in lines:
        if line.startswith("0x"):
            names = found[int(line, 16)] = []
            place = False
        elif not place:
            names.append(line.partition(".")[0])
            place = True
        else:
            place = False
    return {address: tuple(names) for address, names in found.items()}


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


def named(variant: str, rounds: int) -> dict[str, list[list[Chain]]]:
    """By kind of call, the functions of each call's blocks in order."""
    image, traces = _traces(variant, rounds)
    back = _CALL if variant == "kcov" else 0
    names = chains(
        image.directory / "vmlinux.debug", {pc - back for trace in traces for pc in trace.pcs}
    )
    found: dict[str, list[list[Chain]]] = defaultdict(list)
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


def _order(ours: list[list[Chain]], theirs: list[list[Chain]]) -> float:
    both = {chain[-1] for call in ours for chain in call}
    both &= {chain[-1] for call in theirs for chain in call}

    def runs(calls: list[list[Chain]]) -> list[list[str]]:
        return [
            [name for name, _ in groupby(chain[-1] for chain in call if chain[-1] in both)][
                :_LONGEST
            ]
            for call in calls[-_ORDER_CALLS:]
        ]

    def agreement(one: list[str], other: list[str]) -> float:
        longest = max(len(one), len(other))
        return 2 * longest_common(one, other) / (len(one) + len(other)) if longest else 1.0

    mine = runs(ours)
    return statistics.median(max(agreement(one, other) for other in mine) for one in runs(theirs))


def _alone(calls: list[list[Chain]], others: list[list[Chain]]) -> tuple[int, Counter[str]]:
    """How many blocks the calls have, and by function those that the others do not have."""
    known = {name for call in others for chain in call for name in chain}
    blocks = Counter(chain[-1] for call in calls for chain in call)
    return blocks.total(), Counter(
        {name: count for name, count in blocks.items() if name not in known}
    )


def main() -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m tests.system.reference.against_plain")
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
        their, lacks = _alone(calls, ours[kind])
        our, adds = _alone(ours[kind], calls)
        lacking.update(lacks)
        extra.update(adds)
        totals.update(kcov=their, source=our, lacks=lacks.total(), adds=adds.total())
        orders.append(_order(ours[kind], calls))
        print(
            f"{kind:<12}{their / len(calls):>9.0f}{our / len(calls):>9.0f}"
            f"{1 - lacks.total() / max(their, 1):>9.2%}{adds.total() / max(our, 1):>9.2%}"
            f"{orders[-1]:>8.3f}"
        )
    had = 1 - totals["lacks"] / totals["kcov"]
    added = totals["adds"] / totals["source"]
    print(f"of kcov's blocks the source has {had:.2%}; kcov lacks {added:.2%} of the source's")
    print(f"order: median of the kinds {statistics.median(orders):.3f}, least {min(orders):.3f}")
    for what, counts in (("lacks", lacking), ("has alone", extra)):
        print(f"the source {what}: " + ", ".join(f"{n} {c}" for n, c in counts.most_common(30)))
    return 0 if had >= _HAVE_AIM and added <= _EXTRA_AIM else 1


if __name__ == "__main__":
    sys.exit(main())
