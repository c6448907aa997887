# SPDX-License-Identifier: Apache-2.0
"""From the records of a stream to calls with names, arguments, and the code that they reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, overload

from bridge.device.calls import LoggedCall, LoggedCalls
from bridge.sources.native.debug import Frame
from bridge.sources.pcs import SYSCALL_FILE, Location
from bridge.trace.arguments import arguments_text
from bridge.trace.call import Call, HostCode, HostThread
from bridge.trace.names import call_name, error_name

__all__ = ["Code", "CodeFinder", "ExplainedCalls", "kernel_function"]

_NANOSECOND = 1e-9


class _KernelCode(NamedTuple):
    """A function of the guest's kernel, and its module; "" for the kernel's own."""

    function: str
    module: str


def kernel_function(text: str) -> _KernelCode:
    """Return function and module in ``[file:line ]function+0xoffset[ [module]]``."""
    module = ""
    for word in reversed(text.split()):
        name, plus, _ = word.partition("+0x")
        if plus:
            return _KernelCode(name, module)
        module = word[1:-1] if word.startswith("[") and word.endswith("]") else ""
    return _KernelCode(text, "")


class Code(NamedTuple):
    """The code of some PCs, in the order in which they came: as the fields of a call."""

    host: tuple[HostCode, ...]
    kernel: tuple[str, ...]
    modules: tuple[tuple[str, tuple[str, ...]], ...]


ThreadAt = Callable[[int, int], HostThread | None]


def _nobody(index: int, pc: int) -> HostThread | None:
    return None


class CodeFinder:
    """Finds the functions to which PCs belong; each PC is looked up once.

    Args:
        symbolize: returns the location of a PC of the target, the text for one of the guest's
            kernel, or None.
        function_at: returns the function of a line of a file.
        native: returns the function of a PC of a native program, or None.
    """

    def __init__(
        self,
        symbolize: Callable[[int], Location | str | None],
        function_at: Callable[[str, int], str],
        native: Callable[[int], Frame | None] = lambda pc: None,
    ) -> None:
        self._symbolize = symbolize
        self._function_at = function_at
        self._native = native
        self._known: dict[int, HostCode | _KernelCode | None] = {}

    def find(self, pcs: Iterable[int], thread_at: ThreadAt = _nobody) -> Code:
        """Return the target's code and the kernel's functions.

        ``thread_at``: returns the target's thread of a PC, by its index among these PCs.
        """
        ran: dict[tuple[str, str, HostThread | None], tuple[set[int], set[int]]] = {}
        kernel: dict[str, None] = {}
        modules: dict[str, dict[str, None]] = {}
        for index, pc in enumerate(pcs):
            try:
                code = self._known[pc]
            except KeyError:
                code = self._known[pc] = self._look_up(pc)
            if isinstance(code, _KernelCode):
                kernel[code.function] = None
                if code.module:
                    modules.setdefault(code.module, {})[code.function] = None
            elif code is not None:
                key = code.file, code.function, thread_at(index, pc)
                lines, blocks = ran.setdefault(key, (set(), set()))
                lines.update(code.lines)
                blocks.add(pc)
        return Code(
            tuple(
                HostCode(file, function, tuple(sorted(lines)), thread, tuple(sorted(blocks)))
                for (file, function, thread), (lines, blocks) in ran.items()
            ),
            tuple(kernel),
            tuple((module, tuple(functions)) for module, functions in modules.items()),
        )

    def _look_up(self, pc: int) -> HostCode | _KernelCode | None:
        if (frame := self._native(pc)) is not None:
            return HostCode(frame.file, frame.function, (frame.line,) if frame.line else ())
        place = self._symbolize(pc)
        if isinstance(place, str):
            return kernel_function(place)
        if place is None or place.file == SYSCALL_FILE:
            return None
        lines = tuple(place.block.lines)
        return HostCode(place.file, self._function_at(place.file, lines[0]), lines)


class ExplainedCalls(Sequence[Call]):
    """The calls of one command in the order in which they were entered, each made when it is asked
    for.

    Args:
        logged: the records.
        pcs: the PCs of the command.
        code: finds the code of a PC.
    """

    def __init__(self, logged: LoggedCalls, pcs: Sequence[int], code: CodeFinder) -> None:
        self._logged = logged
        self._pcs = pcs
        self._code = code
        self._began = logged[0].entered if logged else 0

    @property
    def began(self) -> float:
        """When the first call was entered, in seconds of the guest's monotonic clock."""
        return self._began * _NANOSECOND

    def __len__(self) -> int:
        return len(self._logged)

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> list[Call]: ...
    def __getitem__(self, index: int | slice) -> Call | list[Call]:
        if isinstance(index, slice):
            return [self._explain(each) for each in self._logged[index]]
        return self._explain(self._logged[index])

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle as a list: the records may be in a file, and the code in another process."""
        return list, (list(self),)

    def _explain(self, logged: LoggedCall) -> Call:
        start = logged.start
        code = self._code.find(
            self._pcs[start : logged.stop],
            (lambda index, pc: logged.thread_at(start + index, pc)) if logged.threads else _nobody,
        )
        returned, result = logged.returned, logged.result
        seconds = None
        if returned is not None:
            # A hostile guest's clock may run backwards.
            seconds = max(returned - logged.entered, 0) * _NANOSECOND
        arguments = None
        if not logged.ia32:
            arguments = arguments_text(logged.number, logged.arguments, logged.strings)
        return Call(
            start=(logged.entered - self._began) * _NANOSECOND,
            seconds=seconds,
            thread=logged.thread,
            command=logged.command.decode("utf-8", "backslashreplace"),
            number=logged.number,
            name=call_name(logged.number, ia32=logged.ia32),
            arguments=arguments,
            result=result,
            error=error_name(result) if result is not None else None,
            host=code.host,
            kernel=code.kernel,
            modules=code.modules,
        )
