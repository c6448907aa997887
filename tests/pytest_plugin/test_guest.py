# SPDX-License-Identifier: Apache-2.0
"""Runs of pytest with the plugin, with real guests: what a user's tests see."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.util.cache import cache_directory

pytestmark = pytest.mark.vm

pytest_plugins = ["pytester"]


@pytest.fixture
def cache() -> Path:
    return cache_directory()


@pytest.fixture
def run(cache: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run tests in a process of their own."""
    monkeypatch.setenv("KCOV_BRIDGE_REQUIRE", "1")
    # ``pytester`` makes a home of its own, so ``cache`` comes before it.
    monkeypatch.setenv("KCOV_BRIDGE_CACHE", str(cache))
    return Run(pytester)


class Run:
    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester

    def __call__(self, tests: str, *arguments: str) -> pytest.RunResult:
        self.pytester.makepyfile(test_it=tests)
        return self.pytester.runpytest_subprocess(
            "-p", "no:cacheprovider", *arguments, timeout=1200
        )


def test_guest_each_test_finds_it_as_new(run: Run) -> None:
    result = run(
        """
        import pytest

        def test_writes(guest):
            guest.succeed("echo 1 >/root/left && mkdir /run/left")
            assert guest.run(["cat", "/root/left"]).stdout == "1\\n"

        def test_finds_nothing(guest):
            guest.fail("test -e /root/left")
            guest.fail("test -e /run/left")

        @pytest.mark.guest(reset="never")
        def test_leaves(guest):
            guest.succeed("touch /run/left")

        @pytest.mark.guest(reset="never")
        def test_finds_what_was_left(guest):
            guest.succeed("test -e /run/left")
            assert guest.session.resets == 1
        """
    )
    result.assert_outcomes(passed=4)


def test_guest_tests_that_want_two_images_have_a_guest_of_each(run: Run) -> None:
    result = run(
        """
        import pytest

        pids = {}

        @pytest.mark.parametrize("number", [1, 2])
        @pytest.mark.parametrize("kernel", [
            pytest.param("6.1.", marks=pytest.mark.guest(image="bookworm")),
            pytest.param("6.12.", marks=pytest.mark.guest(image="trixie")),
        ])
        def test_kernel(guest, kernel, number):
            assert guest.succeed("uname -r").startswith(kernel)
            pids.setdefault(guest.session.machine.pid, []).append(kernel)

        def test_all():
            assert sorted(pids.values()) == [["6.1.", "6.1."], ["6.12.", "6.12."]]
        """
    )
    result.assert_outcomes(passed=5)


