# SPDX-License-Identifier: Apache-2.0
"""Runs inside nbdkit, around a plugin in Python, so that the plugin is measured.

nbdkit calls a plugin on threads that C has started, of which Python's own means to trace new
threads hear nothing. So each callback of the plugin first has its thread measured.

nbdkit is given this script; the plugin's path is in ``KCOV_BRIDGE_NBDKIT_PLUGIN``. The plugin runs
in the script's namespace, because nbdkit looks for callbacks in ``__main__``; so all names here
begin with an underscore. Only the standard library may be imported.
"""

import os as _os
import sys as _sys
from collections.abc import Callable as _Callable
from pathlib import Path as _Path
from typing import Any as _Any

_VARIABLE = "KCOV_BRIDGE_NBDKIT_PLUGIN"

_CALLBACKS = (
    *("thread_model", "dump_plugin", "config", "config_complete", "get_ready", "after_fork"),
    *("preconnect", "list_exports", "default_export", "open", "close", "unload", "cleanup"),
    *("export_description", "get_size", "block_size", "is_rotational", "can_multi_conn"),
    *("can_write", "can_flush", "can_trim", "can_zero", "can_fast_zero", "can_fua", "can_cache"),
    *("can_extents", "pread", "pwrite", "flush", "trim", "zero", "cache", "extents"),
)
"""Of nbdkit-python-plugin(3)."""


def _measuring() -> _Callable[[], None] | None:
    """Return what has this thread measured; None where nothing is."""
    for name in ("bridge.sources.python.hooks", "_kcov_bridge.hooks"):
        hooks = _sys.modules.get(name)
        if hooks is not None:
            join: _Callable[[], None] = hooks.MEASURING.join
            return join
    return None


def _measured(callback: _Callable[..., _Any], join: _Callable[[], None]) -> _Callable[..., _Any]:
    def call(*arguments: _Any) -> _Any:
        join()
        return callback(*arguments)

    return call


def _run() -> None:
    namespace = globals()
    path = _os.environ[_VARIABLE]
    namespace["__file__"] = path
    join = _measuring()
    if join is not None:
        join()
    exec(compile(_Path(path).read_bytes(), path, "exec"), namespace)
    for name in _CALLBACKS:
        callback = namespace.get(name)
        if callable(callback) and join is not None:
            namespace[name] = _measured(callback, join)


_run()
