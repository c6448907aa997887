# SPDX-License-Identifier: Apache-2.0
"""Targets that are given as objects, and several of them as one."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import UsageError
from bridge.targets import Endpoint, GuestFile
from bridge.targets.description import describe
from bridge.targets.services import CompositeTarget, Service, Services


class Part:
    packages: tuple[str, ...] = ("shared",)
    guest_modules: tuple[str, ...] = ("9p",)
    guest_teardown = ""

    def __init__(self, name: str = "part", port: int = 1, setup: str = "") -> None:
        self.name = name
        self.endpoints = (Endpoint(name, 4000, port),)
        self.guest_setup = setup
        self.log: list[str] = []

    def start(self) -> None:
        self.log.append("start")

    def stop(self) -> None:
        self.log.append("stop")


class Rooted(Part):
    def __init__(self, directory: Path | None = None) -> None:
        super().__init__(str(directory))


class WithFiles(Part):
    guest_files = (GuestFile("/etc/x", b"x"),)


def test_service_class_gets_the_directory_only_if_it_wants_one() -> None:
    here = Path("/here")
    assert Service(Rooted).make(here).name == "/here"
    assert Service(Part).make(here).name == "part"
    assert Service(Part, {"name": "other"}).make(here).name == "other"
    assert Service(lambda directory: Part(str(directory))).make(here).name == "/here"
    part = Part()
    assert Service(part).make(here) is part


def test_service_equal_only_for_the_same_thing_and_arguments() -> None:
    part = Part()
    assert Service(part) == Service(part) != Service(Part())
    assert Service("plan9") == Service("plan" + "9")
    assert Service(Part, {"port": [1]}) != Service(Part, {"port": [2]})
    assert len({Service(Part, {"port": [1]}), Service(Part, {"port": [1]})}) == 1


@pytest.mark.parametrize(
    ("what", "arguments", "message"),
    [
        (3, {}, "is no target"),
        ("nothing", {}, "there is no target"),
        (Part(), {"a": 1}, "takes no"),
    ],
)
def test_service_of_something_else_is_refused(
    what: object, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Service(what, arguments)


def test_composite_target_joins_what_its_parts_say() -> None:
    first, second = Part("a", 1, "echo a; exit 0"), WithFiles("b", 2, "echo b")
    target = Services((Service(first), Service(second)))(None)
    target.start()
    told = describe(target)
    assert (told.name, target.packages) == ("a+b", ("shared",))
    assert [each.guest_port for each in told.endpoints] == [1, 2]
    assert told.guest_modules == ("9p",)
    assert told.guest_files == WithFiles.guest_files
    shown = subprocess.run(["sh", "-c", told.guest_setup], stdout=subprocess.PIPE, check=True)
    assert shown.stdout == b"a\nb\n", "`exit` ends the part alone"
    assert told.guest_setup_by_region == "", "none of them offers it"
    first.guest_setup_by_region = "echo region"  # type: ignore[attr-defined]
    by_region = describe(target).by_region().guest_setup
    shown = subprocess.run(["sh", "-c", by_region], stdout=subprocess.PIPE, check=True)
    assert shown.stdout == b"region\nb\n"
    failing = CompositeTarget([Part("a", 1, "exit 3"), second]).guest_setup
    assert subprocess.run(["sh", "-c", failing], stdout=subprocess.PIPE).returncode == 3
    target.stop()
    target.stop()
    assert first.log == second.log == ["start", "stop"]


def test_composite_target_part_that_fails_stops_the_others() -> None:
    class Failing(Part):
        def start(self) -> None:
            raise OSError("no")

    first, second = Part("a", 1), Failing("b", 2)
    with pytest.raises(OSError, match="no"):
        CompositeTarget([first, second]).start()
    assert first.log == ["start", "stop"]
    assert second.log == ["stop"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (Part("a", 7), Part("b", 7), "a and b both want the port 7"),
        (
            Part("a", 1, "mount -t 9p x /mnt/target"),
            Part("b", 2, "mkdir -p /y && mount -t nfs y:/ /mnt/target || exit 1"),
            "a and b are both mounted at /mnt/target",
        ),
    ],
)
def test_composite_target_parts_that_clash_are_refused(
    first: Part, second: Part, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        CompositeTarget([first, second]).start()
