# SPDX-License-Identifier: Apache-2.0
"""How the hub of a campaign does with many workers: the same hub, workers that only report.

The hub (:class:`bridge.fuzz.hub.Hub`), the placement of jobs, the store on the disk and the encoded
messages are those of a campaign. The workers, the time and the network are simulated; what Dask's
scheduler does to carry a message is not part of it.

What the workers find comes from a seeded model (:class:`Growth`): after n executions of all of them
together there are about ``factor * n ** exponent`` cases with new coverage. Feature i is reached by
an execution with a probability proportional to i ** (-1 / exponent), the same for all workers, so
several find the same one before they hear of each other.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from bridge.errors import UsageError
from bridge.fuzz.hub import Hub
from bridge.fuzz.job import Figures
from bridge.fuzz.novelty import Coverage
from bridge.fuzz.placement import Placement
from bridge.fuzz.store import CORPUS_DIRECTORY, Case, Store, read_cases
from bridge.fuzz.wire import Report, ReportedCase, decode_reply, encode_report

__all__ = ["RECORDED", "Growth", "Load", "simulate", "simulate_each"]

_LATEST: Final = 0.5
"""Seconds for which the hub collects reports before it merges them."""

_FIRST_PC: Final = 0xFFFFFFFF81000000


@dataclass(frozen=True, slots=True)
class Growth:
    """How coverage grows with executions.

    Attributes:
        factor: cases after one execution, by the fit.
        exponent: above 0, below 1.
        case_bytes: size of a case.
        pcs: new PCs of a case.
        edges: new edges of a case.
        source: what it was fitted to.
    """

    factor: float
    exponent: float
    case_bytes: int
    pcs: int
    edges: int
    source: str

    @classmethod
    def fitted(cls, directory: Path) -> Growth:
        """Fit to the cases that a campaign recorded.

        Raises:
            UsageError: it found too few.
            InfrastructureError: its record cannot be read.
        """
        found = [case for case in read_cases(directory).cases if not case.seed]
        # Cases come in batches; what counts is how many there are after each.
        after = {case.executions: count for count, case in enumerate(found, 1)}
        points = [(executions, count) for executions, count in after.items() if executions > 0]
        if len(points) < 10:
            raise UsageError(
                f"{directory} recorded too few cases to fit a model",
                hint="name a campaign that found cases at 10 moments at least, or leave --from out",
            )
        factor, exponent = _power_law(points)
        return cls(
            factor,
            min(0.95, max(0.05, exponent)),
            _mean_size(directory, found),
            max(1, round(sum(len(case.pcs) for case in found) / len(found))),
            max(1, round(1.6 * sum(len(case.pcs) for case in found) / len(found))),
            f"{len(found)} cases of {directory}",
        )


RECORDED: Final = Growth(
    factor=4.95,
    exponent=0.38,
    case_bytes=31,
    pcs=6,
    edges=10,
    source="138 cases in 10,399 executions of a mutation loop with feedback on PyYAML's parser",
)
"""The default: a stream that was recorded without a VM, and fitted."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a number of workers costs the coordinator.

    Attributes:
        seconds: simulated.
        cases: that were kept.
        reports: messages to the hub; each is answered.
        repeated: cases that were reported and had been reached by another worker.
        bytes_in: of reports.
        bytes_out: of answers.
        cpu_seconds: processor time of hub, placement and store.
        wall_seconds: the same with the waits for the disk.
        memory: growth of the process in bytes, the simulated workers included.
        restarts: workers that vanished; each new one gets the whole corpus.
    """

    workers: int
    seconds: float
    cases: int
    reports: int
    repeated: int
    bytes_in: int
    bytes_out: int
    cpu_seconds: float
    wall_seconds: float
    memory: int
    restarts: int

    @property
    def cpu_share(self) -> float:
        """Of one processor."""
        return self.cpu_seconds / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**asdict(self), "cpu_share": self.cpu_share}


@dataclass(slots=True)
class _Worker:
    run: str
    executions: int = 0
    sequence: int = 0
    position: int = 0


class _Features:
    """What can be found, by falling probability."""

    def __init__(self, growth: Growth, executions: float) -> None:
        self._growth = growth
        exponent = growth.exponent
        # After n executions gamma(1 - e) * (scale * n) ** e different features are expected.
        scale = (growth.factor / math.gamma(1 - exponent)) ** (1 / exponent)
        count = 1000 + 4 * math.ceil(growth.factor * executions**exponent)
        chances = [min(1.0, scale * rank ** (-1 / exponent)) for rank in range(1, count + 1)]
        self._chances = chances
        self._sums = [0.0, *itertools.accumulate(chances)]

    def found(self, numbers: random.Random, executions: int, first: int) -> set[int]:
        """Return features, from one on, that some executions reach."""
        # Those that are all but certain need no dice.
        certain = first
        while certain < len(self._chances) and self._chances[certain] * executions > 20:
            certain += 1
        found = set(range(first, certain))
        below, above = self._sums[certain], self._sums[-1]
        for _ in range(_poisson(numbers, executions * (above - below))):
            place = numbers.uniform(below, above)
            found.add(min(bisect.bisect_right(self._sums, place), len(self._chances)) - 1)
        return found

    def case(self, feature: int, numbers: random.Random) -> ReportedCase:
        """Return a case that reaches a feature: another one each time."""
        growth = self._growth
        # Close together, as the code of one kernel is: so they all fit below 2 ** 64.
        first = _FIRST_PC + feature * max(16 * growth.pcs, growth.edges)
        return ReportedCase(
            numbers.randbytes(growth.case_bytes),
            Coverage.of(
                range(first, first + 16 * growth.pcs, 16), range(first, first + growth.edges)
            ),
        )


def simulate(
    workers: int,
    growth: Growth = RECORDED,
    *,
    seconds: float = 600.0,
    rate: float = 1000.0,
    vanish: float = 30.0,
    seed: int = 1,
) -> Load:
    """Run a hub with simulated workers.

    Args:
        workers: how many; each has one VM.
        growth: what they find.
        seconds: to simulate.
        rate: executions per second of a worker.
        vanish: seconds after which one worker vanishes, again and again.
        seed: of all dice.
    """
    features = _Features(growth, workers * rate * seconds)
    numbers = random.Random(seed)
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="kcov-bridge-simulation-"))
        store = stack.enter_context(Store.create(Path(place, "out"), {}))
        before = _memory()
        clock = _Clock()
        hub = stack.enter_context(contextlib.closing(Hub(store, workers, clock=clock)))
        meter = _Meter()
        placement = Placement(workers, clock)
        names = itertools.count()
        room = {f"tcp://worker-{next(names)}": 1 for _ in range(workers)}
        running: dict[int, _Worker] = {}
        due: dict[int, float] = {}
        reached: dict[int, int] = {}
        """Of each feature that the hub has, how many segments there were then."""
        repeated = restarts = 0
        peak = before
        next_loss = vanish
        while clock.now < seconds:
            if clock.now >= next_loss:
                next_loss += vanish
                room.pop(numbers.choice(sorted(room)))
                room[f"tcp://worker-{next(names)}"] = 1
                restarts += 1
            with meter:
                for job in placement.lost(room):
                    placement.take_back(job)
                    hub.retire(job, "its worker vanished")
                placed = placement.place(room)
            for job, worker in placed:
                running[job] = _Worker(worker)
                due[job] = clock.now + numbers.uniform(0, hub.interval)
            messages: list[bytes] = []
            asked: list[int] = []
            claimed: set[int] = set()
            for job, moment in due.items():
                if moment > clock.now:
                    continue
                state = running[job]
                new = int(rate * hub.interval) if state.sequence else 0
                first = _first_unknown(reached, state.position)
                cases = sorted(
                    feature
                    for feature in features.found(numbers, new, first)
                    if reached.get(feature, math.inf) >= state.position
                )
                repeated += sum(each in reached or each in claimed for each in cases)
                claimed.update(cases)
                state.executions += new
                state.sequence += 1
                asked.append(job)
                messages.append(
                    encode_report(
                        Report(
                            job,
                            state.run,
                            state.sequence,
                            state.position,
                            state.run,
                            [features.case(feature, numbers) for feature in cases],
                            figures=Figures(state.executions, 1, 0.99, "fuzzing"),
                        )
                    )
                )
            with meter:
                answers = hub.receive(messages)
            for job, answer in zip(asked, answers, strict=True):
                reply = decode_reply(answer.message)
                running[job].position = reply.position
                due[job] = clock.now + (_LATEST if reply.more else reply.interval)
            latest = max((running[job].position for job in asked), default=0)
            for feature in claimed:
                reached.setdefault(feature, max(0, latest - 1))
            peak = max(peak, _memory())
            clock.now += _LATEST
        return Load(
            workers,
            seconds,
            len(store),
            hub.messages,
            repeated,
            hub.bytes_in,
            hub.bytes_out,
            meter.cpu,
            meter.wall,
            peak - before,
            restarts,
        )


def simulate_each(
    numbers: Sequence[int],
    growth: Growth = RECORDED,
    *,
    progress: Callable[[str], object] = lambda text: None,
    **options: float,
) -> Iterator[Load]:
    """Simulate each number of workers in a process of its own, so that its memory is its own."""
    for workers in numbers:
        progress(f"simulating {workers:,} workers")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield pool.submit(_simulate_in_process, workers, growth, options).result()


def _simulate_in_process(workers: int, growth: Growth, options: dict[str, Any]) -> Load:
    return simulate(workers, growth, **options)


class _Clock:
    """Simulated time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class _Meter:
    """Sums the time that its blocks take."""

    def __init__(self) -> None:
        self.cpu = 0.0
        self.wall = 0.0

    def __enter__(self) -> None:
        self._cpu = time.process_time()
        self._wall = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.cpu += time.process_time() - self._cpu
        self.wall += time.perf_counter() - self._wall


def _first_unknown(reached: dict[int, int], position: int) -> int:
    """Return the first feature that a worker with so many segments does not know."""
    feature = 0
    while reached.get(feature, math.inf) < position:
        feature += 1
    return feature


def _memory() -> int:
    """Return the resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _poisson(numbers: random.Random, mean: float) -> int:
    if mean > 50:
        return max(0, round(numbers.gauss(mean, math.sqrt(mean))))
    count, product, limit = 0, numbers.random(), math.exp(-mean)
    while product > limit:
        count += 1
        product *= numbers.random()
    return count


def _power_law(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return factor and exponent of the power law through points: least squares of logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x = sum(x for x, _ in logs) / len(logs)
    mean_y = sum(y for _, y in logs) / len(logs)
    exponent = sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum(
        (x - mean_x) ** 2 for x, _ in logs
    )
    return math.exp(mean_y - exponent * mean_x), exponent


def _mean_size(directory: Path, cases: Sequence[Case]) -> int:
    sizes = []
    for case in cases:
        with contextlib.suppress(OSError):
            sizes.append((directory / CORPUS_DIRECTORY / case.name).stat().st_size)
    return max(8, round(sum(sizes) / len(sizes))) if sizes else 100
