# SPDX-License-Identifier: Apache-2.0
"""Targets that are given as objects: names, classes and instances, one or several.

:class:`Services` makes a target of them. It can be pickled where its classes and instances can.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bridge.errors import UsageError
from bridge.targets import AnyEndpoint, Device, GuestFile, Target, UdpEndpoint
from bridge.targets.description import member_of
from bridge.targets.registry import check_name, create, find_factory, made

__all__ = ["CompositeTarget", "Service", "Services"]

_DIRECTORY = "directory"
_MOUNT_POINT = re.compile(r"^[^#\n]*\bmount\s[^;&|\n]*?(/[^\s;&|]+)\s*(?:[;&|]|$)", re.MULTILINE)
"""The last path of a command ``mount``."""


class Service:
    """What makes one target; equal where it is the same thing with equal arguments.

    Args:
        what: a name as ``--target`` takes it; a class or a function, which is called with the
            setting ``target_dir`` if it cannot be called without, or its parameter is named
            ``directory``; or an instance.
        arguments: what the class or function is called with by name.

    Raises:
        UsageError: it is none of these.
    """

    def __init__(self, what: Any, arguments: dict[str, Any] | None = None) -> None:
        self.what = what
        self.arguments = dict(arguments or {})
        if isinstance(what, str):
            check_name(what)
        elif not callable(what) and not self.is_instance:
            raise UsageError(
                f"{what!r} is no target",
                hint='a target is a name such as "module:Class", a class, a function that returns '
                "a target, or an instance of such a class",
            )
        if self.arguments and self.is_instance:
            raise UsageError(
                f"the target {self} is an instance, and takes no arguments",
                hint="give them when you make the instance",
            )

    @property
    def is_instance(self) -> bool:
        """Whether it is a target that exists, not something that makes one."""
        return not isinstance(self.what, str | type) and hasattr(self.what, "start")

    def __str__(self) -> str:
        if isinstance(self.what, str):
            return self.what
        name = getattr(self.what, "__qualname__", None)
        return str(name) if name is not None else type(self.what).__qualname__

    def __repr__(self) -> str:
        return f"Service({self})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Service):
            return NotImplemented
        same = self.what is other.what or (
            isinstance(self.what, str) and isinstance(other.what, str) and self.what == other.what
        )
        return same and self.arguments == other.arguments

    def __hash__(self) -> int:
        # Values of arguments may have no hash.
        key = self.what if isinstance(self.what, str) else id(self.what)
        return hash((key, tuple(sorted(self.arguments))))

    def make(self, directory: Path | None) -> Target:
        """Return the target, not started; to be called on the target's thread.

        Raises:
            TargetError, UsageError: as :func:`bridge.targets.registry.create`.
        """
        what = self.what
        if isinstance(what, str):
            if not self.arguments:
                return create(what, directory)
            what = find_factory(what)
        elif self.is_instance:
            return made(str(self), lambda: what)
        return made(str(self), lambda: _called(what, directory, self.arguments))


def _called(factory: Any, directory: Path | None, arguments: dict[str, Any]) -> Any:
    """Call what makes a target, with the directory if it wants one."""
    try:
        signature = inspect.signature(factory)
        signature.bind(**arguments)
    except (TypeError, ValueError):
        # It needs one more, or cannot be asked.
        return factory(directory, **arguments)
    if _DIRECTORY in signature.parameters and _DIRECTORY not in arguments:
        return factory(directory, **arguments)
    return factory(**arguments)


class Services(tuple[Service, ...]):
    """One or several services, which make one target together."""

    __slots__ = ()

    def __call__(self, directory: Path | None) -> Target:
        """Return the target, not started; raises as :meth:`Service.make`."""
        if len(self) == 1:
            return self[0].make(directory)
        return CompositeTarget([service.make(directory) for service in self])

    def __str__(self) -> str:
        return " + ".join(str(service) for service in self)


def _in_turn(scripts: Sequence[str]) -> str:
    return "".join(f"(\n{script}\n) || exit $?\n" for script in scripts if script)


class CompositeTarget:
    """Several targets as one: they start in order, and stop in reverse.

    Attributes:
        targets: the targets.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = tuple(targets)
        self.name = "+".join(str(each.name) for each in targets)
        self.packages = tuple(dict.fromkeys(name for each in targets for name in each.packages))
        self._stack = ExitStack()

    def prepare(self) -> None:
        """Prepare those that can be prepared."""
        for target in self.targets:
            if (prepare := getattr(target, "prepare", None)) is not None:
                prepare()

    @property
    def native(self) -> bool:
        """Whether any of them starts native programs that are covered."""
        return any(member_of(each, "native", False) for each in self.targets)

    @property
    def processes(self) -> tuple[int, ...]:
        """The processes of all of them."""
        return self._join("processes")

    def cover_programs(self, environment: Mapping[str, str]) -> None:
        """Give the variables to those that start such programs."""
        for target in self.targets:
            if (cover := getattr(target, "cover_programs", None)) is not None:
                cover(environment)

    def build_programs(self) -> None:
        """Build the programs of those that have some, as far as they are missing."""
        for target in self.targets:
            if (build := getattr(target, "build_programs", None)) is not None:
                build()

    def start(self) -> None:
        """Start all of them, or none."""
        with ExitStack() as stack:
            for target in self.targets:
                # One that fails half-way is stopped too.
                stack.callback(target.stop)
                target.start()
            self._check()
            self._stack = stack.pop_all()

    def _check(self) -> None:
        """Look for what two of them cannot have at once; raises UsageError."""
        ports: dict[tuple[bool, int], str] = {}
        mounts: dict[str, str] = {}
        for target in self.targets:
            name = str(target.name)
            # UDP has ports of its own.
            endpoints: Sequence[AnyEndpoint] = member_of(target, "endpoints", ())
            wanted = [(isinstance(each, UdpEndpoint), each.guest_port) for each in endpoints]
            for port in wanted:
                if (other := ports.setdefault(port, name)) is not name or wanted.count(port) > 1:
                    raise UsageError(
                        f"the targets {other} and {name} both want the port {port[1]} of the "
                        "guest's address of targets",
                        hint="give one of them another guest_port",
                    )
            for mount in set(_MOUNT_POINT.findall(member_of(target, "guest_setup", ""))):
                if (other := mounts.setdefault(mount, name)) is not name:
                    raise UsageError(
                        f"the targets {other} and {name} are both mounted at {mount} in the guest",
                        hint="have the guest_setup of one of them mount it elsewhere",
                    )

    @property
    def endpoints(self) -> tuple[AnyEndpoint, ...]:
        """The endpoints of all of them."""
        return self._join("endpoints")

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of all of them."""
        return self._join("devices")

    @property
    def guest_files(self) -> tuple[GuestFile, ...]:
        """The files of all of them."""
        return self._join("guest_files")

    @property
    def guest_packages(self) -> tuple[str, ...]:
        """The packages of all of them."""
        return self._join("guest_packages")

    def _join(self, member: str) -> tuple[Any, ...]:
        """Return what the targets have of a member that is optional."""
        having: list[Sequence[Any]] = [member_of(each, member, ()) for each in self.targets]
        return tuple(thing for things in having for thing in things)

    @property
    def guest_modules(self) -> tuple[str, ...]:
        """The modules of all of them, each once."""
        return tuple(dict.fromkeys(self._join("guest_modules")))

    @property
    def guest_setup(self) -> str:
        """The scripts of all of them, each in a shell of its own; the first that fails is last."""
        return _in_turn([member_of(each, "guest_setup", "") for each in self.targets])

    @property
    def guest_setup_by_region(self) -> str:
        """The scripts of all of them, if any has one; the others are reached by the network."""
        offered = [member_of(each, "guest_setup_by_region", "") for each in self.targets]
        if not any(offered):
            return ""
        return _in_turn(
            [
                script or member_of(each, "guest_setup", "")
                for each, script in zip(self.targets, offered, strict=True)
            ]
        )

    @property
    def guest_teardown(self) -> str:
        """The scripts of all of them, in reverse."""
        scripts = [member_of(each, "guest_teardown", "") for each in reversed(self.targets)]
        return "".join(f"(\n{script}\n)\n" for script in scripts if script)

    def stop(self) -> None:
        """Stop all of them, whatever one of them raises. Safe to call twice."""
        self._stack.close()
