# SPDX-License-Identifier: Apache-2.0
"""The two interfaces of the bridge.

* kcov's own: ioctl numbers, modes and limits, from ``include/uapi/linux/kcov.h`` and
  ``kernel/kcov.c`` in Linux, and ``pkg/sentry/kernel/kcov.go`` in gVisor;
* the layout of the shared region, which the guest module's ``kcov_bridge_abi.h`` repeats
  (``tests/device/test_abi.py`` compiles that header and compares).

The region is an array of little-endian 64-bit words, so each field is read and written by one
aligned access that cannot tear::

    page 0                     header: written by the host, except for the words named GUEST
    REQUESTS_OFFSET            one request of 64 bytes for each slot, written by the guest
    RESPONSES_OFFSET           one response of 64 bytes for each slot, written by the host
    PAYLOAD_OFFSET             what does not fit into a request: one page, written by the guest
    AREAS_OFFSET ...           the kcov areas, handed out in pages

A slot belongs to one open kcov descriptor (an *instance*) from open to release. The guest fills
the slot's request, sets its ``SEQ`` to a new value, moves the header's ``KICK`` and, unless the
header says that the host is awake, rings the doorbell. The host carries the operation out, fills
the response and sets its ``SEQ`` to the request's, which hands both back to the guest.

An owner's return is such a request only if ``COVERAGE_EPOCH`` says that there may be coverage for
it; the next request says how many returns were not reported (the argument *unreported*).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

__all__ = [
    "AREAS_OFFSET",
    "CALL_CUT_SHIFT",
    "CALL_MOST_WORDS",
    "CALL_STRINGS",
    "CALL_STRING_BYTES",
    "CALL_WORDS_BITS",
    "ENOTSUPP",
    "FOLLOW_FLAG",
    "GVISOR_MAX_WORDS",
    "HOST_PEER",
    "KCOV_BRIDGE_LANE",
    "KCOV_BRIDGE_STREAM",
    "KCOV_BRIDGE_WIRE",
    "KCOV_CMP_CONST",
    "KCOV_CMP_SIZE",
    "KCOV_DISABLE",
    "KCOV_ENABLE",
    "KCOV_INIT_TRACE",
    "KCOV_REMOTE_ENABLE",
    "KCOV_REMOTE_MAX_HANDLES",
    "KCOV_RESET_TRACE",
    "KCOV_TRACE_CMP",
    "KCOV_TRACE_PC",
    "KCOV_UNIQUE_ENABLE",
    "KCOV_WORDS_PER_CMP",
    "KICK_SLOT_BITS",
    "LANE_INDEX_SHIFT",
    "LANE_MASK",
    "LINUX_MAX_WORDS",
    "MAGIC",
    "PAGE_SIZE",
    "PAYLOAD_OFFSET",
    "PCI_DEVICE_ID",
    "PCI_VENDOR_ID",
    "REQUESTS_OFFSET",
    "RESPONSES_OFFSET",
    "SINCE_NONE",
    "SLOTS",
    "SLOT_WORDS",
    "STREAM_MASK",
    "UNREPORTED_MASK",
    "VECTORS",
    "VERSION",
    "WIRE_BYTES",
    "WIRE_RING_BYTES",
    "WIRE_VECTOR",
    "WORD",
    "CallFlag",
    "CallLogWord",
    "CallWord",
    "Comparison",
    "HeaderWord",
    "Hidden",
    "HostState",
    "Op",
    "RequestWord",
    "ResponseWord",
    "WireEnd",
    "WireWord",
]

# kcov: include/uapi/linux/kcov.h, 64-bit little-endian.
KCOV_INIT_TRACE = 0x80086301
KCOV_ENABLE = 0x6364
KCOV_DISABLE = 0x6365
KCOV_REMOTE_ENABLE = 0x40186366
KCOV_TRACE_PC = 0
KCOV_TRACE_CMP = 1
KCOV_REMOTE_MAX_HANDLES = 0x100
KCOV_CMP_CONST = 1
"""In the type of a comparison: the first operand is a constant."""
KCOV_WORDS_PER_CMP = 4
"""``KCOV_WORDS_PER_CMP`` in ``kernel/kcov.c``: type, two operands, PC."""

Comparison = tuple[int, int, int, int]
"""A record of KCOV_TRACE_CMP as it lies in an area: type, two operands, PC."""

# As proposed for Linux ("kcov: add ioctl(KCOV_UNIQUE_ENABLE)", "kcov: add ioctl(KCOV_RESET_TRACE)",
# linux-kernel, July 2025); not in its uapi header yet.
KCOV_UNIQUE_ENABLE = 0x40086367
KCOV_RESET_TRACE = 0x6368

# The bridge's own: the calling thread traces into a stream of the host's.
KCOV_BRIDGE_STREAM = 0x63E0
"""Argument: the stream's number, with FOLLOW_FLAG if children are to trace into it as well."""
FOLLOW_FLAG = 1 << 63
STREAM_MASK = FOLLOW_FLAG - 1
"""The bits of a stream's number."""

