# SPDX-License-Identifier: Apache-2.0
"""Measures a Python program that a target has started; see ../hooks.py.

It comes first on PYTHONPATH, takes itself off ``sys.path`` again, and runs the ``sitecustomize``
that would have run without it. What goes wrong here reaches the source, not the program.
"""

import contextlib
import os
import sys
import types
from importlib import import_module
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path


def _begin() -> None:
    lines = os.environ.get("KCOV_BRIDGE_LINES")
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    if not lines or sys.version_info < (3, 11):
        return

    project = here.parents[3]
    spec = PathFinder.find_spec("bridge")
    if spec is None or spec.origin == str(project / "bridge" / "__init__.py"):
        # By its name, for the program may import it too, and there must be one of it.
        sys.path.insert(0, str(project))
        try:
            hooks = import_module("bridge.sources.python.hooks")
        finally:
            sys.path.remove(str(project))
    else:
        # The program has another module of that name.
        package = types.ModuleType("_kcov_bridge")
        package.__path__ = [str(here.parent)]
        sys.modules["_kcov_bridge"] = package
        hooks = import_module("_kcov_bridge.hooks")
    hooks.attach(lines)


def _go_on() -> None:
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None and spec.origin != __file__:
        module = sys.modules[__name__]
        module.__spec__, module.__file__ = spec, spec.origin
        spec.loader.exec_module(module)


def _tell(error: BaseException) -> None:
    """Note in the sources' memories that this program is not measured."""
    # By its path: what the program has put in the place of other modules may be the reason.
    path = str(Path(__file__).resolve().parents[1] / "faults.py")
    faults = types.ModuleType("faults")
    SourceFileLoader("faults", path).exec_module(faults)
    text = f"a program is not measured: {faults.describe(error)}"
    for memory in os.environ["KCOV_BRIDGE_LINES"].split(os.pathsep):
        faults.note_in(memory, text)


try:
    _begin()
except BaseException as failure:
    # The source may have ended, or be out of reach.
    with contextlib.suppress(BaseException):
        _tell(failure)
_go_on()