def test_guest_verbs_do_what_they_say(run: Run) -> None:
    result = run(
        """
        import pathlib, time
        import pytest

        def test_run(guest, tmp_path):
            done = guest.run("echo out; echo err >&2; exit 3")
            assert (done.status, done.stdout, done.stderr) == (3, "out\\n", "err\\n")
            assert done.stdout_bytes == b"out\\n" and 0 < done.seconds < 60
            assert guest.run(["echo", "a  b", "$HOME"]).stdout == "a  b $HOME\\n"
            assert guest.run("cat", stdin="typed").stdout == "typed"
            assert guest.run("pwd; echo $WORD", cwd="/tmp", env={"WORD": "x y"}).stdout == (
                "/tmp\\nx y\\n")
            assert guest.succeed("printf 1", "printf 2") == "12"
            with pytest.raises(AssertionError, match="status 7"):
                guest.succeed("exit 7")
            with pytest.raises(AssertionError, match="should fail"):
                guest.fail("true")
            guest.put(b"bytes", pathlib.PurePosixPath("/root/file"))
            assert guest.get("/root/file") == b"bytes"
            copy = guest.get_file("/root/file", tmp_path / "copy")
            assert copy.read_bytes() == b"bytes"
            guest.put(b"x" * 1_200_000, "/root/file")
            assert len(guest.get("/root/file")) == 1_200_000
            with pytest.raises(AssertionError, match="cannot write /nowhere/file"):
                guest.put(b"", "/nowhere/file")
            with pytest.raises(AssertionError, match="cannot read /nowhere"):
                guest.get_file("/nowhere", tmp_path / "copy")

        def test_user(guest, kcov):
            guest.succeed("useradd -m -d /srv/tester -G audio tester")
            who = "id -un; id -Gn; echo $HOME $USER $LOGNAME; pwd; cat"
            wanted = "tester\\ntester audio\\n/srv/tester tester tester\\n{}\\ntyped"
            done = guest.run(who, user="tester", stdin="typed")
            assert done.stdout == wanted.format("/srv/tester")
            with kcov.trace() as trace:
                done = guest.run(who, user="tester", stdin="typed", cwd="/tmp")
            assert done.stdout == wanted.format("/tmp")
            assert {call.name for call in trace.calls} & {"setresuid", "setreuid", "setuid"}
            assert "Permission denied" in guest.run(["cat", "/etc/shadow"], user="tester").stderr
            assert guest.succeed("pwd", user="nobody") == "/\\n"
            guest.fail("echo 1 >/root/x", user="tester")
            guest.wait_until_succeeds(["test", "-O", "/srv/tester"], user="tester")
            guest.wait_until_fails(["test", "-O", "/root"], user="tester")
            missing = guest.run("true", user="nobody else")
            assert missing.status == 126 and "no user nobody else" in missing.stderr

        def test_waits(guest):
            guest.succeed("(sleep 0.3; echo ready >/run/made) >/dev/null 2>&1 &")
            guest.wait_for_file("/run/made")
            assert guest.wait_until_succeeds("grep ready /run/made") == "ready"
            guest.succeed("(sleep 0.3; rm /run/made) >/dev/null 2>&1 &")
            guest.wait_until_fails("test -e /run/made")
            here = "cat <<'EOF'\\nit's `x` $(1\\nEOF\\n# a comment"
            assert guest.wait_until_succeeds(here) == "it's `x` $(1"
            assert guest.wait_until_fails("echo on both; echo 1 >&2; exit 3") == "on both\\n1"
            with pytest.raises(AssertionError) as caught:
                guest.wait_until_succeeds("echo not yet; false", timeout=0.5)
            assert "timed out after 0.5 s" in str(caught.value) and "not yet" in str(caught.value)
            with pytest.raises(AssertionError) as caught:
                guest.wait_until_succeeds("echo why >&2; false", timeout=0.5)
            assert str(caught.value).count("why") == 2, "the command, and its output once"
            for wrong in ("false); true; (true", "echo '"):
                with pytest.raises(AssertionError, match="yntax|nterminated"):
                    guest.wait_until_succeeds(wrong, timeout=0.2)
            with pytest.raises(AssertionError, match="itself did not end"):
                guest.wait_until_succeeds("yes", timeout=0.5)
            began = time.monotonic()
            with pytest.raises(AssertionError, match="exists"):
                guest.wait_for_file("/nowhere", timeout=0.2)
            assert time.monotonic() - began < 50, "the default of 60 s"
            guest.wait_for_open_port(22)
            with pytest.raises(AssertionError, match="port 9 is open"):
                guest.wait_for_open_port(9, timeout=0.2)

        def test_console(guest):
            guest.succeed("echo 'a word on the console' >/dev/console")
            assert guest.wait_for_console_text("w.rd on") == "word on"
            assert "a word" in guest.console_log()
            with pytest.raises(AssertionError, match="did not show 'nothing'"):
                guest.wait_for_console_text("nothing", timeout=0.2)
            guest.succeed("echo 'a word in the log' >/dev/kmsg")
            assert "a word in the log" in guest.dmesg()

        def test_console_of_the_test_before_is_not_this_ones(guest):
            assert "a word" not in guest.console_log() + guest.dmesg()

        def test_reset_in_the_middle(guest):
            guest.succeed("touch /run/left")
            guest.reset()
            guest.fail("test -e /run/left")

        def test_reboot(guest):
            guest.succeed("touch /run/left")
            guest.reboot()
            guest.fail("test -e /run/left")
            guest.succeed("true")
        """
    )
    result.assert_outcomes(passed=7)


