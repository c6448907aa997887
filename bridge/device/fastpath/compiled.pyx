# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
# cython: freethreading_compatible=False
"""What is done for each signal, compiled: bridge/device/fastpath/plain.py says what and why.

ReturnPoller.poll() alone releases the interpreter lock. Where a comment calls a stretch atomic,
nothing in it runs Python code or allocates an object that the garbage collector tracks: a
collection may run Python code.
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
from cpython.dict cimport PyDict_DelItem, PyDict_GetItemWithError, PyDict_Next, PyDict_SetItem
from cpython.list cimport PyList_Append, PyList_GET_ITEM, PyList_GET_SIZE
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.object cimport PyObject
from cpython.set cimport PySet_Add, PySet_Clear
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

import errno
from operator import attrgetter

from bridge.device import abi

__all__ = ["AreaWords", "KcovState", "LineDrain", "ReturnHandler", "ReturnPoller", "Totals"]

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
    #define kb_lowest(word) __builtin_ctzll(word)
    #define kb_ones(word) __builtin_popcountll(word)
    """
    uint64_t kb_read(const uint64_t *word) nogil
    void kb_write(uint64_t *word, uint64_t value) nogil
    void kb_pause() nogil
    int kb_lowest(uint64_t word) nogil
    int kb_ones(uint64_t word) nogil
    Py_ssize_t Py_REFCNT(PyObject *of)
    int PySet_CheckExact(PyObject *of)
    long PyLong_AsLongAndOverflow(object number, int *overflow) except? -1


# The layout, from its one definition.
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

    cdef void let_go(self) noexcept:
        if self.words != NULL:
            self.words = NULL
            PyBuffer_Release(&self._view)

    def __dealloc__(self):
        self.let_go()


cdef class AreaWords:
    cdef readonly object _words
    cdef readonly Py_ssize_t size
    cdef Py_ssize_t _head
    cdef _Words _held

    def __init__(self, words, Py_ssize_t size):
        if not 1 <= size <= len(words):
            raise ValueError(f"an area of {size} words in {len(words)}")
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
            raise ValueError(f"a bitmap of {words} words in an area of {self.size}")
        self._head = words

    cdef Py_ssize_t room(self, uint64_t *count) except -1:
        """How many more PCs fit, and the count as it is now."""
        cdef uint64_t most = <uint64_t>(self.size - 1 - self._head)
        if self._held.words == NULL:
            raise ValueError("the area was released")
        count[0] = kb_read(self._held.words + self._head)
        return 0 if count[0] >= most else <Py_ssize_t>(most - count[0])

    cdef Py_ssize_t put(self, object first, object pcs) except -1:
        """Append ``first``, if it is not None, and a sequence after it; how many fitted."""
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
        self._held.let_go()
        self._words.release()


cdef Py_ssize_t _copy_list(uint64_t *words, list pcs, Py_ssize_t room) except -1:
    cdef Py_ssize_t fitting = 0
    # Asked for its length each time: a number that is no plain one may run code.
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
            raise TypeError("PCs are of the format Q, as array('Q') has them")
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
        """For annotations alone, as that of a generic class."""
        return cls


cdef class Totals:
    cdef public uint64_t returns
    cdef public uint64_t appended
    cdef public uint64_t dropped
    cdef public uint64_t comparisons
    cdef public uint64_t comparisons_dropped


