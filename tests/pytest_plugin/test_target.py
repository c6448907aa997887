# SPDX-License-Identifier: Apache-2.0
"""Targets of tests: how they are chosen, what becomes of them between tests, how they fail."""

from __future__ import annotations

import pytest

from tests.pytest_plugin.test_guest import Run, cache, run  # noqa: F401

pytestmark = pytest.mark.vm

pytest_plugins = ["pytester"]

COUNTER = """
import os, socketserver, sys, threading
from bridge import Endpoint
from bridge.targets import TARGET_ADDRESS


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(self.server.target.answer(line.decode().strip()).encode() + b"\\n")


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True


class Counter:
    '''Counts the lines it was sent, on a port of the guest's choice.'''

    packages = ("counter",)
    guest_modules = ()
    guest_teardown = ""
    endpoints = ()

    def __init__(self, port=7000):
        self.name = f"counter{port}"
        self.port = port
        self.count = 0
        self.server = None
        self.pid = os.getpid()

    @property
    def guest_setup(self):
        return f"echo {TARGET_ADDRESS} {self.name} >>/etc/hosts\\n"

    def answer(self, line):
        if line == "fail":
            raise ValueError("no such line")
        if line == "die":
            os._exit(9)
        self.count += 1
        return f"{self.count} {self.port}"

    def pids(self):
        return self.pid, os.getpid()

    def start(self):
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.target = self
        self.thread = threading.Thread(target=self.server.serve_forever, name="serving")
        self.thread.start()
        self.endpoints = (Endpoint(self.name, self.server.server_address[1], self.port),)

    def stop(self):
        if self.server is not None:
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()
            self.server = None
            self.count = 0


class Prepared(Counter):
    def prepare(self):
        self.answers = {"ready": str(os.getpid())}

    def answer(self, line):
        return self.answers.get(line) or super().answer(line)


class Early(Counter):
    def prepare(self):
        threading.Thread(target=threading.Event().wait, name="too early", daemon=True).start()
"""

ASK = """
def send(guest, line):
    command = f"exec 3<>/dev/tcp/counter7000/7000; echo {line} >&3; cat <&3"
    guest.run(["bash", "-c", command], timeout=20)


def ask(guest, line="more", port=7000):
    command = f"exec 3<>/dev/tcp/counter{port}/{port}; echo {line} >&3; head -n 1 <&3"
    return guest.succeed(["bash", "-c", command], timeout=20).strip()
"""


@pytest.fixture(autouse=True)
def counter(run: Run) -> None:  # noqa: F811
    run.pytester.makepyfile(counter=COUNTER, asking=ASK)
    run.pytester.makeini("[pytest]\npythonpath = .\n")


def test_target_each_way_to_choose_one_reaches_it(run: Run) -> None:  # noqa: F811
    result = run(
        """
        import pytest
        from asking import ask
        from counter import Counter

        class Other(Counter):
            '''Of the test module itself, without arguments.'''
            def __init__(self):
                super().__init__(7001)

        KEPT = Counter(7002)

        @pytest.mark.target("counter:Counter", port=7003)
        def test_name(guest, target):
            assert ask(guest, port=7003) == "1 7003"
            assert target.count == 1 and target.endpoints[0].guest_port == 7003

        @pytest.mark.guest(target=Other)
        class TestClass:
            def test_class(self, guest, target):
                assert ask(guest, port=7001) == "1 7001"
                assert isinstance(target, Other)

            def test_keeps_its_state(self, guest, target):
                assert ask(guest, port=7001) == "2 7001"

            def test_fixture_alone_starts_the_guest(self, target):
                assert target.count == 2

        @pytest.mark.parametrize("target", [KEPT, Other, Counter], indirect=True)
        def test_parameter(guest, target):
            assert ask(guest, port=target.port).endswith(str(target.port))
            assert target.port != 7002 or target is KEPT

        @pytest.mark.parametrize("target", [(KEPT, Other)], indirect=True)
        def test_parameter_of_a_test_without_the_fixture(guest):
            first, second = guest.target
            assert first is KEPT
            assert ask(guest, port=7001) and ask(guest, port=7002)

        @pytest.mark.target(Counter, Other)
        def test_two_at_once(guest, target, kcov):
            first, second = target
            assert (ask(guest), ask(guest, port=7001)) == ("1 7000", "1 7001")
            assert (first.count, second.count) == (1, 1)
            with kcov.trace() as trace:
                ask(guest)
            trace.assert_covered("counter.py:Handler.handle")
        """,
        "-rA",
    )
    result.assert_outcomes(passed=9)


