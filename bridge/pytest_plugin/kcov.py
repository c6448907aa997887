# SPDX-License-Identifier: Apache-2.0
"""What the commands of a test cover on the host, and in the guest's kernel."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from bridge.errors import BridgeError, UsageError
from bridge.pytest_plugin.guest import Command, Guest, Result, Tracer
from bridge.session.session import Session
from bridge.sources.pcs import BlockTable, Location
from bridge.sources.python.functions import ranges_text
from bridge.trace.call import Call
from bridge.trace.text import call_text, render_trace

__all__ = ["Kcov", "Trace"]

_SHOWN: Final = 40
"""How many files or functions a failing assertion shows at most."""
_CALLS_SHOWN: Final = 2
"""How many calls it shows for each of them."""
_LAST_CALLS: Final = 20
"""How many calls are the evidence of a failure."""


class Kcov:
    """Runs commands in the test's guest under kcov."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def run(self, command: Command, *, timeout: float | None = 60.0, calls: bool = True) -> Trace:
        """Run one command under kcov and return what it covered; ``trace.results`` has its result.

        Args:
            timeout: seconds.
            calls: as for :meth:`trace`.

        Raises:
            RunTimeoutError: it did not end in time.
            GuestLostError: the guest was lost.
            IncompleteError: the PCs could not all be kept.
        """
        with self.trace(self._guest, calls=calls) as trace:
            self._guest.run(command, timeout=timeout)
        return trace

    @contextlib.contextmanager
    def trace(self, guest: Guest | None = None, *, calls: bool = True) -> Iterator[Trace]:
        """Have all commands of the guest inside the block run under kcov.

        Args:
            calls: record the system calls of the commands too.

        Yields:
            The trace, which grows with each command.
        """
        guest = guest or self._guest
        trace = Trace(guest, calls=calls)
        with guest.traced_by(trace):
            yield trace


@dataclass(frozen=True)
class _Wanted:
    """What an assertion asks for: a file, a function in it, or lines of it.

    Attributes:
        file: the end of its path, at a slash.
        function: a dotted name as ``__qualname__`` has it, without ``<locals>``; or "".
        lines: the numbers of lines, all of which count; or empty.
    """

    file: str
    function: str
    lines: range

    @staticmethod
    def parse(text: str) -> _Wanted:
        file, colon, rest = text.partition(":")
        if not file or (colon and not rest):
            raise UsageError(
                f"{text!r} names nothing that can be covered",
                hint="write a file, file:function, file:Class.method, file:12 or file:12-20",
            )
        first, dash, last = rest.partition("-")
        if first.isdigit() and (not dash or last.isdigit()):
            return _Wanted(file, "", range(int(first), int(last if dash else first) + 1))
        return _Wanted(file, rest, range(0))


class _Code:
    """The host's code that a session covers."""

    def __init__(self, session: Session) -> None:
        source = session.source
        self.table = source.table if source is not None else BlockTable()
        self.functions = session.functions.functions

    def lines(self, file: str) -> set[int]:
        """Return the lines of a file that can be covered."""
        blocks = self.table.file(file)
        return {line for block in blocks.blocks() for line in block.lines} if blocks else set()