def test_guest_machine_is_sick_the_test_fails_and_the_next_has_another(run: Run) -> None:
    result = run(
        """
        import logging, pytest, threading

        def test_warning(guest):
            guest.succeed("echo 'WARNING: CPU: 0 PID: 1 at x' >/dev/kmsg")

        @pytest.mark.guest(ignore=["expected here"])
        def test_expected(guest):
            guest.succeed("echo 'BUG: expected here' >/dev/kmsg")

        def test_crash_of_a_process(guest):
            guest.run("sh -c 'kill -SEGV $$'")
            guest.succeed("echo 'a.out[99]: segfault at 0 ip 0' >/dev/kmsg")

        def test_failed_assertion_hides_no_fault_of_the_target(guest):
            def fail():
                logging.getLogger("asyncio").error("Task exception", exc_info=OSError("unawaited"))
            thread = threading.Thread(target=fail)
            thread.start()
            thread.join()
            assert False

        @pytest.fixture
        def warns_at_the_end(guest):
            yield
            guest.succeed("echo 'BUG: in the teardown' >/dev/kmsg")

        def test_teardown(warns_at_the_end):
            pass

        @pytest.mark.guest(reset="module")
        class TestModule:
            def test_crash(self, guest):
                guest.crash()

            def test_lost_guest_is_replaced(self, guest):
                guest.succeed("true")

            @pytest.mark.guest(ignore="mine")
            def test_ignored(self, guest):
                guest.succeed("echo 'BUG: mine' >/dev/kmsg")
                assert "BUG: mine" in guest.dmesg()

            def test_log_of_another_test_does_not_count(self, guest):
                guest.succeed("true")
                assert "mine" not in guest.dmesg()

        def test_thread_of_the_target(guest):
            def fail():
                raise RuntimeError("in the target")
            thread = threading.Thread(target=fail)
            thread.start()
            thread.join()

        def test_well(guest):
            guest.succeed("true")

        def test_panic(guest):
            guest.run("echo c >/proc/sysrq-trigger")

        def test_crash_on_purpose(guest):
            guest.crash()

        def test_power_off(guest):
            guest.run("echo o >/proc/sysrq-trigger; sleep 30")

        def test_afterwards(guest):
            guest.succeed("true")
        """,
    )
    result.assert_outcomes(passed=9, failed=6, errors=1, warnings=1)
    text = result.stdout.str()
    assert "the machine is not well" in text
    assert "OSError: unawaited" in text
    assert "BUG: in the teardown" in text
    assert "WARNING: CPU: 0 PID: 1 at x" in text
    assert "RuntimeError: in the target" in text
    assert "panicked" in text
    assert '\nat test_it.py:58: guest.run("echo c >' in text
    assert "  | [" not in text, "the end of the console is shown once"
    assert "was switched off" in text


def test_guest_assertion_fails_shows_the_frames_of_the_test_alone(run: Run) -> None:
    result = run(
        """
        def test_it(guest):
            guest.succeed("echo why >&2; echo in the log >/dev/kmsg; exit 5")

        def test_mistake(guest):
            guest.run("true", env={"no name": ""})

        def test_slow(guest):
            guest.run("echo before the end; sleep 100", timeout=5)
        """,
        "--junitxml=junit.xml",
    )
    result.assert_outcomes(failed=3)
    text = result.stdout.str()
    assert "the machine" not in text
    assert "test_it.py:5: in test_mistake" in text
    assert "'no name' is not a valid name" in text
    assert "test_it.py:8: in test_slow" in text
    assert "| before the end" in text
    assert "direct cause" not in text
    assert "ended with status 5" in text
    assert "| why" in text
    assert "guest kernel log since the test began" in text
    assert "in the log" in text
    assert "guest.py" not in text
    junit = (run.pytester.path / "junit.xml").read_text()
    assert 'name="guest_kernel"' in junit
    assert 'name="guest_accel"' in junit


