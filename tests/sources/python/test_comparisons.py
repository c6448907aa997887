# SPDX-License-Identifier: Apache-2.0
"""Comparisons of Python code: recorded as Linux would, and nothing else about the code changes."""

from __future__ import annotations

import asyncio
import builtins
import enum
import importlib
import inspect
import operator
import sys
import sysconfig
import textwrap
import threading
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyroute2
import pytest

from bridge.config import Settings
from bridge.device.abi import KCOV_CMP_CONST, KCOV_CMP_SIZE, Comparison
from bridge.device.records import comparison_record
from bridge.errors import UsageError
from bridge.session.session import Session
from bridge.sources.comparisons import LIMIT, ComparisonLedger
from bridge.sources.python.instrument import compile_instrumented, instrumenting
from bridge.sources.python.recorder import HELPERS, Recorder, number_of
from bridge.sources.python.source import PythonSource
from tests.sources.python.support import MakePackage
from tests.support.coverage_data import executed

CONST = KCOV_CMP_CONST
SIZE = [KCOV_CMP_SIZE(log) for log in range(4)]
STDLIB = Path(sysconfig.get_paths()["stdlib"])
PYROUTE2 = Path(pyroute2.__file__).parent


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """A recorder that is on, and the helpers where instrumented code finds them."""
    recorder = Recorder()
    with instrumenting(()):
        recorder.record(True)
        yield recorder
        recorder.record(False)


def taken(recorder: Recorder) -> list[tuple[int, int, int]]:
    """What was noted, as type and operands."""
    noted, lost = recorder.take()
    assert lost == 0
    records = [comparison_record(left, right, const, 0) for _, left, right, const in noted]
    return [record[:3] for record in records if record is not None]


def run(source: str, **names: object) -> dict[str, Any]:
    """Run instrumented code in a module's namespace of its own."""
    namespace: dict[str, Any] = {"__name__": "sample", **names}
    exec(compile_instrumented(textwrap.dedent(source), "sample.py"), namespace)
    return namespace


class Color(enum.IntEnum):
    RED = 3


class Loud(int):
    """An int whose own methods must not be called by anybody but the target."""

    def __index__(self) -> int:
        raise AssertionError("called")

    __int__ = __index__


CASES: list[tuple[str, list[tuple[int, int, int]]]] = [
    # Literals come first, whichever side they are on: __sanitizer_cov_trace_const_cmp1.
    ("a == 5", [(SIZE[0] | CONST, 5, 7)]),
    ("5 == a", [(SIZE[0] | CONST, 5, 7)]),
    ("a != 300", [(SIZE[1] | CONST, 300, 7)]),
    ("a < 0x10000", [(SIZE[2] | CONST, 0x10000, 7)]),
    ("a <= 2**0 and a", [(SIZE[0], 7, 1)]),
    ("a > b", [(SIZE[1], 7, 1000)]),
    ("b >= a", [(SIZE[1], 1000, 7)]),
    ("a == -1", [(SIZE[0] | CONST, 0xFF, 7)]),
    ("200 == minus", [(SIZE[1] | CONST, 200, 0xFFFE)]),
    ("minus < -129", [(SIZE[1] | CONST, 0xFF7F, 0xFFFE)]),
    ("minus == -128", [(SIZE[0] | CONST, 0x80, 0xFE)]),
    ("a == 0xffffffffffffffff", [(SIZE[3] | CONST, 2**64 - 1, 7)]),
    ("lowest == 0", [(SIZE[3] | CONST, 0, 2**63)]),
    # No 64 bits hold both.
    ("minus == 0xffffffffffffffff", []),
    ("a == 0x10000000000000000", []),
    ("huge == 5", []),
    ("huge == a", []),
    # What is no integer.
    ("a == 'x'", []),
    ("a == 5.0", []),
    ("a == None", []),
    ("a == True", []),
    ("yes == 1", []),
    ("text == b'GET '", []),
    ("color == 3", [(SIZE[0] | CONST, 3, 3)]),
    ("color == a", [(SIZE[0], 3, 7)]),
    ("loud == 9", [(SIZE[0] | CONST, 9, 8)]),
    # Bytes, as a little-endian machine loads them.
    ("data[:4] == b'GET '", [(SIZE[2] | CONST, 0x20544547, 0x54534F50)]),
    ("data[:2] == array", [(SIZE[1], 0x4F50, 0x4241)]),
    ("data[:3] == b'GET'", []),
    ("data[:4] == b'GE'", []),
    ("a == b'GE'", []),
    # As __sanitizer_cov_trace_switch: each of the constants with the value.
    ("a in (1, 2)", [(SIZE[0] | CONST, 1, 7), (SIZE[0] | CONST, 2, 7)]),
    ("a not in {256}", [(SIZE[1] | CONST, 256, 7)]),
    ("a in [b, 4, 'x']", [(SIZE[0] | CONST, 4, 7)]),
    ("a in numbers", []),
    # Chains: what is compared with a literal, if it is compared at all.
    ("0 <= a < 9", [(SIZE[0] | CONST, 0, 7), (SIZE[0] | CONST, 9, 7)]),
    ("8 <= a < 9", [(SIZE[0] | CONST, 8, 7)]),
    ("8 <= a < b", [(SIZE[0] | CONST, 8, 7)]),
    ("8 <= a < 9 < b", [(SIZE[0] | CONST, 8, 7)]),
    ("a < 9 < b", [(SIZE[0] | CONST, 9, 7), (SIZE[1] | CONST, 9, 1000)]),
    ("a > 9 < b", [(SIZE[0] | CONST, 9, 7)]),
    ("a < b < minus", []),
    ("a is 7 if False else a is b", []),
    ("(a == 5) == (b == 6)", [(SIZE[0] | CONST, 5, 7), (SIZE[1] | CONST, 6, 1000)]),
]
NAMES = {
    "a": 7,
    "b": 1000,
    "minus": -2,
    "lowest": -(2**63),
    "huge": 2**64,
    "yes": True,
    "text": "GET ",
    "color": Color.RED,
    "loud": Loud(8),
    "data": b"POST /",
    "array": bytearray(b"AB"),
    "numbers": (1, 2),
}


