# SPDX-License-Identifier: Apache-2.0
"""kcov for virtual machines that run stock kernels, filled with the coverage of the host code that
serves them.

As a library::

    import bridge

    with bridge.boot() as guest:
        result = guest.kcov(["cat", "/mnt/target/README"])
        for pc in result.pcs:
            print(hex(pc), guest.symbolize(pc))

A name of ``__all__`` is imported when it is first used, so ``import bridge`` is cheap.
"""

from __future__ import annotations

import importlib
import os

# Of this name type checkers know what it means. The module typing takes as long to import as all
# else here, and the command wants Ctrl-C to work soon.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from bridge.config import Settings
    from bridge.errors import (
        BootTimeoutError,
        BridgeError,
        DoorbellError,
        GuestLostError,
        GuestPanicError,
        GuestPoweredOffError,
        GuestResetError,
        GuestSetupError,
        GuestStoppedError,
        ImageError,
        IncompleteError,
        InfrastructureError,
        KernelUnknownError,
        MissingDependencyError,
        QemuError,
        RegionError,
        RunTimeoutError,
        SourceError,
        TargetError,
        UnwatchableError,
        UsageError,
    )
    from bridge.guest.guest import CommandResult
    from bridge.session.events import Event
    from bridge.session.executor import KcovResult
    from bridge.session.pool import Pool
    from bridge.session.session import Session
    from bridge.session.stats import Stats
    from bridge.sources.pcs import Location
    from bridge.targets import (
        BlockDevice,
        Endpoint,
        GuestFile,
        QemuDevice,
        SerialPort,
        Target,
        Tpm,
        UdpEndpoint,
        UnixEndpoint,
        VhostUserFs,
        VirtioPort,
    )
    from bridge.trace.call import Call

    __version__: str

__all__ = [
    "BlockDevice",
    "BootTimeoutError",
    "BridgeError",
    "Call",
    "CommandResult",
    "DoorbellError",
    "Endpoint",
    "Event",
    "GuestFile",
    "GuestLostError",
    "GuestPanicError",
    "GuestPoweredOffError",
    "GuestResetError",
    "GuestSetupError",
    "GuestStoppedError",
    "ImageError",
    "IncompleteError",
    "InfrastructureError",
    "KcovResult",
    "KernelUnknownError",
    "Location",
    "MissingDependencyError",
    "Pool",
    "QemuDevice",
    "QemuError",
    "RegionError",
    "RunTimeoutError",
    "SerialPort",
    "Session",
    "Settings",
    "SourceError",
    "Stats",
    "Target",
    "TargetError",
    "Tpm",
    "UdpEndpoint",
    "UnixEndpoint",
    "UnwatchableError",
    "UsageError",
    "VhostUserFs",
    "VirtioPort",
    "__version__",
    "boot",
]  # fmt: skip

_MODULES = {
    "BlockDevice": "bridge.targets",
    "Call": "bridge.trace.call",
    "CommandResult": "bridge.guest.guest",
    "Endpoint": "bridge.targets",
    "GuestFile": "bridge.targets",
    "QemuDevice": "bridge.targets",
    "SerialPort": "bridge.targets",
    "UdpEndpoint": "bridge.targets",
    "Tpm": "bridge.targets",
    "UnixEndpoint": "bridge.targets",
    "VhostUserFs": "bridge.targets",
    "VirtioPort": "bridge.targets",
    "Event": "bridge.session.events",
    "KcovResult": "bridge.session.executor",
    "Location": "bridge.sources.pcs",
    "Pool": "bridge.session.pool",
    "Session": "bridge.session.session",
    "Settings": "bridge.config",
    "Stats": "bridge.session.stats",
    "Target": "bridge.targets",
}
"""Where the names of ``__all__`` are defined; all others are errors."""


def boot(out: str | os.PathLike[str] | None = None, **settings: Any) -> Session:
    """Return a guest with its target and its kcov device, for a ``with`` statement.

    Args:
        out: directory for ``console.log``, ``.coverage`` and ``blocks.tsv``; None for nowhere.
        settings: those of :class:`bridge.Settings`, over the environment and the settings file.

    Raises:
        BridgeError: what failed, most of it on entering.
    """
    from bridge import config
    from bridge.session.session import Session

    return Session(config.load(settings), out)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # Defined in pyproject.toml, and by that in what is installed.
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("kcov-bridge")
        except PackageNotFoundError:
            return "(not installed)"
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES.get(name, "bridge.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
