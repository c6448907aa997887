# SPDX-License-Identifier: Apache-2.0
"""Execute a program that dies with its parent and gains no privileges.

Run as a script, by :mod:`bridge.vm.process`:

``launch.py PARENT ERROR_FD -- PROGRAM [ARGUMENT ...]``

A function between fork and exec (``preexec_fn``) is unsafe in a process with threads, so a fresh
interpreter requests the parent-death signal here, and the exec preserves it. ``ERROR_FD`` is the
writing end of a pipe: a failed exec writes its errno there, a successful one closes it. The script
imports only the standard library, so that ``-I -S`` starts it in a few milliseconds.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
"""``include/uapi/linux/prctl.h``."""


def main(argv: list[str]) -> int:
    parent, error_fd, program = int(argv[1]), int(argv[2]), argv[4:]
    # Python ignores it, and the exec would preserve that. SIGXFSZ stays ignored: a program that
    # meets a limit of file sizes then says what it could not write.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.set_inheritable(error_fd, False)
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0
        or libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
    ):
        os.write(error_fd, b"%d" % ctypes.get_errno())
        return 126
    # There is no signal if the parent died before the call above.
    if os.getppid() != parent:
        return 126
    try:
        os.execvp(program[0], program)
    except OSError as error:
        os.write(error_fd, b"%d" % (error.errno or 0))
    return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv))
