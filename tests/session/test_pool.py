# SPDX-License-Identifier: Apache-2.0
"""Sessions in processes of their own."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from bridge.config import Settings
from bridge.errors import InfrastructureError, RunTimeoutError, UsageError
from bridge.session.pool import Pool, Worker
from bridge.session.session import Session
from bridge.session.stats import Stats

SETTINGS = Settings(target="none", source="python", syscall_pcs=True)


class Odd:
    """A service of a caller's own."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def double(self, number: int) -> int:
        return 2 * number

    def divide(self, number: int) -> float:
        return 1 / number

    def thread(self) -> object:
        return threading.current_thread()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def pid(self) -> int:
        return os.getpid()


def test_pool_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="a pool of 0 workers"):
        Pool(0, SETTINGS)
    with pytest.raises(UsageError, match="2 workers are to share 1 settings"):
        Pool(2, [SETTINGS])


def test_worker_whose_session_fails_raises_what_it_raised() -> None:
    settings = SETTINGS.replace(image="no-such-image")
    with Worker(settings) as worker:
        with pytest.raises(UsageError, match="no image 'no-such-image'"):
            worker.wait_ready()
        with pytest.raises(InfrastructureError, match="a worker exited with status 2"):
            worker.wait_ready()


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A worker without a session: it answers with 2 MB, and the length of what it was given."""
    worker = Worker.__new__(Worker)
    ours, theirs = (Connection(sock.detach()) for sock in socket.socketpair())
    worker._connection = ours
    worker._asked = worker._answered = 0
    worker._come = deque()
    worker.stats = Stats()

    def serve() -> None:
        with contextlib.suppress(EOFError), theirs:
            for number in itertools.count(1):
                _, (argument,), _ = theirs.recv()
                answer = bytes(2 << 20), len(argument)
                theirs.send_bytes(pickle.dumps((number, True, answer)))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield worker
    ours.close()
    thread.join(20)


@pytest.mark.parametrize("forgotten", [True, False])
def test_ask_much_while_a_long_answer_is_due_does_not_hang(worker: Worker, forgotten: bool) -> None:
    worker.ask("kcov", b"1")
    if forgotten:
        worker.forget()
    asking = threading.Thread(target=worker.ask, args=("put", bytes(3 << 20)), daemon=True)
    asking.start()
    asking.join(20)
    assert not asking.is_alive()
    if not forgotten:
        assert worker.answer(20)[1] == 1
    assert worker.answer(20)[1] == 3 << 20


def test_worker_that_dies_says_how() -> None:
    with Worker(SETTINGS) as worker:
        worker._process.send_signal(signal.SIGKILL)
        with pytest.raises(InfrastructureError, match="was killed by SIGKILL"):
            worker.wait_ready()


@pytest.mark.vm
def test_pool_shares_work_and_outlives_what_a_request_raises(tmp_path: Path) -> None:
    with Pool(2, SETTINGS, tmp_path) as pool:
        assert [stats.target for stats in pool.wait_ready()] == ["none", "none"]
        assert all(worker.seconds for worker in pool.workers)
        commands = [(["sh", "-c", f"echo {number}"],) for number in range(5)]
        answers = dict(pool.map("kcov", commands))
        assert {number: answer.stdout for number, answer in answers.items()} == {
            number: f"{number}\n".encode() for number in range(5)
        }
        assert all(answer.pcs for answer in answers.values())
        assert all(stats.pcs > 0 for stats in pool.all("stats")), "both have worked"
        first = pool.workers[0]
        with pytest.raises(RunTimeoutError):
            first.call("run", "sleep 60", timeout=1)
        with pytest.raises(InfrastructureError, match="AttributeError"):
            first.call("no_such_thing")
        with pytest.raises(UsageError, match="asked nothing"):
            first.answer()
        first.call("reset")
        assert first.call("run", ["echo", "on"]).stdout == b"on\n"
    assert (tmp_path / "0/console.log").is_file()
    assert (tmp_path / "1/console.log").is_file()
    assert not any(worker.running for worker in pool.workers)


@pytest.mark.vm
def test_worker_serves_what_its_caller_needs() -> None:
    with Worker(SETTINGS, service=f"{__name__}:Odd") as worker:
        assert worker.call("double", 21) == 42
        with pytest.raises(InfrastructureError, match="ZeroDivisionError") as caught:
            worker.call("divide", 0)
        assert "return 1 / number" in caught.value.evidence
        with pytest.raises(InfrastructureError, match="cannot pickle"):
            worker.call("thread")
        worker.ask("sleep", 2)
        with pytest.raises(InfrastructureError, match=r"does not answer within 0\.1 s"):
            worker.answer(0.1)
        assert worker.call("double", 4) == 8, "not the answer that came late"
        pid = worker.call("pid")
        os.kill(pid, signal.SIGSTOP)
        worker.ask("double", 1)
        with pytest.raises(InfrastructureError, match="does not answer within"):
            worker.answer(0.2)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(InfrastructureError, match="was killed by SIGKILL"):
            worker.call("double", 2)


@pytest.mark.vm
def test_pool_gives_no_answers_of_work_that_was_abandoned() -> None:
    with Pool(2, SETTINGS, service=f"{__name__}:Odd") as pool:
        pool.wait_ready()
        for _ in pool.map("double", [(1,), (4,), (3,)]):
            break
        assert dict(pool.map("double", [(10,), (2,), (5,)])) == {0: 20, 1: 4, 2: 10}
        with pytest.raises(InfrastructureError, match="ZeroDivisionError"):
            list(pool.map("divide", [(0,), (0,)]))
        assert pool.all("double", 1) == [2, 2]
        pool.workers[0].ask("double", 50)
        assert pool.all("double", 3) == [6, 6]
        former = pool.map("double", [(7,), (8,), (9,)])
        next(former)
        assert pool.all("double", 4) == [8, 8]
        with pytest.raises(UsageError, match="other work before this map had ended"):
            next(former)
