# SPDX-License-Identifier: Apache-2.0
"""The hub: what it keeps, what it tells whom, and what it knows of its jobs."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bridge.errors import InfrastructureError
from bridge.fuzz.hub import EDGES_FILE, Hub, JobState
from bridge.fuzz.job import STARTING, Figures, FoundFinding
from bridge.fuzz.novelty import Coverage, CoverageSet, edge
from bridge.fuzz.store import Offer, Store, case_name, read_cases
from bridge.fuzz.wire import (
    Reply,
    Report,
    ReportedCase,
    Segment,
    decode_reply,
    decode_segment,
    encode_report,
)


class Clock:
    """A clock that the test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "out", {}) as made:
        yield made


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hub(store: Store, clock: Clock) -> Iterator[Hub]:
    made = Hub(store, 3, clock=clock)
    yield made
    made.close()


def found(data: bytes, *pcs: int) -> ReportedCase:
    return ReportedCase(data, CoverageSet().take([pcs], ordered=True))


def send(hub: Hub, *reports: Report) -> list[Reply]:
    answers = hub.receive([encode_report(report) for report in reports])
    assert [answer.run for answer in answers] == [report.run for report in reports]
    return [decode_reply(answer.message) for answer in answers]


def given(reply: Reply) -> list[bytes]:
    return [case for segment in segments(reply) for case in segment.cases]


def segments(reply: Reply) -> Sequence[Segment]:
    return [decode_segment(message) for message in reply.segments]


def test_case_with_new_coverage_is_on_the_disk_when_it_is_answered(hub: Hub, store: Store) -> None:
    (reply,) = send(
        hub, Report(0, "a", 7, 0, "w", [found(b"one", 1, 2)], figures=Figures(executions=50))
    )
    assert (reply.sequence, reply.kept, reply.stop) == (7, True, False)
    (case,) = read_cases(store.directory).cases
    assert (case.name, case.pcs, case.executions) == (case_name(b"one"), (1, 2), 50)


def test_case_with_nothing_new_is_left_out(hub: Hub, store: Store) -> None:
    send(
        hub,
        Report(0, "a", 1, 0, cases=[found(b"one", 1, 2, 3)]),
        Report(1, "b", 1, 0, cases=[found(b"same", 1, 2, 3), found(b"part", 2, 3)]),
    )
    send(hub, Report(1, "b", 2, 1, cases=[found(b"again", 1, 2)]))
    assert list(store.since(0)) == [case_name(b"one")]


def test_case_with_a_new_edge_only_is_kept(hub: Hub, store: Store) -> None:
    send(hub, Report(0, "a", 1, 0, cases=[found(b"one", 1, 2, 3)]))
    send(hub, Report(1, "b", 1, 0, cases=[found(b"back", 3, 2, 1)]))
    assert list(store.since(0)) == [case_name(b"one"), case_name(b"back")]
    assert read_cases(store.directory).cases[1].pcs == ()


def test_job_gets_what_others_found_once_and_not_its_own(hub: Hub) -> None:
    send(hub, Report(0, "a", 1, 0, cases=[found(b"one", 1)]))
    (first,) = send(hub, Report(0, "a", 2, 0))
    (second,) = send(hub, Report(1, "b", 1, 0, cases=[found(b"two", 2)]))
    (third,) = send(hub, Report(0, "a", 3, first.position))
    (fourth,) = send(hub, Report(0, "a", 4, third.position))
    assert given(first) == []
    assert given(second) == [b"one"]
    assert given(third) == [b"two"]
    assert list(segments(third)[0].coverage.pcs) == [2]
    assert given(fourth) == []
    # A job that starts again has nothing.
    (again,) = send(hub, Report(0, "c", 1, 0))
    assert given(again) == [b"one", b"two"]


def test_large_corpus_travels_in_several_replies(hub: Hub) -> None:
    numbers = random.Random(1)
    cases = [found(numbers.randbytes(200_000), each) for each in range(20)]
    send(hub, Report(0, "a", 1, 0, cases=cases))
    got: list[bytes] = []
    position = count = 0
    more = True
    while more:
        (reply,) = send(hub, Report(1, "b", count, position))
        got += given(reply)
        position, more, count = reply.position, reply.more, count + 1
    assert got == [case.data for case in cases]
    assert count > 2


