# SPDX-License-Identifier: Apache-2.0
"""``kcov-bridge doctor``: each thing that the bridge needs, found or not, and how to get it.

With ``--json`` it prints one object: ``format`` (``"kcov-bridge-doctor"``), ``version`` (1), ``ok``
(nothing required is missing) and ``checks``, whose items are the fields of :class:`Check`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from bridge.cli.arguments import add_settings, settings_of
from bridge.config import Settings
from bridge.device import fastpath
from bridge.errors import BridgeError, MissingDependencyError
from bridge.fuzz.engine import find_engine
from bridge.guest import images
from bridge.guest.images.recipe import DEFAULT_RECIPE, is_recipe
from bridge.guest.images.store import resolve
from bridge.sources.guest_kernel.plugin import build_plugin, why_not_loaded
from bridge.sources.python import tracer
from bridge.util.cache import CACHE_VARIABLE, cache_can_be_written, cache_directory
from bridge.util.packages import apt_line, debian_packages, found
from bridge.vm.accel import choose_accelerator, why_not_kvm

__all__ = ["DESCRIPTION", "EPILOG", "Check", "add_arguments", "diagnose", "render", "run"]

DESCRIPTION = """\
Check everything that a run with these settings needs, and say how to get what is missing.
"""

EPILOG = """\
examples:
  kcov-bridge doctor
  kcov-bridge doctor --source kernel --accel tcg
  kcov-bridge doctor --json | jq '.checks[] | select(.found | not)'

`kcov-bridge setup` installs the Debian packages that are missing. The exit status is 0 if
nothing required is missing, else 1.
"""

_FORMAT = "kcov-bridge-doctor"
_VERSION = 1

_QEMU_OWN_MIB = 300
"""What QEMU takes beside the guest's memory, mostly translated code: with QEMU 7.2 under TCG 200
after the default workload, and growing with the code that runs."""

_BUILD_MIB = 2048
"""Room that building an image takes, the build root with compiler and headers included."""

_PROBE_SECONDS = 30.0

_QEMU_DEVICE = "ivshmem-doorbell"

_COMPILER = frozenset({"gcc", "libc6-dev"})


@dataclass(frozen=True)
class Check:
    """One thing that a run needs or can use."""

    name: str
    required: bool
    found: bool
    detail: str
    """What was found, or why it will not do."""
    remedy: str = ""
    """How to get it; empty where it is there."""


def _output(*command: str) -> str | None:
    """Return what a program prints; None if it does not run, fails or hangs."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _platform() -> Iterator[Check]:
    found = f"{platform.system()} on {platform.machine()}"
    fits = found == "Linux on x86_64"
    yield Check("system", True, fits, found, "" if fits else "use Linux on x86_64")


def _python() -> Iterator[Check]:
    detail = ".".join(map(str, sys.version_info[:3]))
    yield Check(
        "Python",
        True,
        sys.version_info >= (3, 11),
        detail,
        "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer",
    )
    try:
        lines = importlib.metadata.requires("kcov-bridge") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            "kcov-bridge", True, False, "is not installed in this Python", "pip install kcov-bridge"
        )
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = f"Python package {requirement.name}"
        remedy = f"pip install '{requirement}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, True, False, "is not installed", remedy)
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        detail = version if fits else f"{version} is there, {requirement.specifier} is needed"
        yield Check(name, True, fits, detail, "" if fits else remedy)


def _compiled() -> Iterator[Check]:
    """Check for the compiled parts; without them a signal and the target take longer."""
    remedy = f"{apt_line('gcc', 'python3-dev')}, then pip install kcov-bridge once more"
    if os.environ.get(fastpath.PLAIN_VARIABLE, "0") not in ("", "0"):
        remedy = f"unset {fastpath.PLAIN_VARIABLE}"
    for name, why_plain in (
        ("compiled fastpath", fastpath.WHY_PLAIN),
        ("compiled tracer", tracer.WHY_PLAIN),
    ):
        if why_plain:
            yield Check(name, False, False, f"not used: {why_plain}", remedy)
        else:
            yield Check(name, False, True, "is used")


