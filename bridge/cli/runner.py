# SPDX-License-Identifier: Apache-2.0
"""One run from top to bottom: boot, work under kcov, report."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bridge.cli.streams import Streams
from bridge.config import Settings
from bridge.errors import BridgeError, InfrastructureError, SourceError, UsageError
from bridge.results import REPORT_FILE
from bridge.results import summary as summaries
from bridge.results.coverage_files import HTML_DIRECTORY, LCOV_FILE, make_html, make_lcov
from bridge.session.device_host import reason_of
from bridge.session.session import KcovResult, Session
from bridge.sources.guest_kernel import BLOCKS_FILE as KERNEL_BLOCKS_FILE
from bridge.sources.guest_kernel import SYMBOLS_FILE
from bridge.sources.symbolize import BLOCKS_FILE, NATIVE_FILE
from bridge.targets import DEFAULT_TARGET, MOUNT_POINT
from bridge.targets.programs import PROGRAMS, target_class
from bridge.targets.registry import check_name
from bridge.trace import Call, TraceHeader, TraceWriter
from bridge.trace.perfetto import PERFETTO_FILE, write_perfetto
from bridge.trace.text import render_trace
from bridge.trace.trace_file import TRACE_FILE
from bridge.util.files import check_output, remove, remove_partial, unusable, write_stream
from bridge.util.resources import guest_directory

__all__ = ["claimed", "clear", "noted", "run", "shell"]

logger = logging.getLogger(__name__)

_RESULTS = (
    *("summary.json", "pcs.txt", ".coverage", BLOCKS_FILE, NATIVE_FILE),
    *(SYMBOLS_FILE, KERNEL_BLOCKS_FILE),
    *(LCOV_FILE, HTML_DIRECTORY, REPORT_FILE, "console.log"),
    *(TRACE_FILE, PERFETTO_FILE, "guests"),
)
_OTHER = "choose another directory: --out DIR"
_WORKLOAD = guest_directory() / "workload" / "files.sh"
_EXAMPLE_BYTES = 2 << 20
"""More than kcov-doc prints where its area, 65,536 words, is full."""
_EXAMPLE = f'kcov-doc "$(find {MOUNT_POINT} -type f | head -n 1)"'


def run(
    settings: Settings, command: Sequence[str], streams: Streams, *, trace: str | None = None
) -> int:
    """Run ``command``, or the default workload if it is empty, under kcov in a fresh guest.

    Leaves its results in ``settings.out``, also when the run is cut off.

    Args:
        trace: the file for the readable trace, "-" for stderr; None to trace no system calls.

    Returns:
        The command's exit status.

    Raises:
        UsageError: another run is writing to ``settings.out``; there is no place for ``trace``.
        BridgeError: what ended the run.
    """
    if not command and settings.target in PROGRAMS:
        workload = target_class(settings.target).workload
        command = ["sh", "-c", workload] if workload else []
    if not command and settings.target != DEFAULT_TARGET:
        check_name(settings.target)
        raise UsageError(
            f"the target {settings.target} has no default workload",
            hint="give a command to run in the guest: kcov-bridge run … -- CMD",
        )
    with claimed(settings.out) as out:
        clear(out)
        if trace is not None and trace != "-":
            # A target may change the working directory.
            trace = str(Path(trace).absolute())
            check_output(Path(trace))
        return _run(settings, out, command, streams, trace)


def _run(
    settings: Settings, out: Path, command: Sequence[str], streams: Streams, trace: str | None
) -> int:
    session = Session(settings, out)
    record = _Record(session, tuple(command) or (f"{_WORKLOAD.name} {MOUNT_POINT}",), trace)
    try:
        with session:
            record.exit_status = _work(session, command, record, streams)
            for problem in session.target_problems():
                logger.warning("%s", problem)
        _check_complete(session)
    except BaseException as error:
        record.failed(error)
        record.write(out, streams)
        raise
    if not record.write(out, streams):
        raise InfrastructureError(f"not all results could be written to {out}")
    return record.exit_status


def shell(settings: Settings, streams: Streams) -> int:
    """Boot a guest with its target and connect the terminal to a shell in it."""
    with Session(settings) as session:
        return session.guest.shell(stdout=streams.write_out, stderr=streams.write_err)


def _work(session: Session, command: Sequence[str], record: _Record, streams: Streams) -> int:
    out, err = streams.write_out, streams.write_err
    timeout = session.settings.timeout
    trace = record.trace is not None
    record.started = time.monotonic()
    if command:
        result = session.kcov(
            command, trace=trace, timeout=timeout, stdout=out, stderr=err, stdin=streams.stdin
        )
        record.keep(result)
        return result.exit_status
    session.put(_WORKLOAD, "/run/kcov-bridge/files.sh", 0o755)
    words = ["sh", "/run/kcov-bridge/files.sh", MOUNT_POINT]
    result = session.kcov(words, trace=trace, timeout=timeout, stdout=out, stderr=err)
    record.keep(result)
    if result.exit_status:
        return result.exit_status
    # The second one uses the device itself, in the way of the kernel's documentation.
    example = session.guest.run(_EXAMPLE, timeout=timeout, stderr=err, capture=_EXAMPLE_BYTES)
    words = [word for word in example.text.split() if word.startswith("0x")]
    record.pcs.append([int(word, 16) for word in words])
    return example.exit_status


def _check_complete(session: Session) -> None:
    """Raise what made the session lose PCs without ending it."""
    doorbell, stats = session.doorbell, session.stats()
    if (failure := doorbell.failure) is not None:
        reason, evidence = reason_of(failure)
        counts = f"failures of sources: {stats.source_failures}"
        if stats.tracer_faults:
            counts += f", faults of the tracer: {stats.tracer_faults}"
        raise SourceError(
            f"the PCs of this run are incomplete: {reason}", evidence=f"{evidence}\n{counts}"
        ) from failure
    if stats.problem:
        raise InfrastructureError(
            f"the PCs of this run may be incomplete, and so are its figures: {stats.problem}"
        )


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """Make the directory, for this run alone until the end of the block or of the process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        directory = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise unusable(out, error, hint=_OTHER) from error
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another run{_lock_holder(directory)} is writing to {out}",
                hint="wait until it ends, or choose another directory: --out DIR",
            ) from error
        except OSError as error:
            logger.debug("%s is on a file system without locks: %s", out, error.strerror)
        yield out
    finally:
        os.close(directory)


