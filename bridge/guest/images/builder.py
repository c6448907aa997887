# SPDX-License-Identifier: Apache-2.0
"""Builds a guest image: base (packages, kernel, root), agent (compiled sources), keys.

The compiler and all tools that affect the result come from the *build root*, a tree of packages of
the image's own Debian release, so the host's tools do not matter. The host provides mmdebstrap to
make the build root, and QEMU to boot the result once. Without root, mmdebstrap and the build root
run in a user namespace.

Everything is made in a temporary directory beside its destination and renamed into place
(:func:`bridge.util.files.atomic_output`). A build holds the recipe's lock, so a temporary directory
that another build finds is left over.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import lzma
import os
import re
import shlex
import shutil
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bridge.errors import ImageError, MissingDependencyError
from bridge.guest.images.archive import EPOCH, Entry, normalise_tar, read_tree, write_newc
from bridge.guest.images.recipe import DEFAULT_RECIPE, Recipe, Sources
from bridge.guest.images.store import (
    FILES,
    MANIFEST,
    OPTIONAL_FILES,
    FileRecord,
    Image,
    base_directory,
    image_directory,
    refuse_mounts,
    sha256_of,
)
from bridge.sources.guest_kernel.placement import ModulePlacement, core_text_size
from bridge.util.cache import cache_directory, lock_file, locked
from bridge.util.commands import Commands, Phases, Progress, disk_full, print_progress
from bridge.util.files import atomic_output, remove

__all__ = ["build", "compile_for_guest"]

logger = logging.getLogger(__name__)

_BASE_BYTES = 2 << 30
"""Free space in bytes that a base needs while it is built: measured 1.6 GiB at the peak."""

_IMAGE_BYTES = 64 << 20
"""Free space in bytes that the agent's layer needs, without its base."""

_BOOT_SECONDS = 120.0
_SYMBOLS_BYTES = 32 << 20
"""Room for the kernel's symbol table as text; Debian 12's takes 5 MiB."""

_ANY_FINGERPRINT = "[0-9a-f]" * 12
"""A pattern for the fingerprints in the names of bases and images."""

_PROGRAM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_BOUND_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def build(
    recipe: str = DEFAULT_RECIPE,
    *,
    force: bool = False,
    include: Iterable[str] = (),
    modules: Iterable[str] = (),
    mirror: str | None = None,
    progress: Progress = print_progress,
) -> Image:
    """Return the image of a recipe's current sources, built if it is missing.

    Args:
        force: build all layers again, with the newest packages.
        include: further packages of the guest.
        modules: further kernel modules.
        mirror: where packages come from, in mmdebstrap's syntax (default: ``KCOV_BRIDGE_MIRROR``,
            else mmdebstrap's own choice).

    Raises:
        UsageError: the recipe is unknown, or a name is not valid.
        MissingDependencyError: a program is not installed.
        ImageError: the build failed.
    """
    sources = Sources.find()
    plain = Recipe.load(recipe, sources.recipes)
    wanted = plain.extended(include, modules)
    directory = image_directory(f"{wanted.name}-{sources.fingerprint(wanted)}")
    if not force and (image := _usable(directory)):
        return image
    mirror = mirror or os.environ.get("KCOV_BRIDGE_MIRROR") or None
    try:
        with contextlib.ExitStack() as stack:
            fd = stack.enter_context(_recipe_lock(wanted.name, progress))
            if not force and (image := _usable(directory)):
                return image
            builder = _Builder(sources, plain, wanted, mirror, Phases(progress), fd)
            base = builder.base(force=force)
            image = builder.image(base, directory)
            progress(
                f"{image.name} is ready: {image.size / 1e6:.0f} MB, kernel "
                f"{image.kernel_release}, {builder.phases.elapsed:.0f} s"
            )
            return image
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(cache_directory()) from error
        raise ImageError(f"the image {recipe} could not be built: {error}") from error


