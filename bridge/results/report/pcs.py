# SPDX-License-Identifier: Apache-2.0
"""What the PCs of a run say: which blocks ran most, and how coverage grew."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bridge.errors import InfrastructureError, SourceError
from bridge.results.kernel_export import is_kernel_pc
from bridge.results.run_directory import load_blocks, load_native
from bridge.sources import PC
from bridge.sources.guest_kernel import BLOCKS_FILE as KERNEL_BLOCKS_FILE
from bridge.sources.guest_kernel import SYMBOLS_FILE
from bridge.sources.native.modules import NATIVE_BASE, NATIVE_END
from bridge.sources.pcs import PC_BASE, SLOT_BYTES, SYSCALL_SLOTS
from bridge.sources.symbolize import BLOCKS_FILE

__all__ = ["PCS_FILE", "HotBlock", "KernelFunction", "PcFigures", "TSeries", "thin_out"]

PCS_FILE: Final = "pcs.txt"
"""Name of the file of PCs in a run's directory."""

_HOTTEST: Final = 60
"""Blocks of each source that are kept."""
_POINTS: Final = 400
"""Points of a series that are kept."""
_SYSCALLS_END: Final = PC_BASE + SYSCALL_SLOTS * SLOT_BYTES

TSeries = list[tuple[float, int]]
"""How a count grew: points of x and count, both rising."""


@dataclass(frozen=True, slots=True)
class HotBlock:
    """A block and how often it was recorded."""

    place: str
    """Name of the file (native: its path), or of the kernel's function."""
    detail: str
    """Lines of the file, or the offset in the function."""
    line: int
    """First line in the file; 0 for a block of the kernel."""
    count: int


@dataclass(slots=True)
class KernelFunction:
    """A function of the guest's kernel that was covered."""

    name: str
    module: str
    """Empty for the kernel itself."""
    blocks: int = 0
    """How many of its blocks were covered."""
    pcs: int = 0
    """How often they were recorded."""


@dataclass(slots=True)
class PcFigures:
    """The figures of one run's directory; empty where it has no such file."""

    total: int = 0
    different: int = 0
    host_blocks: TSeries = field(default_factory=list)
    """Blocks of the target over the number of PCs."""
    kernel_blocks: TSeries = field(default_factory=list)
    """Blocks of the guest's kernel over the number of PCs."""
    hot_host: list[HotBlock] = field(default_factory=list)
    hot_kernel: list[HotBlock] = field(default_factory=list)
    functions: list[KernelFunction] = field(default_factory=list)

    @classmethod
    def read(cls, run: Path) -> PcFigures:
        """Read the PCs, the block table and the kernel's symbols of a run.

        Raises:
            InfrastructureError: a file cannot be read or is damaged.
        """
        figures = cls()
        counts = figures._count(run / PCS_FILE)
        host = sorted((-count, pc) for pc, count in counts.items() if _is_of_target(pc))
        table = load_blocks(run) if (run / BLOCKS_FILE).is_file() else None
        native = load_native(run)
        for negative, pc in host[:_HOTTEST]:
            location = table.lookup(pc) if table is not None else None
            if location is not None:
                lines = location.block.lines
                text = f"{lines[0]}-{lines[-1]}" if len(lines) > 1 else f"{lines[0]}"
                figures.hot_host.append(HotBlock(location.file, text, lines[0], -negative))
            elif native is not None and (frame := native.innermost(pc)) is not None:
                text = f"{frame.line}" if frame.line else "?"
                figures.hot_host.append(HotBlock(frame.file, text, frame.line, -negative))
        if (run / SYMBOLS_FILE).is_file():
            figures._add_kernel(run, counts)
        return figures

    def _count(self, path: Path) -> dict[PC, int]:
        """Count the PCs of a file, and note when a block came for the first time."""
        counts: dict[PC, int] = {}
        # Files repeat their PCs; each text is converted once.
        texts: dict[str, PC] = {}
        host: TSeries = []
        kernel: TSeries = []
        number = 0
        try:
            with path.open(encoding="ascii") as lines:
                for number, line in enumerate(lines, 1):
                    pc = texts.get(line)
                    if pc is None:
                        pc = texts[line] = int(line, 16)
                        if pc not in counts:
                            if is_kernel_pc(pc):
                                kernel.append((number, len(kernel) + 1))
                            elif _is_of_target(pc):
                                host.append((number, len(host) + 1))
                            counts[pc] = 0
                    counts[pc] += 1
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise InfrastructureError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise SourceError(
                f"{path} is damaged in line {number or 1}", evidence=str(error)
            ) from error
        self.total, self.different = number, len(counts)
        self.host_blocks = thin_out(host, number)
        self.kernel_blocks = thin_out(kernel, number)
        return counts

    def _add_kernel(self, run: Path, counts: dict[PC, int]) -> None:
        # Most runs have nothing of the kernel; the imports are not for them.
        from bridge.results.kernel_export import read_blocks
        from bridge.sources.guest_kernel.symbols import KernelSymbols

        symbols = KernelSymbols.load(run / SYMBOLS_FILE)
        blocks = {pc for pc in counts if is_kernel_pc(pc)}
        if (run / KERNEL_BLOCKS_FILE).is_file():
            blocks |= {block.start for block in read_blocks(run / KERNEL_BLOCKS_FILE)}
        functions: dict[tuple[str, str], KernelFunction] = {}
        for pc in blocks:
            symbol = symbols.lookup(pc)
            if symbol is None:
                continue
            key = symbol.name, symbol.module
            function = functions.setdefault(key, KernelFunction(*key))
            function.blocks += 1
            function.pcs += counts.get(pc, 0)
        self.functions = sorted(functions.values(), key=lambda each: (-each.pcs, each.name))
        hottest = sorted((-counts[pc], pc) for pc in blocks if pc in counts)[:_HOTTEST]
        for negative, pc in hottest:
            symbol = symbols.lookup(pc)
            if symbol is not None:
                module = f" [{symbol.module}]" if symbol.module else ""
                self.hot_kernel.append(
                    HotBlock(symbol.name, f"+{pc - symbol.start:#x}{module}", 0, -negative)
                )


def _is_of_target(pc: PC) -> bool:
    return NATIVE_BASE <= pc < NATIVE_END or pc >= _SYSCALLS_END


def thin_out(points: TSeries, end: float) -> TSeries:
    """Return at most a few hundred points of a rising series, with its first and its end.

    Args:
        points: each where the count grew.
        end: the last x, where nothing may have grown.
    """
    if not points:
        return []
    step = max(1, len(points) // _POINTS)
    kept = points[::step]
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    if kept[-1][0] < end:
        kept.append((end, kept[-1][1]))
    return kept