def test_guest_asked_for_by_the_test_itself_or_by_a_fixture_of_a_module(run: Run) -> None:
    result = run(
        """
        import pytest

        def test_asks(request):
            request.getfixturevalue("guest").succeed("echo in the log >/dev/kmsg; exit 5")

        @pytest.fixture(scope="module")
        def prepared(guest):
            pass

        def test_prepared(prepared):
            pass
        """
    )
    result.assert_outcomes(failed=1, errors=1)
    text = result.stdout.str()
    assert "guest kernel log since the test began" in text
    assert "guest.py" not in text
    assert 'guest(reset="module")' in text


def test_guest_fixture_of_the_user_with_this_name_is_left_alone(run: Run) -> None:
    result = run(
        """
        import sys
        import pytest

        @pytest.fixture
        def guest():
            return "Bob"

        @pytest.mark.guest("of honour", table=1)
        def test_first(guest):
            assert guest == "Bob"

        def test_second():
            pass

        def test_third(guest):
            assert "bridge.pytest_plugin.request" not in sys.modules
        """,
        "-v",
        "--guest-keep",
        "test_it.py",
    )
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["*test_first*", "*test_second*", "*test_third*"])


def test_guest_options_that_need_the_terminal_and_workers_is_a_usage_error(run: Run) -> None:
    for option in ("--guest-keep=failed", "--guest-shell"):
        result = run("def test_it(guest): pass", "-n1", option)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert "leave out -n" in result.stderr.str()


def test_guest_wrong_argument_in_a_worker_is_an_error_of_the_test(run: Run) -> None:
    result = run(
        """
        import pytest

        @pytest.mark.guest(memmory=256)
        def test_it(guest):
            pass

        def test_other():
            pass
        """,
        "-n1",
    )
    result.assert_outcomes(errors=1, passed=1)
    assert "did you mean memory?" in result.stdout.str()


def test_guest_broken_settings_file_is_named_and_no_marker(run: Run) -> None:
    (run.pytester.path / "kcov-bridge.toml").write_text("memory = = 3")
    result = run("def test_it(guest): pass")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    text = result.stderr.str() + result.stdout.str()
    assert "kcov-bridge.toml is not valid TOML" in text
    assert "the marker" not in text


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("guest(memory='much')", "memory"),
        ("guest(memmory=256)", "memory"),
        ("guest(reset='sometimes')", "it can be 'test', 'module', 'never'"),
        ("guest(reset=['test'])", "it can be 'test', 'module', 'never'"),
        ("guest(ignore=['('])", "ignore"),
        ("guest('trixie')", "takes settings by name"),
        ("target('nowhere')", "there is no target nowhere"),
        ("target(object())", "is no target"),
        ("target('a:B', reset='sometimes')", "it can be 'keep', 'restart', 'fork'"),
        ("target(port=3)", "names none"),
        ("target('a:B', 'c:D', port=3)", "give instances instead"),
    ],
)
def test_markers_wrong_argument_is_a_usage_error(run: Run, marker: str, message: str) -> None:
    result = run(
        f"""
        import pytest

        @pytest.mark.{marker}
        def test_it(guest):
            pass
        """
    )
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in result.stderr.str() + result.stdout.str()


def test_guest_tests_of_one_machine_run_together(run: Run) -> None:
    result = run(
        """
        import os, pytest

        def pid(guest):
            return guest.session.machine.pid

        seen = []

        def test_a(guest):
            seen.append(pid(guest))

        @pytest.mark.guest(syscall_pcs=True)
        def test_b(guest):
            seen.append(pid(guest))

        def test_c(guest):
            seen.append(pid(guest))

        @pytest.mark.guest(syscall_pcs=True)
        def test_d(guest):
            assert pid(guest) == seen[2] != seen[0] == seen[1]
        """
    )
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*test_it.py ....*"])


def test_guest_no_qemu_is_a_skip_with_the_remedy_or_a_failure(run: Run) -> None:
    tests = """
        import pytest

        @pytest.mark.guest(qemu="qemu-that-nobody-has")
        def test_it(guest):
            pass
        """
    required = run(tests)
    required.assert_outcomes(errors=1)
    os.environ["KCOV_BRIDGE_REQUIRE"] = ""
    skipped = run(tests, "-rs")
    skipped.assert_outcomes(skipped=1)
    assert "kcov-bridge setup" in skipped.stdout.str()


