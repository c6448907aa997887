# SPDX-License-Identifier: Apache-2.0
"""What a test asks for with the marker ``guest``, and the order in which tests run."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bridge import config
from bridge.errors import UsageError
from bridge.pytest_plugin.plugin import REPORT
from bridge.pytest_plugin.target import TargetRequest, target_request

__all__ = [
    "GuestRequest",
    "Machine",
    "Reset",
    "group",
    "report_directory",
    "request_of",
]

_MARKER = "guest"
_WORKER_BOOT_SECONDS = 60.0
"""The boot timeout, times the workers of pytest-xdist, which share the processors."""
_DEFAULTS: Mapping[str, object] = {"target": "none", "diagnose": True}
"""Settings of a guest for tests where neither the test nor the user's settings say otherwise."""


@dataclass(frozen=True)
class Machine:
    """What makes a guest: tests that ask for the same share one.

    Attributes:
        settings: the settings that the test asks for, sorted by name.
        target: its targets.
    """

    settings: tuple[tuple[str, object], ...]
    target: TargetRequest


class Reset(enum.Enum):
    """When a guest becomes as new."""

    TEST = "test"
    MODULE = "module"
    NEVER = "never"


@dataclass(frozen=True)
class GuestRequest:
    """What one test asks for.

    Attributes:
        machine: which guest.
        reset: when the guest becomes as new.
        ignore: what does not make the test fail; see :mod:`.health`.
        module: the test's file, relative to pytest's root directory.
    """

    machine: Machine
    reset: Reset
    ignore: tuple[re.Pattern[str], ...]
    module: str

    def settings(self, overrides: Mapping[str, object], workers: int = 1) -> config.Settings:
        """Return the settings of the guest.

        Args:
            overrides: those of the command line.
            workers: how many processes may start guests at the same time.
        """
        defaults = dict(_DEFAULTS)
        if workers > 1:
            defaults["boot_timeout"] = _WORKER_BOOT_SECONDS * workers
        return config.load({**dict(self.machine.settings), **overrides}, defaults=defaults)


def request_of(item: pytest.Item, target: object = None) -> GuestRequest:
    """Read the markers of a test; the one nearest to the test wins, argument by argument.

    Args:
        target: what the test's own fixture ``target`` returned, if it has one.

    Raises:
        pytest.UsageError: an argument is unknown or has a wrong value.
    """
    values: dict[str, Any] = {}
    for marker in reversed(list(item.iter_markers(_MARKER))):
        if marker.args:
            raise _wrong(item, f"takes settings by name, not {marker.args[0]!r}")
        values.update(marker.kwargs)
    reset = values.pop("reset", Reset.TEST.value)
    if reset not in [each.value for each in Reset]:
        choices = ", ".join(repr(each.value) for each in Reset)
        raise _wrong(item, f"reset is {reset!r}; it can be {choices}")
    ignore = values.pop("ignore", ())
    patterns = (ignore,) if isinstance(ignore, str | re.Pattern) else ignore
    try:
        compiled = tuple(re.compile(each) for each in patterns)
    except (re.error, TypeError) as error:
        raise _wrong(item, f"ignore is {ignore!r}: {error}") from None
    # A name is a setting like others; here it may also be an object.
    otherwise = None if isinstance(values.get("target"), str) else values.pop("target", None)
    try:
        config.load({})
    except UsageError as error:
        # The settings file or the environment, whatever the marker says.
        raise pytest.UsageError(error.report()) from None
    try:
        config.load(values)
    except UsageError as error:
        raise _wrong(item, error.report()) from None
    try:
        hash(settings := tuple(sorted(values.items())))
    except TypeError as error:
        raise _wrong(item, str(error)) from None
    machine = Machine(settings, target_request(item, target, otherwise))
    return GuestRequest(machine, Reset(reset), compiled, item.nodeid.partition("::")[0])


def report_directory(config: pytest.Config) -> Path | None:
    """Return the directory of ``--guest-report``; None without it."""
    # A worker may run in another directory.
    worker_input = getattr(config, "workerinput", {})
    given = worker_input.get(REPORT) or config.option.guest_report
    return Path(config.invocation_params.dir, given).absolute() if given else None


def _wrong(item: pytest.Item, what: str) -> pytest.UsageError:
    return pytest.UsageError(f"{item.nodeid}: the marker {_MARKER}: {what}")


def group(
    items: Sequence[pytest.Item], requests: Mapping[pytest.Item, GuestRequest]
) -> list[pytest.Item]:
    """Return the tests in an order in which those that ask for the same machine are together.

    They move behind the first of them; all others stay where they are.
    """
    groups: dict[Machine, list[pytest.Item]] = {}
    places: list[pytest.Item | list[pytest.Item]] = []
    for item in items:
        request = requests.get(item)
        if request is None:
            places.append(item)
            continue
        together = groups.setdefault(request.machine, [])
        if not together:
            places.append(together)
        together.append(item)
    ordered: list[pytest.Item] = []
    for place in places:
        ordered += place if isinstance(place, list) else [place]
    return ordered