cdef class _File:
    """What is known of a file's lines: those that ran, and of which blocks."""

    cdef readonly str name
    cdef list pcs
    cdef Py_ssize_t lines
    cdef uint32_t *block  # of each line: its number in pcs and 1 more, or 0
    cdef uint8_t *taken  # of each line, whether it ever ran
    cdef uint64_t *hit  # a bit for each block, of those to be given
    cdef uint64_t *covered  # likewise, of those ever given
    cdef Py_ssize_t first, last  # the words of hit that have bits
    cdef set beyond  # lines that ran and are none of the file that was read
    cdef bint fresh

    def __cinit__(self):
        self.block = NULL
        self.taken = NULL
        self.hit = NULL
        self.covered = NULL

    def __init__(self, str path, found):
        cdef Py_ssize_t line, words
        cdef dict numbers
        self.name, line_pcs = (path, []) if found is None else found
        self.pcs = sorted(set(line_pcs) - {0})
        numbers = {pc: number for number, pc in enumerate(self.pcs, 1)}
        self.lines = len(line_pcs)
        self.beyond = set()
        words = len(self.pcs) // 64 + 1
        self.block = <uint32_t *>PyMem_Calloc(self.lines + 1, sizeof(uint32_t))
        self.taken = <uint8_t *>PyMem_Calloc(self.lines + 1, 1)
        self.hit = <uint64_t *>PyMem_Calloc(words, 8)
        self.covered = <uint64_t *>PyMem_Calloc(words, 8)
        if not self.block or not self.taken or not self.hit or not self.covered:
            raise MemoryError
        for line in range(self.lines):
            self.block[line] = numbers.get(line_pcs[line], 0)
        self.first = words
        self.last = -1

    def __dealloc__(self):
        PyMem_Free(self.block)
        PyMem_Free(self.taken)
        PyMem_Free(self.hit)
        PyMem_Free(self.covered)

    cdef int take(self, set lines) except -1:
        """Note all lines of a set."""
        cdef Py_ssize_t line, word
        cdef int overflow = 0
        cdef uint32_t block
        for each in lines:
            if type(each) is not int:
                self.beyond.add(each)
                continue
            line = PyLong_AsLongAndOverflow(each, &overflow)
            if not 0 <= line < self.lines:
                self.beyond.add(each)
                continue
            self.taken[line] = 1
            block = self.block[line]
            if block:
                word = (block - 1) >> 6
                self.hit[word] |= <uint64_t>1 << ((block - 1) & 63)
                if word < self.first:
                    self.first = word
                if word > self.last:
                    self.last = word
        return 0

    cdef Py_ssize_t give(self, list out) except -1:
        """Append the PCs of the blocks that were noted; how many are given for the first time."""
        cdef Py_ssize_t word = self.first
        cdef Py_ssize_t last = self.last
        cdef Py_ssize_t new = 0
        cdef uint64_t bits
        self.last = -1
        while word <= last:
            bits = self.hit[word]
            self.hit[word] = 0
            new += kb_ones(bits & ~self.covered[word])
            self.covered[word] |= bits
            while bits:
                PyList_Append(out, <object>PyList_GET_ITEM(self.pcs, 64 * word + kb_lowest(bits)))
                bits &= bits - 1
            word += 1
        self.first = len(self.pcs) // 64 + 1
        return new

    cdef set all_lines(self):
        return self.beyond | {line for line in range(self.lines) if self.taken[line]}


_name_of = attrgetter("name")