def test_guest_two_failed_starts_in_a_row_end_the_run_with_one_message(run: Run) -> None:
    result = run(
        """
        import pytest

        @pytest.mark.parametrize("number", range(6))
        @pytest.mark.guest(memory=64, boot_timeout=1, snapshot=False)
        def test_it(guest, number):
            pass
        """
    )
    result.assert_outcomes(errors=2)
    assert "guests in a row did not start" in result.stdout.str()
    assert "\nat " not in result.stdout.str(), "no line of the test is to blame"


def test_guest_target_that_fails_does_not_end_the_run(run: Run) -> None:
    run.pytester.makepyfile(
        failing="""
        import sys, threading

        class Target:
            name = "failing"
            packages = guest_modules = endpoints = ()
            guest_setup = guest_teardown = ""
            def __init__(self, directory=None): pass
            def start(self): pass
            def stop(self): pass

        class Raises(Target):
            def start(self):
                raise ValueError("no such device")

        class Exits(Target):
            def start(self):
                sys.exit(3)

        class Late(Target):
            def start(self):
                self.asked = threading.Event()
                self.thread = threading.Thread(target=self.serve, name="serving")
                self.thread.start()
            def serve(self):
                self.asked.wait()
                sys.exit(4)
            def stop(self):
                self.asked.set()
                self.thread.join()
                raise OSError("cannot stop")
        """
    )
    result = run(
        """
        import pytest

        @pytest.mark.guest(target="failing:Raises")
        def test_raises(guest):
            pass

        @pytest.mark.guest(target="failing:Exits")
        def test_exits(guest):
            pass

        @pytest.mark.guest(target="failing:Late")
        def test_thread_ends(guest):
            target = guest.session._running.host.target
            target.asked.set()
            target.thread.join()
        """
    )
    result.assert_outcomes(errors=2, failed=1, warnings=2)
    text = result.stdout.str()
    assert "raised ValueError on start: no such device" in text
    assert "raised SystemExit on start: 3" in text
    assert "the target: the thread serving ended by an exception" in text
    assert "a guest did not end in order" in text
    assert "cannot stop" in text


def test_kcov_trace_shows_what_the_target_ran(run: Run) -> None:
    result = run(
        """
        import re

        import pytest

        pytestmark = pytest.mark.guest(target="plan9", source="python")

        def test_read(guest, kcov):
            with kcov.trace(guest) as trace:
                text = guest.succeed("cat /mnt/target/README")
            assert text and len(trace.results) == 1
            trace.assert_covered("plan9/server.py")
            assert any("server.py:" in name for name in trace.functions)
            assert not trace.kernel_functions
            listed = kcov.run(["ls", "-l", "/mnt/target"])
            assert listed.results[0].status == 0
            assert trace.new_since(trace) == {}
            assert listed.new_since(trace) or trace.new_since(listed)

            (opened,) = [
                call for call in trace.calls
                if call.name == "openat" and '"/mnt/target/README"' in call.arguments
            ]
            assert opened.result == 3 and opened.seconds > 0
            assert "Plan9ServerProtocol.t_open" in {code.function for code in opened.host}
            assert trace.last_calls()[-1].endswith("exit_group(0) = ?")
            assert len(trace.last_calls(3)) == 3
            opens = 'openat(AT_FDCWD, "/mnt/target/README", O_RDONLY) = 3'
            opens = "t_open, by " + re.escape(opens)
            with pytest.raises(AssertionError, match=opens):
                trace.assert_covered("plan9/server.py:Plan9ServerProtocol.t_create")
            with pytest.raises(AssertionError, match="is covered: lines .*, by openat"):
                trace.assert_not_covered("plan9/server.py:t_open")
            starts = [call.start for call in trace.calls]
            assert starts == sorted(starts) and starts[0] >= 0

        def test_cut_off(guest, kcov):
            with kcov.trace() as trace:
                with pytest.raises(Exception, match="did not end"):
                    guest.run(["sleep", "1000"], timeout=3)
            assert "nanosleep(" in trace.last_calls()[-1] and trace.calls[-1].result is None
            assert kcov.run(["true"], calls=False).calls == []

        def test_reboot(guest, kcov):
            with kcov.trace() as trace:
                guest.succeed("cat /mnt/target/README")
                before = trace.lines
                guest.reboot()
                guest.succeed("true")
                assert trace.lines == before
                guest.succeed("ls -l /mnt/target")
            assert len(trace.results) == 3
            trace.assert_covered("plan9/server.py")

        def test_nothing(guest, kcov):
            trace = kcov.run(["true"])
            trace.assert_not_covered("plan9/server.py")
            with pytest.raises(AssertionError, match="nothing was covered"):
                trace.assert_covered("plan9/server.py")

        def test_unknown(kcov):
            trace = kcov.run(["true"])
            with pytest.raises(Exception, match="ends with nowhere.py"):
                trace.assert_covered("nowhere.py")
            with pytest.raises(Exception, match="no code in the lines 9990-9999"):
                trace.assert_not_covered("plan9/server.py:9990-9999")
            with pytest.raises(Exception, match="has no function nothing"):
                trace.assert_not_covered("plan9/server.py:nothing")
        """
    )
    result.assert_outcomes(passed=5)