def compile_for_guest(
    image: Image,
    source: Path,
    out: Path,
    *,
    flags: Sequence[str] = ("-O2", "-Wall", "-Wextra", "-Werror"),
    progress: Progress = print_progress,
) -> Path:
    """Compile a C program for an image's guest, with the compiler and libraries of its release.

    Args:
        source: the program; headers beside it are found.
        out: the executable to write.

    Returns:
        ``out``.

    Raises:
        ImageError: compiling failed, with the compiler's messages, or the image's build root was
            removed.
    """
    base = _Base.load(base_directory(image.recipe, image.base_fingerprint), image.base_fingerprint)
    if base is None:
        raise ImageError(
            f"the build root of the image {image.name} is gone",
            hint="build the image again: kcov-bridge image build --force",
        )
    with contextlib.ExitStack() as stack:
        fd = stack.enter_context(_recipe_lock(image.recipe, progress))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kcov-bridge-")))
        commands = Commands(scratch / "build.log", Phases(progress), (fd,))
        build_root = _BuildRoot(base.build_root, commands)
        work = stack.enter_context(build_root.workspace())
        for path in (source, *source.parent.glob("*.h")):
            shutil.copyfile(path, work / path.name)
        build_root.run(
            ["gcc", *flags, "-o", "/work/program.out", f"/work/{source.name}", "-pthread"],
            what=f"compiling {source.name} for the guest",
        )
        shutil.copyfile(work / "program.out", out)
        out.chmod(0o755)
    return out


def _recipe_lock(recipe: str, progress: Progress) -> contextlib.AbstractContextManager[int]:
    return locked(lock_file(recipe), f"the image {recipe}", progress)


def _usable(directory: Path) -> Image | None:
    """Return the image in a directory, or None if it is missing or broken and must be built."""
    try:
        image = Image.load(directory)
        image.check()
    except ImageError:
        return None
    return image


