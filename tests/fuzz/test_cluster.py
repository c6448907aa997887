# SPDX-License-Identifier: Apache-2.0
"""Jobs on real workers of Dask: they vanish, the scheduler vanishes, the campaign vanishes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bridge.errors import InfrastructureError
from bridge.fuzz.cluster import WORKERS, WORKERS_LOG, Cluster, adopt_leftovers
from bridge.fuzz.hub import Hub, JobState
from bridge.fuzz.store import Store, case_name, read_cases
from tests.support import MARK, wait_until_gone
from tests.support.dask import Scheduler
from tests.support.fuzz_jobs import FailingJob, PlayedJob, PrintingJob, stream_pcs

pytestmark = pytest.mark.first

LENGTH = 120
VALUES = {"length": LENGTH, "rate": 40, "finding": True}
EVERYTHING = stream_pcs(0, LENGTH) | stream_pcs(1, LENGTH)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "out", {}) as made:
        yield made


@pytest.fixture
def hub(store: Store) -> Iterator[Hub]:
    made = Hub(store, 2)
    yield made
    made.close()


def step_until(cluster: Cluster, done: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, cluster._hub.view()
        cluster.step(0.2)


def workers(hub: Hub) -> list[int]:
    """The processes in which jobs run."""
    return [
        int(job.figures.more["process"])
        for job in hub.view().jobs
        if job.state is JobState.RUNNING and "process" in job.figures.more
    ]


def assert_kept(store: Store, announced: list[str]) -> None:
    listed = [case.name for case in read_cases(store.directory).cases]
    assert set(announced) <= set(listed)
    for name in announced:
        assert case_name((store.corpus / name).read_bytes()) == name


def gone(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"


def test_workers_that_are_killed_start_again_and_lose_nothing(hub: Hub, store: Store) -> None:
    killed: list[int] = []
    with Cluster(hub, store, PlayedJob, 2, values=VALUES) as cluster:
        for _ in range(2):
            step_until(cluster, lambda: bool(set(workers(hub)) - set(killed)))
            step_until(cluster, lambda: len(store) > 5)
            pid = min(set(workers(hub)) - set(killed))
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            announced = list(store.since(0))
        step_until(cluster, lambda: store.covered == EVERYTHING)
        step_until(cluster, lambda: len(set(workers(hub)) - set(killed)) == 2)
        running = workers(hub)
        starts = [job.starts for job in hub.view().jobs]
        assert cluster.stop()
    view = hub.view()
    assert [job.starts for job in view.jobs] == starts
    assert sum(job.starts for job in view.jobs) >= 2 + len(killed)
    assert [job.state for job in view.jobs] == [JobState.ENDED] * 2
    assert any("vanished" in problem for problem in view.problems)
    assert_kept(store, announced)
    assert view.findings == 1
    assert all(gone(pid) for pid in running + killed)


def test_scheduler_that_dies_loses_nothing_and_resume_goes_on(hub: Hub, store: Store) -> None:
    with Scheduler(workers=1, vms=2) as scheduler:
        with Cluster(
            hub, store, PlayedJob, 2, values=VALUES, scheduler=scheduler.address
        ) as cluster:
            step_until(cluster, lambda: len(store) > 20)
            scheduler.kill()
            with pytest.raises(InfrastructureError, match="went away") as caught:
                step_until(cluster, lambda: False)
        assert "--resume" in caught.value.hint
        announced = list(store.since(0))
    hub.close()
    store.close()
    assert_kept(store, announced)
    with (
        Store.resume(store.directory) as again,
        contextlib.closing(Hub(again, 2)) as next_hub,
        Scheduler(workers=1, vms=2) as scheduler,
    ):
        adopt_leftovers(next_hub, again)
        with Cluster(
            next_hub, again, PlayedJob, 2, values=VALUES, scheduler=scheduler.address
        ) as cluster:
            step_until(cluster, lambda: again.covered == EVERYTHING)
            assert cluster.stop()
        assert_kept(again, announced)


def test_scheduler_that_is_not_there_is_an_error(
    hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.fuzz.cluster._CONNECT", 1.0)
    with pytest.raises(InfrastructureError, match="cannot be reached") as caught:
        Cluster(hub, store, PlayedJob, 2, scheduler="tcp://127.0.0.1:9")
    assert "dask scheduler" in caught.value.hint


def test_scheduler_without_room_for_vms_is_an_error(
    hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Scheduler(workers=0, vms=0) as scheduler:
        monkeypatch.setattr("bridge.fuzz.cluster._CONNECT", 3.0)
        with pytest.raises(InfrastructureError, match="no worker with the resource 'vm'") as caught:
            Cluster(hub, store, PlayedJob, 2, scheduler=scheduler.address)
    assert f"dask worker {scheduler.address}" in caught.value.hint


def test_jobs_that_cannot_run_end_the_campaign(
    hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.fuzz.placement._LONGEST_PAUSE", 0.1)
    monkeypatch.setattr("bridge.fuzz.placement._QUICK_FAILURES", 2)
    with Cluster(hub, store, FailingJob, 2) as cluster:
        with pytest.raises(InfrastructureError, match="no job can run") as caught:
            step_until(cluster, lambda: False)
        assert "there is no afl-fuzz" in caught.value.evidence
        assert hub.view().jobs[0].state is JobState.FAILED


def test_workers_print_into_their_log(
    hub: Hub, store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    with Cluster(hub, store, PrintingJob, 1, values=VALUES) as cluster:
        step_until(cluster, lambda: len(store) > 2)
        # Dask's own pages are nobody's business, and no port of all interfaces is taken.
        address = cluster._client.cluster.scheduler.http_server.address
        assert cluster.stop()
    assert address == "127.0.0.1"
    assert capfd.readouterr() == ("", "")
    lines = (store.jobs / WORKERS / WORKERS_LOG).read_text().splitlines()
    for line in ("printed by the job", "complained by the job", "printed by a program"):
        assert line in lines


INTERRUPTED = """
import sys
from pathlib import Path
from bridge.fuzz.cluster import Cluster
from bridge.fuzz.hub import Hub
from bridge.fuzz.store import Store
from tests.support.fuzz_jobs import PlayedJob

