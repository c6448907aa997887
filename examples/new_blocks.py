# SPDX-License-Identifier: Apache-2.0
"""Run commands in a guest and print the blocks that each one is the first to reach.

usage: python new_blocks.py COMMAND ...
"""

from __future__ import annotations

import sys

import bridge


def main(commands: list[str]) -> int:
    """Return 0, or 1 if a command failed."""
    failed = False
    seen: set[int] = set()
    with bridge.boot(source="python") as guest:
        for number, command in enumerate(commands):
            if number:
                guest.reset()  # each command finds the guest as the first one did
            result = guest.kcov(["sh", "-c", command])
            failed = failed or result.exit_status != 0
            new = sorted(set(result.pcs) - seen)
            seen |= set(result.pcs)
            print(f"{command}: status {result.exit_status}, {len(new)} new blocks")
            for pc in new:
                print(f"  {pc:#x} {guest.symbolize(pc)}")
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
