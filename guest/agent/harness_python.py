# SPDX-License-Identifier: Apache-2.0
"""Calls a Python function with test cases: ``harness_python.py MODULE FUNCTION``.

``harness-python.c`` starts this program, once for many cases, and describes the protocol. It runs
in the guest's Python, whichever that is, so it uses little of it.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import sys
import traceback

__all__ = ["main"]

# Descriptors; harness-python.c has the same numbers.
_CASE = 3
_CONNECTION = 4
_ERRORS = 5
_AREA = 6

_KCOV_ENABLE = 0x6364


def main(module: str, function: str) -> None:
    """Serve until the runner closes the connection."""
    # The directory of the module; this program's own is where Python would look first.
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "modules"))
    call = importlib.import_module(module)
    for name in function.split("."):
        call = getattr(call, name)
    if os.path.exists(f"/proc/self/fd/{_AREA}"):
        fcntl.ioctl(_AREA, _KCOV_ENABLE, 0)
    # What goes wrong up to here is the runner's to show, what comes later is a case's.
    sys.stderr.flush()
    os.dup2(_ERRORS, 2)
    os.write(_CONNECTION, b"r")
    while True:
        length = os.read(_CONNECTION, 4)
        if len(length) < 4:
            os._exit(0)
        answer = b"0"
        try:
            call(os.pread(_CASE, int.from_bytes(length, "little"), 0))
        except BaseException:
            # sys.exit() and KeyboardInterrupt included: no function that takes cases should.
            traceback.print_exc()
            sys.stderr.flush()
            answer = b"1"
        os.write(_CONNECTION, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
