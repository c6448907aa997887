# SPDX-License-Identifier: Apache-2.0
"""The jobs of a campaign on a cluster of Dask: one on this machine, or any other.

A job is a long task that takes one ``vm`` of a worker's resources. The campaign places each job on
a worker itself and starts it elsewhere when that vanishes: Dask's scheduler looks at what a worker
has in all, not at what is free, so it would let jobs queue at one worker beside an idle one.

Reports and replies (:mod:`bridge.fuzz.wire`) travel through queues of the scheduler, which every
worker can reach. The scheduler may vanish, too: each job keeps what was not confirmed
(:mod:`bridge.fuzz.outbox`) and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from bridge.errors import BridgeError, InfrastructureError, MissingDependencyError, UsageError
from bridge.fuzz.hub import Answer, Hub
from bridge.fuzz.job import JobFactory, JobSettings
from bridge.fuzz.job_runner import OUTBOX_DIRECTORY, HubGoneError, Link, run_job
from bridge.fuzz.outbox import leftover_reports
from bridge.fuzz.placement import Placement
from bridge.fuzz.store import JOBS_DIRECTORY, Store, read_campaign
from bridge.fuzz.worker_preload import LOG_KEY
from bridge.util.cache import cache_folder
from bridge.util.files import remove

__all__ = ["RESOURCE", "WORKERS", "WORKERS_LOG", "Cluster", "adopt_leftovers", "check_scheduler"]

RESOURCE: Final = "vm"
"""Name of the resource of which a job takes one."""

WORKERS: Final = "workers"
"""The directory of this machine's workers, in that of the jobs."""

WORKERS_LOG: Final = "log"
"""The file there with what targets and Dask print in the workers."""

_VANISHED: Final = 150.0
"""Seconds without a report after which a job is started elsewhere, whatever the scheduler says."""

_STARTS: Final = 1800.0
"""The same while a job starts: on a busy machine an image and a snapshot take many minutes."""

_CONNECT: Final = 15.0
"""Seconds in which the scheduler has to answer, and workers have to be there."""

_WORKERS_PER_SECOND: Final = 50
"""Of how many workers the campaign hears from the scheduler in a second."""

_LOCAL: Final[Mapping[str, Any]] = {
    # Dask's own measurements take more processor time than the campaign does.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.admin.system-monitor.disk": False,
    "distributed.worker.preload": ["bridge.fuzz.worker_preload"],
    # A job's worker may start processes by multiprocessing.
    "distributed.worker.daemon": False,
    # The slots of a busy machine must not be taken for dead.
    "distributed.scheduler.worker-ttl": "5 minutes",
    "distributed.deploy.lost-worker-timeout": "10 minutes",
    "distributed.comm.timeouts.connect": "60s",
}
"""Settings of Dask for a cluster on this machine."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a worker needs to run jobs."""

    token: str
    """Prefix of the names of queues; differs each time the campaign is started."""
    campaign: str
    out: str
    make_job: JobFactory
    values: Mapping[str, Any]
    ordered: bool


