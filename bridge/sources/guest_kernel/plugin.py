# SPDX-License-Identifier: Apache-2.0
"""The plugin's shared object: compiled for this machine when it is first needed, then cached."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bridge.errors import InfrastructureError, UnwatchableError
from bridge.util.compile import CProgram

__all__ = ["PLUGIN", "build_plugin", "why_not_loaded"]

_HERE = Path(__file__).parent / "tcg"
PLUGIN = CProgram(
    name="the plugin for QEMU",
    source=_HERE / "kcov_tcg.c",
    includes=(_HERE / "plan.h", _HERE / "qemu_plugin_api.h"),
    flags=(
        *("-shared", "-fPIC", "-O2", "-g", "-std=gnu11"),
        *("-Wall", "-Wextra", "-fvisibility=hidden"),
    ),
    folder="plugins",
    suffix=".so",
)
"""It fits every QEMU from 7.2 on: it finds out at load time which plugin API it meets."""

_GREETING = "kcov_tcg: the bridge starts it"
"""What the plugin answers to a QEMU that was not told where the plan is: it was loaded."""

_PROBE_SECONDS = 30.0

_SOURCE_REMEDY = "or leave the guest kernel out: --source python"


def build_plugin(spare: Path | None = None) -> Path:
    """Return the compiled plugin, from the cache if it is there.

    Args:
        spare: see :meth:`bridge.util.compile.CProgram.build`.

    Raises:
        UnwatchableError: it cannot be compiled, or not be kept; the guest kernel can be left out.
    """
    try:
        return PLUGIN.build(spare)
    except InfrastructureError as error:
        raise UnwatchableError(
            error.message,
            evidence=error.evidence,
            hint=", ".join(filter(None, [error.hint, _SOURCE_REMEDY])),
        ) from error


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
