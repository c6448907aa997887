# SPDX-License-Identifier: Apache-2.0
"""Run a program that ends, with all that it has started, when the bridge does.

Run as a script, by :mod:`bridge.util.commands`, as the leader of a session of its own:

``supervise.py BRIDGE PROGRAM [ARGUMENT ...]``

A parent-death signal reaches one process, not the compilers that make and cargo start. So this
process outlives the bridge, whatever kills that, and ends its own process group by SIGTERM, so that
a program can clean up, then all of its session by SIGKILL: ninja gives each compiler a group. It
ends as the program does. The script imports only what starts in a few milliseconds with ``-I -S``.
"""

import os
import select
import signal
import sys

TERM_SECONDS = 10
NOT_RUN = 127
"""The status of a program that cannot be executed, as in a shell."""


def start(program: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    # Python ignores these, and a program would go on to do so.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(program[0], program)
    except OSError as error:
        sys.stderr.write(f"{program[0]}: {error.strerror}\n")
        sys.stderr.flush()
    os._exit(NOT_RUN)


def end_as(status: int) -> int:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return os.waitstatus_to_exitcode(status)


def kill_session() -> None:
    """Kill all processes of this one's session, and this one last."""
    own = os.getpid()
    # Twice, for those that are being started.
    for _ in range(2):
        with os.scandir("/proc") as entries:
            processes = [int(entry.name) for entry in entries if entry.name.isdigit()]
        for process in processes:
            try:
                if process != own and os.getsid(process) == own:
                    os.kill(process, signal.SIGKILL)
            except OSError:
                continue
    os.kill(own, signal.SIGKILL)


def main(argv: list[str]) -> int:
    bridge, program = int(argv[1]), argv[2:]
    # A signal for the group is the program's; a handler does not outlast its exec.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    try:
        bridge_fd = os.pidfd_open(bridge)
    except ProcessLookupError:
        return NOT_RUN
    # Another process may have the number of a bridge that died before the call above.
    if os.getppid() != bridge:
        return NOT_RUN
    child = start(program)
    # The bridge is to learn of it if the program closes its input.
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    child_fd = os.pidfd_open(child)
    poll = select.poll()
    poll.register(child_fd, select.POLLIN)
    poll.register(bridge_fd, select.POLLIN)
    if any(fd == child_fd for fd, _ in poll.poll()):
        return end_as(os.waitpid(child, 0)[1])
    os.killpg(0, signal.SIGTERM)
    poll.unregister(bridge_fd)
    poll.poll(TERM_SECONDS * 1000)
    kill_session()
    return NOT_RUN


if __name__ == "__main__":
    sys.exit(main(sys.argv))
