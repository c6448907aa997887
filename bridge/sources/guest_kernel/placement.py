# SPDX-License-Identifier: Apache-2.0
"""Canonical addresses for the code of kernel modules, the same on every run.

The kernel loads a module wherever there is room, but a PC must mean the same on every run. So the
text of each module in the kernel's package gets its own canonical range, ordered by name; other
modules get the room after them, in the order in which they appear.
"""

from __future__ import annotations

import json
import lzma
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from bridge.errors import SourceError
from bridge.util.files import write_atomically

__all__ = [
    "MODULES_BASE",
    "MODULES_END",
    "ModulePlacement",
    "core_text_sections",
    "core_text_size",
    "module_name",
]

MODULES_BASE: Final = 0xFFFF_FFFF_A000_0000
"""The first canonical address of modules."""
MODULES_END: Final = 0xFFFF_FFFF_E000_0000
"""The end of the canonical addresses of modules, exclusive; synthetic PCs lie further up."""

_PAGE: Final = 4096
_LATE_MODULES: Final = 1024
"""How many modules may come that are not known beforehand: a guest can make up any number."""
_FORMAT: Final = "kcov-bridge-modules"
_VERSION: Final = 1

_SHF_ALLOC: Final = 2
_SHF_EXECINSTR: Final = 4


class ModulePlacement:
    """Assigns canonical bases to the texts of modules."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """Assign a base to each module that is known beforehand.

        Args:
            sizes: bytes of core text, by the module's name.

        Raises:
            SourceError: there is not enough room.
        """
        self._sizes: dict[str, int] = {}
        for name, size in sizes.items():
            known = module_name(name)
            self._sizes[known] = max(_pages(size), self._sizes.get(known, 0))
        self._known: dict[str, int] = {}
        self._late: dict[str, tuple[int, int]] = {}
        self._next = MODULES_BASE
        for name in sorted(self._sizes):
            self._known[name] = self._take(name, self._sizes[name])

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of core text, in whole pages, of the modules that are known beforehand."""
        return dict(self._sizes)

    def place(self, name: str, size: int) -> int:
        """Return the canonical base of a module with ``size`` bytes of core text.

        A module that is known beforehand, and no larger than announced, has the same base on every
        run. Any other module keeps its first base unless it grows.

        Raises:
            SourceError: no room is left, or there are too many modules.
        """
        name, size = module_name(name), _pages(size)
        if size <= self._sizes.get(name, 0):
            return self._known[name]
        base, room = self._late.get(name, (0, 0))
        if size > room:
            if name not in self._late and len(self._late) >= _LATE_MODULES:
                raise SourceError(
                    f"the guest loaded module {name} after {_LATE_MODULES} others that the package "
                    "of its kernel lacks",
                    hint="load fewer modules, or record other sources alone: --source python",
                )
            base = self._take(name, size)
            self._late[name] = base, size
        return base

    def save(self, path: Path) -> None:
        """Write the modules that are known beforehand as JSON, whole or not at all.

        Raises:
            InfrastructureError: the file cannot be written.
        """
        data = {"format": _FORMAT, "version": _VERSION, "sizes": dict(sorted(self._sizes.items()))}
        write_atomically(path, json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> ModulePlacement:
        """Read what :meth:`save` wrote. Raises :class:`bridge.errors.SourceError`."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != _FORMAT or data["version"] != _VERSION:
                raise ValueError(f"format {data['format']!r}, version {data['version']!r}")
            sizes = {str(name): int(size) for name, size in data["sizes"].items()}
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(
                f"{path} is not a list of modules", evidence=f"{type(error).__name__}: {error}"
            ) from error
        return cls(sizes)

    def _take(self, name: str, size: int) -> int:
        base = self._next
        # One page more, so that code past a module's end is not attributed to the next module.
        if base + size + _PAGE > MODULES_END:
            raise SourceError(
                f"no room for the {size} bytes of module {name} in the canonical address range",
                hint=f"{MODULES_END - base} bytes are left: load fewer modules",
            )
        self._next = base + size + _PAGE
        return base


def module_name(name: str) -> str:
    """Return a module's name in the kernel's spelling; its file may be named with hyphens."""
    return name.replace("-", "_")


def core_text_size(path: Path) -> int:
    """Return the bytes of text that a module keeps while it is loaded, from its file.

    Raises as :func:`core_text_sections`.
    """
    return _core_text(path)[1]


def core_text_sections(path: Path) -> dict[str, int]:
    """Return the offset of each section in a module's core text.

    The kernel's loader places the executable sections outside ``.init`` one after the other, each
    aligned. The file may be compressed with xz (``.ko.xz``).

    Raises:
        SourceError: the file is not a module.
    """
    return _core_text(path)[0]


def _core_text(path: Path) -> tuple[dict[str, int], int]:
    try:
        if path.suffix == ".xz":
            return _layout(lzma.decompress(path.read_bytes()))
        if path.suffix == ".zst":
            raise SourceError(
                f"the module {path.name} is compressed with zstd, which this program cannot read"
            )
        # A module with debug information can be very large.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _layout(data)
    except (OSError, lzma.LZMAError) as error:
        raise SourceError(f"cannot read the module {path.name}: {error}") from error
    except (struct.error, ValueError) as error:
        raise SourceError(f"{path.name} is not a kernel module", evidence=str(error)) from error


def _layout(elf: bytes | mmap.mmap) -> tuple[dict[str, int], int]:
    """Return the sections of a 64-bit little-endian ELF; raises ValueError or struct.error."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    # Elf64_Ehdr: e_shoff at 40; e_shentsize, e_shnum, e_shstrndx from 58 on.
    (offset,) = struct.unpack_from("<Q", elf, 40)
    entry, count, names_index = struct.unpack_from("<HHH", elf, 58)
    # Elf64_Shdr: name, type, flags, addr, offset, size, link, info, addralign, entsize.
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + i * entry) for i in range(count)]
    if names_index >= count:
        raise ValueError("it has no section names")
    names = headers[names_index][4]
    sections: dict[str, int] = {}
    total = 0
    for header in headers:
        end = elf.find(b"\0", names + header[0])
        if end < 0:
            raise ValueError("a section name does not end")
        name = elf[names + header[0] : end].decode(errors="replace")
        if header[2] & (_SHF_ALLOC | _SHF_EXECINSTR) != _SHF_ALLOC | _SHF_EXECINSTR:
            continue
        if name.startswith(".init"):
            continue
        alignment = max(header[8], 1)
        start = -(-total // alignment) * alignment
        sections.setdefault(name, start)
        total = start + header[5]
    return sections, total


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