def test_plugin_import_loads_nothing_of_the_package_but_itself(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_it():
            loaded = {name for name in sys.modules if name.partition(".")[0] == "bridge"}
            assert loaded <= {"bridge", "bridge.pytest_plugin", "bridge.pytest_plugin.plugin"}
            assert not {"coverage", "paramiko", "asyncio"} & set(sys.modules)
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:cov").assert_outcomes(
        passed=1
    )


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 2)]
)
def test_guest_signal_in_the_middle_of_a_command_leaves_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    path = run.pytester.path
    run.pytester.makepyfile(
        test_it="""
        import pathlib

        def test_it(guest):
            pathlib.Path("pid").write_text(str(guest.session.machine.pid))
            pathlib.Path("running").touch()
            guest.run("sleep 1000", timeout=None)
        """
    )
    temporary = path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = run.pytester.popen([sys.executable, "-c", _INTERRUPTIBLE], stdin=subprocess.DEVNULL)
    try:
        _wait(lambda: (path / "running").exists() or process.poll() is not None)
        os.kill(process.pid, number)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == status, output.decode()
    _wait(lambda: not Path("/proc", (path / "pid").read_text()).exists())
    assert list(temporary.iterdir()) == []


def test_guest_keep_failed_keeps_the_first_until_ctrl_c(run: Run) -> None:
    path = run.pytester.path
    run.pytester.makepyfile(
        test_it="""
        import pathlib, pytest

        @pytest.mark.parametrize("number", [1, 2, 3])
        def test_it(guest, number):
            with open("pids", "a") as file:
                print(guest.session.machine.pid, file=file)
            assert number == 2
        """
    )
    with (path / "output").open("w") as output:
        process = run.pytester.popen(
            [sys.executable, "-c", _INTERRUPTIBLE, "--guest-keep=failed"],
            stdin=subprocess.DEVNULL,
            stdout=output,
        )
    shown = (path / "output").read_text
    try:
        _wait(lambda: "Ctrl-C ends them" in shown() or process.poll() is not None, shown)
        pids = (path / "pids").read_text().split()
        assert [Path("/proc", pid).exists() for pid in pids] == [True, False, False]
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
    finally:
        process.kill()
    assert shown().count("\nssh -i ") == 1
    assert "2 failed, 1 passed" in shown()
    _wait(lambda: not any(Path("/proc", pid).exists() for pid in pids))


_INTERRUPTIBLE = """
import signal, sys
import pytest

# A shell's background job ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def _wait(condition: Callable[[], bool], evidence: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, evidence()
        time.sleep(0.1)
