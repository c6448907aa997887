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

from bridge.errors import MissingDependencyError, SourceError
from bridge.image.store import cache_directory

__all__ = ["build_plugin"]

_HERE = Path(__file__).parent / "tcg"
_SOURCES = ("kcov_tcg.c", "plan.h", "qemu_plugin_api.h")
_FLAGS = ("-shared", "-fPIC", "-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden")


def build_plugin(*, werror: bool = False) -> Path:
    """The compiled plugin, from the cache if its sources and the compiler are the same.

    It fits every QEMU from 7.2 on: it finds out at load time which version of the plugin API it
    meets. Raises :class:`bridge.errors.MissingDependencyError` without a C compiler and
    :class:`bridge.errors.SourceError` with the compiler's messages.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise MissingDependencyError(
            "the guest kernel's coverage needs a C compiler, to build its plugin for QEMU",
            hint="install gcc and libc6-dev, or ask for --source python",
        )
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(version + " ".join(_FLAGS).encode())
    for name in _SOURCES:
        digest.update((_HERE / name).read_bytes())
    directory = cache_directory() / "plugins"
    plugin = directory / f"kcov_tcg-{digest.hexdigest()[:12]}.so"
    if plugin.is_file() and not werror:
        return plugin
    directory.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".kcov_tcg-", suffix=".so", dir=directory)
    os.close(handle)
    try:
        flags = [*_FLAGS, *(["-Werror"] if werror else [])]
        command = [compiler, *flags, "-o", temporary, str(_HERE / _SOURCES[0])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SourceError("the plugin for QEMU does not compile", evidence=done.stderr)
        Path(temporary).replace(plugin)
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
    return plugin