# The bridge's own, in place of KCOV_INIT_TRACE: the instance gets an area that the host has made.
KCOV_BRIDGE_LANE = 0x63E1
"""Argument: the lane's number, and the area's index above LANE_INDEX_SHIFT bits."""
LANE_INDEX_SHIFT = 32
LANE_MASK = (1 << LANE_INDEX_SHIFT) - 1
"""The bits of a lane's number."""

# The bridge's own, on /dev/kcov_wire: connect to an endpoint of the target.
KCOV_BRIDGE_WIRE = 0x63E2
"""Argument: the endpoint's port in the guest."""


def KCOV_CMP_SIZE(log: int) -> int:
    """In the type of a comparison: operands of ``1 << log`` bytes, ``log`` 0 to 3."""
    return log << 1


LINUX_MAX_WORDS = 0x7FFFFFFF // 8
"""Largest area in words: ``kcov_ioctl`` in Linux refuses more than INT_MAX / 8."""
GVISOR_MAX_WORDS = 10 * 1024 * 1024
"""Largest area in words: ``kcovAreaSizeMax`` in gVisor."""
ENOTSUPP = 524
"""The kernel-internal errno that ``kcov_get_mode`` returns for a mode it was not built for."""

# The shared region.
PAGE_SIZE = 4096
WORD = 8
MAGIC = 0x47445242564F434B  # "KCOVBRDG" in memory
VERSION = 12
SLOTS = 1024
SLOT_WORDS = 8
REQUESTS_OFFSET = PAGE_SIZE
RESPONSES_OFFSET = REQUESTS_OFFSET + SLOTS * SLOT_WORDS * WORD
PAYLOAD_OFFSET = RESPONSES_OFFSET + SLOTS * SLOT_WORDS * WORD
AREAS_OFFSET = PAYLOAD_OFFSET + PAGE_SIZE

# The ivshmem device: docs/specs/ivshmem-spec.txt in QEMU.
PCI_VENDOR_ID = 0x1AF4
PCI_DEVICE_ID = 0x1110
HOST_PEER = 1
"""The bridge's peer id. QEMU's own is 0, which snapshots require."""
VECTORS = 2
"""0: requests, to the host alone. WIRE_VECTOR: connections, in both directions."""
WIRE_VECTOR = 1


class HeaderWord(IntEnum):
    """Index of each word of the header. Lines of 8 words have one writer each."""

    MAGIC = 0
    VERSION = 1
    SLOTS = 2
    REQUESTS_OFFSET = 3
    RESPONSES_OFFSET = 4
    AREAS_OFFSET = 5
    REGION_BYTES = 6
    HOST_PEER = 7
    HOST_EPOCH = 8
    """Changes each time a host takes over the region; 0 without a host."""
    HOST_STATE = 9
    """A :class:`HostState`."""
    KICK = 16
    """GUEST: a count of requests above ``KICK_SLOT_BITS`` bits that name the slot of the last."""
    GUEST_TIMEOUTS = 24
    """GUEST: requests given up because the host did not answer in time."""
    GUEST_SKIPPED = 25
    """GUEST: system call returns and modules not reported because the host was known to be gone."""
    GUEST_UNTRACED = 26
    """GUEST: as ``UNTRACED``, where the host did not answer: threads not followed."""
    COVERAGE_EPOCH = 32
    """Changes to a new value, never used before, whenever something may have been covered. The
    target's tracer, the relays and the doorbell write it. An owner reports a return only if the
    value differs from that at the last reported one. 0: every return is reported."""
    COVERAGE_POSITION = 40
    """How many blocks the host has noted so far while there was more than one reader. A call that
    finds a value when it begins gets what is noted after that; see
    :meth:`bridge.sources.ledger.Ledger.collect`."""


KICK_SLOT_BITS = 16


class HostState(IntEnum):
    """Whether the guest must ring the doorbell after a request."""

    ASLEEP = 0
    AWAKE = 1


