# SPDX-License-Identifier: Apache-2.0
"""Compile a C program, run it in a guest, and say what the PCs are that it prints.

usage: python run_program.py SOURCE.c [ARGUMENT ...]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import bridge


def main(source: str, *arguments: str) -> int:
    """Return the program's exit status."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "program"
        # Static: the guest may have another C library than this machine.
        subprocess.run(["gcc", "-O2", "-Wall", "-static", "-o", program, source], check=True)
        with bridge.boot(source="python") as guest:
            guest.put(program, "/run/program", 0o755)
            # The program opens the device itself, so it runs as it is, not under guest.kcov().
            result = guest.run(["/run/program", *arguments])
            for line in result.text.splitlines():
                pc = int(line, 16)
                print(f"{pc:#x} {guest.symbolize(pc)}")
            return result.exit_status


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