def _qemu(settings: Settings) -> Iterator[Check]:
    path = shutil.which(settings.qemu)
    remedy = apt_line("qemu-system-x86")
    if path is None:
        yield Check("QEMU", True, False, f"{settings.qemu} is not found", remedy)
        return
    banner = _output(path, "--version")
    if banner is None:
        yield Check("QEMU", True, False, f"{path} --version fails", remedy)
        return
    match = re.search(r"version (\S+)", banner)
    yield Check("QEMU", True, True, f"{match.group(1) if match else banner.strip()}, {path}")
    # The device rather than the version: a build may leave it out.
    devices = _output(path, "-device", "help") or ""
    there = f'"{_QEMU_DEVICE}"' in devices
    yield Check(
        f"QEMU's {_QEMU_DEVICE}",
        True,
        there,
        "in this QEMU" if there else f"not in {path}",
        "" if there else "use a QEMU that is built with it, as Debian's is: --qemu PROGRAM",
    )


def _kernel(settings: Settings) -> Iterator[Check]:
    """Check that the guest kernel can be watched: compiler, QEMU with plugins, TCG."""
    name = "guest kernel's coverage"
    required = settings.source in ("kernel", "kernel,python", "python,kernel")
    qemu = shutil.which(settings.qemu)
    try:
        accelerator = choose_accelerator(settings.accel).name
        with tempfile.TemporaryDirectory(prefix="kcov-bridge-") as directory:
            # As a run would find it: with a cache that cannot be written it makes none.
            spare = Path(directory) if cache_can_be_written() else None
            plugin = build_plugin(settings.qemu, spare)
            why = why_not_loaded(qemu, plugin) if qemu else f"{settings.qemu} is not found"
    except BridgeError as error:
        yield Check(name, required, False, error.message, error.hint)
        return
    if why is not None:
        detail = f"this QEMU does not load the plugin: {why}"
        remedy = "use a QEMU with TCG plugins, as Debian's is: --qemu PROGRAM"
        yield Check(name, required, False, detail, remedy)
    elif accelerator != "tcg":
        yield Check(name, required, False, "KVM hides the guest's code", "--accel tcg shows it")
    else:
        yield Check(name, required, True, "works under TCG")


def _accelerator(settings: Settings) -> Iterator[Check]:
    try:
        chosen = choose_accelerator(settings.accel)
    except BridgeError as error:
        yield Check("accelerator", True, False, error.message, error.hint)
    else:
        yield Check("accelerator", True, True, f"{chosen.name}: {chosen.reason}")
    obstacle = why_not_kvm()
    if obstacle is None:
        yield Check("KVM", False, True, "can boot a stock kernel")
    else:
        yield Check("KVM", False, False, f"{obstacle[0]} (TCG is slower)", obstacle[1])


def _guest_image(settings: Settings) -> tuple[Check, bool]:
    """Check the image that a run would boot; also say whether a run would build it first."""
    name = "guest image"
    wanted = settings.image or DEFAULT_RECIPE
    build = "kcov-bridge image build"
    try:
        recipe = settings.ssh_key is None and is_recipe(wanted)
        image = images.find(wanted) if recipe else None
    except BridgeError as error:
        return Check(name, True, False, error.message, build), True
    if image is not None:
        return Check(name, True, True, str(image.directory)), False
    if recipe:
        how = f"{build} (run does it by itself)"
        return Check(name, False, False, "not built yet, or older than its sources", how), True
    path = Path(wanted)
    if settings.ssh_key is None and not path.is_file():
        try:
            return Check(name, True, True, str(resolve(wanted))), False
        except BridgeError as error:
            return Check(name, True, False, error.message, "kcov-bridge image list"), False
    for what, file in (("disk image", path), ("SSH key", settings.ssh_key)):
        if file is None or not file.is_file():
            how = "a disk image of your own comes with its key: --image FILE --ssh-key FILE"
            return Check(
                name,
                True,
                False,
                f"the {what} {file} does not exist" if file else f"no {what} is given",
                how,
            ), False
    return Check(name, True, True, str(path)), False


