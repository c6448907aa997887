# SPDX-License-Identifier: Apache-2.0
"""Reference kernels: built from Debian's source package, booted like the project's own image.

    python -m tests.system.reference [VARIANT ...]

builds them; no test does, for it takes minutes. All variants are one configuration,
``base.config`` on top of tinyconfig, and what makes the variant on top of that:

``kcov``
    with CONFIG_KCOV: the kernel's own device is ``/sys/kernel/debug/kcov``, and the bridge's, in
    the same guest, ``/sys/kernel/debug/kcov_bridge``;
``plain``
    the same without CONFIG_KCOV;
``debug``
    plain, with lockdep, KASAN, debugobjects and whatever else complains;
``nosmp``
    plain, for one processor: without CONFIG_SMP, which the others have.

Each has debug information in ``vmlinux.debug`` (and none in what boots) unless
``KCOV_BRIDGE_REFERENCE_DWARF`` is 0.

Layout below ``reference`` in the cache::

    linux-VERSION/source       the unpacked source package
    linux-VERSION/VARIANT      the build tree, in which modules are built too
    kernels/VARIANT-PRINT      what came out of it: vmlinux, vmlinux.debug, System.map, config, ...

A kernel's fingerprint is that of its configuration, the source package and the compiler. The image
around it, among the project's other images, has the agent and the module too; a change in them
takes seconds.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bridge.errors import ImageError, MissingDependencyError
from bridge.guest.images import Image
from bridge.guest.images import build as build_default
from bridge.guest.images.archive import Entry, read_tree, write_newc
from bridge.guest.images.builder import (
    _Base,
    _BuildRoot,
    _link,
    _make_keys,
    _new_directory,
    _recipe_lock,
    _write_json,
)
from bridge.guest.images.recipe import Sources
from bridge.guest.images.store import (
    FILES,
    MANIFEST,
    FileRecord,
    base_directory,
    image_directory,
    remove_tree,
    sha256_of,
)
from bridge.util.cache import cache_directory, lock_file, locked
from bridge.util.commands import Commands, Phases, Progress, disk_full, print_progress

__all__ = ["VARIANTS", "build"]

VARIANTS = ("kcov", "plain", "debug", "nosmp")

_FORMAT = 1
"""Version of what is made of a configuration; a new one makes every kernel be built anew."""

_HERE = Path(__file__).parent
_PACKAGE = "linux-source-6.1"
_ARCHIVE = Path("/usr/src") / f"{_PACKAGE}.tar.xz"
_PROGRAMS = {
    "make": "make",
    "gcc": "gcc",
    "bison": "bison",
    "flex": "flex",
    "bc": "bc",
    "xz": "xz-utils",
    "objcopy": "binutils",
}
_HEADERS = {"gelf.h": "libelf-dev", "openssl/opensslv.h": "libssl-dev"}
_ROOM = 8 << 30
"""Free space in bytes for sources, one build tree with debug information, and the products."""

_BOOTED = {"kcov": "vmlinux", "plain": "vmlinux", "debug": "vmlinuz", "nosmp": "vmlinux"}
"""What QEMU starts. Through the PVH entry of ``vmlinux`` a kernel with KASAN runs instrumented code
before there is shadow memory, and is reset; ``vmlinuz`` unpacks itself, at a random address."""

_OPTIONAL = ("CONFIG_KCOV_ENABLE_COMPARISONS=y",)
"""What an old compiler may lack."""

_BUILD_ENV = {
    "LC_ALL": "C",
    "LOCALVERSION": "",
    "KBUILD_BUILD_TIMESTAMP": "2023-01-01 00:00:00 +0000",
    "KBUILD_BUILD_USER": "kcov-bridge",
    "KBUILD_BUILD_HOST": "kcov-bridge",
    "KBUILD_BUILD_VERSION": "1",
}
"""Nothing of the machine where it is built gets into the kernel's version."""


@dataclass(frozen=True)
class _Kernel:
    """A built kernel: what came out, and the tree for its modules."""

    directory: Path
    tree: Path
    release: str
    version: str


def build(variant: str = "kcov", *, progress: Progress = print_progress) -> Image:
    """The image of a variant, built as far as it is not there.

    Its name in ``bridge.boot(image=...)`` boots it. Raises :class:`bridge.errors.ImageError` and
    :class:`bridge.errors.MissingDependencyError`.
    """
    if variant not in VARIANTS:
        raise ImageError(f"there is no reference kernel {variant!r}: {', '.join(VARIANTS)}")
    default = build_default(progress=progress)
    with locked(lock_file("reference"), "a reference kernel", progress) as fd:
        phases = Phases(progress)
        kernel = _kernel(variant, phases, fd)
        return _image(variant, kernel, default, phases, progress)


# -- the kernel ------------------------------------------------------------------------------