def test_report_that_is_sent_twice_counts_once(hub: Hub, store: Store) -> None:
    report = Report(0, "a", 1, 0, cases=[found(b"one", 1)], figures=Figures(executions=9))
    assert send(hub, report)[0].kept
    assert send(hub, report)[0].kept
    assert len(store) == 1
    assert hub.executions == 9


def test_seed_that_is_executed_gets_its_coverage(store: Store, clock: Clock) -> None:
    store.add([Offer(b"seed", 0, 0, seed=True), Offer(b"other", 0, 0, seed=True)])
    hub = Hub(store, 2, clock=clock)
    (reply,) = send(hub, Report(0, "a", 1, 0))
    assert given(reply) == [b"seed", b"other"]
    send(hub, Report(0, "a", 2, reply.position, cases=[found(b"seed", 4, 5)]))
    assert [(each.name, each.seed, each.pcs) for each in read_cases(store.directory).cases] == [
        (case_name(b"seed"), True, ()),
        (case_name(b"other"), True, ()),
        (case_name(b"seed"), True, (4, 5)),
    ]
    # The others have the case, and learn what it covers.
    (reply,) = send(hub, Report(1, "b", 1, 0))
    assert given(reply) == [b"seed", b"other"]
    assert [pc for each in segments(reply) for pc in each.coverage.pcs] == [4, 5]
    (then,) = send(hub, Report(1, "b", 2, reply.position, cases=[found(b"more", 6)]))
    assert given(send(hub, Report(0, "a", 3, reply.position))[0]) == [b"more"]
    assert given(then) == []
    hub.close()


def test_resumed_hub_knows_pcs_edges_and_corpus(store: Store, clock: Clock) -> None:
    hub = Hub(store, 1, clock=clock)
    send(hub, Report(0, "a", 1, 0, cases=[found(b"one", 1, 2, 3)], figures=Figures(700)))
    clock.now += 60
    send(hub, Report(0, "a", 2, 0, cases=[found(b"two", 3, 1)], figures=Figures(900)))
    hub.close()
    # A kill may tear the last edge.
    path = store.directory / EDGES_FILE
    assert path.stat().st_size == 3 * 8
    path.write_bytes(path.read_bytes() + b"\1\2\3")
    store.close()
    with Store.resume(store.directory) as again:
        hub = Hub(again, 1, clock=Clock())
        assert (hub.executions, hub.seconds) == (900, 60)
        view = hub.view()
        assert (view.blocks, view.edges, view.corpus) == (3, 3, 2)
        (reply,) = send(hub, Report(0, "x", 1, 0, cases=[found(b"three", 2, 3)]))
        assert given(reply) == [b"one", b"two"]
        known = {each for segment in segments(reply) for each in segment.coverage.edges}
        assert known == {edge(1, 2), edge(2, 3), edge(3, 1)}
        send(hub, Report(0, "x", 2, 0, cases=[found(b"four", 3, 2)]))
        assert again.since(2) == [case_name(b"four")]
        assert path.stat().st_size == 4 * 8
        hub.close()


def test_run_that_is_replaced_is_told_to_end_and_keeps_its_executions(
    hub: Hub, store: Store
) -> None:
    send(hub, Report(0, "old", 1, 0, "w1", figures=Figures(executions=100)))
    send(hub, Report(0, "new", 1, 0, "w2", figures=Figures(executions=10)))
    (reply,) = send(hub, Report(0, "old", 2, 0, "w1", [found(b"late", 9)], figures=Figures(120)))
    assert reply.stop
    assert reply.kept
    assert len(store) == 1
    job = hub.view().jobs[0]
    assert (job.worker, job.starts, job.executions, job.state) == ("w2", 2, 110, JobState.RUNNING)
    assert "w1 vanished, w2 goes on" in hub.view().problems[0]


def test_silent_job_keeps_its_vm(hub: Hub, clock: Clock) -> None:
    send(
        hub,
        Report(0, "a", 1, 0, "w1", figures=Figures(1, vms=1, stability=0.5)),
        Report(1, "b", 1, 0, "w2", figures=Figures(1, vms=1, stability=1.0)),
    )
    view = hub.view()
    assert (view.vms, view.stability, view.workers()) == (2, 0.75, {"w1": 1, "w2": 1})
    clock.now += 45
    send(hub, Report(1, "b", 2, 0, "w2", figures=Figures(2, vms=1, stability=1.0)))
    view = hub.view()
    assert [job.state for job in view.jobs] == [
        JobState.SILENT,
        JobState.RUNNING,
        JobState.WAITING,
    ]
    assert (view.vms, view.stability, view.workers()) == (2, 0.75, {"w1": 1, "w2": 1})
    hub.retire(0, "its worker w1 is silent")
    view = hub.view()
    assert (view.vms, view.stability, view.workers()) == (1, 1.0, {"w2": 1})


