# SPDX-License-Identifier: Apache-2.0
"""What the PCs of a campaign mean: kept by each job while its machine runs, read by the report.

A job writes into its directory what a run writes into its own: the block table of the target, its
native modules, the symbols and the covered blocks of the guest's kernel; and beside that, in
``modules``, the kernel modules of which something was covered, as the guest has them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from bridge.errors import BridgeError, InfrastructureError
from bridge.fuzz.frontier import KernelText
from bridge.fuzz.records import CampaignRecord
from bridge.fuzz.store import JOBS_DIRECTORY
from bridge.guest.images.store import Image, list_images
from bridge.results.kernel_export import Block, is_kernel_pc, read_blocks
from bridge.results.merge import add_native
from bridge.results.report.host import find_paths
from bridge.session.session import Session
from bridge.sources import PC
from bridge.sources.guest_kernel import BLOCKS_FILE as KERNEL_BLOCKS_FILE
from bridge.sources.guest_kernel import SYMBOLS_FILE
from bridge.sources.guest_kernel.lines import Lines, find_modules, find_vmlinux
from bridge.sources.guest_kernel.symbols import KernelSymbols
from bridge.sources.native.modules import ModuleTable, NativeModule
from bridge.sources.native.places import NativePlaces
from bridge.sources.pcs import PC_BASE, SLOT_BYTES, SYSCALL_FILE, SYSCALL_SLOTS, BlockTable
from bridge.sources.python.blocks import decode_source
from bridge.sources.symbolize import BLOCKS_FILE, NATIVE_FILE
from bridge.util.files import atomic_output, remove_partials, write_atomically

__all__ = ["Places", "is_syscall_pc", "keep_places", "tidy_places"]

_MODULES: Final = "modules"
_TEXT: Final = 160
"""Characters of a source line."""
_SYSCALLS_END: Final = PC_BASE + SYSCALL_SLOTS * SLOT_BYTES
_SUFFIXES: Final = (".ko", ".ko.xz")

_log = logging.getLogger(__name__)


def is_syscall_pc(pc: PC) -> bool:
    """Whether a PC stands for the number of a system call, not for code."""
    return PC_BASE <= pc < _SYSCALLS_END


def keep_places(session: Session, directory: Path) -> None:
    """Write what the PCs of a session mean into a directory; what is there is added to.

    To be called while the machine runs, once before its end and now and then: it takes some 100 ms
    when new modules were covered, and little otherwise.

    Raises:
        InfrastructureError: the directory cannot be written.
    """
    if session.source is not None:
        try:
            with atomic_output(directory / BLOCKS_FILE) as part:
                session.source.table.save(part)
        except OSError as error:
            raise InfrastructureError(
                f"cannot write {directory / BLOCKS_FILE}: {error.strerror}"
            ) from error
    if session.native is not None:
        add_native(session.native.places().table, directory / NATIVE_FILE)
    if session.kernel is None:
        return
    path = directory / KERNEL_BLOCKS_FILE
    before = read_blocks(path) if path.is_file() else []
    session.kernel.save(directory)
    blocks = [*before, *(read_blocks(path) if path.is_file() else [])]
    if before:
        write_atomically(path, "".join(f"{b.start:#x}\t{b.size}\n" for b in sorted(set(blocks))))
    if (directory / SYMBOLS_FILE).is_file():
        _keep_modules(session, directory, blocks)


def _say_left_out(modules: Iterable[NativeModule]) -> None:
    for module in modules:
        _log.warning("the PCs of %s in one guest are those of another module", module.path)


def tidy_places(directory: Path) -> None:
    """Remove what killed processes left half-written of :func:`keep_places`.

    Raises:
        InfrastructureError: it cannot be removed.
    """
    for each in (directory, directory / _MODULES):
        try:
            remove_partials(each)
        except OSError as error:
            raise InfrastructureError(f"cannot write {each}: {error.strerror}") from error


def _keep_modules(session: Session, directory: Path, blocks: Iterable[Block]) -> None:
    symbols = KernelSymbols.load(directory / SYMBOLS_FILE)
    texts = [symbols.text_at(block.start) for block in blocks]
    names = {text[2] for text in texts if text is not None and text[2]}
    folder = directory / _MODULES
    wanted = [
        name
        for name in sorted(names)
        if not any((folder / f"{name}{suffix}").exists() for suffix in _SUFFIXES)
    ]
    if not wanted:
        return
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InfrastructureError(f"cannot write {folder}: {error.strerror}") from error
    for name in wanted:
        # A module that the guest does not show costs the report its frontier, and nothing else.
        try:
            found = session.guest.run(["modinfo", "-n", name], check=True).stdout.decode().strip()
            suffix = next(each for each in _SUFFIXES if found.endswith(each))
            session.get(found, folder / f"{name}{suffix}")
        except (BridgeError, StopIteration, UnicodeDecodeError) as error:
            _log.info("the module %s of the guest cannot be kept: %s", name, error)


def _image_of(campaign: CampaignRecord) -> Image | None:
    """Return the image that the guests booted, or another one with the same kernel; or None."""
    images = [image for image in list_images() if image.kernel.is_file()]
    name, release = campaign.fact("image"), campaign.fact("kernel")
    same = [image for image in images if image.name == name]
    same += [image for image in images if image.kernel_release == release]
    return same[0] if same else None


class Places:
    """What the PCs of a campaign mean: place, function, source line, code.

    Args:
        vmlinux: the guest kernel's debug information, if it is not where Debian's packages put it.
        problems: gets what is not known, and why.

    Attributes:
        table: of the target's packages of Python; None if it is not known.
        symbols: of the guest's kernel; None if they are not known.
        sources: path of each file of the target that is there, by its name in the table.

    Raises:
        BridgeError: a file of the campaign is damaged.
    """

    def __init__(self, campaign: CampaignRecord, vmlinux: Path | None, problems: list[str]) -> None:
        jobs = campaign.directory / JOBS_DIRECTORY
        self._directories = [
            campaign.directory,
            *sorted(each for each in (*jobs.glob("*"), *jobs.glob("*/vm")) if each.is_dir()),
        ]
        self._image = _image_of(campaign)
        self._release = campaign.fact("kernel")
        if not self._release and self._image is not None:
            self._release = self._image.kernel_release
        self._problems = problems
        self.table: BlockTable | None = None
        self.symbols: KernelSymbols | None = None
        self.sources: dict[str, Path] = {}
        self._lines: Lines | None = None
        self._texts: dict[str, list[str]] = {}
        covered = campaign.covered()
        if tables := self._files(BLOCKS_FILE):
            self.table = BlockTable.load(tables[0])
            names = {
                location.file for pc in covered if (location := self.table.lookup(pc)) is not None
            } - {SYSCALL_FILE}
            found = {name: Path(path) for name, path in find_paths(names, ()).items()}
            self.sources = {name: path for name, path in found.items() if path.is_file()}
        self._native = self._find_native()
        if self.table is None and any(
            not is_kernel_pc(pc) and not is_syscall_pc(pc) and self._of_native(pc)[0] == f"{pc:#x}"
            for pc in covered
        ):
            problems.append(f"there is no {BLOCKS_FILE}: the lines of PCs are not known")
        if symbols := self._files(SYMBOLS_FILE):
            # The job that knows most modules.
            self.symbols = max(map(KernelSymbols.load, symbols), key=len)
            self._lines = self._find_lines(vmlinux)
        elif any(map(is_kernel_pc, covered)):
            problems.append(f"there is no {SYMBOLS_FILE}: the kernel's functions are not known")

    def of(self, pc: PC) -> tuple[str, str, str]:
        """Return place, function and source line of a PC; "" for what is not known."""
        if is_kernel_pc(pc):
            symbol = self.symbols.lookup(pc) if self.symbols is not None else None
            if symbol is None:
                return f"{pc:#x}", "", ""
            module = f" [{symbol.module}]" if symbol.module else ""
            line = self._lines.lookup(pc) if self._lines is not None else None
            offset = f"{symbol.name}+{pc - symbol.start:#x}{module}"
            return (f"{line[0]}:{line[1]}" if line else offset), symbol.name, offset if line else ""
        location = self.table.lookup(pc) if self.table is not None else None
        if location is None:
            return self._of_native(pc)
        lines = location.block.lines
        place = f"{lines[0]}-{lines[-1]}" if len(lines) > 1 else f"{lines[0]}"
        return f"{location.file}:{place}", "", self._line(location.file, lines[0])

    def _of_native(self, pc: PC) -> tuple[str, str, str]:
        frame = self._native.innermost(pc) if self._native is not None else None
        if frame is None:
            return f"{pc:#x}", "", ""
        if not frame.line:
            place = self._native.text(pc) if self._native is not None else None
            return place or f"{pc:#x}", frame.function, ""
        self.sources.setdefault(frame.file, Path(frame.file))
        return f"{frame.file}:{frame.line}", frame.function, self._line(frame.file, frame.line)

    def _find_native(self) -> NativePlaces | None:
        """Return the native modules of all jobs; None without any."""
        table = ModuleTable()
        for path in self._files(NATIVE_FILE):
            _say_left_out(table.merge(ModuleTable.load(path)))
        return NativePlaces(table) if len(table) else None

    def kernel_blocks(self) -> list[Block]:
        """Return the blocks of the guest's kernel that any job recorded."""
        found = {block for path in self._files(KERNEL_BLOCKS_FILE) for block in read_blocks(path)}
        return sorted(found)

    def kernel_text(self) -> KernelText | None:
        """Return the code of the guest's kernel and of the modules that jobs kept.

        None if the kernel's image is not here.

        Raises:
            MissingDependencyError: pyelftools is not installed.
            SourceError: a file is damaged.
        """
        file = self._image.kernel if self._image is not None else None
        if file is None and self._release:
            file = find_vmlinux(self._release)
        if file is None or self.symbols is None:
            return None
        text = KernelText(file)
        bases: dict[str, PC] = {}
        for start, _, module in self.symbols.texts(all_modules=True):
            bases[module] = min(start, bases.get(module, start))
        for directory in self._directories:
            for path in sorted((directory / _MODULES).glob("*.ko*")):
                base = bases.pop(path.name.partition(".")[0], None)
                if base is not None:
                    text.add_module(path, base, self.symbols)
        return text

    def _files(self, name: str) -> list[Path]:
        return [path for each in self._directories if (path := each / name).is_file()]

    def _find_lines(self, vmlinux: Path | None) -> Lines | None:
        if vmlinux is None and not self._release:
            return None
        found = find_vmlinux(self._release, vmlinux)
        if found is None or self.symbols is None:
            return None
        try:
            return Lines(found, self.symbols, find_modules(self._release, found))
        except BridgeError as error:
            if vmlinux is not None:
                raise
            self._problems.append(f"the kernel's lines are not known: {error.message}")
            return None

    def _line(self, file: str, number: int) -> str:
        if file not in self._texts:
            self._texts[file] = []
            path = self.sources.get(file)
            if path is not None:
                try:
                    self._texts[file] = decode_source(path.read_bytes()).splitlines()
                except (OSError, BridgeError) as error:
                    self._problems.append(f"the source of {file} cannot be shown: {error}")
        lines = self._texts[file]
        return lines[number - 1].strip()[:_TEXT] if number <= len(lines) else ""
