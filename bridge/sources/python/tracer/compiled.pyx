# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
# cython: freethreading_compatible=False
"""The tracer in C: plain.py is the definition, and gives the reasons."""

from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.dict cimport PyDict_GetItemWithError
from cpython.list cimport PyList_GET_ITEM, PyList_Append
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t

import os
import sys
import time
from operator import attrgetter

from .. import faults as _faults
from .. import lines as _layout
from .. import threads as _threads
from .plain import CodeViews, canonical, is_settled, keep_fault

__all__ = [
    "Apart",
    "Feed",
    "Group",
    "View",
    "chain",
    "chained",
    "current",
    "forked",
    "install",
    "thread_ended",
    "uninstall",
]

cdef extern from *:
    """
    #include <frameobject.h>
    #define kb_order() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    /* Each byte is stored once, after those before it. */
    #define kb_store(place, value) __atomic_store_n((place), (value), __ATOMIC_RELEASE)
    #define kb_load(place) __atomic_load_n((place), __ATOMIC_ACQUIRE)
    #define kb_count(place) __atomic_fetch_add((uint64_t *)(place), 1, __ATOMIC_RELAXED)
    /* Guarded by the interpreter lock; plain.py says what a value consists of. */
    static uint64_t kb_epoch_count, kb_epoch_process;
    #define kb_change_epoch(word) __atomic_store_n((word), \
        ++kb_epoch_count << 23 | kb_epoch_process, __ATOMIC_RELEASE)
    """
    ctypedef struct PyFrameObject
    ctypedef struct PyCodeObject:
        PyObject *co_filename
    ctypedef int (*Py_tracefunc)(PyObject *, PyFrameObject *, int, PyObject *) noexcept
    ctypedef struct PyThreadState:
        Py_tracefunc c_tracefunc
        PyObject *c_traceobj
    int PyTrace_CALL
    int PyTrace_LINE
    PyThreadState *PyThreadState_Get()
    void PyEval_SetTrace(Py_tracefunc function, PyObject *of)
    PyCodeObject *PyFrame_GetCode(PyFrameObject *frame)
    int PyFrame_GetLineNumber(PyFrameObject *frame)
    object PyFrame_GetGlobals(PyFrameObject *frame)
    void PyErr_Fetch(PyObject **kind, PyObject **value, PyObject **trace)
    void PyErr_Restore(PyObject *kind, PyObject *value, PyObject *trace)
    void Py_XINCREF(PyObject *of)
    void Py_XDECREF(PyObject *of)
    void kb_order() nogil
    void kb_store(uint8_t *place, int value) nogil
    int kb_load(const uint8_t *place) nogil
    void kb_count(uint8_t *place) nogil
    uint64_t kb_epoch_count, kb_epoch_process
    void kb_change_epoch(uint64_t *word) nogil

cdef Py_ssize_t _ACTIVE = _layout.ACTIVE
cdef Py_ssize_t _CHANGED = _layout.CHANGED
cdef Py_ssize_t _DIRTY = _layout.DIRTY
cdef Py_ssize_t _BY_THREAD = _threads.BY_THREAD
cdef int _OTHER = _threads.OTHER
cdef int _NUMBER_SHIFT = _threads.NUMBER_SHIFT
cdef uint64_t _PC_MASK = _threads.PC_MASK
cdef Py_ssize_t _FAULTED = _faults.FAULTED
cdef Py_ssize_t _FAULTS = _faults.FAULTS
cdef int _UNREPORTED = _faults.UNREPORTED
cdef int _REPORTED = _faults.REPORTED

# The interpreter's own; hooks may replace them later.
_settrace = sys.settrace
_gettrace = sys.gettrace


