# SPDX-License-Identifier: Apache-2.0
"""What a started target says of itself, read once and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bridge.errors import TargetError
from bridge.targets import Endpoint, Target
from bridge.targets.thread import foreign

__all__ = ["Description", "describe"]


@dataclass(frozen=True)
class Description:
    """The members of a :class:`bridge.targets.Target` that are valid once it is started."""

    name: str = ""
    endpoints: tuple[Endpoint, ...] = ()
    guest_modules: tuple[str, ...] = ()
    guest_setup: str = ""
    guest_teardown: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the description as JSON can hold it."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Description:
        """Return the description that :meth:`as_dict` was made of."""
        return Description(
            values["name"],
            tuple(Endpoint(**each) for each in values["endpoints"]),
            tuple(values["guest_modules"]),
            values["guest_setup"],
            values["guest_teardown"],
        )


def describe(target: Target) -> Description:
    """Read what a target says of itself; to be called on the target's thread, after its start.

    Raises:
        TargetError: a member raises, or is not what the protocol says.
    """
    with foreign("the target", "when asked for its name"):
        name = str(target.name)
    with foreign(f"the target {name}", "when asked for its endpoints"):
        endpoints = tuple(target.endpoints)
        if not all(isinstance(each, Endpoint) for each in endpoints):
            raise _wrong(name, "endpoints", endpoints, "a tuple of bridge.Endpoint")
    with foreign(f"the target {name}", "when asked for its guest_modules"):
        modules = target.guest_modules
        if isinstance(modules, str) or not all(isinstance(each, str) for each in modules):
            raise _wrong(name, "guest_modules", modules, 'a tuple of names such as ("9p",)')
        modules = tuple(modules)
    scripts = []
    for member in ("guest_setup", "guest_teardown"):
        with foreign(f"the target {name}", f"when asked for its {member}"):
            script = getattr(target, member)
            if not isinstance(script, str):
                raise _wrong(name, member, script, "a shell script, as text")
            scripts.append(script)
    return Description(name, endpoints, modules, *scripts)


def _wrong(name: str, member: str, value: object, needed: str) -> TargetError:
    return TargetError(f"target {name}: {member} is {value!r}", hint=f"it must be {needed}")
