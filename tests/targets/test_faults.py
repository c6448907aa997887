# SPDX-License-Identifier: Apache-2.0
"""What is noted of exceptions that nobody sees, and of threads that end."""

from __future__ import annotations

import logging
import socket
import socketserver
import threading

from bridge.targets.faults import ServingThreads, TargetFaults


def test_serving_threads_one_that_ends_is_told_once() -> None:
    before = ServingThreads.running()
    go = threading.Event()
    thread = threading.Thread(target=go.wait, name="serving")
    thread.start()
    serving = ServingThreads(before)
    other = threading.Thread(target=lambda: None, name="later")
    other.start()
    other.join()
    assert serving.take_ended() == []
    go.set()
    thread.join()
    assert serving.take_ended() == ["the thread serving, which serves the guest, has ended"]
    assert serving.take_ended() == []


def test_target_faults_exception_of_a_thread_is_noted_once() -> None:
    hook = threading.excepthook
    shown: list[object] = []
    threading.excepthook = shown.append
    faults = TargetFaults()
    faults.watch()

    def fail() -> None:
        raise RuntimeError("in the target")

    thread = threading.Thread(target=fail, name="serving")
    thread.start()
    thread.join()
    (fault,) = faults.take()
    assert "serving" in fault
    assert "RuntimeError: in the target" in fault
    assert faults.take() == []
    assert len(shown) == 1, "the hook that was there before is called too"
    faults.close()
    assert threading.excepthook == shown.append
    threading.excepthook = hook


def test_target_faults_hook_in_its_place_calls_it_no_endless_chain() -> None:
    hook = threading.excepthook
    shown: list[object] = []
    threading.excepthook = shown.append
    faults = TargetFaults()
    faults.watch()
    watching = threading.excepthook
    threading.excepthook = lambda args: watching(args)
    faults.watch()

    def fail() -> None:
        raise RuntimeError("in the target")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    faults.close()
    threading.excepthook = hook
    assert faults.take()


def test_target_faults_error_of_a_request_that_socketserver_prints_counts() -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            raise RuntimeError("in the handler")

    before = socketserver.BaseServer.handle_error
    faults = TargetFaults()
    faults.watch()
    faults.watch()
    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        socket.create_connection(server.server_address[:2]).close()  # type: ignore[arg-type]
        thread.join()
    (fault,) = faults.take()
    assert "TCPServer failed on a request" in fault
    assert "RuntimeError: in the handler" in fault
    faults.close()
    assert socketserver.BaseServer.handle_error is before


def test_target_faults_errors_that_asyncio_logs_on_other_threads_count() -> None:
    faults = TargetFaults()
    faults.watch()
    log = logging.getLogger("asyncio")

    def fail() -> None:
        log.error("Task exception was never retrieved", exc_info=RuntimeError("in the target"))

    thread = threading.Thread(target=fail, name="serving")
    thread.start()
    thread.join()
    log.error("on the thread of the test itself")
    (fault,) = faults.take()
    assert "serving: Task exception was never retrieved" in fault
    assert "RuntimeError: in the target" in fault
    faults.close()
    assert faults not in log.handlers
