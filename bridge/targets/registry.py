# SPDX-License-Identifier: Apache-2.0
"""Targets by name: built-in ones, and your own as ``module:Class``.

A target of your own is a class, or any callable, in a module that Python finds; the working
directory counts too. It is called with one argument, the setting ``target_dir`` (a
:class:`pathlib.Path` or ``None``), and returns a :class:`bridge.targets.Target`. Its module must
not import the code under test at its top level: ``start()`` does that, while it is measured.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from bridge.errors import TargetError, UsageError
from bridge.targets import DEFAULT_TARGET, Target
from bridge.targets.description import member_of
from bridge.targets.none import NoTarget
from bridge.targets.programs import PROGRAMS, target_class
from bridge.targets.thread import foreign

__all__ = [
    "TargetMaker",
    "check_name",
    "create",
    "find_factory",
    "has_only_programs",
    "made",
    "names",
]

TargetMaker = Callable[[Path | None], Target]
"""Makes a target for a directory, the setting ``target_dir``."""


def _plan9(directory: Path | None) -> Target:
    # asyncio is imported by those who use it.
    from bridge.targets.plan9 import Plan9Target

    return Plan9Target(directory)


def _program(name: str, directory: Path | None) -> Target:
    return target_class(name)(directory)


_BUILT_IN: dict[str, Callable[[Path | None], Target]] = {
    DEFAULT_TARGET: _plan9,
    "none": NoTarget,
    **{name: functools.partial(_program, name) for name in PROGRAMS},
}

_MEMBERS = ("name", "packages", "start", "stop")
"""What a target must have; :func:`bridge.targets.description.describe` takes others as empty."""


def names() -> tuple[str, ...]:
    """Return the names of the built-in targets."""
    return tuple(_BUILT_IN)


def create(name: str | TargetMaker, directory: Path | None = None) -> Target:
    """Make the target of this name, or what a maker makes, not yet started.

    A target of your own runs its code here: call this on the target's thread
    (:class:`bridge.targets.thread.TargetThread`).

    Raises:
        UsageError: the name stands for nothing.
        TargetError: the code behind it raises, or what it makes is no target.
    """
    if not isinstance(name, str):
        with foreign(f"the target {name}", "while it was made"):
            return name(directory)
    check_name(name)
    factory = find_factory(name)

    def make() -> Any:
        try:
            inspect.signature(factory).bind(directory)
        except TypeError:
            return factory()
        except ValueError:
            pass  # it cannot be asked
        return factory(directory)

    return made(name, make)


def check_name(name: str) -> None:
    """Check that a name is that of a built-in target, or has the form ``module:Class``.

    Raises:
        UsageError: it is neither.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        if not module or not attribute:
            raise UsageError(
                f"the target {name!r} is not of the form module:Class",
                hint="for example --target mypackage.server:Server",
            )
    elif name not in _BUILT_IN:
        near = difflib.get_close_matches(name, _BUILT_IN, n=1)
        raise UsageError(
            f"there is no target {name}",
            hint=(f"did you mean {near[0]}? " if near else "")
            + f"the targets are {', '.join(_BUILT_IN)}, and module:Class for your own",
        )


def find_factory(name: str) -> Callable[..., Any]:
    """Return what makes the target of this name; imports its module.

    Raises:
        UsageError: the name stands for nothing.
        TargetError: its module raises something.
    """
    if ":" not in name:
        return _BUILT_IN[name]
    module_name, _, attribute = name.partition(":")
    # An installed command does not search the working directory. Last, so that nothing there hides
    # an installed module.
    here = os.getcwd()  # noqa: PTH109
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    with foreign(f"the target {name}", "while it was made"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            raise UsageError(
                f"target {name}: there is no module {error.name}",
                hint="the working directory and this Python's packages were searched",
            ) from error
    factory: Any = module
    for part in attribute.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        near = difflib.get_close_matches(attribute, classes, n=1)
        raise UsageError(
            f"target {name}: module {module_name} has no class {attribute}",
            hint=f"did you mean {near[0]}?" if near else "",
        )
    found: Callable[..., Any] = factory
    return found


def has_only_programs(target: str | TargetMaker, directory: Path | None = None) -> bool:
    """Return whether a target covers native programs, and no package of Python.

    Such a target needs no process of its own, because its programs have theirs. Only a target that
    may be one is made, and dropped again.

    Raises:
        UsageError: the name stands for nothing.
        TargetError: its module or its class raises something.
    """
    factory = find_factory(target) if isinstance(target, str) else target
    if target not in PROGRAMS and not getattr(factory, "native", False):
        return False
    found = create(target, directory)
    return bool(member_of(found, "native", False)) and not found.packages


def made(name: str, make: Callable[[], Any]) -> Target:
    """Return what ``make`` returns, which must be a target.

    Raises:
        TargetError: it raises, or what it returns is no target.
    """
    with foreign(f"the target {name}", "while it was made"):
        target = make()
        # dir() rather than hasattr(): a property such as endpoints is valid only after start().
        present = dir(target)
        missing = [member for member in _MEMBERS if member not in present]
        if missing:
            raise TargetError(
                f"target {name} is not a target: it lacks {', '.join(missing)}",
                hint="the docstring of bridge.Target explains each",
            )
        packages = target.packages
        if not isinstance(packages, tuple) or not all(isinstance(each, str) for each in packages):
            raise TargetError(
                f"target {name}: packages is {packages!r}",
                hint='a tuple of package names is needed, such as ("mypackage",)',
            )
        if not isinstance(target.name, str):
            raise TargetError(f"target {name}: name is {target.name!r}", hint="a text is needed")
    return cast(Target, target)
