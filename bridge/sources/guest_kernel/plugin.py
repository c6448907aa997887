# SPDX-License-Identifier: Apache-2.0
"""The plugin's shared object: compiled for this machine when it is first needed, then cached."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from bridge.errors import UnwatchableError
from bridge.guest.images.store import cache_directory

__all__ = ["build_plugin", "why_not_loaded"]

_HERE = Path(__file__).parent / "tcg"
_SOURCES = ("kcov_tcg.c", "plan.h", "qemu_plugin_api.h")
_GREETING = "kcov_tcg: the bridge starts it"
"""What the plugin answers to a QEMU that was not told where the plan is: it was loaded."""

_PROBE_SECONDS = 30.0

_REMEDY = "install gcc and libc6-dev, or ask for --source python"
_FLAGS = ("-shared", "-fPIC", "-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden")


def build_plugin(*, werror: bool = False, spare: Path | None = None) -> Path:
    """The compiled plugin, from the cache if its sources and the compiler are the same.

    It fits every QEMU from 7.2 on: it finds out at load time which version of the plugin API it
    meets. ``spare`` is a directory for one that is not in the cache, which is left alone then.
    Raises :class:`bridge.errors.UnwatchableError` without a C compiler, and with the
    messages of one that does not do.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise UnwatchableError(
            "the guest kernel's coverage needs a C compiler, to build its plugin for QEMU",
            hint=_REMEDY,
        )
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(version + " ".join(_FLAGS).encode())
    for name in _SOURCES:
        digest.update((_HERE / name).read_bytes())
    directory = cache_directory() / "plugins"
    plugin = directory / f"kcov_tcg-{digest.hexdigest()[:12]}.so"
    if plugin.is_file() and not werror:
        return plugin
    if spare is not None:
        directory, plugin = spare, spare / plugin.name
    directory.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".kcov_tcg-", suffix=".so", dir=directory)
    os.close(handle)
    try:
        flags = [*_FLAGS, *(["-Werror"] if werror else [])]
        command = [compiler, *flags, "-o", temporary, str(_HERE / _SOURCES[0])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnwatchableError(
                "the plugin for QEMU does not compile", evidence=done.stderr, hint=_REMEDY
            )
        Path(temporary).replace(plugin)
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
    return plugin


def why_not_loaded(qemu: str, plugin: Path) -> str | None:
    """What keeps this QEMU from loading the plugin, in its own words; None when nothing does."""
    machine = ("-machine", "none", "-nodefaults", "-display", "none")
    try:
        done = subprocess.run(
            [qemu, *machine, "-plugin", f"file={str(plugin).replace(',', ',,')}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if _GREETING in done.stderr:
        return None
    return done.stderr.strip().partition("\n")[0] or f"it ends with status {done.returncode}"
