# SPDX-License-Identifier: Apache-2.0
"""Shared objects and archives with a harness: whether they can work in the guest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.errors import MissingDependencyError, UsageError

__all__ = ["SharedObject", "check_archive", "closure"]

_GUESTS_OWN = re.compile(
    r"(ld-linux-x86-64|libanl|libc|libdl|libm|libmvec|libnsl|libpthread|libresolv|librt|libutil)"
    r"\.so\.\d+"
)
"""Libraries of libc6, which each guest has in its own version."""

_DIRECTORIES = (
    Path("/usr/local/lib"),
    Path("/usr/lib/x86_64-linux-gnu"),
    Path("/lib/x86_64-linux-gnu"),
    Path("/usr/lib64"),
    Path("/usr/lib"),
)
"""Where libraries lie on this machine."""

_ARCHIVE = b"!<arch>\n"
_MEMBER_HEADER = 60


@dataclass(frozen=True)
class SharedObject:
    """A shared object of this machine.

    Attributes:
        path: where it is.
        name: what others call it: a file name.
        needed: the names of the libraries that it needs.
        search: directories in which it looks for them first.
        symbols: the functions and variables that it defines for others.
        libc: the newest version of the C library that it asks for, in numbers.
    """

    path: Path
    name: str
    needed: tuple[str, ...]
    search: tuple[Path, ...]
    symbols: frozenset[str]
    libc: tuple[int, ...]

    @classmethod
    def load(cls, path: Path, name: str | None = None) -> SharedObject:
        """Read a shared object.

        Raises:
            UsageError: it cannot be read, or is none for x86-64.
            MissingDependencyError: pyelftools is not installed.
        """
        elf_file, elf_error = _elftools()
        try:
            with path.open("rb") as file:
                elf = elf_file(file)
                _check_machine(str(path), elf)
                dynamic = elf.get_section_by_name(".dynamic")
                if elf["e_type"] != "ET_DYN" or dynamic is None:
                    raise UsageError(
                        f"{path} is not a shared object", hint="link it with -shared -fPIC"
                    )
                tags = list(dynamic.iter_tags())
                return cls(
                    path,
                    name or path.name,
                    tuple(tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"),
                    tuple(_search_paths(tags, path)),
                    frozenset(_defined(elf.get_section_by_name(".dynsym"))),
                    max(_libc_versions(elf), default=()),
                )
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        except elf_error as error:
            raise UsageError(
                f"{path} is not a shared object: {error}", hint="link it with -shared -fPIC"
            ) from error

    def require_symbol(self, name: str) -> None:
        """Raise UsageError unless it defines this function for others."""
        if name not in self.symbols:
            raise _no_symbol(str(self.path), name, self.symbols)

    def require_libc(self, version: str, image: str) -> None:
        """Raise UsageError if it needs a newer C library than a guest has.

        Args:
            version: of the guest's package libc6; "" if it is unknown.
            image: the guest image's name.
        """
        has = tuple(map(int, re.findall(r"\d+", version.split("-")[0])[:2]))
        if has and self.libc > has:
            needed = ".".join(map(str, self.libc))
            raise UsageError(
                f"{self.path} needs the C library {needed}, and the guest image {image} has "
                f"{version.split('-')[0]}",
                hint="compile it on the guest's release, link it into PATH.a, or take a newer "
                "image (--image)",
            )


def closure(start: SharedObject, given: Sequence[Path] = ()) -> list[SharedObject]:
    """Return the libraries that a shared object needs, beyond the C library, in load order.

    Args:
        given: files or directories in which they are looked for first.

    Raises:
        UsageError: one is not there, or is none for x86-64.
    """
    found: dict[str, SharedObject] = {}
    waiting = [start]
    while waiting:
        item = waiting.pop(0)
        for name in item.needed:
            if name in found or _GUESTS_OWN.fullmatch(name):
                continue
            path = _find(name, [*given, *start.search, *item.search, item.path.parent])
            if path is None:
                raise UsageError(
                    f"{item.path} needs {name}, which is not on this machine",
                    hint=f"install it, or say where it is: --library PATH/{name}",
                )
            found[name] = SharedObject.load(path, name)
            waiting.append(found[name])
    return list(found.values())


def _find(name: str, places: Iterable[Path]) -> Path | None:
    for place in (*places, *_DIRECTORIES):
        path = place if place.name == name and place.is_file() else place / name
        if path.is_file():
            return path.resolve()
    return None


def check_archive(path: Path, symbol: str) -> None:
    """Check that an archive defines a function, for x86-64.

    Raises:
        UsageError: it is no archive, is for another machine, or lacks the function.
        MissingDependencyError: pyelftools is not installed.
    """
    import io

    elf_file, elf_error = _elftools()
    defined: set[str] = set()
    for member in _members(path):
        if not member.startswith(b"\x7fELF"):
            continue
        try:
            elf = elf_file(io.BytesIO(member))
            _check_machine(f"a member of {path}", elf)
            defined.update(_defined(elf.get_section_by_name(".symtab")))
        except elf_error as error:
            raise UsageError(f"a member of {path} is damaged: {error}") from error
    if symbol not in defined:
        raise _no_symbol(str(path), symbol, defined)


def _members(path: Path) -> Iterator[bytes]:
    """Yield the contents of an archive's members (``ar(5)``)."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if not data.startswith(_ARCHIVE):
        thin = " but a thin one" if data.startswith(b"!<thin>") else ""
        raise UsageError(f"{path} is not an archive{thin}", hint="make it with ar rcs")
    at = len(_ARCHIVE)
    while at + _MEMBER_HEADER <= len(data):
        header = data[at : at + _MEMBER_HEADER]
        try:
            size = int(header[48:58])
        except ValueError as error:
            raise UsageError(f"{path} is damaged", hint="make it again with ar rcs") from error
        at += _MEMBER_HEADER
        yield data[at : at + size]
        at += size + size % 2


