# SPDX-License-Identifier: Apache-2.0
"""A ready guest on disk, to start from instead of booting, and to return to.

A snapshot is a directory with

* ``memory``: the guest's memory, with holes where it is zero;
* ``devices``: the state of the devices, which a new QEMU takes as an incoming migration. It holds
  neither the guest's memory nor the shared region (:mod:`bridge.vm.vmstate`);
* ``snapshot.json``: the sizes of these files, their checksums, and whether the guest's agent takes
  commands.

QEMU takes an incoming migration once, but ``loadvm`` any number of times. So each machine also gets
the same state as a disk in memory.

A snapshot appears by a rename once it is complete. Only the user may read its files, because they
hold the guest's memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bridge.device import abi
from bridge.errors import ImageError
from bridge.util.files import atomic_output
from bridge.vm.config import BackendFds, MachineConfig, MemoryFds, qemu_command
from bridge.vm.machine import Machine
from bridge.vm.vmstate import keeping_code, state_disk

__all__ = ["KEPT", "Loading", "Snapshot", "fingerprint", "new_memory", "prune"]

KEPT = 12
"""How many snapshots the cache keeps: the ones used last. Tests ask for many kinds of machine; each
takes some 80 MB."""

_FORMAT = 4
_DESCRIPTION = "snapshot.json"
_MEMORY, _DEVICES = "memory", "devices"
_FILES = (_MEMORY, _DEVICES)
_NO_STREAM = bytes(8)
_CHUNK = 1 << 20
_BLOCK = 64 * 1024
_ZEROES = bytes(_BLOCK)


def fingerprint(
    config: MachineConfig,
    region_bytes: int,
    modules: Sequence[str] = (),
    cpuinfo: str | None = None,
    *,
    prepared: str = "",
) -> str:
    """Return a hash of everything that a snapshot of a machine depends on: 16 hex digits.

    That is QEMU's command line without wiring (:attr:`MachineConfig.identity`), the files that it
    names, QEMU itself, the loaded kernel modules, the region and its layout, and the host's
    processor, which sets the pace of the guest's clock and, under KVM, its features. Under KVM it
    is also the host's kernel.

    Args:
        modules: the kernel modules that the guest loads.
        cpuinfo: the text of /proc/cpuinfo; None to read that file.
        prepared: the command that the guest ran before it was saved.
    """
    fds = BackendFds(0, 0, 0, 0, memory=MemoryFds(0, 0), channel=0 if config.channel else None)
    parts = [str(_FORMAT), *qemu_command(config.identity, fds)]
    if config.accelerator.name == "kvm":
        # KVM keeps a part of the devices' state in a format of its own.
        parts.append(os.uname().release)
    program = shutil.which(config.qemu)
    for file in (program, config.kernel, config.initrd, config.disk):
        if file is not None:
            path = Path(file).resolve()
            status = path.stat()
            parts += [str(path), str(status.st_size), str(status.st_mtime_ns)]
    layout = (abi.VERSION, abi.SLOTS, abi.PAYLOAD_OFFSET, abi.AREAS_OFFSET)
    parts += [",".join(modules), prepared, str(region_bytes), *map(str, layout)]
    text = Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
    names = ("vendor_id", "model name", "stepping", "microcode", "flags")
    processor = text.partition("\n\n")[0].splitlines()
    parts += [line for line in processor if line.partition("\t")[0].strip() in names]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def new_memory(size: int) -> int:
    """Create the memory of a guest, ``size`` bytes of zero.

    Returns:
        A descriptor, which the caller closes.

    Raises:
        OSError: there is no memory.
    """
    fd = os.memfd_create("kcov-bridge-guest", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd


class Snapshot:
    """A snapshot whose files are open, so that it remains usable after its removal.

    Attributes:
        directory: where its files are.
        channel: as in :class:`bridge.vm.agent.Ready`, of the guest that was saved.
        memory: its memory's file.

    Raises:
        ImageError: there is no snapshot in the directory, or it is broken.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with contextlib.ExitStack() as stack:
            try:
                data = json.loads((directory / _DESCRIPTION).read_text(encoding="utf-8"))
                fds = []
                for name in _FILES:
                    fd = os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC)
                    stack.callback(os.close, fd)
                    size = os.fstat(fd).st_size
                    if size != data["files"][name]:
                        raise ValueError(f"{name} has {size} bytes")
                    fds.append(fd)
                self.channel = int(data["channel"])
                # Mark it as used, for prune(). In a read-only cache there is nothing to prune.
                with contextlib.suppress(OSError):
                    os.utime(directory)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ImageError(
                    f"the snapshot {directory} cannot be used",
                    evidence=f"{type(error).__name__}: {error}",
                ) from error
            self.memory, self.devices = fds
            self._size = os.fstat(self.memory).st_size
            self._extents = list(_extents(self.memory, self._size))
            self._stack = stack.pop_all()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(self, ram: int, mapping: mmap.mmap | None = None) -> None:
        """Restore the guest's memory into ``ram``, a descriptor of :func:`new_memory`.

        Args:
            mapping: a mapping of all of ``ram``, kept for the next time: half the time, because the
                kernel need not look for each page.

        Raises:
            ImageError: the saved memory cannot be read.
        """
        try:
            with contextlib.ExitStack() as stack:
                if mapping is None:
                    used = stack.enter_context(mmap.mmap(ram, self._size))
                else:
                    used = mapping
                hole = 0
                for start, end in [*self._extents, (self._size, self._size)]:
                    if start > hole:
                        used.madvise(mmap.MADV_REMOVE, hole, start - hole)
                    hole = end
            for start, end in self._extents:
                if mapping is not None:
                    self._read(mapping, start, end)
                else:
                    self._send(ram, start, end)
        except (OSError, ValueError, EOFError) as error:
            raise ImageError(f"the memory of {self.directory} cannot be read: {error}") from error

    def _send(self, ram: int, start: int, end: int) -> None:
        """Write a part of the saved memory into a file, which need not have pages there yet."""
        os.lseek(ram, start, os.SEEK_SET)
        while start < end:
            sent = os.sendfile(ram, self.memory, start, end - start)
            if not sent:
                raise EOFError("the file ends")
            start += sent

    def _read(self, mapping: mmap.mmap, start: int, end: int) -> None:
        """Read a part of the saved memory into a mapping."""
        with memoryview(mapping) as view:
            while start < end:
                with view[start:end] as part:
                    got = os.preadv(self.memory, [part], start)
                if not got:
                    raise EOFError("the file ends")
                start += got

    @contextlib.contextmanager
    def loading(self, ram: int) -> Iterator[Loading]:
        """Run :meth:`restore` on a thread, so that QEMU can start meanwhile; end it on exit."""
        loading = Loading(self, ram)
        try:
            yield loading
        finally:
            loading.end()

    @functools.cached_property
    def _states(self) -> tuple[bytes, bytes | None]:
        devices = os.pread(self.devices, os.fstat(self.devices).st_size, 0)
        return devices, keeping_code(devices)

    @property
    def keeps_code(self) -> bool:
        """Whether :meth:`states` has :data:`bridge.vm.vmstate.KEEPING_CODE`. Raises OSError."""
        return self._states[1] is not None

    def states(self) -> int:
        """Return a disk in memory with the devices' state, for one machine; the caller closes it.

        Raises:
            OSError: there is no memory.
            QemuError: the state is too large.
        """
        return state_disk(*self._states)

    def close(self) -> None:
        """Close the files. Safe to call twice."""
        self._stack.close()

    @property
    def damaged(self) -> bool:
        """Whether its files differ from what was saved. Reads them all; False if it cannot."""
        try:
            text = (self.directory / _DESCRIPTION).read_text(encoding="utf-8")
            saved = json.loads(text).get("sha256", {})
            return any(saved[name] != _sha256(self.directory / name) for name in saved)
        except (OSError, ValueError, AttributeError, TypeError):
            return False

    @staticmethod
    def save(
        directory: Path,
        machine: Machine,
        ram: int,
        on_progress: Callable[[], object] = lambda: None,
    ) -> None:
        """Save a guest, which is paused afterwards.

        Args:
            ram: the guest's memory.
            on_progress: as for :meth:`bridge.vm.machine.Machine.save`.

        Raises:
            ImageError: the files cannot be written. And what
                :meth:`bridge.vm.machine.Machine.save` raises.
        """
        try:
            directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # An existing snapshot was found unusable, so it is replaced.
            with atomic_output(directory, durable=True) as part:
                part.mkdir(mode=0o700)
                (part / _DEVICES).write_bytes(machine.save(on_progress))
                _copy(ram, part / _MEMORY)
                description = {
                    "format": _FORMAT,
                    "channel": machine.channel_version,
                    "files": {name: (part / name).stat().st_size for name in _FILES},
                    "sha256": {name: _sha256(part / name) for name in _FILES},
                }
                (part / _DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
                for name in (*_FILES, _DESCRIPTION):
                    (part / name).chmod(0o600)
        except OSError as error:
            raise ImageError(
                f"the snapshot {directory} cannot be written: {error.strerror}",
                hint="make room, or do without snapshots: --no-snapshot",
            ) from error


class Loading:
    """Restores a guest's memory on a thread; made by :meth:`Snapshot.loading`.

    Attributes:
        devices: a pipe from which QEMU reads the devices' state. The data comes after the memory
            is complete, because the devices look into it.
    """

    def __init__(self, snapshot: Snapshot, ram: int) -> None:
        self._error: ImageError | None = None
        self.devices, self._writing = os.pipe()
        self._thread = threading.Thread(
            target=self._load, args=(snapshot, ram), name="snapshot", daemon=True
        )
        self._thread.start()

    def _load(self, snapshot: Snapshot, ram: int) -> None:
        with os.fdopen(self._writing, "wb", buffering=0) as pipe:
            try:
                snapshot.restore(ram)
                at = 0
                while chunk := os.pread(snapshot.devices, _CHUNK, at):
                    at += pipe.write(chunk) or 0
            except ImageError as error:
                self._error = error
                # QEMU ignores the end of the pipe, so send what is no stream: that ends QEMU.
                with contextlib.suppress(OSError):
                    pipe.write(_NO_STREAM)
            except BrokenPipeError:
                pass  # QEMU has ended, or never started; its own error says more
            except OSError as error:
                self._error = ImageError(f"{snapshot.directory} cannot be read: {error}")

    def check(self) -> None:
        """Raise :class:`bridge.errors.ImageError` if it failed; QEMU has failed then, too."""
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Close the pipe, and wait until the thread has ended. Safe to call twice."""
        if self.devices >= 0:
            os.close(self.devices)
            self.devices = -1
        self._thread.join()


def prune(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Remove the unwanted snapshots in ``folder``, and all but the last used :data:`KEPT`."""
    found: list[tuple[float, Path]] = []
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append((path.stat().st_mtime, path))
    kept = 0
    for _, path in sorted(found, reverse=True):
        if not path.name.startswith("."):
            kept += 1
            if kept > KEPT or not wanted(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a file that have data: (start, end)."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: no more data
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def _copy(source: int, path: Path) -> None:
    """Copy a file; blocks of zeros become holes."""
    size = os.fstat(source).st_size
    with path.open("wb") as file:
        file.truncate(size)
        for start, end in _extents(source, size):
            for at in range(start, end, _CHUNK):
                chunk = memoryview(os.pread(source, min(_CHUNK, end - at), at))
                for offset in range(0, len(chunk), _BLOCK):
                    block = chunk[offset : offset + _BLOCK]
                    if bytes(block) != _ZEROES[: len(block)]:
                        os.pwrite(file.fileno(), block, at + offset)
