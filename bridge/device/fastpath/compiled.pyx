# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
# cython: freethreading_compatible=False
"""The fast path in C: bridge/device/fastpath/plain.py is the definition, and gives the reasons.

Only ReturnPoller.poll() releases the interpreter lock.
"""

from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_ND,
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_CheckBuffer,
    PyObject_GetBuffer,
)
from cpython.dict cimport PyDict_GetItemWithError, PyDict_SetItem
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.set cimport PySet_Add
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

import errno

from bridge.device import abi

__all__ = ["AreaWords", "KcovState", "ReturnHandler", "ReturnPoller", "Totals"]

cdef extern from *:
    """
    /* Each word of shared memory is read once and written once, whatever the guest does. */
    static inline uint64_t kb_read(const uint64_t *word)
    {
        return __atomic_load_n(word, __ATOMIC_ACQUIRE);
    }
    static inline void kb_write(uint64_t *word, uint64_t value)
    {
        __atomic_store_n(word, value, __ATOMIC_RELEASE);
    }
    #if defined(__x86_64__) || defined(__i386__)
    #define kb_pause() __builtin_ia32_pause()
    #else
    #define kb_pause() ((void)0)
    #endif
    """
    uint64_t kb_read(const uint64_t *word) nogil
    void kb_write(uint64_t *word, uint64_t value) nogil
    void kb_pause() nogil


# The layout, from its definition in abi.py.
cdef Py_ssize_t _KICK = abi.HeaderWord.KICK
cdef Py_ssize_t _REQUESTS = abi.REQUESTS_OFFSET // abi.WORD
cdef Py_ssize_t _RESPONSES = abi.RESPONSES_OFFSET // abi.WORD
cdef Py_ssize_t _CONTROL_WORDS = abi.AREAS_OFFSET // abi.WORD
cdef Py_ssize_t _SLOT_WORDS = abi.SLOT_WORDS
cdef Py_ssize_t _SLOTS = abi.SLOTS
cdef int _SLOT_BITS = abi.KICK_SLOT_BITS
cdef Py_ssize_t _SEQ = abi.RequestWord.SEQ
cdef Py_ssize_t _OP = abi.RequestWord.OP
cdef Py_ssize_t _GENERATION = abi.RequestWord.GENERATION
cdef Py_ssize_t _TASK = abi.RequestWord.TASK
cdef Py_ssize_t _ARG0 = abi.RequestWord.ARG0
cdef Py_ssize_t _ANSWER_SEQ = abi.ResponseWord.SEQ
cdef Py_ssize_t _ERROR = abi.ResponseWord.ERROR
cdef Py_ssize_t _APPENDED = abi.ResponseWord.APPENDED
cdef Py_ssize_t _DROPPED = abi.ResponseWord.DROPPED
cdef uint64_t _RETURN = abi.Op.RETURN
cdef uint64_t _UNREPORTED_MASK = abi.UNREPORTED_MASK
cdef uint64_t _SINCE_NONE = abi.SINCE_NONE
cdef uint64_t _EIO = errno.EIO
cdef int _LOOKS = 64