def _elftools() -> tuple[Any, type[Exception]]:
    try:
        from elftools.common.exceptions import ELFError
        from elftools.elf.elffile import ELFFile
    except ImportError as error:
        raise MissingDependencyError(
            "harnesses of compiled code need the package pyelftools",
            hint="pip install 'kcov-bridge[fuzz]'",
        ) from error
    return ELFFile, ELFError


def _check_machine(what: str, elf: Any) -> None:
    if elf["e_machine"] != "EM_X86_64" or elf.elfclass != 64:
        raise UsageError(
            f"{what} is for {elf.get_machine_arch()}, and guests are x86-64",
            hint="compile it for x86-64",
        )


def _defined(section: Any) -> Iterator[str]:
    for symbol in section.iter_symbols() if section is not None else ():
        if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_LOCAL":
            yield symbol.name


def _no_symbol(path: str, name: str, symbols: Iterable[str]) -> UsageError:
    mangled = any(name in symbol for symbol in symbols)
    return UsageError(
        f"{path} does not define {name}",
        hint='declare it extern "C"'
        if mangled
        else f"a harness is int {name}(const uint8_t *data, size_t size), visible to others",
    )


def _search_paths(tags: Sequence[Any], path: Path) -> Iterator[Path]:
    for tag in tags:
        if tag.entry.d_tag in ("DT_RUNPATH", "DT_RPATH"):
            text = tag.runpath if tag.entry.d_tag == "DT_RUNPATH" else tag.rpath
            for directory in text.split(":"):
                origin = str(path.resolve().parent)
                yield Path(directory.replace("$ORIGIN", origin).replace("${ORIGIN}", origin))


def _libc_versions(elf: Any) -> Iterator[tuple[int, ...]]:
    section = elf.get_section_by_name(".gnu.version_r")
    for _, versions in section.iter_versions() if section is not None else ():
        for version in versions:
            if re.fullmatch(r"GLIBC_[\d.]+", version.name):
                yield tuple(map(int, version.name.removeprefix("GLIBC_").split(".")[:2]))
