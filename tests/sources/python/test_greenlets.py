# SPDX-License-Identifier: Apache-2.0
"""Greenlets: frames that come and go without a call or a return that a tracer is shown."""

from __future__ import annotations

import importlib
import socket
import socketserver
import threading
from functools import partial

import gevent
import greenlet
import pytest

from tests.sources.python.support import MakePackage, MakeSource, Measure, TargetThread, places

SERVICE = """
    import gevent


    def mix():
        return 3


    def paint(colour):
        job = gevent.spawn(mix)
        gevent.joinall([job])
        if colour == "red":
            return f"red {job.value}"
        if colour == "blue":
            return f"blue {job.value}"
        return "none"


    def never():
        return 1
"""


def test_what_runs_after_a_join_is_covered(measure: Measure, on_target: TargetThread) -> None:
    service, source = measure("service", service=SERVICE)
    expected = {
        "red": ["service:6", "service:10", "service:13"],
        "blue": ["service:6", "service:10", "service:14", "service:15"],
        "other": ["service:6", "service:10", "service:14", "service:16"],
    }

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            answer = service.paint(self.rfile.readline().decode().strip())
            self.wfile.write(answer.encode() + b"\n")

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)

    def serve() -> threading.Thread:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        return thread

    address = ("127.0.0.1", server.socket.getsockname()[1])
    thread = on_target(serve)
    try:
        for colour in 4 * ("red", "blue", "other"):
            with socket.create_connection(address) as connection:
                connection.settimeout(60)
                connection.sendall(colour.encode() + b"\n")
                assert connection.recv(100)
            assert places(source) == expected[colour]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("turns", [1, 7])
def test_no_line_is_booked_on_another_file(
    make_package: MakePackage, make_source: MakeSource, on_target: TargetThread, turns: int
) -> None:
    """Greenlets of files that are covered, and not, take turns in the middle of their frames."""
    body = """
        def run(other, turns):
            for turn in range(turns):
                value = turn
                other.switch()
            return value

        def never():
            a = 1
            b = 2
            c = 3
            return a
    """
    uncovered = (
        "\n" * 8 + "def run(other, turns):\n    for turn in range(turns):\n        other.switch()\n"
    )
    name, outside = make_package(inside=body), make_package({"outside.py": uncovered})
    source = make_source(name)
    on_target(source.start)
    inside = on_target(importlib.import_module, f"{name}.inside")
    other = on_target(importlib.import_module, f"{outside}.outside")
    source.consume()

    def take_turns() -> None:
        one = greenlet.greenlet(inside.run)
        two = greenlet.greenlet(partial(other.run, one, turns + 1))
        one.switch(two, turns)
        two.switch()

    on_target(take_turns)
    assert places(source) == ["inside:3", "inside:4", "inside:6"]


def test_many_greenlets_on_one_thread_are_told_apart_from_nothing(
    measure: Measure, on_target: TargetThread
) -> None:
    """Pools of greenlets that end, are killed, and raise."""
    jobs, source = measure(
        "jobs",
        jobs="""
        import gevent

        def sleeps():
            gevent.sleep(0)
            return 1

        def raises():
            gevent.sleep(0)
            raise ValueError("as it should")

        def is_killed():
            try:
                gevent.sleep(60)
            finally:
                done = 1
        """,
    )

    def run() -> None:
        spawned = [gevent.spawn(each) for each in 5 * [jobs.sleeps, jobs.is_killed]]
        gevent.sleep(0)
        gevent.killall(spawned)
        with pytest.raises(ValueError, match="as it should"):
            jobs.raises()

    on_target(run)
    assert places(source) == ["jobs:5", "jobs:9", "jobs:13", "jobs:14", "jobs:15"]
