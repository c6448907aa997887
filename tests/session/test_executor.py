# SPDX-License-Identifier: Apache-2.0
"""A command under kcov whose PCs are not all there is an error, however they were lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import pytest

from bridge.device.abi import HeaderWord
from bridge.errors import IncompleteError, SourceError
from bridge.guest.guest import CommandResult, Guest
from bridge.session.device_host import DeviceHost
from bridge.session.executor import GuestExecutor
from bridge.trace import Call

CutOff = list[tuple[Sequence[int], Sequence[Call]]]


class Source:
    """A source that raises what it is given."""

    def __init__(self) -> None:
        self.failure: Exception | None = None

    def consume(self) -> list[int]:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        return []


class Here:
    """Stands for the guest: a command is a function of this process, which covers nothing."""

    def __init__(self, host: DeviceHost) -> None:
        self.command: Callable[[], object] = lambda: None
        self.joins = True
        self._host = host

    def run(self, command: Sequence[str], **_: object) -> CommandResult:
        if not self.joins:
            return CommandResult(125, b"", b"kcov-exec: Input/output error", False, 0.0)
        device = self._host.device
        kcov = self._host.call(device.open)
        stream = int(command[command.index("-s") + 1], 0)
        assert self._host.call(lambda: device.join_stream(kcov, 1, stream)) == 0
        self._host.call(lambda: device.release(kcov))
        self.command()
        return CommandResult(0, b"", b"", False, 0.0)


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def host(source: Source) -> Iterator[DeviceHost]:
    with DeviceHost(1 << 20, source=source, syscall_comparisons=True) as host:
        yield host


@pytest.fixture
def guest(host: DeviceHost) -> Here:
    return Here(host)


@pytest.fixture
def cut_off() -> CutOff:
    return []


@pytest.fixture
def executor(host: DeviceHost, guest: Here, cut_off: CutOff) -> GuestExecutor:
    return GuestExecutor(
        cast(Guest, guest),
        host,
        watched=False,
        directory=None,
        can_be_unique=True,
        explain=lambda logged, pcs: (),
        cut_off=lambda pcs, calls: cut_off.append((pcs, calls)),
    )


def kcov(executor: GuestExecutor) -> int:
    return executor.kcov(["true"], follow=True, unique=False).exit_status


def test_kcov_source_fails_meanwhile_is_incomplete(
    executor: GuestExecutor,
    host: DeviceHost,
    guest: Here,
    source: Source,
    cut_off: CutOff,
) -> None:
    def fail(text: str) -> None:
        source.failure = SourceError(text, evidence="seen")
        host.consume()

    assert kcov(executor) == 0
    for text in ("the tracer failed", "once more"):
        guest.command = lambda text=text: fail(text)  # type: ignore[misc]
        with pytest.raises(IncompleteError, match=f"the PCs are incomplete: {text}") as raised:
            kcov(executor)
        assert raised.value.evidence == "seen"
    assert len(cut_off) == 2
    guest.command = lambda: None
    assert kcov(executor) == 0, "what was before is no matter of this command"


def test_kcov_that_cannot_join_is_an_error(executor: GuestExecutor, guest: Here) -> None:
    guest.joins = False
    with pytest.raises(IncompleteError, match=r"the command was not run, .*: true$") as raised:
        kcov(executor)
    assert raised.value.evidence == "kcov-exec: Input/output error"


def test_compare_source_fails_meanwhile_is_incomplete(
    executor: GuestExecutor, host: DeviceHost, guest: Here
) -> None:
    guest.command = lambda: host.call(lambda: host.doorbell.source_failed(RuntimeError("no luck")))
    with pytest.raises(IncompleteError, match="the coverage source raised RuntimeError: no luck"):
        executor.compare(["true"], follow=True)


def test_kcov_waits_for_a_reset_untraced_processes_are_noticed(
    executor: GuestExecutor, host: DeviceHost, guest: Here
) -> None:
    word = HeaderWord.GUEST_UNTRACED
    host.region.control[word] = 5

    def reset_then_run() -> None:
        host.reset()
        host.region.control[word] = 3

    guest.command = reset_then_run
    with pytest.raises(IncompleteError, match="3 processes or threads were not traced"):
        kcov(executor)


def test_kcov_pcs_that_had_no_room_are_noticed(
    executor: GuestExecutor, host: DeviceHost, guest: Here
) -> None:
    def drop() -> None:
        (stream,) = host.device._streams.values()
        stream.dropped = 7

    guest.command = lambda: host.call(drop)
    with pytest.raises(IncompleteError, match="the PCs are incomplete: 7 did not fit"):
        kcov(executor)