def _lock_holder(descriptor: int) -> str:
    """Return " (process N)" for the process that holds the lock, "" if it is not known."""
    inode = str(os.fstat(descriptor).st_ino)
    with contextlib.suppress(OSError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].rpartition(":")[2] == inode:
                return f" (process {words[4]})"
    return ""


def clear(out: Path) -> None:
    """Take away what an earlier run left: a file that is there belongs to this run."""
    try:
        for name in _RESULTS:
            remove(out / name)
            remove_partial(out / name)
    except OSError as error:
        raise unusable(out, error, hint=_OTHER) from error


class _Record:
    """What is known of the run so far, to be written at its end, however that comes."""

    def __init__(
        self, session: Session, command: tuple[str, ...], trace: str | None = None
    ) -> None:
        self.session = session
        self.command = command
        self.trace = trace
        self.pcs: list[Sequence[int]] = []
        self.calls: list[Sequence[Call]] = []
        self.exit_status = BridgeError.exit_status
        self.error = ""
        self.started: float | None = None
        self._ended: float | None = None

    def keep(self, result: KcovResult) -> None:
        """Add what a command covered."""
        self.pcs.append(result.pcs)
        self.calls.append(result.calls)

    def failed(self, error: BaseException) -> None:
        """The run is cut off by this; the PCs so far say how far it had come."""
        self.pcs.append(self.session.partial_pcs)
        self.calls.append(self.session.partial_calls)
        if isinstance(error, BridgeError):
            self.error, self.exit_status = error.message, error.exit_status
        elif isinstance(error, KeyboardInterrupt):
            self.error = "interrupted"
            self.exit_status = getattr(error, "exit_status", 130)
        else:
            self.error = f"{type(error).__name__}: {error}"

    def write(self, out: Path, streams: Streams) -> bool:
        """Write whatever can be written and log the rest; return whether all was written.

        A signal that asks the command to end skips what is being written, not the summary.
        """
        seconds = time.monotonic() - self.started if self.started is not None else None
        problems: list[str] = []
        try:
            with (
                noted("pcs.txt", problems),
                (out / "pcs.txt").open("w", encoding="ascii") as file,
            ):
                for pcs in self.pcs:
                    file.writelines(f"{pc:#018x}\n" for pc in pcs)
            if self.trace is not None:
                self._write_trace(self.trace, out, streams, problems)
            data_file = out / ".coverage"
            if data_file.is_file():
                with noted("the HTML report", problems):
                    make_html(data_file, out / HTML_DIRECTORY)
                with noted("the LCOV report", problems):
                    make_lcov(data_file, out / LCOV_FILE)
        except KeyboardInterrupt as error:
            self.failed(error)
            raise
        finally:
            summary = self._summary(seconds)
            with noted("summary.json", problems):
                summaries.write(summary, out / "summary.json")
            with noted("the summary on stderr", problems):
                if self.started is not None:
                    print(summaries.render(summary), file=streams.err)
                print(f"{'results in':>12}  {out}", file=streams.err)
        return not problems

    def _write_trace(self, place: str, out: Path, streams: Streams, problems: list[str]) -> None:
        stats = self.session.stats()
        header = TraceHeader(
            source=",".join(stats.sources),
            image=self.session.settings.image or "",
            kernel=stats.kernel or "",
            command=self.command,
        )
        calls = functools.partial(itertools.chain.from_iterable, self.calls)
        with noted(TRACE_FILE, problems), TraceWriter(out / TRACE_FILE, header) as writer:
            writer.write_all(calls())
        with noted(PERFETTO_FILE, problems):
            write_perfetto(calls(), out / PERFETTO_FILE)
        with noted("the readable trace", problems):
            lines = (f"{line}\n" for line in render_trace(calls()))
            if place == "-":
                for line in lines:
                    streams.write_err(line.encode(streams.err.encoding or "utf-8", "replace"))
            else:
                write_stream(Path(place), lines)

    def _summary(self, seconds: float | None) -> summaries.Summary:
        return summaries.Summary(
            self.session.stats(),
            exit_status=self.exit_status,
            command=self.command,
            run_seconds=round(seconds, 3) if seconds is not None else None,
            error=self.error,
        )


@contextlib.contextmanager
def noted(what: str, problems: list[str]) -> Iterator[None]:
    """Keep a failure to write one result from hiding the others, or what ended the run."""
    try:
        yield
    except BrokenPipeError:
        # Whoever read the stream has gone away.
        raise
    except Exception as error:
        problems.append(what)
        if isinstance(error, BridgeError):
            reason = error.report()
        else:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        logger.error("%s could not be written: %s", what, reason)