@dataclass(frozen=True)
class _Base:
    """The slow part of an image: ``bases/NAME-FINGERPRINT``."""

    directory: Path
    fingerprint: str
    kernel_release: str
    kernel_version: str
    packages: dict[str, str]

    @classmethod
    def load(cls, directory: Path, fingerprint: str) -> _Base | None:
        try:
            data = json.loads((directory / "base.json").read_text(encoding="utf-8"))
            return cls(
                directory,
                fingerprint,
                data["kernel_release"],
                data["kernel_version"],
                data["packages"],
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def build_root(self) -> Path:
        return self.directory / "build-root"


class _BuildRoot:
    """The tree in which everything is compiled and packed, entered by chroot."""

    def __init__(self, root: Path, commands: Commands) -> None:
        self.root = root
        self._commands = commands

    def run(
        self,
        argv: Sequence[str],
        *,
        what: str,
        feed: Callable[[IO[bytes]], None] | None = None,
    ) -> None:
        """Run a program of the tree, in a mount namespace with /proc and some devices."""
        as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        binds = "".join(f'mount --bind /dev/{name} "$0/dev/{name}" && ' for name in _BOUND_DEVICES)
        # objtool of Linux 7 reads the limit of its stack in /proc.
        binds += 'mount --rbind /proc "$0/proc" && '
        script = f'{binds}exec chroot "$0" "$@"'
        self._commands.run(
            ["unshare", *as_root, "--mount", "--", "sh", "-c", script, str(self.root), *argv],
            what=what,
            feed=feed,
            env={"PATH": _PROGRAM_PATH, "LC_ALL": "C", "HOME": "/", "TZ": "UTC"},
        )

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """Yield an empty ``/work`` in the tree.

        The path is always the same, because compiled files may contain it. The recipe's lock keeps
        other builds out.
        """
        work = self.root / "work"
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


class _Builder:
    """One build. Its methods make the layers, from the bottom up."""

    def __init__(
        self,
        sources: Sources,
        plain: Recipe,
        recipe: Recipe,
        mirror: str | None,
        phases: Phases,
        lock_fd: int,
    ) -> None:
        self.sources = sources
        self.plain = plain
        self.recipe = recipe
        self.mirror = mirror
        self.phases = phases
        self._lock_fd = lock_fd

    # -- the base ----------------------------------------------------------------------------

    def base(self, *, force: bool) -> _Base:
        """Return the base, built if it is missing."""
        fingerprint = self.sources.base_fingerprint(self.recipe)
        directory = base_directory(self.recipe.name, fingerprint)
        base = _Base.load(directory, fingerprint)
        if base is not None and not force:
            return base
        _require_programs()
        _require_room(_BASE_BYTES)
        with _new_directory(directory) as temporary:
            commands = self._commands(temporary)
            build_root = _BuildRoot(temporary / "build-root", commands)
            self._make_build_root(build_root, temporary, commands)
            release, version = self._unpack_kernel(build_root, temporary)
            tree = build_root.root / "kernel" / "lib" / "modules" / release
            wanted = (*self.recipe.boot_modules, *self.recipe.modules)
            made = {_module_name(source) for source in self.recipe.source_modules}
            # Before the compiler runs, so that a misspelt name costs no more time than it must.
            _Modules(tree).require(name for name in wanted if _module_name(name) not in made)
            self._build_source_modules(build_root, release)
            modules = _Modules(tree)
            modules.require(wanted)
            ModulePlacement(modules.text_sizes()).save(temporary / "modules.json")
            self._make_boot_archive(build_root, modules, temporary)
            packages = self._make_root(build_root, modules, release, temporary, commands)
            shutil.rmtree(build_root.root / "kernel")
            record = {"kernel_release": release, "kernel_version": version, "packages": packages}
            _write_json(temporary / "base.json", record)
        base = _Base.load(directory, fingerprint)
        assert base is not None  # it was written just now
        return base

    def _make_build_root(self, build_root: _BuildRoot, temporary: Path, commands: Commands) -> None:
        self.phases.begin("installing the build root (compiler, kernel headers)")
        # The headers must belong to the guest's kernel, so both come from the package that names
        # it. The image package of a later release is empty, and depends on the packages with the
        # kernel, its modules and their lists.
        depends = "apt-cache show --no-all-versions"
        hook = (
            f"set -e; image=$({depends} {self.recipe.kernel}"
            r" | sed -n 's/^Depends:.* \(linux-image-[^ ,]*\).*/\1/p'); "
            "release=${image#linux-image-}; "
            f"parts=$({depends} $image | sed -n 's/^Depends: //p' | tr ',' '\\n'"
            r' | sed -n "s/^ *\(linux-[a-z]*-$release\) .*/\1/p"); '
            "apt-get install --yes --no-install-recommends linux-headers-$release; "
            "mkdir /kernel; cd /kernel; apt-get download $image $parts"
        )
        if self.recipe.source_modules:
            hook += "; apt-get download linux-source-$(echo $release | cut -d. -f1,2)"
        archive = temporary / "build-root.tar"
        self._bootstrap(
            self.recipe.build_packages,
            archive,
            commands,
            # mmdebstrap gives the hook the tree as $1.
            [f'--customize-hook=chroot "$1" sh -c {shlex.quote(hook)}'],
        )
        self.phases.begin("unpacking the build root and the kernel")
        build_root.root.mkdir()
        commands.run(
            [
                *("tar", "--extract", "--file", str(archive), "--directory", str(build_root.root)),
                *("--no-same-owner", "--exclude=./dev/*"),
            ],
            what="unpacking the build root",
        )
        archive.unlink()
        (build_root.root / "dev").mkdir(exist_ok=True)
        for name in _BOUND_DEVICES:
            (build_root.root / "dev" / name).touch()

    def _unpack_kernel(self, build_root: _BuildRoot, temporary: Path) -> tuple[str, str]:
        """Unpack the kernel packages in the build root, and copy the base's files from them.

        Returns:
            The kernel's release, and the packages' version.
        """
        kernel = build_root.root / "kernel"
        image = next(kernel.glob("linux-image-*.deb"), None)
        if image is None:
            raise ImageError(f"package {self.recipe.kernel} provides no kernel image")
        name, version = image.name.split("_")[:2]
        release = name.removeprefix("linux-image-").replace("-unsigned", "")
        for package in sorted(kernel.glob("*.deb")):
            build_root.run(
                ["dpkg-deb", "--extract", f"/kernel/{package.name}", "/kernel"],
                what="unpacking the kernel",
            )
            package.unlink()
        # A release with a merged /usr may ship its modules there.
        if not (kernel / "lib").exists() and (kernel / "usr" / "lib" / "modules").is_dir():
            (kernel / "lib").symlink_to("usr/lib")
        places = (kernel / "boot" / f"vmlinuz-{release}", kernel / f"lib/modules/{release}/vmlinuz")
        vmlinuz = next((path for path in places if path.is_file()), None)
        if vmlinuz is None:
            raise ImageError(f"the packages of {name} contain no kernel")
        shutil.copyfile(vmlinuz, temporary / "vmlinuz")
        _write_sparse(temporary / "vmlinux", self._unpacked(vmlinuz, build_root))
        compressed = sorted((kernel / "lib" / "modules" / release).rglob("*.ko.xz"))
        for module in compressed:
            module.with_suffix("").write_bytes(lzma.decompress(module.read_bytes()))
            module.unlink()
        build_root.run(["depmod", "-b", "/kernel", release], what="depmod")
        return release, version.replace("%3a", ":")

    def _build_source_modules(self, build_root: _BuildRoot, release: str) -> None:
        """Build modules of the kernel's source package beside those of the release."""
        if not self.recipe.source_modules:
            return
        self.phases.begin("building modules of the kernel's source")
        kernel = build_root.root / "kernel"
        archive = next((kernel / "usr" / "src").glob("linux-source-*.tar.xz"), None)
        if archive is None:
            raise ImageError(f"the kernel {release} has no package with its source")
        with build_root.workspace() as work:
            # The directory in the archive has the archive's name.
            top = archive.name.removesuffix(".tar.xz")
            files = [f"{top}/{source}" for source in self.recipe.source_modules]
            build_root.run(
                [
                    *("tar", "--extract", "--xz", "--file", f"/kernel/usr/src/{archive.name}"),
                    *("--directory", "/work", "--no-same-owner", *files),
                ],
                what="unpacking the kernel's source",
            )
            archive.unlink()
            for source in self.recipe.source_modules:
                there = Path("/work") / top / Path(source).parent
                name = Path(source).stem
                makefile = build_root.root / there.relative_to("/") / "Makefile"
                makefile.write_text(f"obj-m := {name}.o\n", encoding="utf-8")
                build_root.run(
                    ["make", "-C", f"/lib/modules/{release}/build", f"M={there}", "modules"],
                    what=f"compiling {source}",
                )
                made = f"{there}/{name}.ko"
                build_root.run(["strip", "--strip-debug", made], what="strip")
                place = kernel / "lib" / "modules" / release / "kernel" / Path(source).parent
                place.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(work / made.removeprefix("/work/"), place / f"{name}.ko")
        build_root.run(["depmod", "-b", "/kernel", release], what="depmod")

    def _unpacked(self, vmlinuz: Path, build_root: _BuildRoot) -> bytes:
        """Return the ELF file in a bzImage, which xz or another program of the build root unpacks.

        ``Documentation/x86/boot.rst``: the number of setup sectors is at 0x1f1, the payload's
        offset from there at 0x248 and its length at 0x24c.
        """
        image = vmlinuz.read_bytes()
        setup_sectors = image[0x1F1] or 4
        offset, length = struct.unpack_from("<II", image, 0x248)
        begin = (setup_sectors + 1) * 512 + offset
        payload = image[begin : begin + length]
        programs = {b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip"}
        program = next((p for magic, p in programs.items() if payload.startswith(magic)), None)
        if program is None:
            raise ImageError(f"{vmlinuz.name} has an unknown compression: {payload[:6].hex()}")
        # The kernel's build appends the unpacked size, four bytes that the stream does not include.
        with build_root.workspace() as work:
            (work / "payload").write_bytes(payload[:-4])
            build_root.run(
                ["sh", "-c", f"{program} -dc < /work/payload > /work/vmlinux"],
                what="unpacking vmlinuz",
            )
            unpacked = (work / "vmlinux").read_bytes()
        if not unpacked.startswith(b"\x7fELF"):
            raise ImageError(f"{vmlinuz.name} contains no ELF file")
        return unpacked

    def _make_boot_archive(
        self, build_root: _BuildRoot, modules: _Modules, temporary: Path
    ) -> None:
        entries = [Entry.directory(name) for name in ("dev", "modules", "proc", "sys")]
        order = []
        for number, path in enumerate(modules.closure(self.recipe.boot_modules)):
            name = f"modules/{number:02d}-{path.name}"
            entries.append(Entry.file(name, path.read_bytes()))
            order.append(f"/{name}\n")
        entries.append(Entry.file("modules/load", "".join(order).encode()))
        with (temporary / "boot.cpio").open("wb") as out:
            write_newc(out, entries)

    def _make_root(
        self,
        build_root: _BuildRoot,
        modules: _Modules,
        release: str,
        temporary: Path,
        commands: Commands,
    ) -> dict[str, str]:
        """Make root.squashfs; return the packages in it with their versions."""
        self.phases.begin("installing the guest's root")
        archive = temporary / "root.tar"
        self._bootstrap(self.recipe.packages, archive, commands, [])
        self.phases.begin("packing the guest's root")
        with build_root.workspace() as work, archive.open("rb") as source:
            packages = _packages(source)
            module_tree = work / "tree" / "lib" / "modules" / release
            wanted = (*self.recipe.boot_modules, *self.recipe.modules)
            modules.copy(modules.closure(wanted), module_tree)
            build_root.run(["depmod", "-b", "/work/tree", release], what="depmod")
            entries = read_tree(module_tree, f"usr/lib/modules/{release}/")
            entries += read_tree(self.sources.root_files)
            source.seek(0)
            build_root.run(
                [
                    *("mksquashfs", "-", "/work/root.squashfs", "-tar", "-quiet", "-no-progress"),
                    *("-comp", "zstd", "-Xcompression-level", "19", "-no-xattrs"),
                    *("-mkfs-time", str(EPOCH), "-all-time", str(EPOCH)),
                ],
                what="packing the guest's root",
                feed=lambda out: normalise_tar(
                    source,
                    out,
                    exclude=self.recipe.exclude,
                    replace=entries,
                    edit={"etc/shadow": _without_dates},
                ),
            )
            shutil.move(work / "root.squashfs", temporary / "root.squashfs")
        (temporary / "root.squashfs").chmod(0o644)
        archive.unlink()
        return packages

    def _bootstrap(
        self, packages: Sequence[str], out: Path, commands: Commands, options: Sequence[str]
    ) -> None:
        """Run mmdebstrap, its temporary tree beside ours, so that both are removed together."""
        with tempfile.TemporaryDirectory(prefix="mmdebstrap-", dir=out.parent) as scratch:
            Path(scratch).chmod(0o755)  # root of a user namespace is another user
            # Root's mmdebstrap mounts into its tree. In a namespace of its own that ends with it,
            # even if it is killed; another user's makes one itself.
            private = ["unshare", "--mount", "--"] if os.geteuid() == 0 else []
            command = [
                *private,
                *("mmdebstrap", "--variant=essential", "--format=tar"),
                # A merged /usr from the start; otherwise a package that needs perl would merge it.
                "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
                "--include=usr-is-merged," + ",".join(packages),
                # The guest leaves these paths out, and building does not need them.
                "--dpkgopt=path-exclude=/usr/share/man/*",
                "--dpkgopt=path-exclude=/usr/share/locale/*",
                "--dpkgopt=path-exclude=/usr/share/doc/*",
                *options,
                self.recipe.suite,
                str(out),
                *([self.mirror] if self.mirror else []),
            ]
            env = {**os.environ, "TMPDIR": scratch, "SOURCE_DATE_EPOCH": str(EPOCH), "LC_ALL": "C"}
            what = f"installing packages of {self.recipe.suite}"
            try:
                commands.run(command, what=what, env=env)
            except ImageError as error:
                if not error.hint and "is expired" in error.evidence:
                    error.hint = (
                        "the mirror's index is older than Debian allows; to use it anyway: "
                        f"--mirror 'deb [check-valid-until=no] URI {self.recipe.suite} main'"
                    )
                raise

    # -- the image ---------------------------------------------------------------------------

    def image(self, base: _Base, directory: Path) -> Image:
        """Make the image on top of a base."""
        _require_room(_IMAGE_BYTES)
        with _new_directory(directory) as temporary:
            commands = self._commands(temporary)
            build_root = _BuildRoot(base.build_root, commands)
            for name in ("vmlinux", "vmlinuz", "root.squashfs"):
                _link(base.directory / name, temporary / name)
            # Bases that an earlier version built lack these.
            for name in OPTIONAL_FILES:
                if (base.directory / name).exists():
                    _link(base.directory / name, temporary / name)
            agent = self._compile_agent(build_root, base.kernel_release, temporary)
            keys = _make_keys(temporary)
            (temporary / "initrd.img").touch(mode=0o600)  # it contains the host's private key
            with (temporary / "initrd.img").open("wb") as initrd:
                initrd.write((base.directory / "boot.cpio").read_bytes())
                write_newc(initrd, agent)
                write_newc(initrd, keys)
            if not (base.directory / "System.map").exists():
                self._read_symbols(base, temporary, commands)
            _link(base.directory / "System.map", temporary / "System.map")
            shutil.rmtree(temporary / "scratch", ignore_errors=True)
            image = Image(
                directory=directory,
                recipe=self.recipe.name,
                suite=self.recipe.suite,
                fingerprint=self.sources.fingerprint(self.recipe),
                base_fingerprint=base.fingerprint,
                agent_fingerprint=self.sources.agent_fingerprint(),
                kernel_release=base.kernel_release,
                kernel_version=base.kernel_version,
                include=tuple(p for p in self.recipe.packages if p not in self.plain.packages),
                modules=tuple(m for m in self.recipe.modules if m not in self.plain.modules),
                packages=base.packages,
                files={
                    name: FileRecord((temporary / name).stat().st_size, sha256_of(temporary / name))
                    for name in (*FILES, *OPTIONAL_FILES)
                    if (temporary / name).exists()
                },
            )
            _write_json(temporary / MANIFEST, image.manifest())
        return image

    def _compile_agent(self, build_root: _BuildRoot, release: str, temporary: Path) -> list[Entry]:
        """Compile ``guest/`` in the build root; return the entries for the initramfs."""
        self.phases.begin("compiling the module and the agent")
        with build_root.workspace() as work:
            for name, path in self.sources.agent_files():
                (work / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, work / name)
            build_root.run(
                ["make", "-C", "/work/agent", "install", "OUT=.", "DESTDIR=/work/layer"],
                what="compiling the agent",
            )
            build_root.run(
                ["make", "-C", f"/lib/modules/{release}/build", "M=/work/module", "modules"],
                what="compiling the module",
            )
            module = work / "module" / "kcov_bridge.ko"
            build_root.run(["strip", "--strip-debug", "/work/module/kcov_bridge.ko"], what="strip")
            shutil.copyfile(module, temporary / "kcov_bridge.ko")
            extra = work / "layer" / "usr" / "lib" / "modules" / release / "extra"
            extra.mkdir(parents=True)
            shutil.copyfile(module, extra / "kcov_bridge.ko")
            entries = read_tree(work / "layer", "layer/")
        return [*entries, Entry.link("init", "layer/usr/sbin/kcov-init")]

    def _read_symbols(self, base: _Base, temporary: Path, commands: Commands) -> None:
        """Boot the image once to read the kernel's symbols; this also shows that it boots.

        Debian's packages lack System.map, and its debug package is a hundred times larger.
        """
        self.phases.begin("booting once, for the kernel's symbols")
        out = temporary / "symbols"
        with out.open("wb") as file:
            file.truncate(_SYMBOLS_BYTES)
        drive = "if=none,format=raw,file="
        qemu = os.environ.get("KCOV_BRIDGE_QEMU") or "qemu-system-x86_64"
        commands.run(
            [
                *(qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                *("-machine", "q35", "-accel", "tcg", "-cpu", "max,la57=off", "-m", "256"),
                *("-kernel", "vmlinux", "-initrd", "initrd.img", "-serial", "stdio"),
                *("-append", "console=ttyS0 quiet panic=-1 no_timer_check kcov_init.symbols"),
                *("-drive", f"{drive}root.squashfs,id=root,readonly=on"),
                *("-device", "virtio-blk-pci,drive=root"),
                *("-drive", f"{drive}symbols,id=symbols"),
                *("-device", "virtio-blk-pci,drive=symbols"),
            ],
            what="booting the image",
            cwd=temporary,
            seconds=_BOOT_SECONDS,
        )
        text, end, _ = out.read_bytes().partition(b"\nend\n")
        out.unlink()
        if not end or b" T _text\n" not in text:
            raise ImageError(
                "the image does not boot: the kernel's symbols were not written",
                evidence="\n".join(
                    commands.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
                ),
            )
        map_path = temporary / "System.map"
        map_path.write_bytes(text + b"\n")
        map_path.replace(base.directory / "System.map")

    # -- common ------------------------------------------------------------------------------

    def _commands(self, temporary: Path) -> Commands:
        return Commands(temporary / "build.log", self.phases, (self._lock_fd,))


class _Modules:
    """A kernel's modules and their dependencies, from depmod's files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._needs: dict[str, list[str]] = {}
        self._paths: dict[str, str] = {}
        for line in (directory / "modules.dep").read_text(encoding="utf-8").splitlines():
            path, _, needs = line.partition(":")
            self._paths[_module_name(path)] = path
            self._needs[path] = needs.split()
        builtin = (directory / "modules.builtin").read_text(encoding="utf-8")
        self._builtin = {_module_name(path) for path in builtin.split()}
        self._before: dict[str, list[str]] = {}
        self._after: dict[str, list[str]] = {}
        for words in self._words("modules.softdep", "softdep"):
            where = None
            for word in words[1:]:
                if word in ("pre:", "post:"):
                    where = self._before if word == "pre:" else self._after
                elif where is not None:
                    where.setdefault(_module_name(words[0]), []).append(word)
        self._aliases: dict[str, list[str]] = {}
        for words in self._words("modules.alias", "alias"):
            self._aliases.setdefault(_module_name(words[0]), []).append(_module_name(words[-1]))

    def _words(self, file: str, keyword: str) -> Iterator[list[str]]:
        """Yield the words after the keyword, of each line with it in one of depmod's files."""
        path = self._directory / file
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            words = line.split()
            if words[:1] == [keyword] and len(words) > 2:
                yield words[1:]

    def require(self, names: Iterable[str]) -> None:
        """Raise :class:`bridge.errors.ImageError` if the kernel lacks modules; name all of them."""
        known = self._builtin | set(self._paths)
        missing = [name for name in names if _module_name(name) not in known]
        if missing:
            raise ImageError(
                f"the kernel {self._directory.name} has no module {', '.join(missing)}",
                hint="leave them out of --module, or of `modules` in the recipe, or set another "
                "`kernel` in the recipe",
            )

    def closure(self, names: Iterable[str]) -> list[Path]:
        """Return the files of modules and their dependencies, in an order in which they load.

        Soft dependencies (modules.softdep) are included if the kernel has them.

        Raises:
            ImageError: the kernel lacks a module.
        """
        names = list(names)
        self.require(names)
        order: dict[str, None] = {}
        seen: set[str] = set()
        for name in names:
            self._add(_module_name(name), order, seen)
        return [self._directory / path for path in order]

    def _add(self, name: str, order: dict[str, None], seen: set[str]) -> None:
        """Add a module after its dependencies, and its soft post-dependencies after it."""
        if name in seen or name not in self._paths:
            return
        seen.add(name)
        for wanted in self._before.get(name, ()):
            self._add_wanted(wanted, order, seen)
        # modules.dep lists dependencies in the reverse order of loading.
        for path in reversed(self._needs[self._paths[name]]):
            self._add(_module_name(path), order, seen)
            order.setdefault(path)
        order.setdefault(self._paths[name])
        for wanted in self._after.get(name, ()):
            self._add_wanted(wanted, order, seen)

    def _add_wanted(self, wanted: str, order: dict[str, None], seen: set[str]) -> None:
        """Add a soft dependency: a module, or an alias of modules; it may be missing."""
        name = _module_name(wanted)
        for each in [name] if name in self._paths else self._aliases.get(name, []):
            self._add(each, order, seen)

    def text_sizes(self) -> dict[str, int]:
        """Return the bytes of text that each module keeps while it is loaded, by name."""
        return {
            name: core_text_size(self._directory / path)
            for name, path in sorted(self._paths.items())
        }

    def copy(self, files: Iterable[Path], to: Path) -> None:
        """Copy modules, and depmod's other input files, to another tree of modules."""
        extra = ("modules.builtin", "modules.builtin.modinfo", "modules.order")
        for path in (*files, *(self._directory / name for name in extra)):
            if path.exists():
                target = to / path.relative_to(self._directory)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def _module_name(path: str) -> str:
    return Path(path).name.partition(".")[0].replace("-", "_")


def _packages(archive: IO[bytes]) -> dict[str, str]:
    """Return the packages in the dpkg status of a root's tar archive, with their versions."""
    with tarfile.open(fileobj=archive, mode="r:") as tar:
        status = tar.extractfile("./var/lib/dpkg/status")
        if status is None:
            raise ImageError("the guest's root has no list of packages")
        text = status.read().decode()
    found = {}
    for stanza in text.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version): (.*)$", stanza, re.MULTILINE))
        if len(fields) == 2:
            found[fields["Package"]] = fields["Version"]
    return dict(sorted(found.items()))


def _without_dates(shadow: bytes) -> bytes:
    """Set the day of the last change, the third field in shadow(5), to a fixed one in the past."""
    return re.sub(rb"^([^:]*:[^:]*):\d+:", rb"\1:19000:", shadow, flags=re.MULTILINE)


def _make_keys(directory: Path) -> list[Entry]:
    """Make the image's key pairs; return the entries for the initramfs.

    The user's keys stay in the directory. Only the guest gets the host's private key.
    """
    user, host = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    user_public = _public_line(user, "kcov-bridge")
    host_public = _public_line(host, "kcov-guest")
    private = directory / "id_ed25519"
    private.touch(mode=0o600)
    private.write_bytes(_private_text(user))
    (directory / "id_ed25519.pub").write_bytes(user_public)
    (directory / "ssh_host_ed25519_key.pub").write_bytes(host_public)
    return [
        Entry.directory("layer/root", 0o700),
        Entry.directory("layer/root/.ssh", 0o700),
        Entry.file("layer/root/.ssh/authorized_keys", user_public, 0o600),
        Entry.file("layer/etc/ssh/ssh_host_ed25519_key", _private_text(host), 0o600),
        Entry.file("layer/etc/ssh/ssh_host_ed25519_key.pub", host_public),
    ]


def _private_text(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def _public_line(key: Ed25519PrivateKey, comment: str) -> bytes:
    line = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return line + f" {comment}\n".encode()


def _require_programs() -> None:
    needed = {"mmdebstrap": "mmdebstrap", "unshare": "util-linux", "tar": "tar"}
    if os.geteuid() != 0:
        needed["newuidmap"] = "uidmap"
    missing = [package for program, package in needed.items() if shutil.which(program) is None]
    if missing:
        raise MissingDependencyError(
            f"building an image needs: {', '.join(missing)}",
            hint="`kcov-bridge setup` installs them on Debian",
        )


def _require_room(needed: int) -> None:
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(cache).free < needed:
        raise disk_full(cache, needed)


def _link(source: Path, target: Path) -> None:
    """Link a file, or copy it if the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _write_sparse(path: Path, data: bytes) -> None:
    """Write a file with holes in place of pages of zeros.

    Half of an unpacked kernel is alignment and memory that must be zero.
    """
    page = 4096
    with path.open("wb") as out:
        for offset in range(0, len(data), page):
            chunk = data[offset : offset + page]
            if chunk.count(0) == len(chunk):
                out.seek(len(chunk), os.SEEK_CUR)
            else:
                out.write(chunk)
        out.truncate(len(data))


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _new_directory(destination: Path) -> Iterator[Path]:
    """Yield an empty directory, which becomes ``destination`` at the end and replaces an older one.

    Remains of killed builds of the same recipe are removed. The recipe's lock must be held.

    Raises:
        ImageError: something is mounted in the older directory, or in such remains.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    refuse_mounts(destination)
    recipe = destination.name.rpartition("-")[0]
    for left in destination.parent.glob(f".{recipe}-{_ANY_FINGERPRINT}.*"):
        refuse_mounts(left)
        try:
            remove(left)
        except OSError as error:
            # Without root, files that root of a user namespace made may belong to another user.
            logger.warning("cannot remove the remains of a killed build: %s", error)
    with atomic_output(destination) as directory:
        directory.mkdir()
        # Root of mmdebstrap's user namespace is another user, who must be able to pass.
        directory.parent.chmod(0o755)
        directory.chmod(0o755)
        yield directory
