# SPDX-License-Identifier: Apache-2.0
"""A campaign on workers in network namespaces of their own, one of which is killed again and again.

``make fuzz-workers`` runs it as root: it takes minutes, and is no part of the whole suite, where
``test_cluster.py`` kills workers of this machine. These variables say how long it is and what runs:
``KCOV_BRIDGE_FUZZ_WORKERS_SECONDS``, ``KCOV_BRIDGE_FUZZ_WORKERS_EVERY`` (seconds between two
kills) and ``KCOV_BRIDGE_FUZZ_WORKERS_REAL`` (how many of the jobs have a VM and an engine; the
others play cases).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.config import Settings
from bridge.fuzz.campaign_job import Plan
from bridge.fuzz.cluster import Cluster
from bridge.fuzz.findings import FINDING
from bridge.fuzz.hub import CampaignView, Hub, JobState
from bridge.fuzz.store import Store, case_name, read_cases
from tests.support import MARK, wait_until_gone
from tests.support.dask import Scheduler
from tests.support.fuzz_jobs import RealOrPlayedJob
from tests.support.namespaces import Namespaces
from tests.support.programs import guest_image

pytestmark = pytest.mark.vm

JOBS = 4
REAL = int(os.environ.get("KCOV_BRIDGE_FUZZ_WORKERS_REAL", "2"))
SECONDS = float(os.environ.get("KCOV_BRIDGE_FUZZ_WORKERS_SECONDS", "300"))
EVERY = float(os.environ.get("KCOV_BRIDGE_FUZZ_WORKERS_EVERY", "30"))
READY_SECONDS = 600.0
AGAIN_SECONDS = 300.0
"""How long a job may take until it executes again; a VM starts within."""
PLAYED = {"length": 100_000, "rate": 5, "finding": True}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("harness") / "workers.so"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    source = Path(__file__).with_name("workers_harness.c")
    subprocess.run(["cc", *flags, "-o", made, source], check=True)
    return made


class Watched:
    """A campaign, what it announced, and what each job had executed."""

    def __init__(self, cluster: Cluster, hub: Hub, store: Store) -> None:
        self._cluster = cluster
        self._hub = hub
        self._store = store
        self.began = time.monotonic()
        self.cases: list[str] = []
        self.findings = 0
        self.problems: list[str] = []
        self.killed: dict[int, tuple[float, int]] = {}
        """The jobs whose worker was killed: when, and their executions then."""
        self.again: list[tuple[int, float]] = []
        """The jobs that executed again, and after how many seconds."""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def step(self) -> CampaignView:
        self._cluster.step(0.2)
        view = self._hub.view()
        for problem in view.problems:
            if problem not in self.problems:
                self.problems.append(problem)
                print(f"{self.seconds:.0f} s: {problem}", flush=True)
        self.cases += list(self._store.since(len(self.cases)))
        self.findings = max(self.findings, view.findings)
        for number, (moment, executions) in list(self.killed.items()):
            if view.jobs[number].executions > executions:
                self.again.append((number, time.monotonic() - moment))
                del self.killed[number]
        return view

    def executing(self) -> list[int]:
        """The jobs that have executed something in their present run."""
        return [
            job.number
            for job in self._hub.view().jobs
            if job.state is JobState.RUNNING and job.figures.executions
        ]


@contextlib.contextmanager
def nothing_left(place: Path) -> Iterator[None]:
    """No process is left of what runs inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, str(place))
        yield
    wait_until_gone(place)


def test_workers_in_namespaces_that_are_killed_lose_nothing(harness: Path, tmp_path: Path) -> None:
    assert os.geteuid() == 0, "namespaces take root's rights"
    guest_image()
    plan = Plan(
        settings=Settings(target="none", source="kernel").changed(),
        harness=str(harness),
        target_state="restart",
        random_seed=1,
    )
    values = {**PLAYED, "real": REAL, "plan": plan.as_values()}
    out = tmp_path / "out"
    with nothing_left(tmp_path):
        with (
            Namespaces(JOBS + 1) as spaces,
            Scheduler(0, 0, spaces.addresses[JOBS], spaces.enter(JOBS)) as scheduler,
            Store.create(out, {}) as store,
            contextlib.closing(Hub(store, JOBS)) as hub,
        ):
            names = [f"worker{each}" for each in range(JOBS)]
            workers = [
                scheduler.start_worker(1, *spaces.enter(each), name=name)
                for each, name in enumerate(names)
            ]
            with Cluster(
                hub, store, RealOrPlayedJob, JOBS, values=values, scheduler=scheduler.address
            ) as cluster:
                watched = Watched(cluster, hub, store)
                while len(watched.executing()) < JOBS:
                    assert watched.seconds < READY_SECONDS, hub.view()
                    watched.step()
                print(f"all {JOBS} jobs execute after {watched.seconds:.0f} s", flush=True)
                kills, began, before = 0, watched.seconds, 0
                while watched.seconds - began < SECONDS:
                    view = watched.step()
                    if watched.seconds - began < (kills + 1) * EVERY:
                        continue
                    chosen = kills % JOBS
                    # The program that entered the namespace became the worker.
                    workers[chosen].kill()
                    workers[chosen].wait()
                    hit = [job for job in view.jobs if job.worker.endswith(f"/{names[chosen]}")]
                    for job in hit:
                        watched.killed[job.number] = (time.monotonic(), job.executions)
                    kills += 1
                    names[chosen] = f"worker{chosen}-{kills}"
                    workers[chosen] = scheduler.start_worker(
                        1, *spaces.enter(chosen), name=names[chosen]
                    )
                    assert view.executions > before
                    before = view.executions
                    print(
                        f"kill {kills}: the worker of job {[job.number for job in hit]} "
                        f"({[job.figures.state for job in hit]}); {before:,} executions, "
                        f"{len(watched.cases):,} cases, {watched.findings} findings, "
                        f"{view.vms} VMs",
                        flush=True,
                    )
                end = time.monotonic() + AGAIN_SECONDS
                while watched.killed:
                    assert time.monotonic() < end, hub.view()
                    watched.step()
                assert cluster.stop()
                view = watched.step()
        compare(out, watched)
    assert not spaces.left()
    for number, seconds in watched.again:
        print(f"job {number} executed again {seconds:.1f} s after a kill")
    print(
        f"{kills} kills in {SECONDS:g} s: {view.executions:,} executions, {len(watched.cases):,} "
        f"cases and {watched.findings} findings announced, all on the disk; starts of the jobs: "
        f"{[job.starts for job in view.jobs]}"
    )
    assert sum(job.starts for job in view.jobs) >= JOBS + kills
    assert watched.findings


def compare(out: Path, watched: Watched) -> None:
    """What was announced is on the disk, and whole."""
    listed = {case.name for case in read_cases(out).cases}
    assert watched.cases
    assert set(watched.cases) <= listed
    for name in watched.cases:
        assert case_name((out / "corpus" / name).read_bytes()) == name
    folders = [folder for folder in (out / "findings").iterdir() if (folder / "case").is_file()]
    assert len(folders) >= watched.findings
    for folder in folders:
        if (folder / FINDING).exists():
            assert json.loads((folder / FINDING).read_text())["sha256"]