cdef class _Memory:
    """The bytes of a memory, held for the life of this object."""

    cdef Py_buffer _held
    cdef uint8_t *base
    cdef bint _holds
    cdef list views

    def __cinit__(self):
        self._holds = False
        self.base = NULL

    def __init__(self, buffer):
        PyObject_GetBuffer(buffer, &self._held, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self._holds = True
        self.base = <uint8_t *>self._held.buf
        self.views = []

    def __dealloc__(self):
        if self._holds:
            PyBuffer_Release(&self._held)


cdef class View:
    cdef readonly object feed
    cdef readonly object name
    cdef object _path
    cdef object _first
    cdef Py_ssize_t _step
    cdef list _pcs  # made when they are first asked for
    cdef _Memory _memory
    cdef _Memory _word
    cdef uint8_t *base
    cdef uint8_t *dirty
    cdef uint8_t *taken
    cdef uint8_t *hit
    cdef uint64_t *epoch
    cdef const uint32_t *block_of
    cdef Py_ssize_t lines, blocks
    cdef uint8_t *_covered
    cdef Py_ssize_t covered_blocks

    def __cinit__(self):
        self._covered = NULL

    def __init__(self, feed, _Memory memory, file, Py_ssize_t index, name, first_pc, step):
        self.feed = feed
        self.name = name
        self._path = file.path
        self._first = first_pc
        self._step = step
        self._memory = memory
        self.base = memory.base
        self.dirty = memory.base + _DIRTY + index
        self._word = (<Feed?>feed)._epoch
        self.epoch = <uint64_t *>(self._word.base + <Py_ssize_t>feed.memory.epoch_at)
        self.taken = memory.base + <Py_ssize_t>file.taken
        self.hit = memory.base + <Py_ssize_t>file.hit
        self.block_of = <const uint32_t *>(memory.base + <Py_ssize_t>file.block_of)
        self.lines = file.lines
        self.blocks = file.blocks
        self._covered = <uint8_t *>PyMem_Calloc(self.blocks + 1, 1)
        if self._covered == NULL:
            raise MemoryError
        if memory._held.len < <Py_ssize_t>file.hit + self.blocks:
            raise ValueError(f"the lines of {file.path} are not all in their memory")

    def __dealloc__(self):
        PyMem_Free(self._covered)

    cdef inline bint note(self, Py_ssize_t line, int thread) noexcept:
        """Note that a thread has run a line; return False if it is outside the view."""
        cdef uint32_t block
        if not 0 <= line < self.lines:
            return False
        kb_store(self.taken + line, 1)
        block = self.block_of[line]
        # Bounded, because other processes can write here.
        if 0 < block <= self.blocks:
            kb_store(self.hit + block - 1, thread)
            kb_store(self.dirty, 1)
            kb_store(self.base + _CHANGED, 1)
            kb_change_epoch(self.epoch)
        return True

    def record(self, Py_ssize_t line):
        if not self.note(line, _OTHER):
            self.feed.note_beyond(self._path, line)

    cdef list pcs(self):
        if self._pcs is None:
            self._pcs = [self._first + number * self._step for number in range(self.blocks)]
        return self._pcs

    cdef inline void cover(self, Py_ssize_t block) noexcept:
        if not self._covered[block]:
            self._covered[block] = 1
            self.covered_blocks += 1

    cdef int give(self, Py_ssize_t block, list out) except -1:
        self.cover(block)
        PyList_Append(out, <object>PyList_GET_ITEM(self._pcs, block))
        return 0

    cdef int give_by_thread(self, Py_ssize_t block, int thread, list out) except -1:
        cdef uint64_t pc = <uint64_t>(<object>PyList_GET_ITEM(self._pcs, block))
        self.cover(block)
        out.append((pc & _PC_MASK) | <uint64_t>thread << _NUMBER_SHIFT)
        return 0

    cdef int take_into(self, list out, bint by_thread) except -1:
        cdef Py_ssize_t at = 0
        cdef Py_ssize_t within
        cdef int thread
        self.pcs()
        while at < self.blocks:
            # Eight at a time: the memory is padded to a multiple of eight.
            if (<uint64_t *>(self.hit + at))[0]:
                for within in range(at, min(at + 8, self.blocks)):
                    thread = kb_load(self.hit + within)
                    if thread:
                        kb_store(self.hit + within, 0)
                        if by_thread:
                            self.give_by_thread(within, thread, out)
                        else:
                            self.give(within, out)
            at += 8
        return 0

    def take(self):
        cdef list out = []
        self.take_into(out, False)
        return out

    def adopt(self, set lines):
        cdef Py_ssize_t line
        cdef list out = []
        blocks = set()
        for each in lines:
            line = each
            if not 0 <= line < self.lines:
                self.feed.note_beyond(self._path, line)
                continue
            kb_store(self.taken + line, 1)
            if 0 < self.block_of[line] <= self.blocks:
                blocks.add(self.block_of[line] - 1)
        self.pcs()
        for block in sorted(blocks):
            self.give(block, out)
        return out


_name_of = attrgetter("name")


cdef class Feed:
    cdef readonly object memory
    cdef readonly dict beyond
    cdef object _unknown
    cdef dict _views
    cdef list _memories
    cdef _Memory _epoch
    cdef uint8_t *base
    cdef list _dirty

    def __init__(self, memory, unknown):
        cdef _Memory held = _Memory(memory.buffer)
        self.memory = memory
        self.beyond = {}
        self._unknown = unknown
        self._views = {}
        self._memories = [held]
        self._epoch = _Memory(memory.epoch)
        self._dirty = []
        self.base = held.base

    def add(self, memory, names, first_pcs, step):
        cdef _Memory held
        held = self._memories[0] if memory is self.memory else _Memory(memory.buffer)
        if held._held.len < _DIRTY + ((len(memory.files) + 7) & ~7):
            raise ValueError("the memory is too short")
        for index, (file, name, pc) in enumerate(zip(memory.files, names, first_pcs, strict=True)):
            view = View(self, held, file, index, name, pc, step)
            held.views.append(view)
            self._views[file.path] = view
        if memory is not self.memory:
            self._memories.append(held)
        return held.views

    @property
    def active(self):
        return self.base[_ACTIVE] != 0

    @property
    def covered(self):
        cdef _Memory held
        cdef View view
        cdef Py_ssize_t covered = 0
        for held in self._memories:
            for view in held.views:
                covered += view.covered_blocks
        return covered

    def view(self, path):
        try:
            return self._views[path]
        except KeyError:
            if not self.memory.covers(path):
                return None
            view = self._views[path] = self._unknown(path)
            return view

    def note_beyond(self, path, line):
        self.beyond.setdefault(path, set()).add(line)

    def drain(self):
        cdef list out = []
        cdef list dirty = self._dirty
        cdef _Memory held
        cdef View view
        cdef uint8_t *flags
        cdef Py_ssize_t at, within, files
        cdef bint by_thread
        for held in self._memories:
            if not kb_load(held.base + _CHANGED):
                continue
            if kb_load(held.base + _FAULTED) == _UNREPORTED:
                kb_store(held.base + _FAULTED, _REPORTED)
                dirty.clear()
                raise _faults.Faulted
            kb_store(held.base + _CHANGED, 0)
            kb_order()
            flags = held.base + _DIRTY
            files = len(held.views)
            at = 0
            while at < files:
                if (<uint64_t *>(flags + at))[0]:
                    for within in range(at, min(at + 8, files)):
                        if kb_load(flags + within):
                            kb_store(flags + within, 0)
                            PyList_Append(dirty, <object>PyList_GET_ITEM(held.views, within))
                at += 8
        if not dirty:
            return out
        # A full barrier, so that stores before a byte that was just cleared are seen below.
        kb_order()
        if len(self._memories) > 1:
            dirty.sort(key=_name_of)
        by_thread = kb_load(self.base + _BY_THREAD) != 0
        for view in dirty:
            view.take_into(out, by_thread)
        dirty.clear()
        return out


cdef class Group:
    cdef readonly tuple feeds
    cdef dict _views
    cdef object _code_views

    def __init__(self, feeds):
        self.feeds = tuple(feeds)
        self._views = {}
        self._code_views = CodeViews()
        for feed in self.feeds:
            if type(feed) is not Feed:
                raise TypeError(f"{feed!r} is not a Feed")

    cdef bint lasts(self) noexcept:
        """Return whether any feed has not ended."""
        cdef Py_ssize_t at
        for at in range(PyTuple_GET_SIZE(self.feeds)):
            if (<Feed>PyTuple_GET_ITEM(self.feeds, at)).base[_ACTIVE]:
                return True
        return False

    cdef inline bint ended(self) noexcept:
        """Return whether any feed has ended."""
        cdef Py_ssize_t at
        for at in range(PyTuple_GET_SIZE(self.feeds)):
            if not (<Feed>PyTuple_GET_ITEM(self.feeds, at)).base[_ACTIVE]:
                return True
        return False

    @property
    def stale(self):
        return self.ended()

    def alive(self):
        if not self.ended():
            return self
        feeds = [feed for feed in self.feeds if feed.active]
        return Group(feeds) if feeds else None

    def views(self, code, file=None):
        filename = code.co_filename
        views = self._views.get(filename)
        if views is None:
            views = self._code_views.get(code)
        if views is None:
            path = canonical(filename, file)
            found = [feed.view(path) for feed in self.feeds] if path else []
            views = tuple([view for view in found if view is not None])
            if not is_settled(filename, file):
                self._code_views.put(code, views)
            elif path:
                self._views[filename] = views
        return views


cdef class Apart:
    cdef dict _lines
    cdef Apart _outer

    def __init__(self):
        self._lines = {}

    cpdef note(self, View view, set lines):
        self._lines.setdefault(view, set()).update(lines)

    def give(self, feed):
        cdef list pcs = []
        for view in sorted([each for each in self._lines if each.feed is feed], key=_name_of):
            pcs += view.adopt(self._lines[view])
        for view, lines in self._lines.items():
            if view.feed is feed:
                continue
            if self._outer is not None:
                self._outer.note(view, lines)
            else:
                for line in lines:
                    view.record(line)
        return pcs

    def keep(self):
        return _Keeping(self)


cdef class _Keeping:
    """The context manager of Apart.keep(): the thread's tracer writes to the Apart meanwhile."""

    cdef Apart _apart
    cdef ThreadTracer _tracer

    def __init__(self, Apart apart):
        self._apart = apart

    def __enter__(self):
        self._tracer = _tracer()
        if self._tracer is not None:
            self._apart._outer, self._tracer.apart = self._tracer.apart, self._apart

    def __exit__(self, *_):
        if self._tracer is not None:
            self._tracer.apart = self._apart._outer


cdef class ThreadTracer:
    """The trace function of one thread, and the one that it replaced."""

    cdef Group group
    cdef Apart apart
    cdef Py_tracefunc function
    cdef PyObject *of
    # The last look-up; the reference keeps the code's address from being reused.
    cdef PyCodeObject *code
    cdef tuple views
    # The thread's number in the memory of each feed; ``number`` is 0 if there are several feeds.
    cdef dict numbers
    cdef int number

    def __cinit__(self):
        self.function = NULL
        self.of = NULL
        self.code = NULL
        self.numbers = {}
        self.number = _OTHER

    def __dealloc__(self):
        Py_XDECREF(<PyObject *>self.code)
        Py_XDECREF(self.of)

    def __call__(self, frame, event, arg):
        # A caller passed an earlier result of sys.gettrace() to sys.settrace().
        _set(self)
        return self

    cdef void chain_to(self, PyThreadState *state) noexcept:
        """Chain the trace function that has replaced this one."""
        cdef PyObject *before = self.of
        Py_XINCREF(state.c_traceobj)
        self.function = state.c_tracefunc
        self.of = state.c_traceobj
        Py_XDECREF(before)

    cdef void switch(self, Group group) noexcept:
        self.group = group
        Py_XDECREF(<PyObject *>self.code)
        self.code = NULL
        self.views = None
        self.number = 0
        if PyTuple_GET_SIZE(group.feeds) == 1:
            self.number = self.number_in(<object>PyTuple_GET_ITEM(group.feeds, 0))

    cdef int number_in(self, feed) noexcept:
        cdef PyObject *known = PyDict_GetItemWithError(self.numbers, feed)
        return <int>(<object>known) if known != NULL else _OTHER

    cdef int take_numbers(self, Group group, name) except -1:
        for feed in group.feeds:
            if feed not in self.numbers:
                self.numbers[feed] = _threads.take(feed.memory, name)
        return 0

    cdef int line(self, PyFrameObject *frame) except -1:
        cdef PyCodeObject *code = PyFrame_GetCode(frame)
        cdef PyObject *known
        cdef Py_ssize_t at, number
        cdef View view
        if code != self.code:
            try:
                known = PyDict_GetItemWithError(self.group._views, <object>code.co_filename)
                if known != NULL:
                    self.views = <tuple>known
                else:
                    file = PyFrame_GetGlobals(frame).get("__file__")
                    self.views = self.group.views(<object>code, file)
            except BaseException:
                Py_XDECREF(<PyObject *>code)
                raise
            Py_XDECREF(<PyObject *>self.code)
            self.code = code
        else:
            Py_XDECREF(<PyObject *>code)
        for at in range(PyTuple_GET_SIZE(self.views)):
            view = <View>PyTuple_GET_ITEM(self.views, at)
            number = PyFrame_GetLineNumber(frame)
            if self.apart is not None:
                self.apart.note(view, {number})
            elif not view.note(number, self.number or self.number_in(view.feed)):
                view.feed.note_beyond(view._path, number)
        return 0


cdef int _trace(PyObject *of, PyFrameObject *frame, int what, PyObject *arg) noexcept:
    """Handle an event of a measured thread; the interpreter calls this."""
    cdef ThreadTracer tracer = <ThreadTracer>of
    cdef PyThreadState *state
    cdef Py_tracefunc function
    cdef PyObject *kind = NULL
    cdef PyObject *value = NULL
    cdef PyObject *trace = NULL
    cdef int status
    if tracer.group.ended() and not _stay(tracer, frame):
        function = tracer.function
        PyEval_SetTrace(function, tracer.of)
        return function(tracer.of, frame, what, arg) if function != NULL else 0
    if what == PyTrace_LINE and _line(tracer, frame) < 0:
        return -1
    function = tracer.function
    if function == NULL:
        return 0
    status = function(tracer.of, frame, what, arg)
    state = PyThreadState_Get()
    if state.c_tracefunc != _trace:
        # It removed or replaced itself (coverage.py does both).
        PyErr_Fetch(&kind, &value, &trace)
        tracer.chain_to(state)
        PyEval_SetTrace(_trace, <PyObject *>tracer)
        PyErr_Restore(kind, value, trace)
    return status


cdef int _line(ThreadTracer tracer, PyFrameObject *frame) except -1:
    """Note a line; raise only KeyboardInterrupt, which is meant for the code that is traced."""
    try:
        tracer.line(frame)
    except KeyboardInterrupt as error:
        _fault(tracer, frame, error)
        raise
    except BaseException as error:
        _fault(tracer, frame, error)
    return 0


cdef void _fault(ThreadTracer tracer, PyFrameObject *frame, error) noexcept:
    """Do plain.note_fault(); the part that must not fail allocates no memory."""
    cdef Py_ssize_t at
    cdef tuple feeds = tracer.group.feeds
    cdef uint8_t *base
    cdef PyCodeObject *code = NULL
    for at in range(PyTuple_GET_SIZE(feeds)):
        kb_count((<Feed>PyTuple_GET_ITEM(feeds, at)).base + _FAULTS)
    try:
        if frame == NULL:
            keep_fault(feeds, error)
        else:
            code = PyFrame_GetCode(frame)
            keep_fault(feeds, error, <object>code.co_filename, PyFrame_GetLineNumber(frame))
    except BaseException:
        # The fault is counted already; only its reason is missing.
        pass
    Py_XDECREF(<PyObject *>code)
    for at in range(PyTuple_GET_SIZE(feeds)):
        base = (<Feed>PyTuple_GET_ITEM(feeds, at)).base
        if not kb_load(base + _FAULTED):
            kb_store(base + _FAULTED, _UNREPORTED)
        kb_store(base + _CHANGED, 1)


cdef bint _stay(ThreadTracer tracer, PyFrameObject *frame) noexcept:
    """Forget the feeds that have ended; return whether there are others.

    If that fails, the tracer continues for all of them, so nothing is lost.
    """
    if not tracer.group.lasts():
        return False
    try:
        group = tracer.group.alive()
        if group is None:
            return False
        tracer.switch(group)
    except BaseException as error:
        _fault(tracer, frame, error)
    return True


cdef ThreadTracer _tracer():
    """Return this thread's tracer, or None."""
    cdef PyThreadState *state = PyThreadState_Get()
    if state.c_tracefunc == _trace:
        return <ThreadTracer>state.c_traceobj
    return None


cdef int _set(ThreadTracer tracer) except -1:
    """Replace the trace function of this thread by a tracer, which chains it."""
    cdef PyThreadState *state = PyThreadState_Get()
    if state.c_tracefunc != _trace:
        tracer.chain_to(state)
        if tracer.of == <PyObject *>tracer:
            # Set through sys.settrace(), so there is no other function to chain.
            Py_XDECREF(tracer.of)
            tracer.of = NULL
            tracer.function = NULL
        PyEval_SetTrace(_trace, <PyObject *>tracer)
    return 0


def _set_process():
    global kb_epoch_process
    kb_epoch_process = <uint64_t>os.getpid() << 1


kb_epoch_count = time.monotonic_ns()
_set_process()


def forked():
    cdef ThreadTracer tracer = _tracer()
    _set_process()
    _threads.forked()
    if tracer is not None:
        tracer.numbers.clear()
        tracer.take_numbers(tracer.group, None)
        tracer.switch(tracer.group)


def install(Group group not None, name=None):
    cdef ThreadTracer tracer = _tracer()
    if tracer is None:
        tracer = ThreadTracer()
        tracer.take_numbers(group, name)
        tracer.switch(group)
        _set(tracer)
    else:
        tracer.take_numbers(group, name)
        tracer.switch(group)


def thread_ended():
    cdef ThreadTracer tracer = _tracer()
    if tracer is not None:
        for feed, number in tracer.numbers.items():
            _threads.give_back(feed.memory, number)


def uninstall():
    cdef ThreadTracer tracer = _tracer()
    if tracer is not None and tracer.group.ended() and not _stay(tracer, NULL):
        PyEval_SetTrace(tracer.function, tracer.of)


def current():
    cdef ThreadTracer tracer = _tracer()
    return None if tracer is None else tracer.group.alive()


def chain(function):
    cdef ThreadTracer tracer = _tracer()
    _settrace(function)
    if tracer is not None:
        _set(tracer)


def chained():
    cdef ThreadTracer tracer = _tracer()
    if tracer is None:
        return _gettrace()
    return None if tracer.of == NULL else <object>tracer.of