class Cluster:
    """Runs the jobs of a campaign; a context manager.

    Call :meth:`step` again and again, from one thread; each call exchanges messages.
    """

    def __init__(
        self,
        hub: Hub,
        store: Store,
        make_job: JobFactory,
        jobs: int,
        *,
        ordered: bool = True,
        values: Mapping[str, Any] | None = None,
        scheduler: str = "",
        progress: Callable[[str], object] = lambda text: None,
    ) -> None:
        """Connect to the cluster, or make one on this machine, and hand the jobs over.

        Args:
            hub: merges what the jobs report.
            store: the directory of the campaign.
            make_job: makes a job where it runs.
            jobs: how many.
            ordered: the sources give PCs in order, so edges count.
            values: settings for the jobs; values of JSON.
            scheduler: address of a scheduler of Dask; empty for a cluster on this machine.
            progress: takes a sentence about what takes long.

        Raises:
            MissingDependencyError: the package ``distributed`` is not installed.
            InfrastructureError: the scheduler cannot be reached, or has no worker with a ``vm``.
        """
        distributed = _distributed()
        self._hub = hub
        self._address = scheduler
        self._placement = Placement(jobs, time.monotonic)
        self._futures: list[Any] = [None] * jobs
        self._attempts = 0
        self._error = ""
        self._queues: dict[str, _Queue] = {}
        self._gone = False
        self._refusing = False
        self._look_again = 0.0
        self._plan = _Plan(
            f"kcov-bridge-{store.campaign.id[:8]}-{uuid.uuid4().hex[:12]}",
            store.campaign.id,
            str(store.directory.absolute()),
            make_job,
            dict(values or {}),
            ordered,
        )
        with contextlib.ExitStack() as stack:
            self._client: Any = stack.enter_context(
                self._remote(distributed, progress)
                if scheduler
                else _local(distributed, jobs, store.jobs / WORKERS, progress)
            )
            self._room = _Room(self._client)
            self._news = _Queue(self._client, f"{self._plan.token}-news")
            stack.callback(self._cancel)
            self._stack = stack.pop_all()

    def step(self, seconds: float = 1.0) -> int:
        """Wait for reports, merge and answer them, and look after the jobs.

        Args:
            seconds: how long to wait for the first report.

        Returns:
            how many reports there were.

        Raises:
            InfrastructureError: the scheduler went away, the store cannot be written, or no job can
                run. What the jobs have found is safe: the jobs keep it, or it is on the disk.
        """
        messages = self._receive(seconds)
        try:
            merge = self._hub.refuse if self._refusing else self._hub.receive
            answers = merge(messages)
        except BridgeError:
            # Nothing can be kept any more, so the jobs have to end and keep what they have.
            self._refusing = True
            with contextlib.suppress(InfrastructureError):
                self._send(self._hub.refuse(messages))
            raise
        self._send(answers)
        if time.monotonic() >= self._look_again:
            self._look_after_jobs()
        return len(messages)

    def stop(self, seconds: float = 60.0) -> bool:
        """Have all jobs end, and merge their last reports.

        Args:
            seconds: how long they may take.

        Returns:
            whether all have ended.

        Raises:
            InfrastructureError: the scheduler went away, or the store cannot be written.
        """
        self._hub.stop()
        self._placement.stop()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if all(future is None or future.done() for future in self._futures):
                return True
            self.step(0.2)
        return False

    def close(self) -> None:
        """Take the jobs back and leave the cluster; end it if it is this machine's own.

        Jobs that still run on other machines notice that the campaign is gone. Safe to call twice.
        """
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # The scheduler.

    @contextlib.contextmanager
    def _remote(self, distributed: Any, progress: Callable[[str], object]) -> Iterator[Any]:
        progress(f"connecting to the scheduler {self._address}")
        try:
            with _quiet():
                client = distributed.Client(
                    self._address, timeout=_CONNECT, set_as_default=False, name="kcov-bridge"
                )
        except (OSError, ValueError, TypeError) as error:
            raise _unreachable(self._address, error) from error
        try:
            self._await_workers(client, progress)
            yield client
        finally:
            with _quiet(), contextlib.suppress(Exception):
                client.close(timeout=5)

    def _await_workers(self, client: Any, progress: Callable[[str], object]) -> None:
        room = _Room(client)
        deadline = time.monotonic() + _CONNECT
        told = False
        while not (vms := sum(room().values())):
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"the scheduler {self._address} has no worker with the resource {RESOURCE!r}",
                    hint=f"start workers with `dask worker {self._address} --nthreads 2 "
                    f"--resources {RESOURCE}=2`, for 2 VMs each",
                )
            if not told:
                progress(f"waiting for a worker with the resource {RESOURCE!r}")
                told = True
            time.sleep(0.5)
        jobs = len(self._futures)
        if vms < jobs:
            progress(
                f"the cluster has room for {vms} VMs: {jobs - vms} of "
                f"{jobs} jobs wait for further workers"
            )

    def _receive(self, seconds: float) -> list[bytes]:
        with self._scheduler():
            first = self._news.get(seconds)
            if first is None:
                if self._client.status != "running":
                    raise ConnectionError("the connection is closed")
                return []
            return [first, *self._news.get_all()]

    def _send(self, answers: Sequence[Answer]) -> None:
        with self._scheduler():
            for answer in answers:
                queue = self._queues.get(answer.run)
                if queue is None:
                    queue = _Queue(self._client, f"{self._plan.token}-{answer.run}")
                    self._queues[answer.run] = queue
                # A job that gets no answer asks again.
                with contextlib.suppress(TimeoutError):
                    queue.put(answer.message)

    @contextlib.contextmanager
    def _scheduler(self) -> Iterator[None]:
        """Turn what shows that the scheduler went away into an error."""
        try:
            with _quiet():
                yield
        except (OSError, RuntimeError, KeyError, CancelledError) as error:
            self._gone = True
            where = self._address or "of this machine"
            raise InfrastructureError(
                f"the scheduler {where} went away: {_reason(error)}",
                hint="all announced cases and findings are kept: start a scheduler and its workers "
                "again, and go on with --resume",
            ) from error

    # The jobs.

    def _submit(self, number: int, worker: str) -> None:
        self._attempts += 1
        self._futures[number] = self._client.submit(
            _run_task,
            self._plan,
            number,
            key=f"{self._plan.token}-job-{number}-{self._attempts}",
            resources={RESOURCE: 1},
            workers=[worker],
            allow_other_workers=False,
            pure=False,
        )

    def _look_after_jobs(self) -> None:
        """Start jobs where there is room; take back those whose worker is not there any more."""
        with self._scheduler():
            room = self._room()
            self._look_again = time.monotonic() + max(1.0, len(room) / _WORKERS_PER_SECOND)
            for number, future in enumerate(self._futures):
                if future is not None and future.done():
                    self._ended(number, future)
            views = self._hub.view().jobs
            for number in self._placement.lost(room):
                self._take_back(number, f"its worker {views[number].worker} vanished")
            for view in views:
                longest = _STARTS if view.starting else max(_VANISHED, 5 * self._hub.interval)
                if view.silent > longest and self._futures[view.number] is not None:
                    self._take_back(view.number, f"its worker {view.worker} is silent")
            for number, worker in self._placement.place(room):
                self._submit(number, worker)
            if not self._address and len(room) < len(self._futures):
                # Those that Dask gave up.
                self._client.cluster.scale(len(self._futures))
        if self._futures and self._placement.hopeless:
            raise InfrastructureError(
                "no job can run: each failed several times in a row soon after its start",
                evidence=self._error,
                hint="look at what one of them says; then go on with --resume",
            )

    def _take_back(self, number: int, reason: str) -> None:
        self._hub.retire(number, reason)
        self._release(number)
        self._placement.take_back(number)

    def _ended(self, number: int, future: Any) -> None:
        """Note the end of a job's task; it starts again unless the campaign ends."""
        if future.status == "finished":
            self._error = future.result() or self._error
        elif future.status == "error":
            self._error = str(future.exception()) or "unknown error"
            self._hub.retire(number, self._error.strip().splitlines()[-1])
        elif self._placement.worker(number) in self._room():
            raise ConnectionError(f"it knows nothing of job {number} any more")
        self._release(number)
        self._placement.ended(number)

    def _release(self, number: int) -> None:
        future, self._futures[number] = self._futures[number], None
        if future is not None:
            with contextlib.suppress(Exception):
                future.cancel()

    def _cancel(self) -> None:
        with _quiet():
            for number in range(len(self._futures)):
                self._release(number)
            if not self._gone:
                for queue in (self._news, *self._queues.values()):
                    queue.close()