cdef class LineDrain:
    cdef readonly dict _data
    cdef object _find
    cdef dict _files  # path: _File
    cdef list _fresh  # files of which blocks are to be given
    cdef list _gone  # paths to be removed from the data
    cdef list _unknown  # paths that no _File is known of
    cdef readonly Py_ssize_t covered

    def __init__(self, dict data, find):
        self._data = data
        self._find = find
        self._files = {}
        self._fresh = []
        self._gone = []
        self._unknown = []
        self.covered = 0

    @property
    def apart(self):
        return 0

    def drain(self):
        return self._drain(self._data, True)

    def adopt(self, dict sets):
        return self._drain(sets, False)

    def put_back(self):
        cdef _File file
        for path, file in self._files.items():
            self._data.setdefault(path, set()).update(file.all_lines())

    cdef list _drain(self, dict data, bint remove):
        cdef list pcs = []
        cdef _File file
        while True:
            self._sweep(data, remove)
            if not self._unknown:
                break
            # Their lines stay where they are meanwhile.
            while self._unknown:
                path = self._unknown[len(self._unknown) - 1]
                if path not in self._files:
                    self._files[path] = _File(path, self._find(path))
                self._unknown.pop()
        if len(self._fresh) > 1:
            self._fresh.sort(key=_name_of)
        for file in self._fresh:
            self.covered += file.give(pcs)
            file.fresh = False
        self._fresh.clear()
        return pcs

    cdef int _sweep(self, dict data, bint remove) except -1:
        """Note all lines of files that are known, and empty their sets.

        Atomic, so that a frame can neither add a line to a set that was looked at and is about to
        be emptied, nor take one that nobody had a reference to and is about to go.
        """
        cdef PyObject *path = NULL
        cdef PyObject *lines = NULL
        cdef PyObject *known
        cdef Py_ssize_t at = 0
        cdef Py_ssize_t references
        cdef _File file
        while PyDict_Next(data, &at, &path, &lines):
            references = Py_REFCNT(lines)
            if not PySet_CheckExact(lines):
                raise TypeError("the collector's data has something else than sets")
            if len(<set>lines):
                known = PyDict_GetItemWithError(self._files, <object>path)
                if known == NULL:
                    PyList_Append(self._unknown, <object>path)
                    continue
                file = <_File>known
                file.take(<set>lines)
                if not file.fresh:
                    file.fresh = True
                    PyList_Append(self._fresh, file)
                if not (remove and references == 1):
                    PySet_Clear(<set>lines)
            if remove and references == 1:
                PyList_Append(self._gone, <object>path)
        while PyList_GET_SIZE(self._gone):
            PyDict_DelItem(data, self._gone.pop())
        return 0


cdef class ReturnHandler:
    """Appends coverage to the areas of instances, above all at the returns of their owners."""

    cdef object _coverage
    cdef Totals _totals
    cdef set _unique
    cdef object _syscall_pc
    cdef object _update_watched
    cdef object _append_rest
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
        # The PCs of system calls' numbers.
        self._numbers = {}

    def syscall_return(self, KcovState kcov, task, number, unreported):
        """Append coverage since the owner's last return; 0, or None if nothing was done."""
        return 0 if self.answer(kcov, task, number, unreported) else None

    cdef bint answer(
        self, KcovState kcov, uint64_t task, uint64_t number, uint64_t unreported
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
        pcs = self._coverage.collect(kcov.cursor)
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
        """Append ``first``, if it is not None, and ``pcs`` after it."""
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
            # So no more than there are PCs, whatever numbers the guest tells.
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
    """How many requests the last poll() has answered."""

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
            raise ValueError(f"the region has {_CONTROL_WORDS} control words or more")
        if not len(slots) == len(handled) == len(answered) == _SLOTS:
            raise ValueError(f"each list has {_SLOTS} entries, one for each slot")
        self._handler = handler
        self._slots = slots
        self._handled = handled
        self._answered = answered
        self._failed = failed

    def release(self):
        """Let go of the region; no other method may be called afterwards."""
        self._control.let_go()

    def interrupt(self):
        """Make poll() return at once, now or when it is called next; from any thread."""
        self._interrupted = 1

    def serve(self, Py_ssize_t slot):
        """Answer the request in ``slot`` if it is new and the handler can; say whether it did."""
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
        cdef uint64_t now_there = last
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
                        now_there = kb_read(kick)
                        if now_there != last:
                            break
                        kb_pause()
                        looks += 1
                    if now_there != last or self._interrupted:
                        break
                    now = _clock()
                    if now >= until or now >= repair_at or now - self.looked > preempted_ns:
                        break
                    self.looked = now
            if now_there == last or self._interrupted:
                break
            slot = <Py_ssize_t>(now_there & ((<uint64_t>1 << _SLOT_BITS) - 1))
            # Several requests at once need a look at all slots.
            if now_there >> _SLOT_BITS != (last >> _SLOT_BITS) + 1 or not self._serve(slot):
                break
            last = now_there
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
        cdef uint64_t sequence, generation, task, number, unreported, error
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
        error = 0
        try:
            if not self._handler.answer(kcov, task, number, unreported):
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
        # Last: what it answers.
        kb_write(answer + _ANSWER_SEQ, sequence)
        return True


cdef inline int64_t _clock() noexcept nogil:
    """As time.perf_counter_ns()."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec
