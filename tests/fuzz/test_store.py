# SPDX-License-Identifier: Apache-2.0
"""The directory of a campaign: created, held, resumed, killed, and on a full disk."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridge.errors import InfrastructureError, UsageError
from bridge.fuzz.store import Case, Offer, Store, case_name, read_campaign, read_cases
from tests.support.full_disk import run_on_small_disk

ANNOUNCE = """
import random, sys
from pathlib import Path
from bridge.fuzz.store import Offer, Store

place, seed = Path(sys.argv[1]), int(sys.argv[2])
numbers = random.Random(seed)
with (Store.resume if seed else Store.create)(place, {}) as store:
    for problem in store.problems:
        print("problem", problem, flush=True)
    print("open", flush=True)
    while True:
        batch = [
            Offer(numbers.randbytes(numbers.randrange(1, 3000)), 1.0, 1, [numbers.randrange(9999)])
            for _ in range(numbers.randrange(1, 5))
        ]
        for case in store.add(batch):
            print("announced", case.name, flush=True)
"""
"""Announces cases until it is killed."""


def offer(data: bytes, *pcs: int, executions: int = 0, seed: bool = False) -> Offer:
    return Offer(data, executions / 100, executions, pcs, seed)


def test_create_writes_campaign_and_empty_corpus(tmp_path: Path) -> None:
    before = time.time()
    with Store.create(tmp_path / "new" / "out", {"target": "bridge.targets.plan9"}) as store:
        campaign = read_campaign(store.directory)
        assert campaign.facts == {"target": "bridge.targets.plan9"}
        assert before <= campaign.began <= time.time()
        assert len(campaign.id) == 32
        assert read_cases(store.directory).cases == ()
        assert list(store.corpus.iterdir()) == []


def test_add_writes_file_and_line_with_new_pcs_only(tmp_path: Path) -> None:
    with Store.create(tmp_path, {}) as store:
        (first,) = store.add([offer(b"one", 5, 3, seed=True)])
        second, third = store.add(
            [offer(b"two", 3, 7, 2**64 - 1, executions=100), offer(b"three", 7, 9)]
        )
        assert first == Case(case_name(b"one"), 0.0, 0, True, (3, 5))
        assert second.pcs == (7, 2**64 - 1)
        assert third.pcs == (9,)
        assert store.covered == {3, 5, 7, 9, 2**64 - 1}
        assert read_cases(tmp_path).cases == (first, second, third)
        assert (store.corpus / case_name(b"two")).read_bytes() == store.read(second.name) == b"two"
        lines = (tmp_path / "cases.jsonl").read_text().splitlines()
        assert json.loads(lines[2])["pcs"] == ["7", "ffffffffffffffff"]


def test_add_known_case_changes_nothing(tmp_path: Path) -> None:
    with Store.create(tmp_path, {}) as store:
        store.add([offer(b"one", 1)])
        assert store.add([offer(b"one", 1)]) == []
        assert [case.name for case in store.add([offer(b"x"), offer(b"x")])] == [case_name(b"x")]
        assert len(store) == 2
        assert len(read_cases(tmp_path).cases) == 2


def test_add_seed_that_is_executed_later_records_what_it_covers(tmp_path: Path) -> None:
    with Store.create(tmp_path, {}) as store:
        store.add([offer(b"seed", seed=True), offer(b"other", seed=True)])
        (line,) = store.add([offer(b"seed", 7, 8, executions=100), offer(b"other")])
        assert line == Case(case_name(b"seed"), 1.0, 100, True, (7, 8))
        assert store.add([offer(b"other", 7)]) == []
        assert len(store) == 2
    with Store.resume(tmp_path) as store:
        assert store.problems == []
        assert (len(store), store.covered) == (2, {7, 8})
        assert [each.seed for each in read_cases(tmp_path).cases] == [True, True, True]
        (line,) = store.add([offer(b"other", 9)])
        assert line.seed


def test_since_returns_what_is_new(tmp_path: Path) -> None:
    with Store.create(tmp_path, {}) as store:
        names = [case.name for case in store.add(offer(bytes([each])) for each in range(5))]
        assert list(store.since(3)) == names[3:]
        assert list(store.since(1, 2)) == names[1:3]
        assert list(store.since(5)) == []


def test_resume_knows_cases_coverage_and_clock(tmp_path: Path) -> None:
    with Store.create(tmp_path, {"jobs": 1}) as store:
        store.add([offer(b"one", 1, 2), offer(b"two", 2, 3, executions=500)])
        names, began, identity = store.since(0), store.campaign.began, store.campaign.id
    with Store.resume(tmp_path, {"jobs": 2}) as store:
        assert store.problems == []
        assert store.since(0) == names
        assert store.covered == {1, 2, 3}
        assert (store.elapsed, store.executions) == (5.0, 500)
        assert store.add([offer(b"two", 3)]) == []
        campaign = read_campaign(tmp_path)
        assert (campaign.id, campaign.began, campaign.facts) == (identity, began, {"jobs": 2})
        assert len(campaign.resumed) == 1


def test_create_in_a_finished_campaign_is_refused(tmp_path: Path) -> None:
    Store.create(tmp_path, {}).close()
    with pytest.raises(UsageError, match=r"belongs to a campaign$") as caught:
        Store.create(tmp_path, {})
    assert "--resume" in caught.value.hint


def test_create_in_a_directory_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("the only copy")
    with pytest.raises(UsageError, match=r"not empty: thesis\.tex"):
        Store.create(tmp_path, {})
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.tex"]


def test_create_after_a_kill_before_the_campaign_began_succeeds(tmp_path: Path) -> None:
    Store.create(tmp_path, {}).close()
    (tmp_path / "campaign.json").unlink()
    (tmp_path / "cases.jsonl").write_bytes(b'{"form')
    (tmp_path / ".partial" / "left").write_bytes(b"")
    with Store.create(tmp_path, {}) as store:
        store.add([offer(b"one")])
        assert len(read_cases(tmp_path).cases) == 1
        assert list((tmp_path / ".partial").iterdir()) == []


def test_resume_without_campaign_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no campaign"):
        Store.resume(tmp_path)
    with pytest.raises(UsageError, match="holds no campaign"):
        Store.resume(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_second_campaign_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with Store.create(tmp_path, {}):
        for begin in (Store.create, Store.resume):
            program = (
                "import sys; from pathlib import Path; from bridge.errors import UsageError\n"
                "from bridge.fuzz.store import Store\n"
                f"try: Store.{begin.__name__}(Path(sys.argv[1]), {{}})\n"
                "except UsageError as error: print(error.report())"
            )
            done = subprocess.run(
                [sys.executable, "-c", program, str(tmp_path)],
                capture_output=True,
                text=True,
                check=True,
            )
            assert f"process {os.getpid()} on " in done.stdout
            assert "--out" in done.stdout
    Store.resume(tmp_path).close()


def test_resume_removes_a_torn_line_and_says_so(tmp_path: Path) -> None:
    with Store.create(tmp_path, {}) as store:
        store.add([offer(b"one", 1), offer(b"two", 2)])
    path = tmp_path / "cases.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert [case.name for case in read_cases(tmp_path).cases] == [case_name(b"one")]
    with Store.resume(tmp_path) as store:
        assert "incomplete" in store.problems[0]
        # The file of the second is there, so the case is kept.
        assert list(store.since(0)) == [case_name(b"one"), case_name(b"two")]
        assert "1 cases were written but not announced" in store.problems[1]
    assert [case.name for case in read_cases(tmp_path).cases] == [
        case_name(b"one"),
        case_name(b"two"),
    ]


def test_resume_tells_lost_and_foreign_files(tmp_path: Path) -> None:
    with Store.create(tmp_path, {}) as store:
        store.add([offer(b"one"), offer(b"two"), offer(b"three")])
    (store.corpus / case_name(b"one")).unlink()
    (store.corpus / case_name(b"two")).write_bytes(b"tw")
    (store.corpus / "id:000001").write_bytes(b"of another fuzzer")
    with Store.resume(tmp_path) as store:
        assert list(store.since(0)) == [case_name(b"three")]
        assert "2 cases" in store.problems[0]
        assert "id:000001" in store.problems[1]
        store.add([offer(b"two")])
        assert store.read(case_name(b"two")) == b"two"
    with Store.resume(tmp_path) as store:
        assert sorted(store.since(0)) == sorted([case_name(b"three"), case_name(b"two")])


def test_read_cases_leaves_damaged_lines_out_and_says_which(tmp_path: Path) -> None:
    with Store.create(tmp_path, {}) as store:
        store.add([offer(b"one"), offer(b"two")])
    path = tmp_path / "cases.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[1] = b'{"name":"../../etc/passwd","seconds":0,"executions":0,"seed":false,"pcs":[]}'
    path.write_bytes(b"\n".join(lines))
    found = read_cases(tmp_path)
    assert [case.name for case in found.cases] == [case_name(b"two")]
    assert "were left out: 2" in found.problems[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"format":"other"}', "no format"),
        ('{"format":"kcov-bridge fuzz campaign","version":99}', "version 99"),
        ('{"format":"kcov-bridge fuzz campaign","version":1,"id":"a"}', "began"),
    ],
)
def test_read_campaign_of_something_else_says_what(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "campaign.json").write_text(text)
    with pytest.raises(InfrastructureError, match=message):
        read_campaign(tmp_path)


def test_finding_is_written_whole_and_once(tmp_path: Path) -> None:
    with Store.create(tmp_path, {}) as store:
        assert store.add_finding("KASAN-in-p9_read-0f3a", {"case": b"x", "console.log": b"oops"})
        assert not store.add_finding("KASAN-in-p9_read-0f3a", {"case": b"y"})
        place = store.findings / "KASAN-in-p9_read-0f3a"
        assert {path.name: path.read_bytes() for path in place.iterdir()} == {
            "case": b"x",
            "console.log": b"oops",
        }
        for bad in ("../out", "a/b", "", ".hidden", "x" * 300):
            with pytest.raises(ValueError, match="plain name"):
                store.add_finding(bad, {})
            with pytest.raises(ValueError, match="plain name"):
                store.add_finding("good", {bad: b""})
        assert [path.name for path in store.findings.iterdir()] == ["KASAN-in-p9_read-0f3a"]


def test_update_keeps_what_was_there(tmp_path: Path) -> None:
    with Store.create(tmp_path, {"jobs": 3}) as store:
        store.update({"kernel": "6.1.0-40"})
    assert read_campaign(tmp_path).facts == {"jobs": 3, "kernel": "6.1.0-40"}


def test_kill_at_random_moments_loses_no_announced_case(tmp_path: Path) -> None:
    numbers = random.Random(4)
    announced: list[str] = []
    for run in range(50):
        with subprocess.Popen(
            [sys.executable, "-c", ANNOUNCE, str(tmp_path / "out"), str(run)],
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line == "open\n":
                    break
                assert line.startswith("problem "), line
            time.sleep(numbers.uniform(0, 0.05))
            child.kill()
            words = [line.split() for line in child.stdout if line.endswith("\n")]
            announced += [name for _, name in words]
    assert len(announced) > 50
    listed = [case.name for case in read_cases(tmp_path / "out").cases]
    # Before a resume could mend anything.
    assert set(announced) <= set(listed)
    for name in announced:
        assert case_name((tmp_path / "out" / "corpus" / name).read_bytes()) == name
    with Store.resume(tmp_path / "out") as store:
        assert set(announced) <= set(store.since(0))
        assert len(set(store.since(0))) == len(store)


FILL = """
import sys
from pathlib import Path
from bridge.errors import InfrastructureError
from bridge.fuzz.store import Offer, Store, case_name, read_cases

