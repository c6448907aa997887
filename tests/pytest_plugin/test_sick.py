# SPDX-License-Identifier: Apache-2.0
"""Machines that are not well: what is noticed, what is kept of it, and that the run goes on."""

from __future__ import annotations

import re

import pytest

from tests.pytest_plugin.test_guest import Run, cache, run  # noqa: F401

pytestmark = pytest.mark.vm

pytest_plugins = ["pytester"]


def test_guest_programs_that_crash_make_the_test_fail(run: Run) -> None:  # noqa: F811
    result = run(
        """
        import pytest

        ABORT = ["sh", "-c", "sh -c 'kill -ABRT $$'; true"]

        def test_core(guest):
            guest.succeed(ABORT)

        @pytest.mark.guest(ignore="sh .*SIGABRT")
        def test_expected(guest):
            guest.succeed(ABORT)

        @pytest.mark.guest(image="no-such-image")
        def test_another_image(guest):
            pass

        def test_term_is_no_crash(guest):
            guest.run("sh -c 'kill -TERM $$'")

        def test_address_sanitizer(guest):
            guest.run("echo '==12==ERROR: AddressSanitizer: heap-use-after-free on x' >&2")

        def test_undefined(guest):
            guest.run("echo 'it.c:7:3: runtime error: signed integer overflow'")

        def test_other_words(guest):
            guest.run("echo 'the Sanitizer: runtime error: none'")

        def test_well(guest):
            assert guest.succeed("cat /proc/sys/kernel/hung_task_timeout_secs") == "20\\n"
        """,
        "--guest-report=out",
    )
    result.assert_outcomes(passed=4, failed=3, errors=1)
    text = result.stdout.str()
    assert "what the test asks for cannot be had: there is no image 'no-such-image'" in text
    assert re.search(r"the guest: sh \(process \d+\) dumped core: SIGABRT", text)
    assert "the guest: ==12==ERROR: AddressSanitizer: heap-use-after-free on x" in text
    assert "the guest: it.c:7:3: runtime error: signed integer overflow" in text
    kept = run.pytester.path / "out" / "evidence"
    assert "dumped core" in (kept / "test_it.py-test_core.txt").read_text()
    (core,) = kept.glob("test_it.py-test_core.core.*")
    assert core.read_bytes()[:4] == b"\x7fELF"


def test_guest_whose_test_harms_it_fails_at_once_and_is_replaced(run: Run) -> None:  # noqa: F811
    result = run(
        """
        import time
        import pytest

        @pytest.fixture(autouse=True)
        def no_deadline_is_waited_for(guest):
            began = time.monotonic()
            yield
            assert time.monotonic() - began < 150

        def test_restarts(guest):
            guest.run("echo b >/proc/sysrq-trigger; sleep 500", timeout=400)

        def test_sleep_is_refused(guest):
            guest.fail("echo freeze >/sys/power/state")
            guest.fail("echo mem >/sys/power/state")
            assert "nothing would wake this guest" in guest.dmesg()

        def test_ends_all_processes(guest):
            # What runs commands is process 1, which this spares.
            assert guest.run("kill -KILL -1; sleep 500", timeout=400).status == 137

        def test_ends_the_first_process(guest):
            guest.run("kill -KILL 1; kill -SEGV 1")
            guest.succeed("true")

        def test_fills_the_memory(guest):
            fill = "dd if=/dev/zero of={}/fill bs=1M"
            guest.run(f"{fill.format('/root')}; {fill.format('/run')}", timeout=100)

        def test_well(guest):
            guest.succeed("echo 1 >/root/x && test -s /root/x")
        """,
    )
    result.assert_outcomes(passed=4, failed=2)
    text = result.stdout.str()
    assert (
        "the machine failed, not an assertion of the test: the guest was reset from inside" in text
    )
    assert "Out of memory: Killed process" in text


def test_guest_command_that_hangs_its_evidence_is_kept_before_it_is_killed(
    run: Run,  # noqa: F811
) -> None:
    run.pytester.makepyfile(
        slow="""
        import socket, threading
        from bridge import Endpoint

        class Slow:
            name = "slow"
            packages = ("slow",)
            guest_modules = endpoints = ()
            guest_setup = guest_teardown = ""

            def start(self):
                self.listening = socket.create_server(("127.0.0.1", 0))
                self.ends = threading.Event()
                self.thread = threading.Thread(target=self.never_answers, name="serving")
                self.thread.start()
                self.endpoints = (Endpoint("slow", self.listening.getsockname()[1], 7000),)

            def never_answers(self):
                connection, _ = self.listening.accept()
                with connection:
                    self.ends.wait()

            def stop(self):
                self.ends.set()
                socket.create_connection(self.listening.getsockname()).close()
                self.thread.join()
                self.listening.close()
        """
    )
    tests = """
        import pytest

        COMMAND = ["bash", "-c", "exec 3<>/dev/tcp/10.0.2.100/7000; cat <&3"]

        @pytest.mark.target("slow:Slow")
        class Test:
            def test_own_deadline(self, guest):
                guest.run(COMMAND, timeout=3)

            @pytest.mark.timeout(8, func_only=True)
            def test_signal(self, guest):
                guest.run(COMMAND)

            @pytest.mark.timeout(8, method="thread", func_only=True)
            def test_thread(self, guest):
                guest.succeed("echo in the log >/dev/kmsg")
                guest.run(COMMAND)
        """
    result = run(tests, "--guest-report=out")
    text = result.stdout.str() + result.stderr.str()
    kept = run.pytester.path / "out" / "evidence"
    for name in ("own_deadline", "signal", "thread"):
        found = (kept / f"test_it.py-Test-test_{name}.txt").read_text()
        assert re.search(r"^\d+ S .*: cat ", found, re.MULTILINE), "the process that waits"
        assert "in never_answers" in found, "where the target is"
        assert "self.ends.wait()" in found
    assert "in the log" in found
    assert "Timeout" in text
    assert "2 failed" not in text, "the method thread ends the run"