class Trace(Tracer):
    """What the commands inside a block covered.

    Attributes:
        pcs: the PCs in the order in which they came.
        results: the results of the commands.
    """

    def __init__(self, guest: Guest, *, calls: bool = True) -> None:
        self._guest = guest
        self._code = _Code(guest.session)
        self._traces_calls = calls
        self._began = time.monotonic()
        self._calls: list[tuple[float, Sequence[Call]]] = []
        """The calls of each command, and when it began."""
        self._by_session: list[tuple[Session, set[int]]] = []
        """The PCs of each session: they mean nothing to the one that follows a reboot."""
        self.pcs: list[int] = []
        self.results: list[Result] = []

    def run(self, command: Command, timeout: float | None) -> Result:
        """Run a command under kcov and add what it covers."""
        words: Sequence[str] | str
        if isinstance(command, str | os.PathLike):
            words = os.fspath(command)
        else:
            words = [os.fspath(word) for word in command]
        began = time.monotonic()
        session = self._guest.session
        # Those of another command that was cut off must not be taken for this one's.
        session.partial_pcs, session.partial_calls = (), ()
        try:
            done = session.kcov(words, timeout=timeout, trace=self._traces_calls)
        except BridgeError:
            self._add(session, began, session.partial_pcs, session.partial_calls)
            raise
        result = Result(done.exit_status, done.stdout, done.stderr, time.monotonic() - began)
        self._add(session, began, done.pcs, done.calls)
        self.results.append(result)
        return result

    def _add(
        self, session: Session, began: float, pcs: Sequence[int], calls: Sequence[Call]
    ) -> None:
        if not self._by_session or self._by_session[-1][0] is not session:
            self._by_session.append((session, set()))
            self._code = _Code(session)
        self._by_session[-1][1].update(pcs)
        self.pcs += pcs
        self._calls.append((began - self._began, calls))

    # What was covered

    def _locations(self) -> Iterator[Location | str | None]:
        for session, pcs in self._by_session:
            yield from map(session.symbolize, pcs)

    @property
    def lines(self) -> dict[str, list[int]]:
        """The covered lines of the host's code, by file; those of each covered block."""
        found: dict[str, set[int]] = {}
        for location in self._locations():
            if isinstance(location, Location):
                found.setdefault(location.file, set()).update(location.block.lines)
        return {file: sorted(numbers) for file, numbers in sorted(found.items())}

    @property
    def functions(self) -> list[str]:
        """The covered functions of the host's code, each ``file:name``, sorted."""
        found = set()
        for file, numbers in self.lines.items():
            for name, span in self._code.functions(file).items():
                if any(number in span for number in numbers):
                    found.add(f"{file}:{name}")
        return sorted(found)

    @property
    def kernel_functions(self) -> list[str]:
        """The covered functions of the guest's kernel, where that is a source, sorted."""
        found = set()
        for text in self._locations():
            if isinstance(text, str):
                # [file:line ]function+0xoffset[ [module]]
                words = text.removesuffix("]").split()
                (name,) = [word for word in words if "+0x" in word][-1:]
                found.add(name.partition("+")[0])
        return sorted(found)

    @property
    def calls(self) -> list[Call]:
        """The system calls of the commands, in the order in which they were entered.

        ``start`` counts from the beginning of the trace, on the host's clock for the beginning of
        each command and on the guest's from there on.
        """
        return list(self._all_calls())

    def _all_calls(self) -> Iterator[Call]:
        for began, calls in self._calls:
            for call in calls:
                yield dataclasses.replace(call, start=call.start + began)

    def last_calls(self, count: int = _LAST_CALLS) -> list[str]:
        """Return the last calls as text, as evidence of a failure: a line each, without code.

        After a command that was cut off they are its last ones.
        """
        last: list[Call] = []
        for _, calls in reversed(self._calls):
            last[:0] = calls[-(count - len(last)) :]
            if len(last) >= count:
                break
        plain = [dataclasses.replace(call, host=(), kernel=(), modules=()) for call in last]
        return list(render_trace(plain, thread=True))

    def new_since(self, other: Trace) -> dict[str, list[int]]:
        """Return the covered lines that another trace has not, by file."""
        before = other.lines
        new = {
            file: sorted(set(numbers) - set(before.get(file, ())))
            for file, numbers in self.lines.items()
        }
        return {file: numbers for file, numbers in new.items() if numbers}

    # Assertions

    def assert_covered(self, *wanted: str) -> None:
        """Assert that code of the host ran.

        Args:
            wanted: each the end of a file's path, ``file:function``, ``file:Class.method``,
                ``file:12`` or ``file:12-20``. Of lines each must be covered, of a function or a
                file one.

        Raises:
            AssertionError: it did not; with what was covered instead.
            UsageError: no covered package has such a file or such a function.
        """
        __tracebackhide__ = True
        for text in wanted:
            missing = self._missing(_Wanted.parse(text))
            if missing:
                raise AssertionError(f"{text} is not covered{missing}\n{self._summary()}")

    def assert_not_covered(self, *unwanted: str) -> None:
        """Assert that code of the host did not run; arguments as :meth:`assert_covered`.

        Raises:
            AssertionError: some of it did.
            UsageError: as above.
        """
        __tracebackhide__ = True
        for text in unwanted:
            each = _Wanted.parse(text)
            if each.lines:
                self._known_lines(each)
            hit = self._hit(each)
            if hit:
                raise AssertionError(
                    f"{text} is covered: lines {ranges_text(hit)}{self._reached_by(each)}"
                )

    def _hit(self, wanted: _Wanted) -> list[int]:
        """Return the covered lines of what is wanted."""
        hit: list[int] = []
        for file, span in self._places(wanted):
            numbers = self.lines.get(file, [])
            hit += [number for number in numbers if span is None or number in span]
        return hit

    def _missing(self, wanted: _Wanted) -> str:
        """Return "" if it is covered, else a text to follow "is not covered"."""
        hit = self._hit(wanted)
        if not wanted.lines:
            return "" if hit else ":"
        lacking = sorted(self._known_lines(wanted) - set(hit))
        return f": lines {ranges_text(lacking)} did not run" if lacking else ""

    def _known_lines(self, wanted: _Wanted) -> set[int]:
        """Return which of the wanted lines have code; a comment or a blank line has none."""
        known = {line for file, _ in self._places(wanted) for line in self._code.lines(file)}
        if not known & set(wanted.lines):
            numbers = f"{wanted.lines.start}-{wanted.lines.stop - 1}"
            raise UsageError(f"{wanted.file} has no code in the lines {numbers}")
        return known & set(wanted.lines)

    def _places(self, wanted: _Wanted) -> list[tuple[str, range | None]]:
        """Return the files that are meant, and which lines of them; None for all."""
        files = [
            file
            for file in self._code.table.files
            if file == wanted.file or file.endswith("/" + wanted.file)
        ]
        if not files:
            raise UsageError(
                f"no file of the covered packages ends with {wanted.file}",
                hint="is its package among the target's packages?"
                if self._code.table.files
                else "the guest has no target: @pytest.mark.guest(target=NAME) names one",
            )
        if not wanted.function:
            return [(file, wanted.lines or None) for file in files]
        places: list[tuple[str, range | None]] = []
        for file in files:
            spans = self._code.functions(file)
            places += [
                (file, span)
                for name, span in spans.items()
                if name == wanted.function or name.endswith("." + wanted.function)
            ]
        if not places:
            raise UsageError(f"{', '.join(files)} has no function {wanted.function}")
        return places

    def _summary(self) -> str:
        if not self.pcs:
            return "nothing was covered: no command ran under kcov, or none reached the target"
        functions = self.functions
        if not functions:
            return f"{len(set(self.pcs)):,} different PCs were covered, none in the host's code"
        reached = self._calls_by_function()
        shown = "\n".join(
            f"  {name}{_by_calls(reached.get(name, []))}" for name in functions[:_SHOWN]
        )
        more = len(functions) - _SHOWN
        return f"covered were:\n{shown}" + (f"\n  and {more} more" if more > 0 else "")

    def _calls_by_function(self) -> dict[str, list[Call]]:
        """Return the calls that reached each function, ``file:name``."""
        reached: dict[str, list[Call]] = {}
        for call in self._all_calls():
            for code in call.host:
                reached.setdefault(f"{code.file}:{code.function}", []).append(call)
        return reached

    def _reached_by(self, wanted: _Wanted) -> str:
        places = self._places(wanted)
        calls = [
            call
            for call in self._all_calls()
            if any(
                code.file == file and (span is None or any(line in span for line in code.lines))
                for code in call.host
                for file, span in places
            )
        ]
        return _by_calls(calls)


def _by_calls(calls: Sequence[Call]) -> str:
    """Return ``, by openat("...") = 3 and 2 more``; "" without any."""
    if not calls:
        return ""
    texts = dict.fromkeys(
        call_text(dataclasses.replace(call, seconds=None, host=(), kernel=(), modules=()))
        for call in calls
    )
    shown = list(texts)[:_CALLS_SHOWN]
    more = len(calls) - len(shown)
    return ", by " + ", ".join(shown) + (f" and {more} more" if more > 0 else "")
