# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence

from bridge.device.fastpath.plain import AreaWords as AreaWords
from bridge.device.fastpath.plain import KcovState as KcovState
from bridge.device.fastpath.plain import LineTap as LineTap
from bridge.device.fastpath.plain import Totals as Totals

class Returns:
    def __init__(
        self,
        coverage: object,
        totals: Totals,
        unique: set[int],
        syscall_pc: Callable[[int], int | None] | None,
        watched: Callable[..., object] | None,
        append_rest: Callable[..., int],
    ) -> None: ...
    def syscall_return(
        self, kcov: KcovState, task: int, number: int, untold: int
    ) -> int | None: ...

class Doorstep:
    last: int
    until: int
    looked: int
    served: int
    def __init__(
        self,
        control: memoryview,
        returns: Returns,
        slots: Sequence[KcovState | None],
        handled: list[int],
        answered: list[int],
        failed: Callable[[Exception], object],
    ) -> None: ...
    def release(self) -> None: ...
    def poke(self) -> None: ...
    def serve(self, slot: int) -> bool: ...
    def stay(self, last: int, until: int, mend_at: int, busy: int, taken: int) -> None: ...
