# SPDX-License-Identifier: Apache-2.0
"""A job beside its runner, with a real hub at the other end of a link that fails on demand."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bridge.errors import InfrastructureError
from bridge.fuzz.cluster import adopt_leftovers
from bridge.fuzz.engine import EngineError
from bridge.fuzz.hub import Answer, Hub, JobState
from bridge.fuzz.job import JobFactory, JobSettings, News
from bridge.fuzz.job_runner import OUTBOX_DIRECTORY, HubGoneError, run_job
from bridge.fuzz.outbox import Outbox, leftover_reports
from bridge.fuzz.store import Offer, Store
from tests.support.fuzz_jobs import FailingJob, PlayedJob, stream_pcs

LENGTH = 30


class Way:
    """A link to a hub in this process; ``before`` may raise, or return False to lose an answer."""

    def __init__(self, hub: Hub, before: Callable[[], bool] = lambda: True) -> None:
        self.hub = hub
        self.before = before
        self.answers: list[bytes] = []

    def send(self, message: bytes) -> None:
        deliver = self.before()
        (answer,) = self.deal(message)
        if deliver:
            self.answers.append(answer.message)

    def deal(self, message: bytes) -> list[Answer]:
        return self.hub.receive([message])

    def receive(self, seconds: float) -> bytes | None:
        if not self.answers:
            time.sleep(seconds)
            return None
        return self.answers.pop()


class Eager(PlayedJob):
    """Does not come without news the first time."""

    def take_news(self) -> News:
        news = super().take_news()
        deadline = time.monotonic() + 60
        while not self._executions and time.monotonic() < deadline:
            time.sleep(0.02)
            more = super().take_news()
            news = replace(more, findings=[*news.findings, *more.findings])
        return news


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "out", {}) as made:
        yield made


@pytest.fixture
def hub(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("bridge.fuzz.job_runner._TICK", 0.05)
    monkeypatch.setattr("bridge.fuzz.hub._FASTEST", 0.05)
    made = Hub(store, 2)
    yield made
    made.close()


def settings(store: Store, number: int = 0, rate: float = 0) -> JobSettings:
    values = {"length": LENGTH, "rate": rate, "finding": True}
    return JobSettings("c", number, store.jobs / str(number), values)


def play(
    hub: Hub, store: Store, way: Way, job: JobFactory = PlayedJob, number: int = 0, rate: float = 0
) -> str:
    return run_job(
        job,
        settings(store, number, rate),
        lambda run: contextlib.nullcontext(way),
        worker="here",
        ordered=True,
    )


def stop_when(hub: Hub, done: Callable[[], bool]) -> Callable[[], bool]:
    def before() -> bool:
        if done():
            hub.stop()
        return True

    return before


def outboxes(store: Store, number: int = 0) -> list[Path]:
    return list((store.jobs / str(number) / OUTBOX_DIRECTORY).iterdir())


def test_run_carries_all_cases_and_findings_to_the_hub(hub: Hub, store: Store) -> None:
    way = Way(hub, stop_when(hub, lambda: stream_pcs(0, LENGTH) == store.covered))
    assert play(hub, store, way) == ""
    assert len(store) == LENGTH
    assert [path.name for path in store.findings.iterdir()] == ["kernel-BUG-at-fs-9p-0123"]
    job = hub.view().jobs[0]
    assert (job.state, job.executions, job.worker) == (JobState.ENDED, 10 * LENGTH, "here")
    assert outboxes(store) == []


def test_run_gives_the_job_what_the_campaign_has(hub: Hub, store: Store) -> None:
    store.add([Offer(b"seed", 0, 0, seed=True)])
    other = Hub(store, 2)
    play(other, store, Way(other, stop_when(other, lambda: len(store) == LENGTH + 1)))
    given: list[float] = []

    def done() -> bool:
        given.append(other.view().jobs[1].figures.more.get("given", 0))
        return stream_pcs(1, LENGTH) <= store.covered

    other._stopping = False
    play(other, store, Way(other, stop_when(other, done)), number=1)
    assert max(given) == LENGTH + 1
    other.close()


def test_answer_that_is_lost_is_asked_for_again(
    hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.fuzz.job_runner._RESEND", 0.05)
    calls = 0

    def before() -> bool:
        nonlocal calls
        calls += 1
        if stream_pcs(0, LENGTH) == store.covered:
            hub.stop()
        return calls % 2 == 0

    assert play(hub, store, Way(hub, before)) == ""
    assert len(store) == LENGTH
    assert hub.executions == 10 * LENGTH
    assert outboxes(store) == []


def test_hub_that_is_gone_ends_the_job_and_the_next_run_sends_what_is_left(
    hub: Hub, store: Store
) -> None:
    pids: list[int] = []

    class Watched(Eager):
        def start(self, settings: JobSettings, seeds: Sequence[bytes], /) -> None:
            super().start(settings, seeds)
            assert self._process is not None
            pids.append(self._process.pid)

    calls = 0

    def gone() -> bool:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise HubGoneError("the scheduler went away")
        return True

    with pytest.raises(HubGoneError):
        play(hub, store, Way(hub, gone), job=Watched)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    assert len(store) == 0
    (left,) = outboxes(store)
    assert list(left.glob("*.report"))
    # The next run plays nothing of its own.
    nothing = JobSettings("c", 0, store.jobs / "0", {"length": 0})
    hub.stop()
    run_job(
        PlayedJob, nothing, lambda run: contextlib.nullcontext(Way(hub)), worker="", ordered=True
    )
    assert len(store) > 0
    assert list(store.findings.iterdir())
    assert outboxes(store) == []


def test_hub_that_never_answers_is_gone(
    hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.fuzz.job_runner._PATIENCE", 0.2)
    with pytest.raises(HubGoneError, match="did not answer"):
        play(hub, store, Way(hub, lambda: False))
    assert outboxes(store) == []


def test_hub_that_cannot_keep_cases_leaves_them_in_the_outbox(hub: Hub, store: Store) -> None:
    calls = 0

    class FullLater(Way):
        def deal(self, message: bytes) -> list[Answer]:
            nonlocal calls
            calls += 1
            return (self.hub.receive if calls < 2 else self.hub.refuse)([message])

    assert play(hub, store, FullLater(hub), job=Eager) == ""
    assert len(store) == 0
    assert outboxes(store)
    assert adopt_leftovers(hub, store) > 0
    assert stream_pcs(0, LENGTH) >= store.covered != set()
    assert outboxes(store) == []


def test_job_that_fails_is_told_to_the_hub(hub: Hub, store: Store) -> None:
    assert "there is no afl-fuzz" in play(hub, store, Way(hub), job=FailingJob)
    assert hub.view().jobs[0].state is JobState.FAILED
    assert "there is no afl-fuzz" in hub.view().jobs[0].error


def test_job_whose_engine_fails_says_what_the_engine_said(hub: Hub, store: Store) -> None:
    class Refused(PlayedJob):
        def start(self, settings: JobSettings, seeds: Sequence[bytes], /) -> None:
            raise EngineError(
                "afl-fuzz exited with status 1", evidence="No instrumentation", hint="add a seed"
            )

    error = play(hub, store, Way(hub), job=Refused)
    assert error == "afl-fuzz exited with status 1\n  | No instrumentation\nhint: add a seed"


def test_run_that_is_killed_leaves_what_it_found(hub: Hub, store: Store) -> None:
    program = f"""
