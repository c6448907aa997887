# SPDX-License-Identifier: Apache-2.0
"""Clean up after processes that were killed. Run as a script, by :mod:`bridge.targets.scratch`.

``guardian.py DIRECTORY``

Its input is a pipe that those processes hold. They write the number of a process group, or 0 for
none, a line each time. When the last of them has ended, however it ended, this process kills the
group that was named last, removes the directory, and ends. The script imports only the standard
library, so that ``-I -S`` starts it in a few milliseconds.
"""

import contextlib
import os
import signal
import sys
import time

TRIES = 50
PAUSE_SECONDS = 0.1


def main(argv: list[str]) -> int:
    directory, group = argv[1], 0
    # What ends a whole session or service is for the others: this process goes last.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    for line in sys.stdin:
        # A line is cut off if its writer was.
        if line.endswith("\n"):
            group = int(line)
    if group:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    for _ in range(TRIES):
        if not os.path.lexists(directory):
            return 0
        import shutil  # takes longer to import than all the rest

        shutil.rmtree(directory, ignore_errors=True)
        # Processes that were killed may still have been writing.
        time.sleep(PAUSE_SECONDS)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