@pytest.mark.parametrize(("expression", "expected"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::BytesWarning")
def test_what_is_recorded(
    recorder: Recorder, expression: str, expected: list[tuple[int, int, int]]
) -> None:
    found = run(f"result = {expression}", **NAMES)["result"]
    assert taken(recorder) == expected
    plain: object = eval(expression, dict(NAMES))
    assert (type(found), found) == (type(plain), plain)


def test_a_match_statement_is_a_switch(recorder: Recorder) -> None:
    sample = run("""
        def of(x):
            match x:
                case 1 | 2:
                    return "few"
                case 100 as hundred if hundred > 99:
                    return hundred
                case -5:
                    return "minus five"
                case [6, *_] | {"x": 6}:
                    return "six"
                case str():
                    return "text"
            return "other"
    """)
    values = (2, 100, -5, [6], {"x": 6}, "x", 77)
    assert [sample["of"](x) for x in values] == [
        *("few", 100, "minus five", "six", "six", "text", "other"),
    ]
    recorder.take()
    sample["of"](77)
    four = [(SIZE[0] | CONST, 1, 77), (SIZE[0] | CONST, 2, 77), (SIZE[0] | CONST, 100, 77)]
    assert taken(recorder) == [*four, (SIZE[0] | CONST, 0xFB, 77)]


def test_nothing_is_noted_while_nobody_wants_it(recorder: Recorder) -> None:
    sample = run("def f(x): return x == 1 or x > y or 0 < x < 9", y=3)
    recorder.record(False)
    assert sample["f"](2) is True
    recorder.record(True)
    assert recorder.take() == ([], 0)
    sample["f"](2)
    assert len(recorder.take()[0]) == 4


def test_notes_are_bounded(recorder: Recorder) -> None:
    run(f"for i in range({LIMIT + 10}): i == 7")
    noted, lost = recorder.take()
    assert (len(noted), lost) == (LIMIT, 10)
    assert noted[-1][2] == LIMIT - 1
    assert recorder.take() == ([], 0)


def test_a_thread_can_be_kept_apart(recorder: Recorder) -> None:
    sample = run("def f(x): return x == 1")
    with recorder.apart():
        sample["f"](2)
        with recorder.apart():
            sample["f"](3)
        sample["f"](4)
        thread = threading.Thread(target=sample["f"], args=(5,))
        thread.start()
        thread.join()
    sample["f"](6)
    assert [record[2] for record in taken(recorder)] == [5, 6]


@pytest.mark.parametrize("value", [None, 1.0, "a", b"", b"abc", True, 2**64, -(2**63) - 1, object])
def test_what_has_no_number(value: object) -> None:
    assert number_of(value) is None


class Sneaky:
    """Says that it is an int, to whoever asks."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        raise AssertionError("asked")


def test_no_code_of_the_operands_is_run() -> None:
    assert number_of(Sneaky()) is None
    assert number_of(Loud(4)) == 4


# ---- the code behaves as before


SAMPLE = '''
from __future__ import annotations

class Value:
    """Says what is done with it."""
    def __init__(self, name): self.name = name
    def __lt__(self, other): return result(f"{self.name} < {other!r}")
    def __eq__(self, other): return result(f"{self.name} == {other!r}")
    def __contains__(self, other): return result(f"{other!r} in {self.name}")
    def __repr__(self): return self.name
    __hash__ = None

class Result:
    def __init__(self, text): self.text = text
    def __bool__(self):
        log.append(f"bool({self.text})")
        return len(log) % 3 != 0

def result(text):
    log.append(text)
    return Result(text)

def value(name):
    log.append(name)
    return Value(name)

def number(n):
    log.append(n)
    return n

def conditions(v):
    if value("a") < value("b"):
        log.append("then")
    elif not (value("a") == 5 and
              value("b") < 6 or
              value("c") < value("d")):
        log.append("elif")
    while not value("w") < 3:
        break
    log.append(type(value("x") == v).__name__)
    log.append([type(x < y).__name__ for x in (value("p"),) for y in (v,) if x == y or x])
    assert value("q") < v or True, "no"
    return (value("y") == 1) if value("z") < v else 0

def chains(v):
    log.append(number(0) < number(1) < number(2) > number(5) > number(3))
    log.append(0 <= number(1) < 9 <= number(10) < 11)
    log.append(0 <= number(-1) < 9)
    log.append(bool(1 < number(2) == v))
    log.append(number(1) == 1 in (number(1), 2))
    return (number(3) == number(3)) != False

def scopes():
    found = [y for x in range(5) if (y := x * 2) == 4 or 2 < (z := y)]
    names = sorted(locals())
    class Inner:
        x = 3
        small = x < 5
        y = x == len("abc")
        __private = 4
        def f(self):
            return self.__private == 4 and Inner.x < self.y
        names = sorted(n for n in dir() if not n.startswith("__"))
    of_class = Inner.small, Inner.y, Inner.names, Inner().f()
    return found, names, of_class, (lambda q, r=3 < 4: q == r)(1)

def generator():
    got = yield 1
    if (yield got) == (yield 2):
        yield "same"
    got = 5 < (yield 3) < 10
    yield got

def generate():
    g = generator()
    return [next(g), g.send("x"), g.send(7), g.send(7), g.send(None), g.send(8)]

async def waits(n):
    log.append(n)
    return n

async def asynchronous():
    out = [await waits(1) == await waits(1), await waits(2) < 3 < await waits(4)]
    async def numbers():
        for i in range(3):
            yield i
    out.append([i async for i in numbers() if await waits(i) == 1 or i in (2, 3)])
    match await waits(4):
        case 3 | 4 as n if n == await waits(4):
            out.append(n)
    return out

def annotated(x: 1 < 2 = 3, *, y: int == 5 = 4) -> x == y:
    local: x < y = x
    return annotated.__annotations__, local

def raises(which):
    try:
        if which == 0:
            return 1 < "x"
        if which == 1:
            return (number(1) <
                    number("x"))
        if which == 2:
            return number(1) < 2 < undefined
        if which == 3:
            return undefined == 5
        if which == 4:
            return {} < 5
        return 1 in 5
    except Exception as error:
        import traceback
        return repr(error), [
            (f.name, f.lineno, f.end_lineno, f.colno, f.end_colno, f.line)
            for f in traceback.extract_tb(error.__traceback__)
        ]

def recursion():
    def deep(n):
        return 0 if n == 0 else 1 + deep(n - 1)
    return deep(300)
'''


def behaviour(code: types.CodeType) -> list[object]:
    """All that the sample does."""
    log: list[object] = []
    sample: dict[str, Any] = {"__name__": "sample", "log": log}
    exec(code, sample)
    for name in ("conditions", "chains"):
        for argument in (0, 1, 2, sample["Value"]("v")):
            log.append((name, repr(sample[name](argument))[:6]))
    log.append(sample["scopes"]())
    log.append(sample["generate"]())
    log.append(asyncio.run(sample["asynchronous"]()))
    log.append(sample["annotated"]())
    log.extend(sample["raises"](which) for which in range(6))
    log.append(sample["recursion"]())
    return log


def test_a_program_does_the_same(recorder: Recorder, tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(SAMPLE)
    plain = behaviour(compile(SAMPLE, str(path), "exec", dont_inherit=True))
    assert behaviour(compile_instrumented(SAMPLE, str(path))) == plain
    assert len(plain) > 150
    assert len(recorder.take()[0]) > 300


def test_operands_show_no_frame_of_ours(recorder: Recorder) -> None:
    sample = run("""
        import sys

        class Caller:
            def __eq__(self, other):
                return sys._getframe(1).f_code.co_name
            __lt__ = __eq__

        def f():
            return Caller() == Caller(), Caller() < 5, (Caller() < 5) == "f"
    """)
    assert sample["f"]() == ("f", "f", True)


def test_operands_are_let_go(recorder: Recorder) -> None:
    sample = run("""
        import sys

        class Thing(int):
            pass

        def f(x, y):
            return x == y or x == 3 or 0 < x < 9
    """)
    thing = sample["Thing"](20)
    before = sys.getrefcount(thing)
    sample["f"](thing, thing + 1)
    assert sys.getrefcount(thing) == before
    assert len(recorder.take()[0]) == 3


def lines_of(code: types.CodeType) -> set[int]:
    lines = {line for _, _, line in code.co_lines() if line}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            lines |= lines_of(constant)
    return lines


@pytest.mark.parametrize(
    "directory",
    [PYROUTE2, STDLIB / "asyncio", STDLIB / "email", STDLIB / "json", STDLIB / "http", STDLIB],
    ids=lambda path: path.name,
)
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_lines_are_the_same(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = sorted(directory.rglob("*.py") if directory == PYROUTE2 else directory.glob("*.py"))
    assert len(files) > 4
    instrumented = 0
    for file in files:
        source = file.read_bytes()
        plain = compile(source, str(file), "exec", dont_inherit=True)
        code = compile_instrumented(source, str(file))
        assert lines_of(code) == lines_of(plain), file
        instrumented += code != plain
    assert instrumented > len(files) / 4
    assert not caplog.records


def test_what_cannot_be_instrumented_is_compiled_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bridge.sources.python.instrument._instrumented", operator.truediv)
    namespace: dict[str, Any] = {}
    exec(compile_instrumented("x = 3 == len('abc')", "some.py"), namespace)
    assert namespace["x"] is True
    assert "some.py: its comparisons are not recorded" in caplog.text


def test_a_source_with_an_error_has_its_own(tmp_path: Path) -> None:
    with pytest.raises(SyntaxError) as caught:
        compile_instrumented("x = 1\nif x == :\n", "wrong.py")
    assert (caught.value.filename, caught.value.lineno) == ("wrong.py", 2)


def test_chains_of_elif_may_be_long(recorder: Recorder) -> None:
    source = "def f(x):\n if x == 0: return 0\n"
    source += "".join(f" elif x == {n}: return {n}\n" for n in range(1, 400))
    assert run(source)["f"](399) == 399
    assert len(recorder.take()[0]) == 400


# ---- imports


@pytest.fixture
def make_package(make_package: MakePackage, monkeypatch: pytest.MonkeyPatch) -> MakePackage:
    """As everywhere; what Python compiles of the packages is written down."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    return make_package


def test_only_the_packages_are_instrumented(
    make_package: MakePackage,
    recorder: Recorder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = "def f(x): return x == 5\n"
    one, two = make_package(m=text), make_package(m=text)
    with instrumenting([one]):
        shown = importlib.import_module(f"{one}.m")
        plain = importlib.import_module(f"{two}.m")
    for module in (shown, plain):
        assert module.f(6) is False
        assert inspect.getsource(module.f) == text
        assert Path(str(module.__file__)).name == "m.py"
    assert taken(recorder) == [(SIZE[0] | CONST, 5, 6)]
    # Compiled code with calls of helpers must never be found by somebody else.
    assert not (tmp_path / "packages" / one / "__pycache__").exists()
    assert (tmp_path / "packages" / two / "__pycache__").exists()
    assert not caplog.records
    assert not any(type(finder).__name__ == "_Finder" for finder in sys.meta_path[1:])


def test_compiled_code_that_is_there_is_not_used(
    make_package: MakePackage, recorder: Recorder, tmp_path: Path
) -> None:
    name = make_package(m="def f(x): return x == 5")
    importlib.import_module(f"{name}.m").f(1)
    assert recorder.take() == ([], 0)
    cached = list((tmp_path / "packages" / name / "__pycache__").iterdir())
    before = [file.read_bytes() for file in cached]
    for module in (name, f"{name}.m"):
        del sys.modules[module]
    with instrumenting([name]):
        importlib.import_module(f"{name}.m").f(1)
    assert len(recorder.take()[0]) == 1
    assert [file.read_bytes() for file in cached] == before


def test_another_loader_is_left_alone(
    make_package: MakePackage,
    recorder: Recorder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = make_package(m="def f(x): return x == 5")

    class Other(importlib.machinery.SourceFileLoader):
        pass

    class Finder:
        @staticmethod
        def find_spec(
            module: str, path: Sequence[str] | None, target: object = None
        ) -> importlib.machinery.ModuleSpec | None:
            if module != f"{name}.m":
                return None
            file = str(tmp_path / "packages" / name / "m.py")
            return importlib.util.spec_from_file_location(module, file, loader=Other(module, file))

    sys.meta_path.insert(0, Finder)
    try:
        with instrumenting([name]):
            module = importlib.import_module(f"{name}.m")
    finally:
        sys.meta_path.remove(Finder)
    assert type(module.__loader__) is Other
    assert module.f(5) is True
    assert recorder.take() == ([], 0)
    assert "loaded by Other" in caplog.text


def test_a_module_that_raises_shows_its_own_line(make_package: MakePackage) -> None:
    name = make_package(m="x = 1\n\nif x == 1 < '2':\n    pass\n")
    with instrumenting([name]), pytest.raises(TypeError) as caught:
        importlib.import_module(f"{name}.m")
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (Path(last.filename).name, last.lineno, last.line) == ("m.py", 3, "if x == 1 < '2':")


# ---- the source


WORK = """
    import enum

    class Kind(enum.IntEnum):
        STAT = 124

    def serve(kind, size):
        if kind == Kind.STAT:
            found = "stat"
        elif kind in (1, 2):
            found = "few"
        else:
            found = None
        total = 0
        while total < size:
            total += 100
        if (
            total >= 300
            and size > 250
        ):
            found = (found,
                     total == 300)
        return found
"""


def work(module: types.ModuleType) -> list[object]:
    return [module.serve(kind, size) for kind in (124, 2, 9) for size in (10, 280)]


def test_a_source_has_the_same_coverage_and_comparisons_beside_it(
    make_package: MakePackage, tmp_path: Path
) -> None:
    name = make_package(m=WORK)
    outcomes = []
    for comparisons in (False, True):
        data_file = tmp_path / f"data{comparisons}"
        source = PythonSource([name], data_file=data_file, comparisons=comparisons)
        source.start()
        try:
            if comparisons:
                source.record_comparisons(True)
            module = importlib.import_module(f"{name}.m")
            results = work(module)
            pcs = source.consume()
            if comparisons:
                records, dropped = source.consume_comparisons()
                source.record_comparisons(False)
        finally:
            source.stop()
        outcomes.append((results, pcs, executed(data_file), source.blocks_total))
        for each in (name, f"{name}.m"):
            del sys.modules[each]
    assert outcomes[0] == outcomes[1]
    assert dropped == 0
    file = source.table.file(f"{name}/m.py")
    assert file is not None

    def at(line: int) -> int:
        pc = file.line_pc(line)
        assert pc is not None
        return pc

    # kind == Kind.STAT, with kind 124 and then 2; the loop of the first call; the two of `in`.
    assert records[0] == (SIZE[0], 124, 124, at(8))
    assert [record for record in records if record[3] == at(15)][:2] == [
        (SIZE[0], 0, 10, at(15)),
        (SIZE[0], 100, 10, at(15)),
    ]
    assert (SIZE[0] | CONST, 1, 2, at(10)) in records
    assert (SIZE[1] | CONST, 250, 280, at(17)) in records
    assert {record[3] for record in records} <= set(pcs)


def test_two_sources_one_after_the_other_share_code_that_is_imported(
    make_package: MakePackage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = make_package(m="def f(x):\n    return x == 5")
    found = []
    for _ in range(2):
        source = PythonSource([name], data_file=None, comparisons=True)
        source.start()
        source.record_comparisons(True)
        importlib.import_module(f"{name}.m").f(6)
        found.append(source.consume_comparisons())
        source.record_comparisons(False)
        source.stop()
        source.stop()
    assert found[0] == found[1]
    assert len(found[0][0]) == 1
    assert "what they compare, is not covered" in caplog.text


def test_what_is_done_on_behalf_of_a_handle_is_kept_apart(make_package: MakePackage) -> None:
    name = make_package(m="def f(x):\n    return x == 5")
    source = PythonSource([name], data_file=None, comparisons=True)
    source.start()
    try:
        source.record_comparisons(True)
        module = importlib.import_module(f"{name}.m")
        with source.divert() as pcs:
            module.f(1)
        module.f(2)
        assert len(pcs) == 1
        assert [record[2] for record in source.consume_comparisons()[0]] == [2]
    finally:
        source.record_comparisons(False)
        source.stop()


def test_without_the_setting_nothing_is_instrumented(make_package: MakePackage) -> None:
    name = make_package(m="def f(x):\n    return x == 5")
    source = PythonSource([name], data_file=None)
    source.start()
    try:
        module = importlib.import_module(f"{name}.m")
        assert module.f.__code__.co_names == ()
    finally:
        source.stop()


# ---- the ledger


class Listed:
    """A source that compares what it is told to."""

    def __init__(self) -> None:
        self.pending: list[Comparison] = []
        self.lost = 0
        self.on: list[bool] = []
        self.failure: Exception | None = None

    def compare(self, *numbers: int) -> None:
        self.pending += [(0, number, number, 8) for number in numbers]

    def record_comparisons(self, on: bool) -> None:
        self.on.append(on)
        self.pending.clear()

    def consume_comparisons(self) -> tuple[Sequence[Comparison], int]:
        if self.failure is not None:
            raise self.failure
        taken, self.pending = self.pending, []
        lost, self.lost = self.lost, 0
        return taken, lost


def numbers(given: tuple[list[Comparison], int]) -> list[int]:
    assert given[1] == 0
    return [record[1] for record in given[0]]


def test_each_reader_is_given_everything_in_order() -> None:
    source = Listed()
    ledger = ComparisonLedger(source)
    source.compare(1)
    first = ledger.open_cursor()
    source.compare(2, 3, 2)
    second = ledger.open_cursor()
    source.compare(4)
    assert numbers(ledger.collect(second)) == [4]
    source.compare(5)
    assert numbers(ledger.collect(first)) == [2, 3, 2, 4, 5]
    assert numbers(ledger.collect(second)) == [5]
    assert numbers(ledger.collect(first)) == []
    ledger.close_cursor(first)
    ledger.close_cursor(first)
    source.compare(6)
    assert numbers(ledger.collect(second)) == [6]
    with pytest.raises(ValueError, match="not open"):
        ledger.collect(first)
    ledger.close_cursor(second)
    assert source.on == [True, False]
    third = ledger.open_cursor()
    source.compare(7)
    assert numbers(ledger.collect(third)) == [7]


def test_a_reader_that_does_not_ask_costs_no_memory_without_end() -> None:
    source = Listed()
    ledger = ComparisonLedger(source)
    slow, quick = ledger.open_cursor(), ledger.open_cursor()
    half = LIMIT // 2
    for turn in range(5):
        source.compare(*range(turn * half, (turn + 1) * half))
        assert len(numbers(ledger.collect(quick))) == half
    assert len(ledger._kept) == LIMIT
    news, lost = ledger.collect(slow)
    assert (len(news), lost) == (LIMIT, 3 * half)
    assert news[-1][1] == 5 * half - 1
    assert ledger._kept == []
    source.lost = 4
    assert ledger.collect(slow) == ([], 4)
    assert ledger.collect(quick) == ([], 4)
    assert ledger.collect(quick) == ([], 0)


def test_a_source_that_fails_has_given_nothing() -> None:
    source = Listed()
    failures: list[Exception] = []
    ledger = ComparisonLedger(source, failures.append)
    cursor = ledger.open_cursor()
    source.failure = OSError("gone")
    assert ledger.collect(cursor) == ([], 0)
    assert failures == [source.failure]
    strict = ComparisonLedger(source)
    cursor = strict.open_cursor()
    with pytest.raises(OSError, match="gone"):
        strict.collect(cursor)


def test_helpers_have_names_that_no_class_changes() -> None:
    assert all(name.startswith("__") and name.endswith("__") for name in HELPERS)
    with instrumenting(()):
        assert all(getattr(builtins, name) is helper for name, helper in HELPERS.items())


def test_a_target_in_a_process_of_its_own_is_refused() -> None:
    settings = Settings(comparisons=True, isolate=True)
    with pytest.raises(UsageError, match="cannot be combined"):
        Session(settings, None)
