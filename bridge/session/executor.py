# SPDX-License-Identifier: Apache-2.0
"""How a command runs in the guest under kcov."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from bridge.device.abi import WORD
from bridge.errors import GuestSetupError
from bridge.sources.comparisons import Comparison

if TYPE_CHECKING:
    from bridge.guest.ssh import Guest, Output

__all__ = ["Executor", "KcovResult", "SshExecutor"]

_GUEST_DIRECTORY = "/run/kcov-bridge"
_EVIDENCE = 4096


@dataclass(frozen=True)
class KcovResult:
    """What a command did under kcov: its exit status, its PCs in order, its output."""

    exit_status: int
    pcs: list[int]
    stdout: bytes
    stderr: bytes


class Executor(Protocol):
    """A way to run a command in the guest under kcov."""

    def kcov(
        self,
        command: Sequence[str],
        *,
        follow: bool,
        unique: bool,
        timeout: float | None = None,
        stdout: Output | None = None,
        stderr: Output | None = None,
    ) -> KcovResult:
        """Run ``command`` and return what it did.

        Args:
            command: its words; bytes that are no text as surrogates (:func:`os.fsdecode`).
            follow: trace its children and threads too.
            unique: record each PC once a process.
            timeout: seconds.
            stdout, stderr: are given the output as it comes.

        Raises:
            RunTimeoutError: it did not end in time.
            GuestLostError: the guest went away.
        """

    def compare(
        self, command: Sequence[str], *, follow: bool, timeout: float | None = None
    ) -> list[Comparison]:
        """Run ``command`` and return what the target compares meanwhile; raises as above."""


class SshExecutor:
    """Runs ``kcov-exec`` over SSH.

    Args:
        guest: where the commands run.
        cut_off: called once for a command that is cut off, before it is killed.
    """

    def __init__(self, guest: Guest, cut_off: Callable[[], object]) -> None:
        self._guest = guest
        self._cut_off = cut_off

    def kcov(
        self,
        command: Sequence[str],
        *,
        follow: bool,
        unique: bool,
        timeout: float | None = None,
        stdout: Output | None = None,
        stderr: Output | None = None,
    ) -> KcovResult:
        """As :class:`Executor`."""
        file = _guest_file("pcs")
        options = [*(["-f"] if follow else []), *(["-u"] if unique else [])]
        words = ["kcov-exec", *options, "-b", "-o", file, "--", *command]
        told = False

        def cut_off() -> None:
            nonlocal told
            if not told:
                told = True
                self._cut_off()

        try:
            result = self._guest.run(
                words, timeout=timeout, stdout=stdout, stderr=stderr, before_kill=cut_off
            )
            pcs = self._fetch(file)
        except BaseException:
            cut_off()
            raise
        return KcovResult(result.exit_status, pcs, result.stdout, result.stderr)

    def compare(
        self, command: Sequence[str], *, follow: bool, timeout: float | None = None
    ) -> list[Comparison]:
        """As :class:`Executor`."""
        file = _guest_file("cmp")
        options = ["-b", "-c", *(["-f"] if follow else [])]
        self._guest.run(["kcov-exec", *options, "-o", file, "--", *command], timeout=timeout)
        words = self._fetch(file)
        return list(zip(words[::4], words[1::4], words[2::4], words[3::4], strict=True))

    def _fetch(self, file: str) -> list[int]:
        # In memory: a bridge that is killed leaves no file behind.
        received = bytearray()
        line = f"cat {file} && rm {file}"
        result = self._guest.run(line, stdout=received.extend, capture=_EVIDENCE)
        if result.exit_status:
            raise GuestSetupError(
                "the PCs of a command cannot be read in the guest",
                evidence=result.stderr.decode(errors="replace"),
            )
        return memoryview(received[: len(received) // WORD * WORD]).cast("Q").tolist()


def _guest_file(kind: str) -> str:
    """A name in the guest that is nobody's yet; to ask the guest for one would take a command."""
    return f"{_GUEST_DIRECTORY}/{kind}.{os.urandom(8).hex()}"
