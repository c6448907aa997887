# SPDX-License-Identifier: Apache-2.0
"""Which targets a test's guest reaches: the marker and the fixture ``target``.

A test says it in one of four ways; the first that is there counts:

* a fixture ``target`` of its own, which returns a target;
* ``@pytest.mark.parametrize("target", [...], indirect=True)``;
* ``@pytest.mark.target(...)``;
* ``@pytest.mark.guest(target=...)``, and the settings.

pytest takes a class that is a marker's only argument for the thing that is marked, so a class in
``@pytest.mark.target`` needs a keyword beside it, such as ``reset="keep"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import pytest

from bridge.errors import UsageError
from bridge.session.target_host import TargetState
from bridge.targets.services import Service, Services

__all__ = ["FIXTURE", "TargetRequest", "target_request", "user_fixture"]

FIXTURE: Final = "target"
_GUEST: Final = "guest"
_PLUGIN: Final = "bridge.pytest_plugin.plugin"
_RESET: Final = "reset"


@dataclass(frozen=True)
class TargetRequest:
    """The targets that a test asks for.

    Attributes:
        services: what makes them; None for the setting ``target``.
        state: what a reset of the guest does to them.
    """

    services: Services | None = None
    state: TargetState = TargetState.KEEP


def target_request(
    item: pytest.Item, given: object = None, otherwise: object = None
) -> TargetRequest:
    """Read what a test asks for.

    Args:
        otherwise: what counts if nothing else says it: the argument ``target`` of ``guest``.
        given: what the test's own fixture returned; None if it has none, or did not run yet.

    Raises:
        pytest.UsageError: it is no target, or an argument is wrong.
    """
    marker = item.get_closest_marker(FIXTURE)
    named: tuple[object, ...] = ()
    arguments: dict[str, Any] = {}
    state = TargetState.KEEP.value
    # Each argument is that of the nearest marker.
    for each in reversed(list(item.iter_markers(FIXTURE))):
        state = each.kwargs.get(_RESET, state)
        if each.args:
            named = each.args
            arguments = {name: value for name, value in each.kwargs.items() if name != _RESET}
    if marker is not None and not named and set(marker.kwargs) - {_RESET}:
        raise _wrong(item, "has arguments for a target, and names none")
    if state not in [each.value for each in TargetState]:
        choices = ", ".join(repr(each.value) for each in TargetState)
        raise _wrong(item, f"reset is {state!r}; it can be {choices}")
    callspec = getattr(item, "callspec", None)
    if given is None and callspec is not None and not user_fixture(item):
        given = callspec.params.get(FIXTURE)
    if given is None and not named:
        given = otherwise
    if given is not None:
        named, arguments = (tuple(given) if isinstance(given, tuple | list) else (given,)), {}
    if arguments and len(named) > 1:
        raise _wrong(
            item,
            f"names {len(named)} targets, so {', '.join(arguments)} may belong to any of them: "
            "give instances instead",
        )
    try:
        services = Services(Service(each, arguments) for each in named)
    except UsageError as error:
        raise _wrong(item, error.report()) from None
    return TargetRequest(services or None, TargetState(state))


def _wrong(item: pytest.Item, what: str) -> pytest.UsageError:
    return pytest.UsageError(f"{item.nodeid}: the target of the test: {what}")


def user_fixture(item: pytest.Item) -> bool:
    """Return whether a test sees a fixture ``target`` of its own that returns a target.

    One that takes ``guest``, directly or through others, has another meaning, and is left alone.
    One that takes ``target`` itself changes what this plugin's returns.
    """
    definitions = _definitions(item, FIXTURE)
    for definition in reversed(definitions):
        # The latter is that of a parameter that is not indirect.
        if definition.func.__module__ == _PLUGIN or definition.func.__module__.startswith(
            "_pytest."
        ):
            return False
        if FIXTURE not in definition.argnames:
            return not _takes_guest(item, definition.argnames, {FIXTURE})
    return False


def _takes_guest(item: pytest.Item, names: Any, seen: set[str]) -> bool:
    for name in names:
        if name == _GUEST:
            return True
        if name in seen:
            continue
        seen.add(name)
        if any(_takes_guest(item, each.argnames, seen) for each in _definitions(item, name)):
            return True
    return False


def _definitions(item: pytest.Item, name: str) -> Any:
    known = getattr(item, "_fixtureinfo").name2fixturedefs.get(name)  # noqa: B009
    if known is not None:
        return known
    return getattr(item.session, "_fixturemanager").getfixturedefs(name, item) or ()  # noqa: B009
