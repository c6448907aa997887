# SPDX-License-Identifier: Apache-2.0
"""The thread of a target: whatever foreign code raises is an error of the target."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bridge.errors import BridgeError, TargetError, UsageError
from bridge.targets import Endpoint, GuestFile, QemuDevice, UnixEndpoint
from bridge.targets.description import Description, describe
from bridge.targets.registry import create
from bridge.targets.thread import TargetThread, foreign


class Unspeakable(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def leave(code: object) -> Callable[[], None]:
    def function() -> None:
        sys.exit(code)  # type: ignore[arg-type]

    return function


def throw(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


FOREIGN = [
    (leave(0), "SystemExit on start: 0"),
    (leave("text"), "SystemExit on start: text"),
    (leave(3), "SystemExit on start: 3"),
    (leave(None), "SystemExit on start"),
    (throw(KeyboardInterrupt()), "KeyboardInterrupt on start"),
    (throw(GeneratorExit()), "GeneratorExit on start"),
    (throw(StopIteration(1)), "StopIteration on start: 1"),
    (throw(Unspeakable()), "Unspeakable on start"),
    (throw(RuntimeError("no such luck")), "RuntimeError on start: no such luck"),
]
"""What code of a target may do, and what is said of it."""


@pytest.mark.parametrize(("function", "message"), FOREIGN, ids=[text for _, text in FOREIGN])
def test_thread_foreign_code_that_raises_anything_is_a_target_error(
    function: Callable[[], None], message: str
) -> None:
    thread = TargetThread()
    with pytest.raises(TargetError) as caught:
        thread.call_foreign("the target x", "on start", function)
    assert caught.value.message.startswith(f"the target x raised {message}")
    assert "test_thread.py" in caught.value.evidence, "its traceback"
    assert thread.call(threading.current_thread) is not threading.main_thread()
    thread.close()


def test_thread_errors_of_the_bridge_pass() -> None:
    thread = TargetThread()
    with pytest.raises(UsageError, match="as it is"):
        thread.call_foreign("the target x", "on start", throw(UsageError("as it is")))
    thread.close()


def test_foreign_on_the_main_thread_a_keyboard_interrupt_is_the_users() -> None:
    with pytest.raises(KeyboardInterrupt), foreign("the target x", "while it was made"):
        raise KeyboardInterrupt
    with pytest.raises(TargetError, match="SystemExit"), foreign("the target x", "on stop"):
        sys.exit(0)


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Presses Ctrl-C in a moment; also where the tests were started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start
    signal.signal(signal.SIGINT, before)


def test_thread_an_interrupt_of_the_user_ends_the_wait(ctrl_c: Callable[[], None]) -> None:
    thread, over = TargetThread(), threading.Event()
    ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        thread.call_foreign("the target x", "on start", over.wait)
    # What it was interrupted in comes to its end: the thread is of use again.
    over.set()
    assert thread.call(lambda: 7) == 7
    thread.close()


def test_thread_stuck_in_foreign_code_is_left_behind(
    ctrl_c: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.targets.thread._STUCK_SECONDS", 0.1)
    thread, over = TargetThread(), threading.Event()
    ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        thread.call(over.wait)
    begun = time.monotonic()
    for _ in range(3):
        with pytest.raises(TargetError, match="its thread is abandoned"):
            thread.call(lambda: 7)
    with pytest.raises(TargetError, match="abandoned"):
        thread.close()
    assert time.monotonic() - begun < 5
    over.set()


class Odd:
    """A target whose members can be set."""

    name = "odd"
    packages: tuple[str, ...] = ()
    endpoints: object = ()
    guest_modules: object = ()
    guest_setup: object = ""
    guest_teardown: object = ""

    def start(self) -> None: ...

    def stop(self) -> None: ...


@pytest.mark.parametrize(
    "member",
    [
        "endpoints",
        "guest_modules",
        "guest_setup",
        "guest_teardown",
        "devices",
        "guest_files",
        "guest_packages",
        "guest_setup_by_region",
    ],
)
def test_describe_a_property_that_exits_is_a_target_error(member: str) -> None:
    class Exits(Odd):
        pass

    setattr(Exits, member, property(lambda self: sys.exit(0)))
    with pytest.raises(TargetError, match=f"SystemExit when asked for its {member}: 0"):
        describe(Exits())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("endpoints", (("http", 80, 80),)),
        ("endpoints", 80),
        ("guest_modules", "9p"),
        ("guest_modules", (1,)),
        ("guest_setup", None),
        ("guest_teardown", b"umount /mnt"),
        ("devices", ("serial",)),
        ("devices", 1),
        ("guest_files", ("/etc/motd",)),
        ("guest_files", (GuestFile("etc/motd", b""),)),
        ("guest_packages", "python3"),
        ("guest_setup_by_region", None),
    ],
)
def test_describe_a_member_of_a_wrong_type_is_a_target_error(member: str, value: object) -> None:
    odd = Odd()
    setattr(odd, member, value)
    with pytest.raises(TargetError, match=member):
        describe(odd)  # type: ignore[arg-type]


def test_description_comes_back_from_json() -> None:
    description = Description(
        "x",
        (Endpoint("http", 1, 2), UnixEndpoint("u", Path("/run/u"), 3)),
        ("9p",),
        "mount",
        "umount",
        (
            QemuDevice(
                "edu",
                ("-device", "edu"),
                ("-device", "edu,x"),
                on_start=(("qom-set", {"path": "/x", "value": 1}),),
                on_reset=(("stop", {}),),
                guest_modules=("edu",),
                guest_setup="true",
                kernel_arguments=("quiet",),
                can_be_saved=False,
            ),
        ),
        (GuestFile("/etc/motd", b"\xff", 0o600),),
        ("python3",),
    )
    text = json.dumps(description.as_dict())
    assert Description.from_dict(json.loads(text)) == description


@pytest.mark.parametrize("where", ["import", "constructor", "packages", "name", "members"])
@pytest.mark.parametrize("what", ["sys.exit(0)", "raise KeyboardInterrupt", "raise GeneratorExit"])
def test_create_foreign_code_that_raises_anything_is_a_target_error(
    where: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {
        "import": what,
        "constructor": f"class Target:\n  def __init__(self, directory):\n    {what}",
        "packages": MEMBERS + f"  @property\n  def packages(self):\n    {what}",
        "name": MEMBERS + f"  @property\n  def name(self):\n    {what}",
        "members": MEMBERS + f"  def __dir__(self):\n    {what}",
    }[where]
    (tmp_path / "raising_target.py").write_text(f"import sys\n{lines}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "raising_target", raising=False)
    thread = TargetThread()
    with pytest.raises(BridgeError, match=r"raised .* while it was made") as caught:
        thread.call(lambda: create("raising_target:Target"))
    assert isinstance(caught.value, TargetError)
    assert "raising_target.py" in caught.value.evidence
    thread.close()


MEMBERS = """\
class Target:
  name, packages, endpoints, guest_modules = "x", (), (), ()
  guest_setup = guest_teardown = ""
  start = stop = lambda self: None
  def __init__(self, directory): pass
"""
