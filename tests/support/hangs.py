# SPDX-License-Identifier: Apache-2.0
"""What a command in a guest waits for that should have ended, on both sides."""

from __future__ import annotations

import faulthandler
import subprocess
import tempfile

from bridge.errors import BridgeError, RunTimeoutError
from bridge.guest.guest import CommandResult
from bridge.session.session import Session

__all__ = ["run_or_tell"]

_IN_GUEST = """
for task in /proc/[0-9]*/task/*; do
  if grep -qx {name} $task/comm 2>/dev/null; then
    echo $task; head -1 $task/syscall; cat $task/stack; grep ctxt $task/status
  fi
done
ss -tanpoi; dmesg | tail -5
grep LOC /proc/interrupts
for cpu in $(seq 0 $(($(nproc) - 1))); do
  timeout 5 taskset -c $cpu sleep 0.1; echo "a sleep on processor $cpu ends with $?"
done
grep LOC /proc/interrupts
"""
_ON_HOST = (
    "ss -tanpo | grep -v LISTEN;"
    "ps -eLo pid,ppid,tid,stat,wchan:20,pcpu,args | grep -E 'qemu|relay' | cut -c1-160"
)


def run_or_tell(
    session: Session, words: list[str], timeout: float, env: dict[str, str] | None = None
) -> CommandResult:
    """Run a program in the guest; if it hangs, the error says where it and this process are.

    Raises:
        RunTimeoutError: it did not end in time.
    """
    found: list[str] = []
    try:
        return session.guest.run(
            words,
            timeout=timeout,
            env=env,
            before_kill=lambda: found.append(_state(session, words[0])),
        )
    except RunTimeoutError as error:
        error.add_note("\n".join(found))
        raise


def _state(session: Session, program: str) -> str:
    before = str(session.doorbell.counters) if session.doorbell is not None else ""
    try:
        # TASK_COMM_LEN in Linux: 15 bytes and NUL.
        script = _IN_GUEST.format(name=program.rpartition("/")[2][:15])
        guest = session.guest.run(["sh", "-c", script], timeout=60).text
    except BridgeError as error:
        guest = str(error)
    host = subprocess.run(_ON_HOST, shell=True, capture_output=True, text=True, check=False).stdout
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        threads = file.read()
    after = str(session.doorbell.counters) if session.doorbell is not None else ""
    return f"doorbell: {before}, later {after}\nguest: {guest}\nhost: {host}\n{threads}"
