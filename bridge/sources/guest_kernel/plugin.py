# SPDX-License-Identifier: Apache-2.0
"""The plugin's shared object: compiled for this machine when it is first needed, then cached."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from bridge.errors import BridgeError, InfrastructureError, UnwatchableError
from bridge.util.cache import cache_directory, cache_folder
from bridge.util.compile import CProgram
from bridge.util.files import atomic_output

__all__ = ["PLUGIN", "build_plugin", "why_not_loaded"]

_HERE = Path(__file__).parent / "tcg"
PLUGIN = CProgram(
    name="the plugin for QEMU",
    source=_HERE / "kcov_tcg.c",
    includes=(_HERE / "plan.h", _HERE / "qemu_plugin_api.h", _HERE / "qemu_plugin_version.h"),
    flags=(
        *("-shared", "-fPIC", "-O2", "-g", "-std=gnu11"),
        *("-Wall", "-Wextra", "-fvisibility=hidden"),
    ),
    folder="plugins",
    suffix=".so",
)
"""The source; it supports each version of the plugin API from 1 on, detected at load time."""

_NEWEST_API = 7
"""The newest version of the plugin API whose callbacks the plugin supports."""

_TOO_OLD = re.compile(r"supports only a minimum version of (\d+)")
"""Error of ``plugin_load`` in QEMU's ``plugins/loader.c`` for a plugin with an older API."""

_GREETING = "kcov_tcg: plan=FD,region=FD is missing"
"""The plugin's error without a plan; it shows that QEMU loaded the plugin."""

_PROBE_SECONDS = 30.0

_SOURCE_REMEDY = "or leave the guest kernel out: --source python"


def build_plugin(
    qemu: str,
    spare: Path | None = None,
    *,
    program: CProgram = PLUGIN,
    greeting: str = _GREETING,
) -> Path:
    """Return the plugin that this QEMU loads, from the cache if it is there.

    If this QEMU loads none, :func:`why_not_loaded` gives the reason.

    Args:
        qemu: the program.
        spare: see :meth:`bridge.util.compile.CProgram.build`.
        program: the plugin's source.
        greeting: as for :func:`why_not_loaded`.

    Raises:
        UnwatchableError: it cannot be compiled, or not be kept; the guest kernel can be left out.
    """
    try:
        plugin = program.build(spare)
        too_old = _TOO_OLD.search(why_not_loaded(qemu, plugin, greeting) or "")
        if too_old is None or int(too_old[1]) > _NEWEST_API:
            return plugin
        flags = (*program.flags, f"-DPLUGIN_API={too_old[1]}")
        return replace(program, flags=flags).build(spare)
    except InfrastructureError as error:
        raise UnwatchableError(
            error.message,
            evidence=error.evidence,
            hint=", ".join(filter(None, [error.hint, _SOURCE_REMEDY])),
        ) from error


def why_not_loaded(qemu: str, plugin: Path, greeting: str = _GREETING) -> str | None:
    """Return QEMU's own reason for not loading the plugin; None if it loads it.

    The cache keeps an answer that depends on the two files alone.

    Args:
        greeting: the plugin's error without arguments.
    """
    answer = _answer_file(qemu, plugin)
    if answer is not None:
        with contextlib.suppress(OSError, UnicodeError):
            return answer.read_text(encoding="utf-8") or None
    why = _try(qemu, plugin, greeting)
    if answer is not None and (why is None or _TOO_OLD.search(why)):
        # A cache that cannot be written keeps no answer; QEMU is asked again next time.
        with contextlib.suppress(OSError, BridgeError):
            cache_folder(PLUGIN.folder)
            with atomic_output(answer) as part:
                part.write_text(why or "", encoding="utf-8")
    return why


def _answer_file(qemu: str, plugin: Path) -> Path | None:
    """Return where the cache has the answer for these files; None if the plugin is not in it."""
    program = shutil.which(qemu)
    if program is None or plugin.parent != cache_directory() / PLUGIN.folder:
        return None
    digest = hashlib.sha256()
    try:
        for path in (Path(program).resolve(), plugin.resolve()):
            status = path.stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    except OSError:
        return None
    return cache_directory() / PLUGIN.folder / f"loads-{digest.hexdigest()[:16]}"


def _try(qemu: str, plugin: Path, greeting: str) -> str | None:
    """Have QEMU load the plugin."""
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
    if greeting in done.stderr:
        return None
    return done.stderr.strip().partition("\n")[0] or f"it ends with status {done.returncode}"
