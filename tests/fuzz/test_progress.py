# SPDX-License-Identifier: Apache-2.0
"""The file of a campaign's progress: what is written is read, whatever happened in between."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.errors import InfrastructureError
from bridge.fuzz.progress import PROGRESS_FILE, Progress, ProgressWriter, Sample, read_progress

SAMPLES = (
    Sample(0.0, 0, 0),
    Sample(1.5, 300, 40, corpus=3, findings=0, vms=2, stability=None),
    Sample(4.0, 1300, 55, corpus=5, findings=1, vms=1, stability=0.75),
)


def descriptors() -> list[str]:
    return sorted(each.name for each in Path("/proc/self/fd").iterdir())


def write(path: Path, *samples: Sample) -> None:
    with ProgressWriter(path) as writer:
        for sample in samples:
            writer.write(sample)


def test_progress_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / PROGRESS_FILE
    write(path, *SAMPLES)
    assert read_progress(path) == Progress(SAMPLES)
    assert read_progress(path).last == SAMPLES[-1]


def test_progress_resumed_campaign_goes_on_after_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / PROGRESS_FILE
    write(path, *SAMPLES[:2])
    with path.open("a") as file:
        file.write('{"seconds": 3.0, "execu')
    assert read_progress(path) == Progress(SAMPLES[:2])
    write(path, SAMPLES[2])
    found = read_progress(path)
    assert found.samples == SAMPLES
    assert found.problems == (f"1 lines of {path} are damaged and were left out",)


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "7",
        "{}",
        '{"seconds": NaN, "executions": 400, "blocks": 1}',
        '{"seconds": 9.0, "executions": -1, "blocks": 1}',
        '{"seconds": 9.0, "executions": 4e2, "blocks": 1}',
        '{"seconds": true, "executions": 400, "blocks": 1}',
        '{"seconds": 9.0, "executions": 400, "blocks": 1, "stability": "x"}',
        "[" * 100_000,
        '{"seconds": 1.0, "executions": 400, "blocks": 1}',
        '{"seconds": 9.0, "executions": 2, "blocks": 1}',
    ],
)
def test_progress_line_that_makes_no_sense_is_left_out_and_said(tmp_path: Path, line: str) -> None:
    path = tmp_path / PROGRESS_FILE
    write(path, *SAMPLES[:2])
    with path.open("a") as file:
        file.write(f"{line}\n")
    write(path, SAMPLES[2])
    found = read_progress(path)
    assert found.samples == SAMPLES
    assert len(found.problems) == 1
    assert found.problems[0].startswith("1 ")


def test_progress_new_keys_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / PROGRESS_FILE
    write(path, SAMPLES[0])
    with path.open("a") as file:
        file.write(json.dumps({"seconds": 2, "executions": 9, "blocks": 1, "later": [1]}) + "\n")
    assert read_progress(path) == Progress((SAMPLES[0], Sample(2.0, 9, 1)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no record"),
        ("{}\n", "no record"),
        ('{"format": "kcov-bridge fuzz progress", "version": 2}\n', "has version 2"),
        ('{"format": "kcov-bridge tests", "version": 1}\n', "no record"),
    ],
)
def test_progress_another_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / PROGRESS_FILE
    path.write_text(text)
    with pytest.raises(InfrastructureError, match=message):
        read_progress(path)


def test_progress_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="cannot read"):
        read_progress(tmp_path / PROGRESS_FILE)
    with pytest.raises(InfrastructureError, match="cannot write"):
        ProgressWriter(tmp_path / "no" / PROGRESS_FILE)


@pytest.fixture
def full_after() -> Iterator[object]:
    """A function that lets no file of this process grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_progress_full_disk_is_said_and_what_was_written_stays(
    tmp_path: Path, full_after: object
) -> None:
    path = tmp_path / PROGRESS_FILE
    write(path, SAMPLES[0])
    assert callable(full_after)
    full_after(path.stat().st_size + 20)
    with ProgressWriter(path) as writer:
        with pytest.raises(InfrastructureError, match="only 20 of"):
            writer.write(SAMPLES[1])
        with pytest.raises(InfrastructureError, match="cannot write"):
            writer.write(SAMPLES[1])
    full_after(resource.RLIM_INFINITY)
    assert read_progress(path).samples == SAMPLES[:1]
    write(path, SAMPLES[2])
    assert read_progress(path).samples == (SAMPLES[0], SAMPLES[2])


def test_progress_curves_leave_out_what_is_not_known() -> None:
    progress = Progress(SAMPLES)
    assert progress.curve("blocks", "executions") == [(0, 0), (300, 40), (1300, 55)]
    assert progress.curve("stability") == [(4.0, 0.75)]


def test_progress_rates_are_of_the_interval_before() -> None:
    same_time = Sample(4.0, 1400, 55)
    assert Progress((*SAMPLES, same_time, Sample(6.0, 1600, 60))).rates() == [
        (1.5, 200.0),
        (4.0, 400.0),
        (6.0, 150.0),
    ]
    assert Progress(SAMPLES[:1]).rates() == []


def test_progress_rates_of_a_slow_campaign_are_those_of_the_last_seconds() -> None:
    """One execution in two seconds is not now 0, now 1 a second."""
    samples = tuple(Sample(float(at), at // 2, 1) for at in range(21))
    assert Progress(samples).rates(10.0)[-2:] == [(19.0, 0.5), (20.0, 0.5)]
    assert Progress(samples).rates(10.0)[2] == pytest.approx((3.0, 1 / 3))


def test_progress_writer_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = descriptors()
    write(tmp_path / PROGRESS_FILE, *SAMPLES)
    assert descriptors() == before