place = Path(sys.argv[1], "out")
announced = []
with Store.create(place, {}) as store:
    try:
        for number in range(1000):
            data = number.to_bytes(2) * 700
            announced += store.add([Offer(data, 0.0, 0, range(number, number + 90))])
    except InfrastructureError as error:
        print(error.report())
    assert list(read_cases(place).cases) == announced, "a line without a case, or none"
    assert {path.name for path in store.corpus.iterdir()} >= {case.name for case in announced}
    assert not list((place / ".partial").iterdir()), "a part was left behind"
    try:
        store.add_finding("one", {"case": b"x", "console.log": b"y" * 100_000})
    except InfrastructureError as error:
        print(error.report())
    assert not list(store.findings.iterdir()), "a part of a finding has its name"
    # Room again: the same store goes on.
    before = len(announced)
    first = store.read(announced[0].name)
    (store.corpus / announced[0].name).unlink()
    (store.corpus / announced[1].name).unlink()
    announced += store.add([Offer(b"after", 0.0, 0)])
    assert len(announced) == before + 1
    (store.corpus / announced[0].name).write_bytes(first)
assert list(read_cases(place).cases) == announced
print("announced", len(announced))
"""


@pytest.mark.parametrize("size", ["256k", "300k", "340k"])
def test_full_disk_is_an_error_that_loses_nothing(tmp_path: Path, size: str) -> None:
    done = run_on_small_disk(tmp_path, size, FILL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("No space left on device") == 2
    assert "hint: make room on the disk, then go on with --resume" in done.stdout
    assert int(done.stdout.split()[-1]) > 10


def test_record_that_cannot_grow_is_an_error_that_loses_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Store.create(tmp_path, {}) as store:
        store.add([offer(b"one", 1)])
        # As on a full disk, a write is short at first; Python ignores SIGXFSZ.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(InfrastructureError, match=r"cases\.jsonl"):
                store.add([offer(b"two", *range(1000))])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [case.name for case in read_cases(tmp_path).cases] == [case_name(b"one")]
        assert len(store) == 1
        assert store.covered == {1}
        assert len(store.add([offer(b"two", *range(1000))])) == 1
    with Store.resume(tmp_path) as store:
        assert store.problems == []
        assert len(store) == 2


def test_create_on_a_full_disk_is_an_error(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from bridge.errors import InfrastructureError
from bridge.fuzz.store import Store
with open(Path(sys.argv[1], "ballast"), "wb", buffering=0) as file:
    try:
        while file.write(bytes(4096)): pass
    except OSError: pass
try:
    Store.create(Path(sys.argv[1], "out"), {})
except InfrastructureError as error:
    print(error.report())
Path(sys.argv[1], "ballast").unlink()
Store.create(Path(sys.argv[1], "out"), {}).close()
"""
    done = run_on_small_disk(tmp_path, "64k", program)
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stdout