def check_scheduler(address: str) -> None:
    """Refuse an unreachable scheduler before anything is made for a campaign.

    Raises:
        UsageError: this is no address.
        MissingDependencyError: the package ``distributed`` is not installed.
        InfrastructureError: nothing answers there.
    """
    distributed = _distributed()
    try:
        distributed.comm.get_address_host_port(address)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(
            f"{address!r} is no address of a scheduler: {_reason(error)}",
            hint="name it as `dask scheduler` prints it, such as --scheduler tcp://HOST:8786",
        ) from error

    async def connect() -> None:
        await (await distributed.comm.connect(address, timeout=_CONNECT)).close()

    try:
        with _quiet():
            asyncio.run(connect())
    except (OSError, ValueError, TypeError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: BaseException) -> InfrastructureError:
    return InfrastructureError(
        f"the scheduler {address} cannot be reached: {_reason(error)}",
        hint="start one with `dask scheduler` and name its address with --scheduler, or "
        "leave --scheduler out for a cluster on this machine",
    )


def adopt_leftovers(hub: Hub, store: Store) -> int:
    """Merge what killed jobs on this machine found and could not report.

    Returns:
        how many cases and findings that was.

    Raises:
        InfrastructureError: something cannot be read or written.
    """
    count = 0
    for place in sorted(store.jobs.iterdir()):
        with leftover_reports(place / OUTBOX_DIRECTORY) as reports:
            count += hub.adopt(reports)
    return count