def test_target_fixture_of_the_user_chooses_it(run: Run) -> None:  # noqa: F811
    result = run(
        """
        import pytest
        from asking import ask
        from counter import Counter

        @pytest.fixture(scope="module")
        def target():
            return Counter(7005)

        def test_override(guest, target):
            assert ask(guest, port=7005) == "1 7005"
            assert target.count == 1

        def test_same_object_keeps_the_guest(guest):
            assert guest.session.resets == 1
            assert ask(guest, port=7005) == "2 7005"

        class TestOther:
            @pytest.fixture
            def target(self, guest):
                return guest.succeed("echo another meaning").strip()

            def test_fixture_that_takes_the_guest_is_none_of_this(self, guest, target):
                assert target == "another meaning"

        class TestChanged:
            pytestmark = pytest.mark.guest(target=Counter)

            @pytest.fixture
            def target(self):
                return 3

            def test_no_target(self, guest):
                pass
        """
    )
    result.assert_outcomes(passed=3, errors=1)
    assert "3 is no target" in result.stdout.str()


def test_target_restart_and_fork_each_test_finds_its_first_state(run: Run) -> None:  # noqa: F811
    result = run(
        """
        import os
        import pytest
        from asking import ask
        from counter import Counter, Prepared

        seen = []

        @pytest.mark.target(Counter, reset="restart")
        class TestRestart:
            @pytest.mark.parametrize("number", range(3))
            def test_it(self, guest, target, number):
                assert ask(guest) == "1 7000"
                assert ask(guest) == "2 7000"
                assert target.count == 2
                seen.append(guest.session.machine.pid)
                assert len(set(seen)) == 1

            def test_reset_in_the_middle(self, guest):
                assert ask(guest) == "1 7000"
                guest.reset()
                assert ask(guest) == "1 7000"

        @pytest.mark.target(Prepared, reset="fork")
        class TestFork:
            @pytest.mark.parametrize("number", range(3))
            def test_it(self, guest, target, number, kcov):
                with kcov.trace() as trace:
                    assert ask(guest) == "1 7000"
                trace.assert_covered("counter.py:Counter.answer")
                assert ask(guest) == "2 7000"
                assert target.count == 2
                made, serving = target.pids()
                assert ask(guest, "ready") == str(made) != str(serving)
                assert os.getpid() not in (made, serving)
                seen.append(serving)
                assert len(set(seen[3:])) == len(seen[3:]) == number + 1, "a process for each"
                with pytest.raises(Exception, match="has no attribute nothing"):
                    target.nothing

        @pytest.mark.target(Counter(7000), Counter(7001), reset="fork")
        def test_fork_of_two(guest, target):
            assert (ask(guest), ask(guest, port=7001)) == ("1 7000", "1 7001")
            assert [each.count for each in target] == [1, 1]

        def test_nothing_is_left():
            assert not [pid for pid in seen if os.path.exists(f"/proc/{pid}") and pid != seen[0]]
        """
    )
    result.assert_outcomes(passed=9)


def test_target_that_fails_says_what_and_the_run_goes_on(run: Run) -> None:  # noqa: F811
    result = run(
        """
        import socket, time
        import pytest
        from asking import ask, send
        from counter import Counter, Early, Prepared

        class Slow(Counter):
            def start(self):
                time.sleep(1000)

        @pytest.mark.guest(target_timeout=1)
        @pytest.mark.target(Slow, reset='keep')
        def test_never_ready(guest):
            pass

        @pytest.mark.guest(target_timeout=1)
        @pytest.mark.target(Slow, reset="fork")
        def test_never_ready_in_its_process(guest):
            pass

        @pytest.mark.target(Early, reset="fork")
        def test_thread_before_the_fork(guest):
            pass

        @pytest.mark.target(Prepared, reset="fork")
        class TestFork:
            def test_raises(self, guest):
                send(guest, "fail")

            def test_dies(self, guest):
                send(guest, "die")

            def test_afterwards(self, guest):
                assert ask(guest) == "1 7000"

        @pytest.mark.guest(target=Counter)
        class TestHere:
            def test_closes_its_socket(self, guest, target):
                target.server.socket.shutdown(socket.SHUT_RDWR)

            def test_thread_ends(self, guest, target):
                target.server.shutdown()
                target.thread.join()

            def test_afterwards(self, guest):
                assert ask(guest) == "1 7000"

        @pytest.mark.target(Counter, Counter(7000))
        def test_same_port(guest):
            pass

        @pytest.mark.target(lambda: Counter(), reset="fork")
        def test_cannot_be_sent(guest):
            pass
        """
    )
    text = result.stdout.str()
    assert "did not return on start within 1 s" in text
    assert "time.sleep(1000)" in text, "where it is"
    assert "in start\n" in text, "where it is in its process"
    assert "--target-timeout allows more time" in text
    assert "did not answer within 1 s (start)" in text
    assert "it has started threads before start(): too early" in text
    assert "ValueError: no such line" in text
    assert "the process of the target counter7000 exited with 9" in text
    assert "the target: the thread serving, which serves the guest, has ended" in text
    assert "the target no longer listens on its endpoint counter7000" in text
    assert "what the test asks for cannot be had: the targets counter7000" in text
    assert "both want the port 7000" in text
    assert "must be at the top level of a module" in text
    result.assert_outcomes(passed=2, failed=4, errors=5)
