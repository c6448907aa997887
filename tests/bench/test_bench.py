# SPDX-License-Identifier: Apache-2.0
"""The benchmark: its arithmetic on made-up samples, what it prints, and some of it for real."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from bridge import config
from bridge.bench import guest_tests, ready, virtme
from bridge.bench.commands import seconds_to_answer
from bridge.bench.document import describe, surroundings
from bridge.bench.executions import Turn, cases_of_a_turn
from bridge.bench.floor import FLOOR, floor
from bridge.bench.measurement import Bench, Measurement, Result, best_of, perform, take_turns
from bridge.bench.plot import plot
from bridge.bench.stats import Aim, Comparison, Of, Series, Summary, Verdict, quantile
from bridge.bench.suite import measurements, title
from bridge.bench.table import amount, render, say_aim
from bridge.bench.worker import SERVICE, proportional_mib
from bridge.cli.main import main
from bridge.config import Settings
from bridge.device import fastpath
from bridge.errors import InfrastructureError, MissingDependencyError, UsageError
from bridge.guest.images import Image
from bridge.session.pool import Worker
from bridge.session.session import Session
from bridge.sources.python import tracer
from tests import support

STEADY = (10.0, 10.1, 10.2, 9.9, 9.8)


def compared(
    ours: Sequence[float],
    baseline: Sequence[float] | None,
    of: Of = Of.TIMES,
    *aims: Aim,
    needed: int = 5,
) -> Comparison:
    other = Series("theirs", tuple(baseline)) if baseline is not None else None
    return Comparison("a case", "us", Series("ours", tuple(ours)), other, needed, of, aims)


# The arithmetic


@pytest.mark.parametrize(
    ("values", "part", "expected"),
    [
        ([7.0], 0.5, 7.0),
        ([4.0, 1.0, 3.0, 2.0], 0.5, 2.5),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0.25, 2.0),
        ([5.0, 1.0], 0.0, 1.0),
        ([5.0, 1.0], 1.0, 5.0),
        ([float(n) for n in range(1001)], 0.999, 999.0),
    ],
)
def test_quantiles_interpolate(values: list[float], part: float, expected: float) -> None:
    assert quantile(values, part) == pytest.approx(expected)


def test_quantile_no_values_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_summary_has_quartiles_and_extremes() -> None:
    summary = Summary.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (summary.runs, summary.median, summary.q1, summary.q3) == (5, 3.0, 2.0, 4.0)
    assert (summary.low, summary.high) == (1.0, 100.0)
    assert summary.spread == pytest.approx(2 / 3)
    assert Summary.of([0.0, 0.0]).spread == 0.0
    assert Summary.of([-1.0, 0.0, 1.0]).spread == float("inf")


def test_ratio_is_the_median_of_the_turns() -> None:
    """The machine slows down by a factor of five meanwhile: the ratio of the turns stays."""
    pace = (1.0, 2.0, 3.0, 4.0, 5.0)
    ours = [4.0 * each for each in pace]
    baseline = [2.0 * each for each in pace]
    figure = compared(ours, baseline).outcome().figure
    assert figure is not None
    assert (figure.median, figure.q1, figure.q3) == (2.0, 2.0, 2.0)
    faster = compared(baseline, ours, Of.FASTER).outcome().figure
    assert faster is not None
    assert faster.median == 2.0
    more = compared([each + 0.5 for each in STEADY], STEADY, Of.MORE).outcome().figure
    assert more is not None
    assert more.median == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("ours", "baseline", "reason"),
    [
        (STEADY[:4], STEADY[:4], "4 of 5 runs: ours"),
        (STEADY, STEADY[:4], "4 of 5 runs: theirs"),
        (STEADY, (*STEADY, 10.0), "not taken in turn"),
        (STEADY, (1.0, 10.0, 100.0, 1000.0, 3.0), "apart, 30% at most"),
        (STEADY, (10.0, 10.0, 0.0, 10.0, 10.0), "0 cannot be divided by"),
        (STEADY, (), "0 of 5 runs: theirs"),
        (STEADY, None, "there is no baseline"),
    ],
)
def test_comparison_too_few_or_too_wide_is_refused(
    ours: Sequence[float], baseline: Sequence[float] | None, reason: str
) -> None:
    comparison = compared(ours, baseline, Of.TIMES, Aim(2.0))
    outcome = comparison.outcome()
    assert outcome.figure is None
    assert reason in outcome.refused
    assert comparison.verdict(Aim(2.0)) is None


def test_difference_spread_is_measured_by_the_baseline() -> None:
    """About nothing more: its quartiles lie on both sides of 0, and that is no reason to refuse."""
    figure = compared(STEADY, STEADY[::-1], Of.MORE).outcome().figure
    assert figure is not None
    assert figure.q1 < 0 < figure.q3
    wild = compared((1.0, 20.0, 3.0, 30.0, 5.0), STEADY, Of.MORE)
    assert "apart" in wild.outcome().refused


@pytest.mark.parametrize(
    ("aim", "expected"),
    [
        (Aim(1.2), Verdict.MET),
        (Aim(1.02), Verdict.MET),
        (Aim(1.0), Verdict.UNCLEAR),
        (Aim(0.9), Verdict.MISSED),
        (Aim(0.98, at_most=False), Verdict.MET),
        (Aim(1.0, at_most=False), Verdict.UNCLEAR),
        (Aim(1.1, at_most=False), Verdict.MISSED),
        (Aim(11.0, of=Of.VALUE), Verdict.MET),
        (Aim(9.0, of=Of.VALUE), Verdict.MISSED),
    ],
)
def test_aim_both_quartiles_agree_is_met_or_missed(aim: Aim, expected: Verdict) -> None:
    ours = (9.8, 9.8, 10.0, 10.2, 10.2)
    assert compared(ours, (10.0,) * 5, aim.of, aim).verdict(aim) is expected


def test_turns_are_taken_in_order_and_the_first_thrown_away() -> None:
    calls: list[str] = []

    def way(name: str) -> int:
        calls.append(name)
        return len(calls)

    taken = take_turns({"a": lambda: way("a"), "b": lambda: way("b")}, 3)
    assert "".join(calls) == "abababab"
    assert taken == {"a": [3, 5, 7], "b": [4, 6, 8]}
    values = iter((5.0, 3.0, 4.0, 9.0, 6.0))
    assert best_of(lambda: next(values))() == 3.0


def test_perform_failure_keeps_the_figures_so_far() -> None:
    def measure(bench: Bench) -> None:
        bench.add(compared(STEADY, STEADY))
        bench.note("nothing of note")
        raise InfrastructureError("the machine is gone", hint="look for it")

    result = perform(Measurement("x", "about x", measure), Settings())
    assert len(result.comparisons) == 1
    assert result.failure == "the machine is gone\nhint: look for it"
    text = render([result])
    assert "not measured: the machine is gone" in text
    assert "note: nothing of note" in text


def test_ctrl_c_is_no_failure_of_a_measurement() -> None:
    def measure(_: Bench) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform(Measurement("x", "about x", measure), Settings())


def test_settings_of_a_measurement_override_the_users() -> None:
    mine = Settings(
        source="kernel", comparisons=True, personality="gvisor", timeout=3.0, memory=512
    )
    given = Bench(mine, Result("x", "")).settings(target="none")
    assert (given.source, given.comparisons, given.personality) == ("python", False, "linux")
    assert (given.timeout, given.target, given.memory) == (None, "none", 512)


def test_ready_run_gets_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kcov-bridge.toml").write_text('memory = 1024\ntarget = "plan9"\n')
    wanted = Settings(target="none", source="python", syscall_pcs=True, boot_timeout=77.5)
    for name, text in ready.environment_of(wanted).items():
        monkeypatch.setenv(name, text)
    assert config.load({}) == wanted


def test_ready_no_virtme_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    session, image = Session(Settings(), None), cast(Image, None)
    with pytest.raises(MissingDependencyError, match="virtme-ng is not installed"):
        virtme.Virtme(session, image)
    (tmp_path / "vng").touch()
    # busybox and modprobe lie on PATH or in /sbin; udevd is a file of the system's.
    with pytest.raises(MissingDependencyError, match=r"missing: .*busybox-static") as caught:
        virtme.Virtme(session, image)
    assert caught.value.hint == "kcov-bridge setup --bench"


@pytest.mark.parametrize("name", ["6.1/../../out", "/out"])
def test_virtme_hostile_archive_stays_in_its_directory(tmp_path: Path, name: str) -> None:
    """The modules for the baseline are sent by a guest."""

    def sent(*names: str) -> io.BytesIO:
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as tar:
            for each in names:
                member = tarfile.TarInfo(each)
                member.size = 4
                tar.addfile(member, io.BytesIO(b"text"))
        made.seek(0)
        return made

    to = tmp_path / "modules"
    virtme._unpack(sent("6.1/a.ko"), to)
    assert (to / "6.1" / "a.ko").read_bytes() == b"text"
    with pytest.raises(InfrastructureError, match="the guest sent"):
        virtme._unpack(sent(name), to)
    assert not (tmp_path / "out").exists()


# What people and programs get to see


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 us"),
        (0.00123, "0.0012 us"),
        (0.5, "0.50 us"),
        (4.216, "4.22 us"),
        (42.16, "42.2 us"),
        (1234567.8, "1,234,568 us"),
    ],
)
def test_amounts_have_three_digits_that_count(value: float, text: str) -> None:
    assert amount(value, "us") == text


def test_aims_are_said_with_what_they_are_of() -> None:
    assert say_aim(Aim(2.0), "us") == "<= 2.00x"
    assert say_aim(Aim(20, at_most=False, of=Of.FASTER), "us") == ">= 20.0x faster"
    assert say_aim(Aim(0.5, of=Of.MORE), "us") == "<= 0.50 us more"
    assert say_aim(Aim(5, of=Of.VALUE), "s") == "<= 5.00 s"


def results() -> list[Result]:
    refused = compared(STEADY, STEADY[:4], Of.TIMES, Aim(2.0))
    both = compared(STEADY, (100.0,) * 5, Of.FASTER, Aim(20, at_most=False, of=Of.FASTER))
    value = Aim(50.0, of=Of.VALUE)
    alone = compared(STEADY, None, Of.VALUE, value, Aim(2.0))
    return [Result("one", "about one", [refused, both, alone], ["a note"], 1.0)]


def test_table_has_baseline_ratio_aim_and_reason() -> None:
    lines = render(results()).splitlines()
    assert lines[0] == "one: about one"
    assert "refused: 4 of 5 runs: theirs" in lines[2]
    assert lines[2].split()[-3:] == ["<=", "2.00x", "refused"]
    assert "x faster" in lines[3]
    assert lines[3].split()[-4:] == [">=", "20.0x", "faster", "MISSED"]
    assert "none" in lines[4]
    assert lines[4].split()[-4:] == ["<=", "50.0", "us", "met"]
    # A second aim has a line of its own.
    assert lines[5].split() == ["<=", "2.00x", "refused"]
    assert len({line.index("a case") for line in lines[2:5]}) == 1


def test_document_has_all_figures() -> None:
    document = describe({"format": "x"}, results())
    text = json.dumps(document, allow_nan=False)
    (one,) = json.loads(text)["measurements"]
    refused, both, alone = one["comparisons"]
    assert refused["result"] is None
    assert refused["refused"].startswith("4 of 5")
    assert refused["ours"]["values"] == list(STEADY)
    assert refused["aims"] == [{"compared": "times", "limit": 2.0, "at_most": True, "met": None}]
    assert both["compared"] == "faster"
    assert both["result"]["median"] == pytest.approx(10.0)
    assert both["aims"][0]["met"] is False
    assert both["baseline"]["median"] == 100.0
    assert alone["baseline"] is None
    assert alone["aims"][0]["met"] is True


def drawn(*measured: Result) -> str:
    head = {
        "machine": {"processor": "A & B", "cpus": 2},
        "accelerator": {"name": "tcg"},
        "date": "2024-01-02T03:04:05+00:00",
    }
    return plot(describe(head, measured))


def test_plot_has_axes_units_and_a_point_for_each_figure() -> None:
    consume = Result("consume", "")
    for files in (10, 1_000):
        for blocks in (1, 10, 1_000):
            values = tuple(each * blocks for each in STEADY)
            parameters = {"files": files, "blocks": blocks}
            consume.comparisons.append(
                Comparison(
                    "",
                    "us",
                    Series("consume()", values),
                    Series("get_data()", tuple(100 * each for each in values)),
                    5,
                    Of.FASTER,
                    parameters=parameters,
                )
            )
    vms = Result("vms", "")
    for count in (1, 2, 4):
        pair = Series("adaptive", STEADY), Series("always asleep", STEADY)
        vms.comparisons.append(Comparison("", "/s", *pair, 5, parameters={"vms": count}))
    root = xml.etree.ElementTree.fromstring(drawn(consume, vms))
    space = "{http://www.w3.org/2000/svg}"
    assert len(list(root.iter(f"{space}circle"))) == 2 * 2 * 3 + 2 * 3
    texts = {"".join(text.itertext()) for text in root.iter(f"{space}text")}
    assert {"consume(), 10 files", "get_data(), 1,000 files", "VMs at once"} <= texts
    assert {"10 µs", "1 s", "signals a second", "1,000", "4"} <= texts
    assert any(text.startswith("A & B, 2 CPUs, tcg; 2024-01-02") for text in texts)


def test_plot_nothing_measured_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="nothing to draw"):
        drawn(Result("append", ""))


# The command


def test_bench_list_names_all_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(measurements())
    assert {"signal", "idle", "others", "consume", "append", "ready", "reset", "vms"} <= set(
        measurements()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "consume,consumme"], "there is no measurement consumme"),
        (["--only", ","], "there is no measurement"),
        (["-o", "/nowhere/at/all.json"], "there is no directory /nowhere/at"),
        (["--plot", "/nowhere/all.svg"], "there is no directory /nowhere"),
        (["-o", "/"], "cannot write /: it is a directory"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_measured(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_seconds_to_answer_ends_at_the_answer() -> None:
    script = "sleep 0.2; echo the answer; sleep 1"
    begun = time.perf_counter()
    seconds = seconds_to_answer(["sh", "-c", script], b"answer", timeout=60)
    assert 0.2 <= seconds <= time.perf_counter() - begun - 0.9


@pytest.mark.parametrize(
    ("script", "timeout", "message"),
    [
        ("echo no; echo why >&2; exit 3", 60.0, "sh exited with status 3 without an answer"),
        ("echo no; sleep 60", 4.0, "sh has not answered after 4 s"),
    ],
)
def test_seconds_to_answer_no_answer_is_an_error_with_the_output(
    script: str, timeout: float, message: str
) -> None:
    with pytest.raises(InfrastructureError, match=message) as raised:
        seconds_to_answer(["sh", "-c", script], b"answer", timeout=timeout)
    assert "no" in raised.value.evidence


def test_seconds_to_answer_time_out_ends_the_commands_children(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script = f"sleep 300 & echo $! >{note}; wait"
    with pytest.raises(InfrastructureError, match="has not answered"):
        seconds_to_answer(["sh", "-c", script], b"answer", timeout=4.0)
    status = Path(f"/proc/{int(note.read_text())}/stat")
    end = time.monotonic() + 20
    # A zombie counts as ended: who waits for it is not ours to say.
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("compiled", "said"),
    [((True, True), ""), ((True, False), "(plain tracer)"), ((False, False), "fastpath, tracer")],
)
def test_surroundings_and_title_compiled_parts_are_named(
    monkeypatch: pytest.MonkeyPatch, compiled: tuple[bool, bool], said: str
) -> None:
    monkeypatch.setattr(fastpath, "COMPILED", compiled[0])
    monkeypatch.setattr(tracer, "COMPILED", compiled[1])
    head = surroundings(Settings(accel="tcg"), quick=True)
    assert head["compiled"] == {"fastpath": compiled[0], "tracer": compiled[1]}
    assert said in title(head)
    assert ("plain" in title(head)) is (said != "")


def test_memory_is_what_proc_says() -> None:
    before = proportional_mib(os.getpid())
    held = bytearray(os.urandom(1)) * (32 << 20)
    assert 20 < proportional_mib(os.getpid()) - before < 60
    del held


# For real


def document_of(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    assert document["format"] == "kcov-bridge-bench"
    assert document["version"] == 2
    assert document["quick"] is True
    return document


@pytest.mark.bench
def test_bench_of_consume_and_append(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "bench.json", tmp_path / "bench.svg"
    arguments = ["--quick", "--only", "append,consume,target", "-o", str(out), "--plot"]
    assert main(["bench", *arguments, str(picture)]) == 0
    captured = capsys.readouterr()
    with capsys.disabled():
        print(f"\n{captured.out}")
    assert "kcov-bridge: [1/3] consume" in captured.err
    found = {each["name"]: each for each in document_of(out)["measurements"]}
    assert list(found) == ["consume", "target", "append"]
    assert all(not each["failure"] for each in found.values())
    costs = {
        (each["parameters"]["files"], each["parameters"]["blocks"]): each
        for each in found["consume"]["comparisons"]
    }
    assert set(costs) == {(files, blocks) for files in (10, 1_000) for blocks in (1, 10, 1_000)}
    for each in costs.values():
        assert each["baseline"]["median"] > each["ours"]["median"]
    # A hundred times the files: far from a hundred times the cost, on a noisy machine too.
    ours = [costs[files, 1]["ours"]["median"] for files in (10, 1_000)]
    assert ours[1] < 10 * ours[0]
    assert len(found["append"]["comparisons"]) == 8
    assert picture.read_text().startswith("<svg")


def test_floor_compiles() -> None:
    program = FLOOR.build()
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: floor" in done.stderr


@pytest.mark.vm
@pytest.mark.bench
def test_bench_of_a_signal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--quick", "--only", "signal", "-o", str(tmp_path / "out.json")]) == 0
    with capsys.disabled():
        print(f"\n{capsys.readouterr().out}")
    (signals,) = document_of(tmp_path / "out.json")["measurements"]
    assert not signals["failure"]
    names = {(each["ours"]["name"], each["baseline"]["name"]) for each in signals["comparisons"]}
    assert names == {
        ("awake", "floor, busy"),
        ("awake", "floor, as slow"),
        ("asleep", "floor, asleep"),
        ("awake", "kcov off"),
    }
    for each in signals["comparisons"]:
        assert each["ours"]["runs"] == each["baseline"]["runs"] == 5
        assert each["ours"]["min"] > 0


@pytest.mark.vm
@pytest.mark.guest(target="none", source="python", syscall_pcs=True)
def test_floor_ends_the_bridge_answers_again(session: Session) -> None:
    """Its doorbell stands aside and comes back, with nothing missed and nothing answered twice."""
    for asleep in (True, False):
        before = session.device.totals.returns
        with floor(session, asleep=asleep):
            figures = json.loads(session.run("kcov-bench calls 1000").text)
            assert figures["pcs"] == 0
        assert session.device.totals.returns == before
        assert session.doorbell.call(lambda: session.region.areas_in_use) == 0
        figures = json.loads(session.run("kcov-bench calls 1000").text)
        assert figures["pcs"] >= 1000
        assert session.device.totals.returns >= before + 1000
    session.doorbell.call(session.doorbell.look_at_guest)
    assert session.doorbell.guest_timeouts == 0
    assert session.device.instances == 0


@pytest.mark.vm
def test_suites_of_guest_tests_run_and_are_measured(tmp_path: Path) -> None:
    guest_tests.write_suites(tmp_path, 2)
    settings = Settings(target="none", source="python")
    for suite in (guest_tests.RESET_SUITE, guest_tests.SHARED_SUITE):
        run = guest_tests.run_suite(settings, tmp_path, suite)
        assert 0 < run.first_test <= run.suite < 300
        assert (run.over > 5) == (suite == guest_tests.RESET_SUITE), "milliseconds of a reset"


@pytest.mark.vm
def test_workers_boot_answer_and_end() -> None:
    settings = Settings(target="none", source="python", syscall_pcs=True)
    with Worker(settings, service=SERVICE) as worker:
        worker.wait_ready()
        assert worker.seconds is not None
        assert worker.seconds > 0
        for adaptive in (True, False):
            worker.ask("stream", 0.2, adaptive)
            rate = worker.answer()
            assert isinstance(rate, float)
            assert rate > 10
        worker.ask("memory")
        memory = worker.answer()
        assert isinstance(memory, tuple)
        assert all(5 < each < 2000 for each in memory)


def test_worker_fails_its_reason_is_shown() -> None:
    settings = Settings(target="none", source="python", image="no-such-image")
    with Worker(settings) as worker, pytest.raises(UsageError, match="no image 'no-such-image'"):
        worker.wait_ready()


@pytest.mark.vm
@pytest.mark.parametrize("only", ["signal", "vms"])
def test_ctrl_c_leaves_nothing(tmp_path: Path, only: str) -> None:
    out = tmp_path / "bench.json"
    with support.nothing_left(out):
        process = subprocess.Popen(
            [*support.COMMAND, "bench", "--quick", "--only", only, "-o", str(out)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, support.MARK: str(out)},
            start_new_session=True,
        )
        try:
            assert process.stderr is not None
            # With QEMU running, and for one of the two in the middle of a turn.
            awaited = {"signal": "in turn", "vms": "2 at once"}[only]
            said = ""
            while awaited not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, said + stderr
    assert "interrupted" in stderr
    assert not out.exists()


@pytest.mark.parametrize("microseconds", [0.5, 20.0, 600.0, 40_000.0, 2_000_000.0])
def test_cases_of_a_turn_last_as_long_as_it_should(microseconds: float) -> None:
    asked = []

    def run(count: int) -> Turn:
        asked.append(count)
        # The first are slow, and each second turn is disturbed.
        slow = {1: 50, 2: 20}.get(len(asked), 1 + 9 * (len(asked) % 2))
        return Turn(0.0, microseconds * slow, 0.0, 0.0)

    count = cases_of_a_turn(run, 0.25)
    assert count * microseconds / 1e6 == pytest.approx(0.25, rel=0.2) or count == 1
    # What it takes to know is no more than a few turns, or the fewest cases.
    assert sum(asked) * microseconds / 1e6 <= 1.5 or sum(asked) == 30