# On a worker.


def _run_task(plan: _Plan, number: int) -> str:
    """Run a job in a thread of a worker; return why it failed, or nothing."""
    distributed = _distributed()
    worker = distributed.get_worker()
    client = distributed.get_client()
    directory, own = _job_directory(plan, number)
    directory.mkdir(parents=True, exist_ok=True)
    error = run_job(
        plan.make_job,
        JobSettings(plan.campaign, number, directory, plan.values),
        lambda run: _queue_link(client, plan.token, run),
        worker=f"{socket.gethostname()}/{worker.name}",
        ordered=plan.ordered,
    )
    if own and not error and not any((directory / OUTBOX_DIRECTORY).glob("*")):
        shutil.rmtree(directory, ignore_errors=True)
    return error


def _job_directory(plan: _Plan, number: int) -> tuple[Path, bool]:
    """Return where a job works, and whether that is in this machine's cache."""
    out = Path(plan.out)
    with contextlib.suppress(BridgeError):
        if read_campaign(out).id == plan.campaign and os.access(out / JOBS_DIRECTORY, os.W_OK):
            return out / JOBS_DIRECTORY / str(number), False
    return cache_folder("fuzz") / plan.campaign / str(number), True


class _Queue:
    """A queue of the scheduler.

    A wait that ends without a message leaves its request with the scheduler, for the next one: a
    request that times out there fills the scheduler's log.
    """

    def __init__(self, client: Any, name: str) -> None:
        self._queue = _distributed().Queue(name, client=client)
        self._loop: asyncio.AbstractEventLoop = client.loop.asyncio_loop
        self._request: Future[bytes] | None = None

    def put(self, message: bytes) -> None:
        self._queue.put(message)

    def get(self, seconds: float) -> bytes | None:
        """Return the next message; None if there is none in time."""
        if self._request is None:
            self._request = asyncio.run_coroutine_threadsafe(
                self._queue.get(asynchronous=True), self._loop
            )
        if not wait([self._request], timeout=seconds).done:
            return None
        request, self._request = self._request, None
        return request.result()

    def get_all(self) -> list[bytes]:
        """Return the messages that are there."""
        found: list[bytes] = self._queue.get(batch=True)
        return found

    def close(self) -> None:
        if self._request is not None:
            self._request.cancel()
        with contextlib.suppress(Exception):
            self._queue.close()


@dataclass(slots=True)
class _QueueLink:
    """The way through the scheduler's queues."""

    news: _Queue
    answers: _Queue

    def send(self, message: bytes) -> None:
        """Send a report."""
        # One that takes too long is sent again later.
        with _hub_is_there(), contextlib.suppress(TimeoutError):
            self.news.put(message)

    def receive(self, seconds: float) -> bytes | None:
        """Return the next answer; None if there is none in time."""
        with _hub_is_there():
            try:
                return self.answers.get(seconds)
            except TimeoutError:
                return None