def _kernel(variant: str, phases: Phases, fd: int) -> _Kernel:
    """The kernel of a variant. The lock must be held."""
    _require()
    version = _output("dpkg-query", "--show", "--showformat=${Version}", _PACKAGE)
    compiler = _output("gcc", "--version").splitlines()[0]
    config = _configuration(variant)
    parts = (str(_FORMAT), version, compiler, config)
    fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    home = cache_directory() / "reference"
    work = home / f"linux-{version}"
    tree = work / variant
    products = home / "kernels" / f"{variant}-{fingerprint}"
    # The tree is the variant's, not the fingerprint's: make builds what a change asks for.
    stamp = tree / "fingerprint"
    if not (products.is_dir() and stamp.is_file() and stamp.read_text() == fingerprint):
        if shutil.disk_usage(cache_directory()).free < _ROOM:
            raise disk_full(cache_directory(), _ROOM)
        tree.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        commands = Commands(work / f"{variant}.log", phases, (fd,))
        commands.log.unlink(missing_ok=True)
        _unpack(work, commands)
        _compile(variant, work, config, commands)
        _publish(tree, products, commands)
        stamp.write_text(fingerprint)
    release = (tree / "include" / "config" / "kernel.release").read_text().strip()
    return _Kernel(products, tree, release, version)


def _configuration(variant: str) -> str:
    names = ["base", variant]
    if variant != "nosmp":
        names.append("smp")
    if os.environ.get("KCOV_BRIDGE_REFERENCE_DWARF", "1") != "0":
        names.append("dwarf")
    return "".join((_HERE / f"{name}.config").read_text(encoding="utf-8") for name in names)


def _require() -> None:
    missing = [package for program, package in _PROGRAMS.items() if not shutil.which(program)]
    for header, package in _HEADERS.items():
        look = subprocess.run(
            ["gcc", "-E", "-x", "c", "-"],
            input=f"#include <{header}>\n",
            text=True,
            capture_output=True,
        ) if shutil.which("gcc") else None  # fmt: skip
        if look is None or look.returncode:
            missing.append(package)
    if not _ARCHIVE.is_file() or not shutil.which("dpkg-query"):
        missing.append(_PACKAGE)
    if missing:
        raise MissingDependencyError(
            f"building a reference kernel needs: {', '.join(missing)}",
            hint=f"on Debian 12: apt-get install {' '.join(missing)}",
        )


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ImageError(f"{command[0]} does not say what is needed: {error}") from error


def _unpack(work: Path, commands: Commands) -> None:
    source = work / "source"
    if source.is_dir():
        return
    commands.phases.begin(f"unpacking {_ARCHIVE.name}")
    with tempfile.TemporaryDirectory(prefix=".source-", dir=work) as temporary:
        commands.run(
            ["tar", "--extract", "--file", str(_ARCHIVE), "--directory", temporary],
            what="unpacking the kernel's source",
        )
        (top,) = Path(temporary).iterdir()
        top.rename(source)


def _make(work: Path, variant: str, *targets: str) -> list[str]:
    jobs = f"-j{os.cpu_count() or 1}"
    tree = f"O={work / variant}"
    return ["nice", "-n", "10", "make", "-C", str(work / "source"), tree, jobs, *targets]


def _compile(variant: str, work: Path, config: str, commands: Commands) -> None:
    environment = {**os.environ, **_BUILD_ENV}
    # make hands these down to a make below it; they are not meant for the kernel's.
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "OUT", "ARGS", "VENV", "PYTHON"):
        environment.pop(name, None)
    commands.phases.begin(f"configuring the kernel {variant}")
    result = work / variant / ".config"
    commands.run(_make(work, variant, "tinyconfig"), what="tinyconfig", env=environment)
    with result.open("a", encoding="utf-8") as file:
        file.write(config)
    commands.run(_make(work, variant, "olddefconfig"), what="olddefconfig", env=environment)
    _check_configuration(config, result.read_text(encoding="utf-8"))
    commands.phases.begin(f"compiling the kernel {variant} (many minutes)")
    commands.run(
        _make(work, variant, "bzImage", "modules"), what="compiling the kernel", env=environment
    )


def _check_configuration(wanted: str, got: str) -> None:
    """Kconfig drops in silence what lacks something else."""
    lines = set(got.splitlines())
    lost = []
    for line in wanted.splitlines():
        if line.startswith("CONFIG_"):
            if line not in lines and line not in _OPTIONAL:
                lost.append(line)
        elif line.startswith("# CONFIG_"):
            name = line.split()[1]
            if any(other.startswith(f"{name}=") for other in lines):
                lost.append(line)
    if lost:
        raise ImageError("the kernel cannot be configured as asked", evidence="\n".join(lost))


def _publish(tree: Path, products: Path, commands: Commands) -> None:
    """Keeps a copy of what came out, so that the tree may go on to another configuration."""
    products.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=products.parent) as name:
        temporary = Path(name) / "kernel"
        temporary.mkdir()
        shutil.copyfile(tree / "vmlinux", temporary / "vmlinux.debug")
        shutil.copyfile(tree / "System.map", temporary / "System.map")
        shutil.copyfile(tree / ".config", temporary / "config")
        shutil.copyfile(tree / "arch" / "x86" / "boot" / "bzImage", temporary / "vmlinuz")
        for part in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
            shutil.copyfile(tree / part, temporary / part)
        commands.run(
            [
                *("objcopy", "--strip-debug"),
                *(str(temporary / "vmlinux.debug"), str(temporary / "vmlinux")),
            ],
            what="stripping the kernel",
        )
        (temporary / "vmlinux").chmod(0o644)
        if products.exists():
            remove_tree(products)
        temporary.rename(products)


