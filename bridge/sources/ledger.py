# SPDX-License-Identifier: Apache-2.0
"""Fan-out of coverage to several readers, each with its own cursor.

Consuming a source clears it, so without the ledger one kcov instance would take blocks from the
others. The ledger keeps the covered blocks in the order in which they were last covered. Each
instance has a cursor into that order and gets the blocks behind it. An instance that does not ask
costs nothing.
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
    ) -> None:
        """Read ``sources``.

        ``on_failure`` gets what a source raises, which then gives nothing; without it the exception
        reaches the caller.
        """
        self._sources = tuple(sources)
        self._only = self._sources[0] if len(self._sources) == 1 else None
        self._on_failure = on_failure
        # Covered blocks that some open cursor has not been given, the last covered one last, by the
        # number of that event.
        self._covered: dict[PC, int] = {}
        self._sequence = 0
        self._cursors: set[Cursor] = set()
        # The only open cursor, where there is one.
        self._alone: Cursor | None = None

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

    def _count(self) -> None:
        self._alone = next(iter(self._cursors)) if len(self._cursors) == 1 else None

    def drain(self) -> None:
        """Consume the sources and keep their blocks for the open cursors.

        Raises what a source's ``consume`` raises; nothing consumed before is lost.
        """
        for source in self._sources:
            self._keep(self._consume(source))

    def collect(self, cursor: Cursor) -> Sequence[PC]:
        """Return the blocks covered since this cursor's last call, each once.

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
        self.drain()
        last = cursor._sequence
        cursor._sequence = self._sequence
        news = []
        for pc, sequence in reversed(self._covered.items()):
            if sequence <= last:
                break
            news.append(pc)
        news.reverse()
        if len(self._cursors) == 1:
            self._covered.clear()
        return news

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
            self._keep(news)
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
        self._sequence = sequence