import contextlib, time
from pathlib import Path
from bridge.fuzz.job import JobSettings
from bridge.fuzz.job_runner import run_job
from bridge.fuzz.wire import Reply, decode_report, encode_reply
from tests.support.fuzz_jobs import PlayedJob

class Once:
    # Answers the first report only.

    answer = None

    def send(self, message):
        if decode_report(message).sequence == 1:
            self.answer = encode_reply(Reply(1, interval=0.5))

    def receive(self, seconds):
        answer, self.answer = self.answer, None
        if not answer:
            time.sleep(0.05)
        return answer

run_job(
    PlayedJob,
    JobSettings("c", 0, Path({str(store.jobs / "0")!r}), {{"length": {LENGTH}, "rate": 100}}),
    lambda run: contextlib.nullcontext(Once()),
    worker="",
    ordered=True,
)
"""
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": root}
    ) as child:
        place = store.jobs / "0" / OUTBOX_DIRECTORY
        deadline = time.monotonic() + 60
        while not list(place.glob("*/*.report")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # In use: left alone.
        with leftover_reports(place) as reports:
            assert reports == []
        child.send_signal(signal.SIGKILL)
    assert adopt_leftovers(hub, store) > 0
    assert store.covered
    assert store.covered <= stream_pcs(0, LENGTH)
    assert outboxes(store) == []


def test_leftovers_stay_if_they_cannot_be_merged(tmp_path: Path) -> None:
    with Outbox(tmp_path) as outbox:
        outbox.put(b"report")

    def merge() -> None:
        with leftover_reports(tmp_path) as reports:
            assert reports == [b"report"]
            raise InfrastructureError("the disk is full")

    with pytest.raises(InfrastructureError):
        merge()
    with leftover_reports(tmp_path) as reports:
        assert reports == [b"report"]
    assert list(tmp_path.iterdir()) == []