def _image(settings: Settings) -> Iterator[Check]:
    check, to_build = _guest_image(settings)
    yield check
    for package in debian_packages("run") + debian_packages("user"):
        if package.name.startswith("qemu-"):
            continue
        there = found(package.probe)
        yield Check(
            package.name,
            # What watches the kernel has a check of its own, and a run does without.
            to_build
            and package.name not in _COMPILER
            and not (package.purpose == "user" and os.geteuid() == 0),
            there is not None,
            there or f"is missing; it {package.what_for}",
            "" if there else apt_line(package.name),
        )
    yield from _cache(to_build)


def _cache(to_build: bool) -> Iterator[Check]:
    """Whether the cache can be written, and has room for an image."""
    cache = cache_directory()
    writable = cache_can_be_written()
    yield Check(
        "cache",
        to_build,
        writable,
        str(cache)
        if writable
        else f"{cache} cannot be written: what it holds is used, what it lacks is left out",
        "" if writable else f"make it writable, or set {CACHE_VARIABLE} to another directory",
    )
    existing = cache
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free >> 20
    enough = free >= _BUILD_MIB
    yield Check(
        "disk",
        to_build,
        enough,
        f"{free} MiB free for {cache}",
        "" if enough else f"free {_BUILD_MIB} MiB there, or set {CACHE_VARIABLE} to another place",
    )


def _memory(settings: Settings) -> Iterator[Check]:
    # Not the region: of that, only what kcov areas use is ever taken.
    needed = settings.memory + _QEMU_OWN_MIB
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    available = int(match.group(1)) >> 10 if match else 0
    enough = available >= needed
    yield Check(
        "memory",
        True,
        enough,
        f"{available} MiB available, a run takes {needed} MiB and what its kcov areas use",
        "" if enough else "free some, or take less: --memory MIB",
    )
    try:
        os.close(os.memfd_create("kcov-bridge-doctor", os.MFD_CLOEXEC))
    except OSError as error:
        why = f"memfd_create: {error.strerror}"
        yield Check("memfd", True, False, why, "the sandbox around it must allow it")
    else:
        yield Check("memfd", True, True, "works")


def _engine() -> Iterator[Check]:
    """Check for the engine of ``kcov-bridge fuzz``, which nothing else needs."""
    try:
        engine = find_engine()
    except MissingDependencyError as error:
        yield Check("AFL++", False, False, f"{error.message} (for fuzz)", error.hint)
        return
    yield Check("AFL++", False, True, f"{engine.version} (for fuzz), {engine.program}")


def diagnose(settings: Settings) -> tuple[Check, ...]:
    """Look for everything that a run with these settings needs."""
    parts: tuple[Callable[[], Iterator[Check]], ...] = (
        _platform,
        _python,
        _compiled,
        lambda: _qemu(settings),
        lambda: _accelerator(settings),
        lambda: _kernel(settings),
        lambda: _memory(settings),
        lambda: _image(settings),
        _engine,
    )
    return tuple(check for part in parts for check in part())


def render(checks: tuple[Check, ...]) -> str:
    """Render the checks for people; no trailing newline."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        mark = "ok" if check.found else "MISSING" if check.required else "no"
        lines.append(f"{mark:>7}  {check.name:<{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':>7}  {'':<{width}}  -> {check.remedy}")
    missing = sum(check.required and not check.found for check in checks)
    lines.append("")
    lines.append(
        "nothing required is missing" if not missing else f"{missing} required, and missing"
    )
    if any(check.required and not check.found and "apt-get" in check.remedy for check in checks):
        lines.append("`kcov-bridge setup` installs the Debian packages that are missing")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command and the settings that count for it."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_settings(parser, ("qemu", "accel", "source", "image", "ssh_key", "memory", "region"))


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis to stdout; return 0 if nothing required is missing, else 1."""
    checks = diagnose(settings_of(args))
    ok = all(check.found for check in checks if check.required)
    if args.json:
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "ok": ok,
            "checks": [dataclasses.asdict(check) for check in checks],
        }
        print(json.dumps(document, indent=2))
    else:
        print(render(checks))
    return 0 if ok else 1