cdef class _Words:
    """A writable buffer of 64-bit words, held until release()."""

    cdef Py_buffer _view
    cdef uint64_t *words
    cdef Py_ssize_t length

    def __cinit__(self):
        self.words = NULL

    cdef int hold(self, object buffer) except -1:
        PyObject_GetBuffer(buffer, &self._view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self.words = <uint64_t *>self._view.buf
        self.length = self._view.len // 8
        return 0

    cdef void drop(self) noexcept:
        if self.words != NULL:
            self.words = NULL
            PyBuffer_Release(&self._view)

    def __dealloc__(self):
        self.drop()


cdef class AreaWords:
    cdef readonly object _words
    cdef readonly Py_ssize_t size
    cdef Py_ssize_t _head
    cdef _Words _held

    def __init__(self, words, Py_ssize_t size):
        if not 1 <= size <= len(words):
            raise ValueError(f"an area of {size} words does not fit in {len(words)}")
        self._held = _Words()
        self._held.hold(words)
        self._words = words
        self.size = size
        self._head = 0

    @property
    def bitmap_words(self):
        return self._head

    @bitmap_words.setter
    def bitmap_words(self, Py_ssize_t words):
        if not 0 <= words < self.size:
            raise ValueError(f"a bitmap of {words} words does not fit in an area of {self.size}")
        self._head = words

    cdef Py_ssize_t room(self, uint64_t *count) except -1:
        """Return how many more PCs fit; store the current count in ``count``."""
        cdef uint64_t most = <uint64_t>(self.size - 1 - self._head)
        if self._held.words == NULL:
            raise ValueError("the area was released")
        count[0] = kb_read(self._held.words + self._head)
        return 0 if count[0] >= most else <Py_ssize_t>(most - count[0])

    cdef Py_ssize_t put(self, object first, object pcs) except -1:
        """Append ``first`` unless it is None, then a sequence; return how many fitted."""
        cdef uint64_t count = 0
        cdef Py_ssize_t room = self.room(&count)
        cdef Py_ssize_t put = 0
        cdef uint64_t *words
        if room == 0:
            return 0
        words = self._held.words + self._head + 1 + count
        if first is not None:
            words[0] = <uint64_t>first
            put = 1
        if type(pcs) is list:
            put += _copy_list(words + put, <list>pcs, room - put)
        elif PyObject_CheckBuffer(pcs):
            put += _copy_words(words + put, pcs, room - put)
        elif pcs:
            put += _copy_list(words + put, list(pcs), room - put)
        if put:
            kb_write(self._held.words + self._head, count + <uint64_t>put)
        return put

    def append(self, pcs):
        return self.put(None, pcs)

    def release(self):
        self._held.drop()
        self._words.release()


cdef Py_ssize_t _copy_list(uint64_t *words, list pcs, Py_ssize_t room) except -1:
    cdef Py_ssize_t fitting = 0
    # Reads the length each time, because converting an item that is no plain int may run code.
    while fitting < room and fitting < PyList_GET_SIZE(pcs):
        words[fitting] = <uint64_t>(<object>PyList_GET_ITEM(pcs, fitting))
        fitting += 1
    return fitting


cdef Py_ssize_t _copy_words(uint64_t *words, object pcs, Py_ssize_t room) except -1:
    cdef Py_buffer view
    cdef Py_ssize_t fitting
    PyObject_GetBuffer(pcs, &view, PyBUF_ND | PyBUF_FORMAT)
    try:
        if view.itemsize != 8 or view.format == NULL or view.format[0] != c"Q":
            raise TypeError("PCs in a buffer must have the format Q, like array('Q')")
        fitting = min(view.len // 8, room)
        memcpy(words, view.buf, <size_t>fitting * 8)
    finally:
        PyBuffer_Release(&view)
    return fitting


cdef class KcovState:
    cdef public uint64_t generation
    cdef public uint64_t appended
    cdef public uint64_t dropped
    cdef public object owner
    cdef public object area
    cdef public object cursor

    def __init__(self, generation):
        self.generation = generation

    @classmethod
    def __class_getitem__(cls, parameters):
        """Allow annotations like those of a generic class."""
        return cls


cdef class Totals:
    cdef public uint64_t returns
    cdef public uint64_t appended
    cdef public uint64_t dropped
    cdef public uint64_t comparisons
    cdef public uint64_t comparisons_dropped


cdef class ReturnHandler:
    """Appends coverage to the areas of instances, above all at the returns of their owners."""

    cdef object _coverage
    cdef Totals _totals
    cdef set _unique
    cdef object _syscall_pc
    cdef object _update_watched
    cdef object _append_rest
    cdef public object on_collected
    cdef dict _numbers

    def __init__(
        self, coverage, Totals totals, set unique, syscall_pc, update_watched, append_rest
    ):
        self._coverage = coverage
        self._totals = totals
        self._unique = unique
        self._syscall_pc = syscall_pc
        self._update_watched = update_watched
        self._append_rest = append_rest
        # The PC of each system call, by its number.
        self._numbers = {}

    def syscall_return(self, KcovState kcov, task, number, unreported, since=0):
        """Append coverage of the owner's call; return 0, or None if nothing was done."""
        return 0 if self.answer(kcov, task, number, unreported, since) else None

    cdef bint answer(
        self, KcovState kcov, uint64_t task, uint64_t number, uint64_t unreported, uint64_t since
    ) except -1:
        cdef AreaWords area
        cdef object first = None
        if type(kcov.owner) is not int or <uint64_t>kcov.owner != task:
            return False
        if kcov.cursor is None or kcov.area is None:
            return False
        area = kcov.area
        if area._head:
            return False
        self._totals.returns += 1 + unreported
        if since == 0:
            pcs = self._coverage.collect(kcov.cursor)
        elif since != _SINCE_NONE:
            pcs = self._coverage.collect(kcov.cursor, since)
        else:
            pcs = ()
        if self.on_collected is not None:
            self.on_collected(kcov, pcs)
        if self._syscall_pc is not None:
            first = self._pc_of(number)
        self._append(kcov, area, first, pcs)
        if self._update_watched is not None:
            self._update_watched(kcov)
        return True

    def append(self, KcovState kcov, AreaWords area, pcs):
        """Append PCs to an instance's area; count those that fitted and those that did not."""
        self._append(kcov, area, None, pcs)

    cdef int _append(self, KcovState kcov, AreaWords area, object first, object pcs) except -1:
        """Append ``first`` unless it is None, then ``pcs``."""
        cdef Totals totals = self._totals
        cdef Py_ssize_t total = len(pcs)
        cdef Py_ssize_t fitted
        if first is not None:
            total += 1
        if not total:
            return 0
        fitted = area.put(first, pcs)
        if fitted != total:
            if first is not None:
                pcs = [first, *pcs]
                first = None
            fitted += self._append_rest(kcov, pcs[fitted:])
            kcov.dropped += total - fitted
            totals.dropped += total - fitted
            pcs = pcs[:fitted]
        kcov.appended += fitted
        totals.appended += fitted
        if first is not None:
            PySet_Add(self._unique, first)
        if type(pcs) is list:
            for pc in <list>pcs:
                PySet_Add(self._unique, pc)
        else:
            self._unique.update(pcs)
        return 0

    cdef object _pc_of(self, uint64_t number):
        cdef object key = number
        cdef PyObject *known = PyDict_GetItemWithError(self._numbers, key)
        if known != NULL:
            return <object>known
        pc = self._syscall_pc(number)
        if pc is not None:
            # Only numbers with a PC, so that a hostile guest cannot make the dict grow.
            PyDict_SetItem(self._numbers, key, pc)
        return pc


cdef class ReturnPoller:
    """Answers the returns that a ReturnHandler can handle, and polls for the next one."""

    cdef _Words _control
    cdef ReturnHandler _handler
    cdef list _slots
    cdef list _handled
    cdef list _answered
    cdef object _failed
    cdef int _interrupted
    cdef readonly uint64_t last
    cdef readonly int64_t until
    cdef readonly int64_t looked
    cdef readonly uint64_t served
    """Number of requests that the last poll() answered."""

    def __init__(
        self,
        control,
        ReturnHandler handler,
        list slots,
        list handled,
        list answered,
        failed,
    ):
        self._control = _Words()
        self._control.hold(control)
        if self._control.length < _CONTROL_WORDS:
            raise ValueError(f"the region must have at least {_CONTROL_WORDS} control words")
        if not len(slots) == len(handled) == len(answered) == _SLOTS:
            raise ValueError(f"each list must have {_SLOTS} entries, one for each slot")
        self._handler = handler
        self._slots = slots
        self._handled = handled
        self._answered = answered
        self._failed = failed

    def release(self):
        """Release the region; no other method may be called afterwards."""
        self._control.drop()

    def interrupt(self):
        """Make the current or next poll() return at once; from any thread."""
        self._interrupted = 1

    def serve(self, Py_ssize_t slot):
        """Answer the request in ``slot`` if it is new and a return; return whether it did."""
        return self._serve(slot)

    def poll(
        self,
        uint64_t last,
        int64_t until,
        int64_t repair_at,
        int64_t poll_ns,
        int64_t preempted_ns,
    ):
        """Answer returns as they come, until ``until``; see bridge/device/fastpath/plain.py."""
        cdef uint64_t *kick = self._control.words + _KICK
        cdef uint64_t seen = last
        cdef int64_t now
        cdef Py_ssize_t slot
        cdef int looks
        if self._control.words == NULL:
            raise ValueError("the region was released")
        self.served = 0
        self.looked = _clock()
        while True:
            with nogil:
                while True:
                    looks = 0
                    while looks < _LOOKS:
                        seen = kb_read(kick)
                        if seen != last:
                            break
                        kb_pause()
                        looks += 1
                    if seen != last or self._interrupted:
                        break
                    now = _clock()
                    if now >= until or now >= repair_at or now - self.looked > preempted_ns:
                        break
                    self.looked = now
            if seen == last or self._interrupted:
                break
            slot = <Py_ssize_t>(seen & ((<uint64_t>1 << _SLOT_BITS) - 1))
            # Several requests at once need a look at all slots.
            if seen >> _SLOT_BITS != (last >> _SLOT_BITS) + 1 or not self._serve(slot):
                break
            last = seen
            self.served += 1
            self.looked = now = _clock()
            until = now + poll_ns
            if now >= repair_at:
                break
        self._interrupted = 0
        self.last = last
        self.until = until

    cdef bint _serve(self, Py_ssize_t slot) except -1:
        cdef uint64_t *request
        cdef uint64_t *answer
        cdef uint64_t sequence, generation, task, number, unreported, since, error
        cdef KcovState kcov
        cdef object each
        if not 0 <= slot < _SLOTS or self._control.words == NULL:
            return False
        request = self._control.words + _REQUESTS + slot * _SLOT_WORDS
        sequence = kb_read(request + _SEQ)
        if kb_read(request + _OP) != _RETURN:
            return False
        each = <object>PyList_GET_ITEM(self._slots, slot)
        if each is None or sequence == <uint64_t>(<object>PyList_GET_ITEM(self._handled, slot)):
            return False
        kcov = each
        generation = kb_read(request + _GENERATION)
        if kcov.generation != generation:
            return False
        task = kb_read(request + _TASK)
        number = kb_read(request + _ARG0)
        unreported = kb_read(request + _ARG0 + 1) & _UNREPORTED_MASK
        since = kb_read(request + _ARG0 + 2)
        error = 0
        try:
            if not self._handler.answer(kcov, task, number, unreported, since):
                return False
        except BaseException as failure:
            self._failed(failure)
            error = _EIO
        each = sequence
        self._handled[slot] = each
        self._answered[slot] = each
        answer = self._control.words + _RESPONSES + slot * _SLOT_WORDS
        kb_write(answer + _ERROR, error)
        kb_write(answer + _APPENDED, kcov.appended)
        kb_write(answer + _DROPPED, kcov.dropped)
        # SEQ last: it makes the answer valid.
        kb_write(answer + _ANSWER_SEQ, sequence)
        return True


cdef inline int64_t _clock() noexcept nogil:
    """Return the time of time.perf_counter_ns()."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec
