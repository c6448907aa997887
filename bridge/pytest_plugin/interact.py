# SPDX-License-Identifier: Apache-2.0
"""Ways for a person into a guest of a test."""

from __future__ import annotations

import functools
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import pytest

from bridge.errors import BridgeError
from bridge.session.session import Session

__all__ = ["open_shell", "wait_for_user"]

_POLL_SECONDS = 0.5


def open_shell(config: pytest.Config, session: Session, greeting: str) -> None:
    """Connect the terminal to a shell in a guest, until it ends."""
    with _terminal(config) as write:
        write(greeting)
        try:
            session.guest.shell()
        except BridgeError as error:
            write(error.report())


def wait_for_user(config: pytest.Config, sessions: Sequence[Session]) -> None:
    """Say how to get into the guests, and wait for Ctrl-C or until they are gone."""
    with _terminal(config) as write:
        for session in sessions:
            write(shlex.join(session.guest.ssh_command))
        write("guests are kept; Ctrl-C ends them")
        try:
            while any(session.machine.loss is None for session in sessions):
                time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            pass


@contextmanager
def _terminal(config: pytest.Config) -> Iterator[_Write]:
    """Give the terminal to the block; yields a function that writes a line."""
    capture = config.pluginmanager.getplugin("capturemanager")
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if capture is not None:
        capture.suspend(in_=True)
    try:
        if reporter is None:
            yield functools.partial(print, flush=True)
            return

        def write(line: str) -> None:
            # A file or a pipe would keep it until the end, and a person waits for it.
            reporter.write_line(line)
            reporter.flush()

        write("")  # below the dots of the tests
        yield write
    finally:
        if capture is not None:
            capture.resume()


class _Write(Protocol):
    def __call__(self, line: str, /) -> object: ...