class Op(IntEnum):
    """The operations that the guest requests. Arguments are ARG0..ARG2 of the request."""

    NONE = 0
    """Refused. A request that was given up, and whose payload is another's by now, becomes one."""
    INIT = 1
    """KCOV_INIT_TRACE; ARG0 = size in words."""
    MAP = 2
    """mmap; ARG0 = length in bytes, ARG1 = offset in pages, ARG2 = live mappings of the area."""
    ENABLE = 3
    """KCOV_ENABLE; ARG0 = mode, ARG1 = the address of the caller's task_struct."""
    DISABLE = 4
    """KCOV_DISABLE; ARG0 = the ioctl's argument, ARG1 = unreported."""
    EXIT = 5
    """The task TASK has ended; ARG1 = unreported."""
    RELEASE = 6
    """The last reference to the instance has gone; no mapping is left."""
    RETURN = 7
    """A system call of the owner is about to return to user mode; ARG0 = its number, ARG1 =
    unreported: how many returns since the owner's last request were not reported; ARG2 = the value
    of COVERAGE_POSITION from which on the call gets what was covered, 0 for all since the owner's
    last RETURN, or SINCE_NONE."""
    RESET = 8
    """KCOV_RESET_TRACE; ARG0 = the ioctl's argument."""
    UNIQUE = 9
    """KCOV_UNIQUE_ENABLE; ARG0 = words of the bitmap, ARG1 as for ENABLE."""
    REMOTE = 10
    """KCOV_REMOTE_ENABLE; ARG0 = trace_mode, and area_size above 32 bits; ARG1 = num_handles, or
    2**64-1 where the argument could not be read; ARG2 = common_handle; the payload: handles."""
    CLOSE = 11
    """The last descriptor is closed while TASK owns the instance; the answer 0 ends that; ARG1 =
    unreported."""
    KERNEL = 12
    """In the module's own slot, which is no instance: the payload describes the kernel, see
    :class:`KernelWord`; the answer 0 says that the host watches it. If CPUS is 0, the kernel ends:
    by a reboot, or because another one runs from now on."""
    MODULE = 13
    """In the module's own slot: a module's code was loaded (ARG0 = 1) or unloaded (0); ARG1 = its
    address, ARG2 = its size in bytes; the payload: its name."""
    STREAM = 14
    """KCOV_BRIDGE_STREAM, or a child of a thread that is followed: TASK traces into an area of the
    host's choice; ARG0 = number of the stream, ARG1 as for ENABLE."""
    UNTRACED = 15
    """In the module's own slot: threads that could not be followed; ARG0 = number of the stream,
    ARG1 = how many."""
    CALLS = 16
    """The log of the owner's system calls is to be emptied; see :class:`CallLogWord`."""
    LANE = 17
    """KCOV_BRIDGE_LANE; ARG0 = the ioctl's argument."""
    WIRE = 18
    """KCOV_BRIDGE_WIRE; ARG0 = the ioctl's argument; see :class:`WireWord`."""


SINCE_NONE = (1 << 64) - 1
"""In ARG2 of RETURN: the call reached no target, and gets no coverage."""

UNREPORTED_MASK = (1 << 32) - 1
"""The bits of *unreported* that are used; no guest makes more returns between two requests."""


class RequestWord(IntEnum):
    """Index of each word of a request."""

    SEQ = 0
    OP = 1
    GENERATION = 2
    """Differs for each open of the device, and so tells a slot's instances apart."""
    TASK = 3
    """Names a guest thread; the low 32 bits are its thread id."""
    ARG0 = 4
    ARG1 = 5
    ARG2 = 6
    HIDDEN = 7
    """No part of the request: a :class:`Hidden`. Unless it is NO, the owner runs the module's code
    instead of its own."""


class Hidden(IntEnum):
    """Whether the owner runs code that a watching host must not record."""

    NO = 0
    YES = 1
    SEEN = 2
    """Like YES; written by the plugin in QEMU, which watches the owner from now on."""
    EXIT = 3
    """Like YES, until the owner's work before user mode is done; the plugin ends it."""
    EXIT_LATER = 4
    """Like NO until that work begins, then like EXIT."""


class ResponseWord(IntEnum):
    """Index of each word of a response."""

    SEQ = 0
    ERROR = 1
    """0 or an errno (positive)."""
    AREA_OFFSET = 2
    """MAP: where the area starts in the region, bytes. STREAM with CALLS: where the log starts.
    WIRE: where the connection's :class:`WireWord` start."""
    APPENDED = 3
    """PCs that the instance has got so far."""
    DROPPED = 4
    """PCs that did not fit into its area so far."""
    FLAGS = 5
    """An :class:`Answer`."""
    SOONEST_NS = 6
    """To an op that starts an owner: the shortest time in which a target can answer, nanoseconds. A
    call that was shorter and did not sleep reached none. 0: calls are not told apart."""


