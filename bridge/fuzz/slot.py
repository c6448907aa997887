# SPDX-License-Identifier: Apache-2.0
"""A slot: one VM with its session, target and lane, for an engine's shim or for Python.

    with Slot(settings, BuiltIn("empty"), directory) as slot:
        slot.execute(b"...", timeout=1.0)  # or
        slot.serve(stop)

The runner is started again after each reset, because the ready state that a reset restores has
none. A machine that cannot be reset is replaced by another one. Everything happens on the thread
that enters the slot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from socket import AF_UNIX, SOCK_SEQPACKET
from socket import socket as Socket

from bridge.config import Settings
from bridge.device.lanes import LaneAreas
from bridge.errors import BridgeError, GuestLostError, InfrastructureError, UsageError
from bridge.fuzz.board import Board, BoardLayout, BoardState, BoardWord, Fold, TraceArea
from bridge.fuzz.lane import (
    LANE_BYTES,
    LANE_INPUT_BYTES,
    LANE_INPUT_OFFSET,
    LANE_OUTPUT_BYTES,
    LANE_OUTPUT_OFFSET,
    Execution,
    Lane,
    LaneFlag,
)
from bridge.fuzz.messages import (
    Hello,
    Message,
    NewCells,
    ResetWanted,
    ShimFailed,
    SuspectCase,
    TimedOut,
    receive,
    send_go,
    send_welcome,
)
from bridge.fuzz.monitor import MachineMonitor
from bridge.fuzz.slot_events import (
    Evidence,
    GuestFile,
    Monitor,
    NewCase,
    SlotHarness,
    SlotListener,
    Suspect,
)
from bridge.fuzz.stability import Stability
from bridge.guest.guest import CommandResult
from bridge.session.session import Session
from bridge.session.target_host import TargetState
from bridge.targets.registry import TargetMaker, has_only_programs
from bridge.util.laps import Laps

__all__ = ["BuiltIn", "RunnerError", "Slot", "SlotOptions"]

logger = logging.getLogger(__name__)

_FAILED_STARTS = 2
"""After so many failed starts in a row the slot ends."""
_POLL_SECONDS = 0.05
_READY_POLL_SECONDS = 0.0005
_JOIN_SECONDS = 10.0
_LOSS_SECONDS = 2.0
_LONGER = 10
"""So many times its limit a case may take when it did not end in time."""
_LONGEST_SECONDS = 60.0
_SLOW_INTERVAL_SECONDS = 60.0
"""Between two lines about cases that were slow."""
_SAID_BYTES = 64 << 10
_SOCKET_PATH_BYTES = 107
"""Of ``sockaddr_un`` in unix(7), without its NUL."""
_SOCKET = "slot"


class RunnerError(InfrastructureError):
    """The runner did not start in the guest, or ended by itself; the evidence is what it said."""


@dataclass(frozen=True)
class BuiltIn:
    """A harness that every image has, such as ``empty``; see ``guest/agent``."""

    name: str
    parameters: tuple[str, ...] = ()

    @property
    def runner(self) -> str:
        """See :class:`SlotHarness`."""
        return "kcov-runner"

    @property
    def arguments(self) -> Sequence[str]:
        """See :class:`SlotHarness`."""
        return self.name, *self.parameters

    @property
    def files(self) -> Sequence[GuestFile]:
        """See :class:`SlotHarness`."""
        return ()


@dataclass(frozen=True)
class SlotOptions:
    """How a slot works.

    Attributes:
        areas: trace areas: one for the harness, the others for its threads and processes.
        area_words: size of each.
        map_size: cells of the engine's map.
        reset_every: executions between two resets; 0 for never.
        spin_ns: how long runner and shim poll for each other before they sleep.
        ready_seconds: how long the runner may take to load its harness.
        blind: the engine sees a map that never changes; see :class:`BoardLayout`, as for the next.
        exit_is_suspect: a harness that exits with another status than 0 is as bad as one that dies.
        drift: a reset comes if the same case gives a map that differs from the one after the last
            reset by more than this part; 0 for never.
        confirm_seconds: how long a case that did not end in time may take the second time, at
            least.
        known_faults: after so many faults without a reset, because they are known, there is one; 0
            for a reset after each.
    """

    areas: int = 4
    area_words: int = 1 << 17
    map_size: int = 1 << 16
    reset_every: int = 0
    spin_ns: int = 50_000
    ready_seconds: float = 60.0
    blind: bool = False
    exit_is_suspect: bool = False
    drift: float = 0.2
    confirm_seconds: float = 5.0
    known_faults: int = 100

    def is_suspect(self, status: int) -> bool:
        """Return whether this wait status of the harness says that something is wrong."""
        return status != 0 and (self.exit_is_suspect or not os.WIFEXITED(status))


class _Runner:
    """The runner in the guest, as a command of the agent's channel on a thread."""

    def __init__(self, session: Session, command: Sequence[str]) -> None:
        self.command = tuple(command)
        self.result: CommandResult | None = None
        self.error: BaseException | None = None
        self._session = session
        self._thread = threading.Thread(target=self._run, name="slot-runner", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._session.guest.run(self.command, capture=_SAID_BYTES)
        except BaseException as error:
            self.error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait for its thread, which ends with the guest or its reset."""
        self._thread.join(_JOIN_SECONDS)

    def check(self) -> None:
        """Raise what ended it, if it has ended."""
        if self.running:
            return
        if self.error is not None:
            if isinstance(self.error, BridgeError):
                raise self.error
            raise RunnerError("the runner's command failed") from self.error
        status, said = 0, ""
        if self.result is not None:
            status = self.result.exit_status
            said = (self.result.stdout + self.result.stderr).decode(errors="replace")
        raise RunnerError(
            f"the runner in the guest ended with status {status}: {' '.join(self.command)}",
            evidence=said,
            hint="does the harness load in the guest by itself?",
        )


class _Interrupted(Exception):
    """The wait for a case was given up."""


class _Vm:
    """A session with its lane and its runner; closed as a whole."""

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        target: TargetMaker | None,
        target_state: TargetState,
        harness: SlotHarness,
        options: SlotOptions,
    ) -> None:
        self._harness = harness
        self._options = options
        self._runner: _Runner | None = None
        with ExitStack() as stack:
            # After the session, whose end is the runner's.
            stack.callback(self._join_runner)
            self.session = session = stack.enter_context(
                Session(settings, directory, target=target, target_state=target_state)
            )
            areas = session.open_lane(Lane.sizes(options.areas, options.area_words))
            stack.callback(session.close_lane, areas)
            self.lane = Lane(areas, spin_ns=options.spin_ns)
            stack.callback(self.lane.close)
            self.layout = self._layout(areas)
            self.start_runner()
            self._stack = stack.pop_all()

    def _layout(self, areas: LaneAreas) -> BoardLayout:
        options = self._options
        control, *traces = areas.areas
        return BoardLayout(
            lane_offset=control.offset,
            lane_bytes=LANE_BYTES,
            input_offset=control.offset + LANE_INPUT_OFFSET,
            input_bytes=LANE_INPUT_BYTES,
            output_offset=control.offset + LANE_OUTPUT_OFFSET,
            output_bytes=LANE_OUTPUT_BYTES,
            areas=tuple(TraceArea(trace.offset, trace.size) for trace in traces),
            map_size=options.map_size,
            # The order of blocks that a target covered since the last return is not that of time.
            fold=Fold.EDGES if self.session.kernel is not None else Fold.BLOCKS,
            reset_every=options.reset_every,
            blind=options.blind,
            exit_is_suspect=options.exit_is_suspect,
            spin_ns=options.spin_ns,
        )

    def start_runner(self) -> None:
        """Put the harness into the guest, which is as new, and start the runner."""
        self._join_runner()
        harness, lane = self._harness, self.lane
        parents = {str(PurePosixPath(each.guest_path).parent) for each in harness.files}
        if parents:
            self.session.guest.run(["mkdir", "-p", *sorted(parents)], check=True)
        for each in harness.files:
            self.session.put(each.source, each.guest_path, each.mode)
        lane.prepare()
        runner = self._runner = _Runner(
            self.session, [harness.runner, f"{lane.number:#x}", *harness.arguments]
        )
        deadline = time.monotonic() + self._options.ready_seconds
        while not lane.ready:
            runner.check()
            if time.monotonic() > deadline:
                raise RunnerError(
                    f"the harness was not ready after {self._options.ready_seconds:g} s: "
                    f"{' '.join(runner.command)}",
                    evidence=self.session.machine.console.tail(20),
                )
            time.sleep(_READY_POLL_SECONDS)
        lane.keep()

    def check(self) -> None:
        """Raise why the runner cannot take cases, if it cannot."""
        self.session.machine.check()
        if self._runner is not None:
            self._runner.check()

    @property
    def dead(self) -> bool:
        """Whether no case will end any more."""
        if self.session.machine.loss is not None:
            return True
        return self._runner is None or not self._runner.running

    def ended(self) -> str:
        """Return why no case will end any more; empty if the runner takes cases.

        The runner ends some moments before it is known that the guest is lost, as at a reboot.
        """
        deadline = time.monotonic() + _LOSS_SECONDS
        while self.dead and self.session.machine.loss is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        try:
            self.check()
        except BridgeError as error:
            return error.report()
        return ""

    def _join_runner(self) -> None:
        if self._runner is not None:
            self._runner.join()

    def close(self, *, orderly: bool) -> None:
        """End everything; a machine that may hang is not asked to power down."""
        if orderly:
            self._stack.close()
        else:
            failure = GuestLostError("the machine is replaced")
            with contextlib.suppress(BridgeError):
                self._stack.__exit__(type(failure), failure, None)


class Slot:
    """A VM that executes cases; a context manager, to be entered once.

    Args:
        settings: of its session.
        harness: what runs the cases.
        directory: for the session's files and the socket; is made.
        target: what makes the target, in place of the setting.
        target_state: what a reset does to the target.
        options: how it works.
        listeners: are told what happens.
        monitor: notices what goes wrong; a
            :class:`bridge.fuzz.monitor.MachineMonitor` by default.

    Raises:
        BridgeError: on entering, what failed.

    Attributes:
        resets: how often guest and target went back to the ready state.
        reset_seconds: what the parts of the last reset took: those of
            :attr:`bridge.session.session.Session.reset_seconds`, then what a slot adds.
        machines: how many machines were started.
        stability: how often the same case covers the same.
        case_seconds: how long a case may take, as far as that is known.
        slow: how many cases took longer than they may only once, which is no finding.
        spared: how many faults were known, and needed no reset.
    """

    def __init__(
        self,
        settings: Settings,
        harness: SlotHarness,
        directory: Path,
        *,
        target: TargetMaker | None = None,
        target_state: TargetState = TargetState.KEEP,
        options: SlotOptions = SlotOptions(),
        listeners: Sequence[SlotListener] = (),
        monitor: Monitor | None = None,
    ) -> None:
        self.settings = settings
        self.harness = harness
        self.directory = Path(directory).absolute()
        self.options = options
        self.resets = 0
        self.reset_seconds: dict[str, float] = {}
        self.machines = 0
        self.stability = Stability(options.drift)
        self.case_seconds = 0.0
        self.slow = 0
        self.spared = 0
        self._slow_due = 0.0
        self._target = target
        if target_state is TargetState.FORK and has_only_programs(
            target or settings.target, settings.target_dir
        ):
            target_state = TargetState.RESTART
        self._target_state = target_state
        self._listeners = tuple(listeners)
        self._own_monitor = MachineMonitor()
        self._monitor: Monitor = monitor if monitor is not None else self._own_monitor
        self._vm: _Vm | None = None
        self._board: Board | None = None
        self._listening: Socket | None = None
        self._path = ""
        self._began = 0.0
        # Of shims that have ended, and of Python.
        self._executions = 0
        self._fault_told = False
        self._reset_due = False
        self._spared_since_reset = 0
        self._stopping: Callable[[], bool] = lambda: False
        self._stack = ExitStack()

    # From nothing to a runner that is ready

    def __enter__(self) -> Slot:
        if self._began:
            raise UsageError("a slot is entered once", hint="make a new one")
        self._began = time.monotonic()
        with ExitStack() as stack:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._open_socket(stack)
            stack.callback(self._own_monitor.close)
            stack.push(self._close_machine)
            self._start_machine()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(None, None, None)

    def _close_machine(self, *_: object) -> None:
        vm, self._vm = self._vm, None
        if vm is not None:
            vm.close(orderly=not vm.dead)

    def _open_socket(self, stack: ExitStack) -> None:
        path = self.directory / _SOCKET
        if len(str(path).encode()) > _SOCKET_PATH_BYTES:
            # A short name of the same place, which ends with this process.
            place = os.open(self.directory, os.O_PATH | os.O_CLOEXEC)
            stack.callback(os.close, place)
            path = Path(f"/proc/{os.getpid()}/fd/{place}/{_SOCKET}")
        self._listening = stack.enter_context(Socket(AF_UNIX, SOCK_SEQPACKET))
        # Of an earlier life that was killed.
        path.unlink(missing_ok=True)
        self._listening.bind(str(path))
        stack.callback(path.unlink, missing_ok=True)
        self._listening.listen(1)
        self._path = str(path)

    def _start_machine(self) -> None:
        """Start a machine with a runner; once more if that fails."""
        for left in reversed(range(_FAILED_STARTS)):
            try:
                self._vm = self._new_vm()
                self._monitor.began(self._vm.session)
                return
            except (RunnerError, UsageError):
                if self.machines == 0:
                    # No other machine loads a harness that the first one does not.
                    raise
                if not left:
                    raise
            except BridgeError as error:
                if not left:
                    raise
                logger.warning("a machine did not start, once more: %s", error.message)

    def _new_vm(self) -> _Vm:
        vm = _Vm(
            self.settings,
            self.directory / "vm",
            self._target,
            self._target_state,
            self.harness,
            self.options,
        )
        self.machines += 1
        return vm

    # What it consists of

    @property
    def _ready(self) -> _Vm:
        if self._vm is None:
            raise UsageError("the slot has no machine: it was not entered, or has ended")
        return self._vm

    @property
    def _door(self) -> Socket:
        if self._listening is None:
            raise UsageError("the slot was not entered")
        return self._listening

    @property
    def session(self) -> Session:
        """The session of the present machine."""
        return self._ready.session

    @property
    def lane(self) -> Lane:
        """The lane of the present machine."""
        return self._ready.lane

    @property
    def socket(self) -> str:
        """The path of the socket on which a shim finds the slot."""
        return self._path

    @property
    def board(self) -> Board | None:
        """The board of the present shim; None without one."""
        return self._board

    @property
    def executions(self) -> int:
        """How many cases were executed so far."""
        board = self._board
        return self._executions + (board[BoardWord.EXECUTIONS] if board is not None else 0)

    @property
    def seconds(self) -> float:
        """How long ago the slot began."""
        return time.monotonic() - self._began if self._began else 0.0

    # Work for Python

    def execute(self, case: bytes, timeout: float, flags: LaneFlag | None = None) -> Execution:
        """Execute a case; not while :meth:`serve` runs.

        A case that did not end (status None) has to be followed by a reset.

        Raises:
            BridgeError: the guest is lost, or its runner has ended.
        """
        if self._reset_due:
            self.reset("shim")
        vm = self._ready
        self._executions += 1
        flags = flags if flags is not None else LaneFlag(0)
        return vm.lane.execute(case, timeout, flags=flags, check=vm.check)

    def trouble(self) -> bool:
        """Return whether something is wrong with guest or target now."""
        return self._ready.dead or self._monitor.trouble()

    def collect(self, *, timed_out: bool = False) -> Evidence:
        """Return what is known of guest and target, before a reset."""
        ended = self._ready.ended()
        evidence = self._monitor.collect(timed_out=timed_out)
        return evidence if evidence.lost else dataclasses.replace(evidence, lost=ended)

    def reset(self, reason: str) -> None:
        """Bring guest and target back to the ready state, with a runner that is ready.

        A machine that does not take that is replaced.

        Raises:
            BridgeError: machines fail to start.
        """
        begun = time.monotonic()
        if self._board is not None:
            self._board.state = BoardState.RESETTING
        try:
            self._reset()
        except Exception as error:
            failure = error
            self._tell(lambda listener: listener.lost(failure))
            raise
        self.resets += 1
        self._reset_due = False
        self._spared_since_reset = 0
        self._fault_told = False
        if self._board is not None:
            self._board.add_epoch()
            self._board.state = BoardState.READY
        seconds = time.monotonic() - begun
        self._tell(lambda listener: listener.was_reset(reason, seconds))

    def _reset(self) -> None:
        vm = self._ready
        try:
            laps = Laps()
            vm.session.reset()
            laps("session")
            vm.start_runner()
            laps("runner")
            self._monitor.began(vm.session)
            laps("monitor")
            self._measure_reference()
            laps("reference")
            del laps.seconds["session"]
            self.reset_seconds = {**vm.session.reset_seconds, **laps.seconds}
        except BridgeError as error:
            logger.warning("the machine is replaced: %s", error.message)
            self.stability.forget_reference()
            self._vm = None
            vm.close(orderly=False)
            self._start_machine()

    # Work for a shim

    def serve(self, stop: Callable[[], bool], *, shims: int = 0) -> None:
        """Serve shims, one after another, until ``stop`` returns true.

        A shim that connects ends the one before it.

        Args:
            stop: asked a few times a second.
            shims: return after the end of so many; 0 for any number.

        Raises:
            BridgeError: machines fail to start, or a shim cannot work.
        """
        served = 0
        self._stopping = stop
        while not stop() and not (shims and served >= shims):
            connection = self._accept()
            if connection is None:
                continue
            with connection, self._posted():
                self._serve_one(connection, stop)
            served += 1

    def _accept(self) -> Socket | None:
        return self._door.accept()[0] if _readable(self._door) else None

    @contextlib.contextmanager
    def _posted(self) -> Iterator[None]:
        """A board for one shim."""
        with Board(self._ready.layout) as board:
            self._board = board
            try:
                yield
            finally:
                board.state = BoardState.GONE
                self._executions += board[BoardWord.EXECUTIONS]
                self._board = None

    def _serve_one(self, connection: Socket, stop: Callable[[], bool]) -> None:
        clean = False
        while not stop():
            waiting = _readable(connection, self._door)
            if not waiting:
                self._watch()
                continue
            if connection not in waiting:
                # afl-showmap starts a second shim beside its first, which it does not use again.
                break
            message = receive(connection)
            if message is None:
                break
            clean = False
            if isinstance(message, ShimFailed):
                raise InfrastructureError(f"the shim cannot work: {message.reason}")
            machine = self._vm
            try:
                self._answer(message)
                if isinstance(message, Hello) or self._vm is not machine:
                    self._welcome(connection)
                else:
                    self._go(connection)
            except (BrokenPipeError, ConnectionResetError):
                break
            clean = True
        lane = self._ready.lane
        # A case may still run, and nobody waits for it.
        if not (clean and lane.idle and lane.catch_up()):
            if stop():
                # Most often the slot ends now.
                self._reset_due = True
            else:
                self.reset("shim")

    def _welcome(self, connection: Socket) -> None:
        board, vm = self._board, self._ready
        if board is None:
            raise UsageError("there is no board")
        if board.layout != vm.layout:
            raise InfrastructureError("the lane of the next machine lies elsewhere")
        board.last_case = vm.lane.last_case
        board.state = BoardState.READY
        session = vm.session
        send_welcome(connection, session.region.fd, board.fd, session.target_fault_memory)

    def _go(self, connection: Socket) -> None:
        if self._board is not None:
            self._board.last_case = self._ready.lane.last_case
        send_go(connection)

    def _watch(self) -> None:
        """Count a fault once: the shim reports the case that runs as suspect then."""
        if self._fault_told or self._board is None:
            return
        if self.trouble():
            self._fault_told = True
            self._board.add_fault()

    def _answer(self, message: Message) -> None:
        vm = self._ready
        match message:
            case Hello():
                if vm.dead or self._fault_told:
                    self.reset("start")
            case NewCells(case=number):
                vm.lane.last_case = number
                self._new_case()
            case SuspectCase(case=number, status=status):
                vm.lane.last_case = number
                self._suspect(status, timed_out=False)
            case TimedOut(case=number):
                vm.lane.last_case = number
                self._suspect(None, timed_out=True)
            case ResetWanted(reason=reason):
                self.reset(reason)

    def _new_case(self) -> None:
        lane = self._ready.lane
        case, pcs = lane.read_case(), lane.read_pcs()
        executions, seconds = self.executions, self.seconds
        # What differs from one execution to the next is no news.
        again = self._again(case)
        event = NewCase(case, pcs, executions, seconds, again)
        self._tell(lambda listener: listener.new_case(event))
        if again is None or not self.stability.due():
            return
        self.stability.add(pcs, again)
        if self.stability.reference is None:
            self._measure_reference(case)
        elif self._drifted():
            self.reset("drift")

    def _again(self, case: bytes) -> tuple[tuple[int, ...], ...] | None:
        """Execute a case once more; None, after a report, if that does not end well."""
        try:
            done = self.execute(case, self.stability.timeout)
        except BridgeError as error:
            logger.info("a case ended the guest when it was executed again: %s", error.message)
            done = None
        status = done.status if done is not None else None
        well = status is not None and not self.options.is_suspect(status) and not self.trouble()
        if done is not None and well:
            return done.pcs
        self._report(case, status, timed_out=done is not None and status is None)
        return None

    def _measure_reference(self, case: bytes | None = None) -> None:
        """Execute the case by which drift is measured, in a guest that was just reset."""
        case = case if case is not None else self.stability.reference
        if case is None or not self.options.drift:
            return
        vm = self._ready
        done = vm.lane.execute(case, self.stability.timeout, check=vm.check)
        if done.status is not None and not self.options.is_suspect(done.status):
            self.stability.set_reference(case, done.pcs)
        else:
            # It is of no use; a hanging one would keep the next case from running.
            self.stability.forget_reference()
            if done.status is None:
                raise RunnerError("a case that ended before did not end after a reset")

    def _drifted(self) -> bool:
        reference = self.stability.reference
        if reference is None or not self.options.drift:
            return False
        again = self._again(reference)
        return again is not None and self.stability.has_drifted(again)

    def _suspect(self, status: int | None, *, timed_out: bool) -> None:
        self._report(self._ready.lane.read_case(), status, timed_out=timed_out)

    def _report(self, case: bytes, status: int | None, *, timed_out: bool) -> None:
        """Collect evidence, tell it, and reset.

        A case that did not end in time is told if it does so a second time. What is known, and
        harmed nothing, needs no reset.
        """
        if timed_out and not self.trouble():
            self.reset("time-out")
            confirmed = self._confirm(case)
            if confirmed is None:
                return
            status, timed_out = confirmed
        lane = self._ready.lane
        output = lane.read_output() if status else b""
        pcs = lane.read_pcs() if status is not None else ()
        evidence = self.collect(timed_out=timed_out)
        event = Suspect(case, status, output, timed_out, evidence, pcs)
        known = [listener.suspect(event) for listener in self._listeners]
        if known and all(known) and self._is_unharmed():
            self.spared += 1
        else:
            self.reset("time-out" if timed_out else "finding")

    def _confirm(self, case: bytes) -> tuple[int | None, bool] | None:
        """Execute a case that did not end in time again, in a guest as new, with much more time.

        Returns:
            Its wait status, and whether it did not end again; None if nothing is wrong with it.
        """
        vm = self._ready
        limit = min(
            _LONGEST_SECONDS, max(self.options.confirm_seconds, _LONGER * self.case_seconds)
        )

        def check() -> None:
            vm.check()
            if self._stopping() or self._monitor.trouble():
                raise _Interrupted

        self._executions += 1
        try:
            status = vm.lane.execute(case, limit, check=check).status
        except _Interrupted:
            if self._stopping():
                self._reset_due = True
                return None
            return None, True
        except BridgeError as error:
            logger.info("a case ended the guest when it was executed again: %s", error.message)
            return None, False
        if status is None:
            return None, True
        if self.options.is_suspect(status) or self.trouble():
            return status, False
        self._was_slow()
        return None

    def _was_slow(self) -> None:
        self.slow += 1
        now = time.monotonic()
        if now >= self._slow_due:
            self._slow_due = now + _SLOW_INTERVAL_SECONDS
            logger.warning(
                "a case took longer than %g s only once, which is no finding (%d such so far)",
                self.case_seconds,
                self.slow,
            )

    def _is_unharmed(self) -> bool:
        """Return whether the next case may come without a reset, after a fault that is known.

        The guest must have nothing of the target that the fault may have harmed, and the case by
        which drift is measured must cover what it covers after a reset.
        """
        vm = self._ready
        reference = self.stability.reference
        if reference is None or not self.options.drift or vm.dead or vm.session.target_in_guest:
            return False
        if self._spared_since_reset >= self.options.known_faults:
            return False
        self._spared_since_reset += 1
        try:
            # What went wrong so far has been told.
            self._monitor.began(vm.session)
            self._fault_told = False
            done = self.execute(reference, self.stability.timeout)
        except BridgeError:
            return False
        if done.status is None or self.options.is_suspect(done.status) or self.trouble():
            return False
        return not self.stability.has_drifted(done.pcs)

    def _tell(self, say: Callable[[SlotListener], None]) -> None:
        for listener in self._listeners:
            say(listener)


def _readable(*connections: Socket) -> list[Socket]:
    """Wait a moment, and return the connections that have something."""
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLIN)
    ready = {number for number, _ in poll.poll(_POLL_SECONDS * 1e3)}
    return [connection for connection in connections if connection.fileno() in ready]
