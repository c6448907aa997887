# SPDX-License-Identifier: Apache-2.0
"""Fan-out of coverage to several readers, each with its own cursor.

Consuming a source clears it, so without the ledger one kcov instance would take blocks from the
others. The ledger keeps the covered blocks in the order in which they were last covered. Each
instance has a cursor into that order and gets the blocks behind it. An instance that does not ask
costs nothing.

A cursor alone would give a reader all that was covered since it last asked, whoever caused it. So a
reader that knows where the order stood when its work began says so: see :meth:`Ledger.collect`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from bridge.sources import PC, Consumed

__all__ = ["Cursor", "Ledger"]


class Cursor:
    """One reader's position; made by :meth:`Ledger.open_cursor`."""

    __slots__ = ("_sequence",)

    def __init__(self, sequence: int) -> None:
        self._sequence = sequence


class Ledger:
    """Gives each reader every block of several sources once.

    Not thread-safe: only the doorbell's thread uses it.

    Blocks come in the order in which they were last covered. Memory is bounded by the number of
    different blocks, even if a reader never asks. A single reader that is up to date takes none.
    """

    def __init__(
        self,
        sources: Sequence[Consumed],
        on_failure: Callable[[Exception], object] | None = None,
        on_position: Callable[[int], object] | None = None,
    ) -> None:
        """Read ``sources``.

        ``on_failure`` gets what a source raises, which then gives nothing; without it the exception
        reaches the caller. ``on_position`` gets :attr:`position` each time it has changed, before
        anybody is given what changed it.
        """
        self._sources = tuple(sources)
        self._only = self._sources[0] if len(self._sources) == 1 else None
        self._on_failure = on_failure
        self._on_position = on_position
        # Covered blocks that some open cursor has not been given, the last covered one last, by the
        # number of that event.
        self._covered: dict[PC, int] = {}
        self._sequence = 0
        # Of these, those that no cursor has been given; in the same order, with the same numbers.
        self._unclaimed: dict[PC, int] = {}
        self._cursors: set[Cursor] = set()
        # The only open cursor, where there is one.
        self._alone: Cursor | None = None

    @property
    def position(self) -> int:
        """The number of the last block that was kept; with one cursor none is."""
        return self._sequence

    def open_cursor(self) -> Cursor:
        """Return a new reader, which gets what is covered from now on.

        Raises what a source's ``consume`` raises.
        """
        self.drain()
        cursor = Cursor(self._sequence)
        self._cursors.add(cursor)
        self._count()
        return cursor

    def close_cursor(self, cursor: Cursor) -> None:
        """Forget a reader. Safe to call twice."""
        self._cursors.discard(cursor)
        self._count()
        if not self._cursors:
            self._covered.clear()
            self._unclaimed.clear()

    def _count(self) -> None:
        self._alone = next(iter(self._cursors)) if len(self._cursors) == 1 else None

    def drain(self) -> None:
        """Consume the sources and keep their blocks for the open cursors.

        Raises what a source's ``consume`` raises; nothing consumed before is lost.
        """
        before = self._sequence
        try:
            self._drain()
        finally:
            self._disclaim(before)

    def _drain(self) -> None:
        for source in self._sources:
            self._keep(self._consume(source))

    def collect(self, cursor: Cursor, since: int = 0) -> Sequence[PC]:
        """Return the blocks covered since this cursor's last call, each once.

        With ``since``, the :attr:`position` when the reader's work began, it leaves out blocks from
        before that have been given to another reader. It gives:

        * What is consumed from then on, by whoever. All that the work covered is among it, because
          a block is numbered when it is consumed, which is after it was covered.
        * What was consumed without having been given to anybody: by :meth:`drain`, when a cursor
          was opened, or in a call that raised.

        So each block that is covered while cursors are open is given to one of them at least, once
        one of those asks: a call gives what it consumes, whose numbers are above every position
        that there was, and what others consumed without giving it.

        A ``since`` above the position counts as the position. If only one cursor is open, and has
        been given all that was consumed before, it is ignored.

        Raises what a source's ``consume`` raises (nothing consumed before is lost), and
        ValueError for a cursor that is not open.
        """
        if cursor is self._alone and not self._covered:
            # A single reader that is up to date gets what is consumed.
            only = self._only
            if only is None:
                return self._collect_alone()
            try:
                return only.consume()
            except Exception as error:
                if self._on_failure is None:
                    raise
                self._on_failure(error)
                return ()
        if cursor not in self._cursors:
            raise ValueError("the cursor is not open")
        before = self._sequence
        try:
            self._drain()
        except BaseException:
            self._disclaim(before)
            raise
        last = cursor._sequence
        cursor._sequence = self._sequence
        start = max(last, min(since, before))
        news = self._after(start)
        if self._unclaimed:
            news = self._claim(last, start) + news
        if len(self._cursors) == 1:
            self._covered.clear()
            self._unclaimed.clear()
        return news

    def _after(self, sequence: int) -> list[PC]:
        """Return the blocks above a number."""
        news = []
        for pc, number in reversed(self._covered.items()):
            if number <= sequence:
                break
            news.append(pc)
        news.reverse()
        return news

    def _claim(self, last: int, start: int) -> list[PC]:
        """Return what nobody has been given, of the numbers above ``last``, up to ``start``."""
        covered = self._covered
        # What was covered again since then has been given, with its new number.
        still = {pc: at for pc, at in self._unclaimed.items() if covered[pc] == at}
        # Cursors that were opened later may not have the rest, and others have their own position.
        nobody = min(cursor._sequence for cursor in self._cursors)
        self._unclaimed = {pc: at for pc, at in still.items() if nobody < at <= last}
        return [pc for pc, at in still.items() if last < at <= start]

    def _disclaim(self, before: int) -> None:
        """Note that nobody has been given the blocks above a number."""
        for pc in self._after(before):
            self._unclaimed.pop(pc, None)
            self._unclaimed[pc] = self._covered[pc]

    def _collect_alone(self) -> Sequence[PC]:
        """From several sources."""
        if not self._sources:
            return ()
        news: dict[PC, None] = {}
        try:
            for source in self._sources:
                for pc in self._consume(source):
                    news.pop(pc, None)
                    news[pc] = None
        except BaseException:
            before = self._sequence
            self._keep(news)
            self._disclaim(before)
            raise
        return list(news)

    def _consume(self, source: Consumed) -> Sequence[PC]:
        if self._on_failure is None:
            return source.consume()
        try:
            return source.consume()
        except Exception as error:
            self._on_failure(error)
            return ()

    def _keep(self, pcs: Iterable[PC]) -> None:
        if not self._cursors:
            return
        covered = self._covered
        sequence = self._sequence
        for pc in pcs:
            sequence += 1
            covered.pop(pc, None)
            covered[pc] = sequence
        if sequence != self._sequence:
            self._sequence = sequence
            if self._on_position is not None:
                self._on_position(sequence)