# -- the image -------------------------------------------------------------------------------


def _image(
    variant: str, kernel: _Kernel, default: Image, phases: Phases, progress: Progress
) -> Image:
    """The kernel with the default image's root and with agent and module. The lock must be held."""
    sources = Sources.find()
    agent_fingerprint = sources.agent_fingerprint()
    booted = _BOOTED[variant]
    parts = (kernel.directory.name, booted, default.base_fingerprint, agent_fingerprint)
    fingerprint = hashlib.sha256("+".join(parts).encode()).hexdigest()[:12]
    directory = image_directory(f"reference-{variant}-{fingerprint}")
    try:
        image = Image.load(directory)
        image.check()
        return image
    except ImageError:
        pass
    base = _Base.load(
        base_directory(default.recipe, default.base_fingerprint), default.base_fingerprint
    )
    if base is None:
        raise ImageError(
            f"the build root of the image {default.name} is gone",
            hint="build the image again: kcov-bridge image build --force",
        )
    with (
        _recipe_lock(default.recipe, progress) as fd,
        tempfile.TemporaryDirectory(prefix="kcov-bridge-") as name,
        _new_directory(directory) as temporary,
    ):
        commands = Commands(temporary / "build.log", phases, (fd,))
        phases.begin(f"compiling the module and the agent for the kernel {variant}")
        module = _module(sources, kernel, Path(name), commands)
        shutil.copyfile(module, temporary / "kcov_bridge.ko")
        layer = _layer(sources, kernel, module, _BuildRoot(base.build_root, commands))
        _link(base.directory / "root.squashfs", temporary / "root.squashfs")
        _link(kernel.directory / booted, temporary / "vmlinux")
        for product in ("vmlinux.debug", "vmlinuz", "System.map", "config"):
            _link(kernel.directory / product, temporary / product)
        keys = _make_keys(temporary)
        (temporary / "initrd.img").touch(mode=0o600)  # the host's private key is in it
        # Drivers are built in. The agent knows an initramfs by its list of modules.
        boot = [Entry.directory(path) for path in ("dev", "modules", "proc", "sys")]
        boot.append(Entry.file("modules/load", b""))
        with (temporary / "initrd.img").open("wb") as initrd:
            for entries in (boot, layer, keys):
                write_newc(initrd, entries)
        image = Image(
            directory=directory,
            recipe=default.recipe,
            suite=default.suite,
            fingerprint=fingerprint,
            base_fingerprint=default.base_fingerprint,
            agent_fingerprint=agent_fingerprint,
            kernel_release=kernel.release,
            kernel_version=kernel.version,
            include=(),
            modules=(),
            packages=base.packages,
            files={
                name: FileRecord((temporary / name).stat().st_size, sha256_of(temporary / name))
                for name in FILES
            },
        )
        _write_json(temporary / MANIFEST, image.manifest())
    progress(f"{image.name} is ready: kernel {image.kernel_release}, {phases.elapsed:.0f} s")
    return image


def _module(sources: Sources, kernel: _Kernel, scratch: Path, commands: Commands) -> Path:
    """Compiles the module with the compiler that the kernel was compiled with: the host's."""
    work = scratch / "module"
    work.mkdir()
    for name, path in sources.agent_files():
        if name.startswith("module/"):
            shutil.copyfile(path, scratch / name)
    commands.run(
        ["nice", "-n", "10", "make", "-C", str(kernel.tree), f"M={work}", "modules"],
        what="compiling the module",
        env={**os.environ, "MAKEFLAGS": "", **_BUILD_ENV},
    )
    module = work / "kcov_bridge.ko"
    commands.run(["objcopy", "--strip-debug", str(module)], what="stripping the module")
    return module


def _layer(sources: Sources, kernel: _Kernel, module: Path, build_root: _BuildRoot) -> list[Entry]:
    """What goes over the root: the agent, the module, and what tells modprobe what is built in."""
    with build_root.workspace() as work:
        for name, path in sources.agent_files():
            (work / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, work / name)
        build_root.run(
            ["make", "-C", "/work/agent", "install", "OUT=.", "DESTDIR=/work/layer"],
            what="compiling the agent",
        )
        tree = work / "tree" / "lib" / "modules" / kernel.release
        (tree / "extra").mkdir(parents=True)
        shutil.copyfile(module, tree / "extra" / "kcov_bridge.ko")
        for part in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
            shutil.copyfile(kernel.directory / part, tree / part)
        build_root.run(["depmod", "-b", "/work/tree", kernel.release], what="depmod")
        entries = read_tree(work / "layer", "layer/")
        entries += read_tree(tree, f"layer/usr/lib/modules/{kernel.release}/")
    return [*entries, Entry.link("init", "layer/usr/sbin/kcov-init")]