@contextlib.contextmanager
def _hub_is_there() -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, KeyError, CancelledError) as error:
        raise HubGoneError(
            f"the scheduler went away: {_reason(error)}", hint="go on with --resume"
        ) from error


@contextlib.contextmanager
def _queue_link(client: Any, token: str, run: str) -> Iterator[Link]:
    queue = _distributed().Queue
    link = _QueueLink(queue(f"{token}-news", client=client), queue(f"{token}-{run}", client=client))
    try:
        yield link
    finally:
        for each in (link.news, link.answers):
            with contextlib.suppress(Exception):
                each.close()


# Dask.


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise MissingDependencyError(
            "campaigns need the package distributed", hint="pip install 'kcov-bridge[fuzz]'"
        ) from error
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        # Its import has it tell each connection that ends.
        logging.getLogger("distributed").setLevel(logging.WARNING)
    return distributed


@contextlib.contextmanager
def _local(
    distributed: Any, jobs: int, place: Path, progress: Callable[[str], object]
) -> Iterator[Any]:
    """Yield a client of a new cluster on this machine."""
    import dask

    progress(f"starting {jobs} local workers" if jobs > 1 else "starting a local worker")
    options = {
        **_LOCAL,
        "temporary-directory": str(place),
        LOG_KEY: str(place / WORKERS_LOG),
    }

    def start() -> Any:
        # Ctrl-C is for this process alone: the workers and Dask's threads, which start them
        # again, inherit this mask until `worker_preload` has left the terminal's session. The
        # tracker comes first, as its start ends with the signal let through.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with dask.config.set(options):
            return distributed.LocalCluster(
                n_workers=jobs,
                threads_per_worker=1,
                processes=True,
                resources={RESOURCE: 1},
                memory_limit=0,
                # Without an address Dask would take port 8787 on all interfaces, or warn that it
                # is taken.
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
                host="127.0.0.1",
                silence_logs=logging.CRITICAL,
            )

    with contextlib.ExitStack() as stack, _quiet():
        try:
            remove(place)
            place.mkdir()
            cluster = stack.enter_context(_started(start))
            with dask.config.set(_LOCAL):
                client = stack.enter_context(
                    distributed.Client(cluster, set_as_default=False, name="kcov-bridge")
                )
        except (OSError, RuntimeError) as error:
            raise InfrastructureError(
                f"the workers of this machine did not start: {_reason(error)}",
                hint="use fewer --jobs",
            ) from error
        yield client


@contextlib.contextmanager
def _started(start: Callable[[], Any]) -> Iterator[Any]:
    """Yield what a call in a thread of its own makes, and close it.

    Ctrl-C meanwhile takes effect when the call has returned, and closes it too.
    """
    with ThreadPoolExecutor(1, "cluster") as pool, contextlib.ExitStack() as stack:
        future = pool.submit(start)
        try:
            made = future.result()
        except KeyboardInterrupt:
            with contextlib.suppress(Exception):
                stack.enter_context(future.result())
            raise
        yield stack.enter_context(made)


class _Room:
    """For how many jobs each worker has room in all, by its address."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._vms: dict[str, int] = {}

    def __call__(self) -> dict[str, int]:
        present = list(self._client.nthreads())
        if any(address not in self._vms for address in present):
            # What the client returns here may lack workers: it updates the same object beside.
            workers = self._client.scheduler_info()["workers"]
            for address, each in workers.items():
                self._vms[address] = int(each.get("resources", {}).get(RESOURCE, 0))
        self._vms = {address: self._vms[address] for address in present if address in self._vms}
        return {address: vms for address, vms in self._vms.items() if vms > 0}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask's own warnings from the screen: what they say becomes an error here."""
    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    return str(error).strip() or type(error).__name__
