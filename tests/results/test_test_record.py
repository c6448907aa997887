# SPDX-License-Identifier: Apache-2.0
"""``tests.jsonl``: what is written is what is read, and whatever else lies there is told apart."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from bridge.errors import InfrastructureError
from bridge.results.test_record import (
    FORMAT,
    VERSION,
    FailureKind,
    Outcome,
    RecordedTest,
    RecordWriter,
    read_records,
    remove_records,
)

HEADER = json.dumps({"format": FORMAT, "version": VERSION})

FULL = RecordedTest(
    test='test_a.py::test_b["</script>\n\udcff"]',
    outcome=Outcome.FAILED,
    kind_of_failure=FailureKind.MACHINE,
    seconds=1.5,
    reset_seconds=0.1,
    began=20.0,
    image="bookworm",
    kernel="6.1.0-1-amd64",
    accelerator="tcg",
    worker="gw1",
    lines={"/srv/\udcffserver.py": (1, 5, 9)},
    new_lines={"/srv/\udcffserver.py": (9,)},
    calls=7,
    message="the kernel logged an oops",
    pcs=90,
    lost=0,
)


def test_writer_full_record_is_read_back_as_it_was(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "new" / "directory") as writer:
        writer.write(FULL)
    found = read_records(tmp_path / "new" / "directory")
    assert found.tests == (FULL,)
    assert found.problems == ()


def test_writer_each_record_is_in_the_file_at_once(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        for count in range(3):
            writer.write(RecordedTest(f"t{count}", Outcome.PASSED, began=count))
            assert [test.test for test in read_records(tmp_path).tests] == [
                f"t{number}" for number in range(count + 1)
            ]


def test_reader_files_of_workers_are_merged_in_order_of_time(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, "gw0") as first, RecordWriter(tmp_path, "gw1") as second:
        for count in range(6):
            (first if count % 2 else second).write(
                RecordedTest(f"t{count}", Outcome.PASSED, began=float(count))
            )
    (tmp_path / "tests.jsonl.txt").write_text("something else")
    assert [test.test for test in read_records(tmp_path).tests] == [f"t{n}" for n in range(6)]


def test_remove_records_old_workers_are_forgotten(tmp_path: Path) -> None:
    for worker in ("", "gw0", "gw7"):
        with RecordWriter(tmp_path, worker) as writer:
            writer.write(RecordedTest("old", Outcome.PASSED))
    (tmp_path / "tests.txt").write_text("mine")
    remove_records(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tests.txt"]
    assert read_records(tmp_path).tests == ()


@pytest.mark.parametrize("missing", ["none", "a/file"])
def test_reader_without_a_record_is_empty(tmp_path: Path, missing: str) -> None:
    (tmp_path / "a").write_text("")
    assert read_records(tmp_path / missing).tests == ()


def test_reader_torn_last_line_keeps_the_others_and_says_so(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.write(FULL)
        writer.write(FULL)
    path = tmp_path / "tests.jsonl"
    os.truncate(path, path.stat().st_size - 1)
    found = read_records(tmp_path)
    assert found.tests == (FULL,)
    assert len(found.problems) == 1
    assert "tests.jsonl is incomplete" in found.problems[0]


@pytest.mark.parametrize("size", [0, 1, 20])
def test_reader_torn_header_is_a_problem_not_an_error(tmp_path: Path, size: int) -> None:
    RecordWriter(tmp_path).close()
    os.truncate(tmp_path / "tests.jsonl", size)
    found = read_records(tmp_path)
    assert found.tests == ()
    assert "no header" in found.problems[0]


@pytest.mark.parametrize(
    "text",
    [
        "<html>\n",
        "[1]\n",
        '{"format": "something"}\n',
        "\n",
        "x",
        "\ud800".encode("utf-16", "surrogatepass").decode("latin-1") + "\n",
        "[" * 100_000 + "\n",
    ],
)
def test_reader_foreign_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tests.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(InfrastructureError, match=r"tests\.jsonl is not a record of tests"):
        read_records(tmp_path)


def test_reader_other_version_names_both(tmp_path: Path) -> None:
    (tmp_path / "tests.jsonl").write_text(f'{{"format": "{FORMAT}", "version": 99}}\n')
    with pytest.raises(InfrastructureError, match=f"version 99.*version {VERSION}"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "not JSON"),
        ("7", "not a JSON object"),
        ('{"outcome": "passed"}', "lacks 'test'"),
        ('{"test": "t"}', "lacks 'outcome'"),
        ('{"test": "t", "outcome": "odd"}', "'outcome'"),
        ('{"test": "t", "outcome": ["passed"]}', "'outcome'"),
        ('{"test": 3, "outcome": "passed"}', "'test'"),
        ('{"test": "t", "outcome": "passed", "seconds": NaN}', "'seconds'"),
        ('{"test": "t", "outcome": "passed", "seconds": -1}', "'seconds'"),
        ('{"test": "t", "outcome": "passed", "seconds": true}', "'seconds'"),
        (f'{{"test": "t", "outcome": "passed", "began": {"9" * 400}}}', "'began'"),
        ('{"test": "t", "outcome": "passed", "calls": 1.5}', "'calls'"),
        ('{"test": "t", "outcome": "passed", "lines": [1]}', "'lines'"),
        ('{"test": "t", "outcome": "passed", "lines": {"f": 1}}', "'lines'"),
        ('{"test": "t", "outcome": "passed", "lines": {"f": ["1"]}}', "'lines'"),
        ('{"test": "t", "outcome": "passed", "kind_of_failure": "odd"}', "'kind_of_failure'"),
    ],
)
def test_reader_damaged_line_is_named_with_its_number(tmp_path: Path, line: str, what: str) -> None:
    good = '{"test": "t", "outcome": "passed"}'
    (tmp_path / "tests.gw0.jsonl").write_text(f"{HEADER}\n{good}\n{line}\n{good}\n")
    with pytest.raises(InfrastructureError) as caught:
        read_records(tmp_path)
    assert "tests.gw0.jsonl is damaged in line 3" in str(caught.value)
    assert what in str(caught.value)


def test_reader_unknown_and_missing_keys_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "tests.jsonl").write_text(
        f'{HEADER}\n{{"test": "t", "outcome": "passed", "of_later": {{}}}}\n'
    )
    assert read_records(tmp_path).tests == (RecordedTest("t", Outcome.PASSED),)


def test_writer_when_there_is_no_room_raises_and_the_next_write_is_whole(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RecordWriter(tmp_path) as writer:
        writer.write(RecordedTest("first", Outcome.PASSED))
        size = writer.path.stat().st_size
        # The kernel writes 10 bytes of the line, and refuses the rest.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        try:
            with pytest.raises(InfrastructureError, match=r"cannot write .*tests\.jsonl"):
                writer.write(RecordedTest("second", Outcome.PASSED, began=1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert writer.path.stat().st_size == size + 10
        writer.write(RecordedTest("third", Outcome.PASSED, began=2))
    found = read_records(tmp_path)
    assert [test.test for test in found.tests] == ["first", "third"]
    assert found.problems == ()


def test_writer_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InfrastructureError, match="cannot write"):
        RecordWriter(tmp_path / "file" / "below")


@pytest.mark.parametrize("worker", ["../x", "a.b", "a b"])
def test_writer_worker_with_odd_name_is_refused(tmp_path: Path, worker: str) -> None:
    with pytest.raises(ValueError, match="worker"):
        RecordWriter(tmp_path, worker)
