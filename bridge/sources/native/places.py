# SPDX-License-Identifier: Apache-2.0
"""From PCs of native blocks back to functions and lines."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from bridge.errors import MissingDependencyError
from bridge.sources import PC
from bridge.sources.native.debug import Frame, NativeSymbols
from bridge.sources.native.modules import ModuleTable, NativeModule

__all__ = ["NativePlaces"]

_log = logging.getLogger(__name__)


class NativePlaces:
    """Symbolizes the PCs of a table. Opens the files of its modules when they are first needed.

    A file that was replaced since the run (its build id is another) is not used, and a warning says
    so; its blocks then have only their module's name and their place in it.
    """

    def __init__(self, table: ModuleTable, refresh: Callable[[], object] | None = None) -> None:
        """Symbolize with a table; ``refresh`` reads what programs have added to it since."""
        self.table = table
        self._refresh = refresh
        self._symbols: dict[str, NativeSymbols | None] = {}

    def frames(self, module: NativeModule, index: int) -> list[Frame]:
        """Return the functions that a block belongs to, the innermost first."""
        if module.blocks:
            block = module.blocks[index]
            return [Frame(block.function, block.file, block.line, block.column)]
        address = module.address(index)
        if not address and self._refresh is not None:
            self._refresh()
            address = module.address(index)
        symbols = self._symbols_of(module) if address else None
        return symbols.frames(address) if symbols is not None else []

    def innermost(self, pc: PC) -> Frame | None:
        """Return the innermost function that a PC belongs to; None for an unknown PC.

        Without debug information its file is the module's name, and its line is 0.
        """
        found = self.table.lookup(pc)
        if found is None:
            return None
        frames = self.frames(*found)
        return frames[0] if frames else Frame("", found[0].name, 0, 0)

    def text(self, pc: PC, prefix: str = "") -> str | None:
        """Return the place of a PC, or of any other address of its slot; None for an unknown one.

        ``file:line.column,line.column function``, for inlined code with the functions that it is
        in; ``module+0xplace`` without debug information.
        """
        found = self.table.lookup(pc)
        if found is None:
            return None
        module, index = found
        if module.blocks:
            block = module.blocks[index]
            return f"{prefix}{block} {block.function}"
        frames = self.frames(module, index)
        if not frames:
            place = module.address(index)
            return f"{module.name}+{place:#x}" if place else f"{module.name}, block {index}"
        first = frames[0]
        if first.line:
            at = f"{first.line}.{first.column}"
            text = f"{prefix}{first.file}:{at},{at} {first.function}"
        else:
            text = f"{first.function} {module.name}+{module.address(index):#x}"
        for frame in frames[1:]:
            text += f", inlined into {frame.function}"
            if frame.line:
                text += f" at {prefix}{frame.file}:{frame.line}.{frame.column}"
        return text

    def _symbols_of(self, module: NativeModule) -> NativeSymbols | None:
        if module.key not in self._symbols:
            self._symbols[module.key] = self._open(module)
        return self._symbols[module.key]

    @staticmethod
    def _open(module: NativeModule) -> NativeSymbols | None:
        try:
            symbols = NativeSymbols(Path(module.path))
        except MissingDependencyError as error:
            _log.warning("%s (%s)", error.message, error.hint)
            return None
        if symbols.build_id and symbols.build_id.hex() != module.key:
            _log.warning("%s was built again since the run: its blocks have no lines", module.path)
            return None
        return symbols