def test_failed_job_is_told(hub: Hub) -> None:
    (reply,) = send(
        hub, Report(2, "a", 1, 0, ended=True, error="Traceback ...\nOSError: no qemu\n")
    )
    assert reply.stop
    assert hub.view().jobs[2].state is JobState.FAILED
    assert hub.view().problems == ("job 2 failed: OSError: no qemu",)


def test_job_that_starts_is_not_silent_and_its_error_is_told_with_the_hint(
    hub: Hub, clock: Clock
) -> None:
    send(hub, Report(0, "a", 1, 0, "w1", figures=Figures(state=STARTING)))
    clock.now += 600
    job = hub.view().jobs[0]
    assert (job.state, job.starting) == (JobState.RUNNING, True)
    error = "afl-fuzz ended: No instrumentation\n  | more\nhint: add a seed\n"
    send(hub, Report(0, "a", 2, 0, "w1", ended=True, error=error))
    assert not hub.view().jobs[0].starting
    assert hub.view().problems == (
        "job 0 failed: afl-fuzz ended: No instrumentation (hint: add a seed)",
    )


def test_stop_reaches_each_job(hub: Hub) -> None:
    send(hub, Report(0, "a", 1, 0))
    hub.stop()
    assert send(hub, Report(0, "a", 2, 0))[0].stop
    assert send(hub, Report(0, "a", 3, 0, ended=True))[0].stop
    assert hub.view().jobs[0].state is JobState.ENDED


def test_messages_that_make_no_sense_are_left_out_and_told(hub: Hub) -> None:
    assert hub.receive([b"", b"\0nonsense", encode_report(Report(99, "a", 1, 0))]) == []
    assert len(hub.view().problems) == 3


def test_finding_is_kept_once(hub: Hub, store: Store) -> None:
    finding = FoundFinding("BUG-in-p9-01", {"case": b"x"})
    send(hub, Report(0, "a", 1, 0, findings=[finding]), Report(1, "b", 1, 0, findings=[finding]))
    assert [path.name for path in store.findings.iterdir()] == ["BUG-in-p9-01"]
    assert hub.view().findings == 1


def test_finding_with_a_bad_name_is_kept_under_another(hub: Hub, store: Store) -> None:
    send(hub, Report(0, "a", 1, 0, findings=[FoundFinding("../../x", {"a/b": b"evidence"})]))
    (place,) = store.findings.iterdir()
    assert place.name.startswith("unnamed-")
    assert [path.read_bytes() for path in place.iterdir()] == [b"evidence"]


def test_full_disk_answers_nothing_and_loses_nothing(hub: Hub, store: Store) -> None:
    message = encode_report(Report(0, "a", 5, 0, cases=[found(b"y" * 5000, 1)]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InfrastructureError, match="cannot write"):
            hub.receive([message])
        (answer,) = hub.refuse([message])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    reply = decode_reply(answer.message)
    assert (reply.sequence, reply.kept, reply.stop) == (5, False, True)
    assert hub.view().blocks == 0
    # With room, the same report is new.
    assert decode_reply(hub.receive([message])[0].message).kept
    assert len(store) == 1


def test_adopt_merges_what_was_never_sent(hub: Hub, store: Store) -> None:
    reports = [
        encode_report(Report(1, "dead", 1, 0, cases=[found(b"one", 1)])),
        encode_report(Report(1, "dead", 2, 0, findings=[FoundFinding("WARN-01", {})])),
        b"torn",
    ]
    assert hub.adopt(reports) == 2
    assert len(store) == 1
    assert (store.findings / "WARN-01").is_dir()
    assert hub.view().jobs[1].starts == 0


def test_interval_grows_with_jobs(store: Store) -> None:
    for jobs, least, most in ((1, 1, 1), (100, 2, 3), (1000, 20, 30), (100_000, 30, 30)):
        hub = Hub(store, jobs)
        assert least <= hub.interval <= most
        hub.close()


def test_coverage_of_nothing_is_nothing(hub: Hub, store: Store) -> None:
    send(hub, Report(0, "a", 1, 0, cases=[ReportedCase(b"blind", Coverage.of())]))
    assert len(store) == 0