def tell(text):
    print(text, flush=True)

if __name__ == "__main__":
    with Store.create(Path(sys.argv[1]), {}) as store:
        try:
            with Cluster(Hub(store, 2), store, PlayedJob, 2, progress=tell) as cluster:
                tell("started")
                while True:
                    cluster.step(0.2)
        except KeyboardInterrupt:
            sys.exit(130)
"""


@pytest.mark.parametrize("seconds", [0.3, 1.5])
def test_interrupt_while_workers_start_prints_nothing(tmp_path: Path, seconds: float) -> None:
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root, MARK: str(tmp_path)},
        start_new_session=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "starting 2 local workers\n"
        time.sleep(seconds)
        # As the terminal does: to all of the foreground.
        os.killpg(child.pid, signal.SIGINT)
        out, err = child.communicate(timeout=120)
    assert child.returncode == 130
    assert (out.replace("started\n", ""), err) == ("", "")
    wait_until_gone(tmp_path)


CAMPAIGN = """
import sys
from pathlib import Path
from bridge.fuzz.cluster import Cluster, adopt_leftovers
from bridge.fuzz.hub import Hub
from bridge.fuzz.store import Store
from tests.support.fuzz_jobs import PlayedJob

if __name__ == "__main__":
    place = Path(sys.argv[1])
    with (Store.resume if place.exists() else Store.create)(place, {}) as store:
        hub = Hub(store, 2)
        adopt_leftovers(hub, store)
        told = 0
        with Cluster(hub, store, PlayedJob, 2, values={"length": 400, "rate": 100}) as cluster:
            while True:
                cluster.step(0.2)
                for name in store.since(told):
                    print("announced", name, flush=True)
                    told += 1
                for job in hub.view().jobs:
                    if "process" in job.figures.more:
                        print("worker", int(job.figures.more["process"]), flush=True)
"""


def test_campaign_that_is_killed_loses_nothing_and_leaves_no_process(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    announced: list[str] = []
    pids: set[int] = set()
    with subprocess.Popen(
        [sys.executable, "-c", CAMPAIGN, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            kind, _, value = line.strip().partition(" ")
            if kind == "announced":
                announced.append(value)
            else:
                pids.add(int(value))
            if len(announced) > 30 and len(pids) == 2:
                break
        child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with Store.resume(tmp_path / "out") as store:
        assert_kept(store, announced)
        # What the jobs had found and not reported is there, too.
        with contextlib.closing(Hub(store, 2)) as hub:
            adopt_leftovers(hub, store)
