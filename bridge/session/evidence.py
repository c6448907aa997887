# SPDX-License-Identifier: Apache-2.0
"""What guest and target are doing now, asked before anything is killed."""

from __future__ import annotations

from typing import Final

from bridge.session.session import Session

__all__ = ["PROCESSES", "guest_processes"]

PROCESSES: Final = """\
for process in /proc/[0-9]*; do
    pid=${process#/proc/}
    read -r stat <$process/stat || continue
    set -- ${stat##*) }
    case " 2 $$ $PPID " in *" $pid "* | *" $2 "*) continue ;; esac
    read -r where <$process/wchan
    echo "$pid $1 $where: $(head -c 200 $process/cmdline | tr '\\0\\n' '  ')"
    case $1 in
        Z | T) ;;
        *) sed 's/^/    /' $process/stack ;;
    esac
done 2>/dev/null
"""
"""Prints the guest's processes, without the kernel's threads: number, state, what it waits for in
the kernel, command, and the way there."""


def guest_processes(session: Session, seconds: float) -> str:
    """Return what :data:`PROCESSES` prints in a guest.

    Raises:
        BridgeError: the guest does not answer within so many seconds.
    """
    return session.run(PROCESSES, timeout=seconds).stdout.decode(errors="replace")