class Answer(IntFlag):
    """Flags of an answer."""

    SILENT = 1
    """To an ENABLE: the owner need not send RETURN."""
    CALLS = 2
    """To a STREAM: the owner logs its system calls."""


class CallLogWord(IntEnum):
    """Index of each word of a log of system calls.

    The log is a ring of records. Positions count words since the start; a word's index in the ring
    is its position modulo RING_WORDS, a power of two.
    """

    HEAD = 0
    """GUEST: the end of the last record."""
    LOST = 1
    """GUEST: records that had no room."""
    ENTERED = 2
    """GUEST: 1 while the owner is in the call that is the record in CALL."""
    TAIL = 8
    """The end of the last record that the host has taken."""
    RING_WORDS = 9
    COUNT_OFFSET = 10
    """Where the count of the owner's area lies in the region, bytes ..."""
    BITMAP_OFFSET = 11
    """... and where its bitmap does, which the guest clears at each call."""
    BITMAP_WORDS = 12
    """0: the guest leaves the bitmap alone."""
    CALL = 16
    """GUEST: a record of ``CALL_MOST_WORDS`` at most."""
    RING = 160
    """The first word of the ring."""


class CallWord(IntEnum):
    """Index of each word of the record of a system call. Its strings follow, each with its NUL,
    padded to whole words."""

    WORDS = 0
    """The record's length with its strings, and :class:`CallFlag` above ``CALL_WORDS_BITS``."""
    NUMBER = 1
    RESULT = 2
    ENTERED = 3
    """Nanoseconds of the guest's monotonic clock, as RETURNED."""
    RETURNED = 4
    COUNT = 5
    """The count of the owner's area when the call was entered."""
    ARGUMENTS = 6
    """Six words."""
    COMMAND = 12
    """The thread's name: 16 bytes with NULs up to the end."""
    STRINGS = 14


CALL_WORDS_BITS = 16
CALL_CUT_SHIFT = 8
"""Where the flags begin that say that a string was cut."""
CALL_STRINGS = 4
"""The most strings in a record."""
CALL_STRING_BYTES = 256
"""The longest string, with its NUL."""
CALL_MOST_WORDS = 144
"""More than the longest record has."""


class CallFlag(IntFlag):
    """Flags of a record, shifted down by ``CALL_WORDS_BITS``. Bits 0 to 5: the argument's string
    follows. Bits 8 to 13: it was cut."""

    RETURNED = 1 << 16
    """RESULT and RETURNED are valid."""
    IA32 = 1 << 17
    """A call of a 32-bit program, with its own numbers."""
    REFUSED = 1 << 18
    """Refused before it was entered, by seccomp; the time of its start is that of its return."""


class KernelWord(IntEnum):
    """Index of each word of KERNEL's payload. Addresses are the guest's."""

    CPUS = 0
    SYSCALL_ENTRY = 1
    MARKER = 2
    """The function by whose code the plugin in QEMU finds this kernel's memory ..."""
    MARKER_PHYSICAL = 3
    """... and its physical address."""
    CPU = 8
    """By APIC id two physical addresses: of current_task and of preempt_count; 0: no CPU."""
    VECTORS = 136
    """The code that each of the 256 vectors of the interrupt descriptor table leads to."""


KERNEL_CPUS = 64
"""How many CPUs KERNEL's payload has room for."""


WIRE_RING_BYTES = 256 * 1024
WIRE_BYTES = PAGE_SIZE + 2 * WIRE_RING_BYTES
"""A connection: a page of words, the ring to the host, the ring to the guest."""


class WireWord(IntEnum):
    """Index of each word of a connection. Positions count bytes since it began."""

    GUEST_SENT = 0
    """GUEST: the end of what it has written."""
    GUEST_TAKEN = 1
    """GUEST: the end of what it has read."""
    GUEST_POLLS = 2
    """GUEST: it polls HOST_SENT, and needs no interrupt."""
    GUEST_FULL = 3
    """GUEST: it waits for room, and needs an interrupt once HOST_TAKEN has moved."""
    HOST_SENT = 8
    HOST_TAKEN = 9
    HOST_FULL = 10
    """It waits for room: the guest rings when GUEST_TAKEN has moved."""
    HOST_ENDED = 11
    """A :class:`WireEnd`, or 0."""


class WireEnd(IntEnum):
    """How the host's side of a connection has ended."""

    CLOSED = 1
    """The target has closed it; there may be data to read."""
    RESET = 2
    """It is broken."""
