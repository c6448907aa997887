# SPDX-License-Identifier: Apache-2.0
"""A disk whose sectors a plugin of nbdkit in Python serves, behind the guest's virtio_blk or nbd.

nbdkit (the Debian packages ``nbdkit`` and ``nbdkit-plugin-python``) has a Python of its own, the
system's. It finds the packages of this Python too, except for modules in C if the versions differ.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from bridge.errors import MissingDependencyError, TargetError
from bridge.targets import BlockDevice, UnixEndpoint
from bridge.targets.nbd import PORT, NbdDisk, export_size
from bridge.targets.scratch import ScratchDirectory

__all__ = ["NbdkitTarget"]

_SCRIPT = Path(__file__).with_name("nbdkit_plugin.py")
_VARIABLE = "KCOV_BRIDGE_NBDKIT_PLUGIN"
"""As in nbdkit_plugin.py, which imports nothing of this package."""

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.01
_STDERR_SHOWN = 4000


class NbdkitTarget:
    """A target that is one disk: nbdkit with a plugin in Python.

    A subclass sets :attr:`packages` and defines :meth:`plugin`::

        class Disk(NbdkitTarget):
            packages = ("mydisk",)
            arguments = {"size": "64M"}

            def plugin(self):
                return Path(mydisk.__file__).with_name("plugin.py")

    The guest finds the disk at ``/dev/target/disk``.
    """

    name = "nbdkit"
    packages: tuple[str, ...] = ()
    arguments: Mapping[str, str] = {}
    """What the plugin's ``config`` is given."""
    filters: tuple[str, ...] = ()
    """Filters of nbdkit in front of the plugin, such as ``cow``, which keeps what is written."""
    read_only = False
    driver: Literal["virtio_blk", "nbd"] = "virtio_blk"
    """The guest's driver: QEMU connects to nbdkit for the first, the guest for the second."""
    guest_modules: tuple[str, ...] = ()
    guest_setup = ""
    guest_teardown = ""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self.devices: tuple[BlockDevice | NbdDisk, ...] = ()
        self.endpoints: tuple[UnixEndpoint, ...] = ()
        self.pid = 0
        """The process of nbdkit, once it was started."""
        self._stopping = False
        self._scratch = ScratchDirectory("nbdkit")
        self._stack = ExitStack()

    def prepare(self) -> None:
        """Make the directory that forked processes share."""
        self._scratch.make()

    def plugin(self) -> Path:
        """Return the path of the plugin's script; called by :meth:`start`."""
        raise NotImplementedError

    def start(self) -> None:
        """Start nbdkit; returns when it serves.

        Raises:
            MissingDependencyError: nbdkit is not installed.
            TargetError: it ended, or did not serve in time.
        """
        program = shutil.which("nbdkit")
        if program is None:
            raise MissingDependencyError(
                "nbdkit is not installed",
                hint="on Debian: apt install nbdkit nbdkit-plugin-python",
            )
        with ExitStack() as stack:
            place = self._scratch.empty()
            stack.callback(self._scratch.remove)
            stderr = stack.enter_context((place / "stderr").open("w+b"))
            address = place / "socket"
            command = [program, "--foreground", "--exit-with-parent", "--unix", str(address)]
            command += [f"--filter={name}" for name in self.filters]
            if self.read_only:
                command.append("--readonly")
            command += ["python", str(_SCRIPT)]
            command += [f"{key}={value}" for key, value in self.arguments.items()]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=self._environment(),
            )
            self.pid = process.pid
            stack.callback(_end, process)
            try:
                size = _size_when_served(address, process)
            except TargetError as error:
                error.evidence = error.evidence or _end_of(place / "stderr")
                raise
            if self.driver == "nbd":
                self.endpoints = (UnixEndpoint("nbd", address, PORT),)
                self.devices = (NbdDisk("disk"),)
            else:
                self.devices = (BlockDevice("disk", address, size, read_only=self.read_only),)
            # A thread that ends by an exception is what tells of a target that is not well.
            watch = threading.Thread(target=self._watch, args=(process, place), name="nbdkit")
            self._stopping = False
            watch.start()
            stack.callback(watch.join)
            # Before the thread is joined.
            stack.callback(_end, process)
            self._stack = stack.pop_all()

    def _watch(self, process: subprocess.Popen[bytes], place: Path) -> None:
        status = process.wait()
        if not self._stopping:
            said = _end_of(place / "stderr")
            raise TargetError(f"nbdkit ended by itself, with status {status}\n{said}")

    def stop(self) -> None:
        """End nbdkit."""
        self.devices, self.endpoints = (), ()
        self._stopping = True
        self._stack.close()

    def _environment(self) -> dict[str, str]:
        """Return an environment in which nbdkit's Python finds this one's packages."""
        # Not its standard library: nbdkit's Python has its own.
        library = Path(sysconfig.get_path("stdlib"))
        skipped = (library, library / "lib-dynload")
        paths = [Path(path).absolute() for path in sys.path]
        found = [str(path) for path in paths if path.is_dir() and path not in skipped]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(found),
            # Its caches do not belong beside this Python's packages.
            "PYTHONDONTWRITEBYTECODE": "1",
            _VARIABLE: str(self.plugin()),
        }


def _size_when_served(address: Path, process: subprocess.Popen[bytes]) -> int:
    """Wait until nbdkit serves; return the size of its export. Raises TargetError."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            return export_size(address)
        except TargetError as error:
            # There is no socket yet, or one on which nobody listens yet.
            if not isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
                raise
        if (status := process.poll()) is not None:
            raise TargetError(f"nbdkit ended with status {status}")
        if time.monotonic() > deadline:
            raise TargetError(f"nbdkit did not serve within {_START_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process, and the plugin's clean-up with it."""
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_of(path: Path) -> str:
    return path.read_bytes()[-_STDERR_SHOWN:].decode(errors="replace")
