# SPDX-License-Identifier: Apache-2.0
"""The floor: a C program that answers the guest in the doorbell's place, and does nothing else.

It is compiled for this machine when it is first needed, with the layout of
:mod:`bridge.device.abi`, and takes the same region and the same bell, so the guest, its module and
its program are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from bridge.device import abi
from bridge.errors import InfrastructureError, MissingDependencyError
from bridge.guest.images.store import cache_directory
from bridge.session.session import Session
from bridge.vm.process import spawn

__all__ = ["LAYOUT_FLAGS", "build_floor", "floor"]

_SOURCE = Path(__file__).with_name("floor.c")
_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")
_AREA_WORDS = 512 << 10
"""As much as kcov-bench asks for."""
_HANDED_OVER_SECONDS = 600.0

_LAYOUT: dict[str, int] = {
    "SLOTS": abi.SLOTS,
    "SLOT_WORDS": abi.SLOT_WORDS,
    "REQUESTS": abi.REQUESTS_OFFSET // abi.WORD,
    "RESPONSES": abi.RESPONSES_OFFSET // abi.WORD,
    "KICK_SLOT_BITS": abi.KICK_SLOT_BITS,
    "KICK": abi.HeaderWord.KICK.value,
    "HOST_STATE": abi.HeaderWord.HOST_STATE.value,
    "HOST_ASLEEP": abi.HostState.ASLEEP.value,
    "HOST_AWAKE": abi.HostState.AWAKE.value,
    "OP_MAP": abi.Op.MAP.value,
    "REQUEST_SEQ": abi.RequestWord.SEQ.value,
    "REQUEST_OP": abi.RequestWord.OP.value,
    "RESPONSE_SEQ": abi.ResponseWord.SEQ.value,
    "RESPONSE_ERROR": abi.ResponseWord.ERROR.value,
    "RESPONSE_FLAGS": abi.ResponseWord.FLAGS.value,
    "RESPONSE_AREA_OFFSET": abi.ResponseWord.AREA_OFFSET.value,
}
LAYOUT_FLAGS = tuple(f"-D{name}={value}" for name, value in _LAYOUT.items())
"""What a compiler has to be told about the region."""


def build_floor() -> Path:
    """The compiled program, from the cache if its source, the layout and the compiler are the same.

    Raises :class:`bridge.errors.MissingDependencyError` without a C compiler and
    :class:`bridge.errors.InfrastructureError` with its messages.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise MissingDependencyError(
            "the floor of a signal is a C program, and there is no compiler for it",
            hint="install gcc and libc6-dev",
        )
    flags = [*_FLAGS, *LAYOUT_FLAGS]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(version + " ".join(flags).encode() + _SOURCE.read_bytes())
    program = cache_directory() / "bench" / f"floor-{digest.hexdigest()[:12]}"
    if program.is_file():
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".floor-", dir=program.parent) as directory:
        made = Path(directory, "floor")
        command = [compiler, *flags, "-o", str(made), str(_SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InfrastructureError("the floor does not compile", evidence=done.stderr)
        made.replace(program)
    return program


@contextlib.contextmanager
def floor(session: Session, *, asleep: bool) -> Iterator[None]:
    """While inside, the floor answers the session's guest; its doorbell stands aside.

    The guest must have no kcov instance open at either end.
    """
    program = build_floor()
    doorbell, region = session.doorbell, session.region
    assert doorbell is not None
    assert region is not None
    aside, over = threading.Event(), threading.Event()

    def stand_aside() -> None:
        aside.set()
        over.wait(_HANDED_OVER_SECONDS)

    with contextlib.ExitStack() as stack:
        area = doorbell.call(lambda: region.allocate(_AREA_WORDS))
        if area is None:
            raise InfrastructureError("the region has no room for one more area")
        stack.callback(doorbell.call, lambda: region.free(area))
        caller = threading.Thread(
            target=doorbell.call,
            args=(stand_aside, _HANDED_OVER_SECONDS),
            name="floor",
            daemon=True,
        )
        caller.start()
        stack.callback(caller.join)
        stack.callback(over.set)
        aside.wait()
        bell = doorbell._bell
        arguments = [region.fd, region.size, bell, area.offset, "asleep" if asleep else "busy"]
        process = spawn([program, *map(str, arguments)], name="floor", pass_fds=(region.fd, bell))
        stack.callback(process.kill)
        yield
        if not process.running:
            raise InfrastructureError(
                f"the floor {process.how_it_ended}", evidence=process.stderr_text
            )
