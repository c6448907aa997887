# SPDX-License-Identifier: Apache-2.0
"""What syzkaller's manager starts in QEMU's place: ``syzkaller_machine DIR [QEMU's arguments]``.

The manager ends a machine with SIGKILL. So this process is thin: it starts another one, which has
the session (:mod:`bridge.cli.syzkaller_guest`), and passes the console on to the manager. The
other one holds the end of a pipe, sees it close when this process dies, however it dies, and
ends its session in order.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bridge.cli.syzkaller_claim import claim
from bridge.errors import BridgeError

__all__ = ["main"]

_SSH_PORT = re.compile(r"hostfwd=tcp:[^:]*:(\d+)-[^:]*:22\b")


def main(argv: Sequence[str]) -> int:
    """Run a guest until it is lost, or until this process is killed."""
    directory, arguments = argv[0], argv[1:]
    try:
        claim(Path(directory), os.getppid())
    except (BridgeError, OSError) as error:
        what = error.report() if isinstance(error, BridgeError) else str(error)
        _say(f"kcov-bridge: error: {what}\n", os.getppid())
        return 2
    if "--version" in arguments:
        print("kcov-bridge in QEMU's place")
        return 0
    port = _SSH_PORT.search(" ".join(arguments))
    if port is None:
        print("kcov-bridge: the manager names no SSH port: is its type qemu?", file=sys.stderr)
        return 2
    console, end = os.pipe()
    guest = subprocess.Popen(
        [sys.executable, "-m", "bridge.cli.syzkaller_guest", directory, port.group(1)],
        stdin=subprocess.PIPE,
        stdout=end,
        stderr=subprocess.STDOUT,
        # A signal for the manager's group is not for it.
        start_new_session=True,
    )
    os.close(end)
    while chunk := os.read(console, 1 << 16):
        while chunk:
            chunk = chunk[os.write(1, chunk) :]
    return guest.wait()


def _say(text: str, manager: int) -> None:
    """Print for the manager, and where it prints: of a failed look at the version it says no more
    than the exit status."""
    print(text, end="", file=sys.stderr)
    with contextlib.suppress(OSError), Path(f"/proc/{manager}/fd/2").open("a") as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
