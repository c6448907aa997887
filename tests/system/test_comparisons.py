# SPDX-License-Identifier: Apache-2.0
"""KCOV_TRACE_CMP in a real guest: what the 9P server compares while the guest looks at a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pyroute2
import pytest

import bridge
from bridge.device.abi import ENOTSUPP, KCOV_CMP_CONST, KCOV_CMP_SIZE
from bridge.errors import UsageError
from bridge.fuzz.dictionary import Dictionary
from bridge.session.session import Session
from bridge.sources.pcs import Location
from tests.support.programs import guest_program

pytestmark = pytest.mark.vm

HERE = Path(__file__).parent
FILE = "/mnt/target/README"
WORDS = 64 << 10

# The types of 9P messages: fcall.h of Plan 9, enum p9_msg_t in include/net/9p/9p.h of Linux.
RERROR, TWALK, TOPEN, TREAD, TCLUNK, TSTAT = 107, 110, 112, 116, 120, 124


@pytest.fixture(scope="module")
def program() -> Path:
    return guest_program(HERE / "compare.c")


# First: in one process only one target can be under coverage at a time.
@pytest.mark.parametrize(
    ("comparisons", "personality", "error"), [(False, "linux", ENOTSUPP), (True, "gvisor", 95)]
)
def test_it_is_refused(program: Path, comparisons: bool, personality: str, error: int) -> None:
    with bridge.boot(target="plan9", comparisons=comparisons, personality=personality) as session:
        session.put(program, "/tmp/compare", 0o755)
        result = session.run(f"/tmp/compare {WORDS} {FILE}", timeout=60)
        assert result.text == f"errno {error}\n", result.stderr.decode()
        assert session.run("kcov-exec -c -- true").exit_status == 125
        if not comparisons:
            with pytest.raises(UsageError, match="not recorded"):
                session.compare(["true"])


@pytest.fixture(scope="module")
def session(program: Path) -> Iterator[Session]:
    # Other tests have imported it, and what is imported already is not instrumented.
    before = take_away_pyroute2()
    try:
        # The threads of the program look up one name, and what one has asked serves the other.
        with bridge.boot(
            target="plan9", source="python", comparisons=True, attribution="all"
        ) as session:
            session.put(program, "/tmp/compare", 0o755)
            yield session
    finally:
        take_away_pyroute2()
        sys.modules.update(before)


def take_away_pyroute2() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == "pyroute2"]
    return {name: sys.modules.pop(name) for name in names}


def compare(session: Session, words: int, times: int = 1) -> tuple[list[tuple[int, ...]], set[int]]:
    """The comparisons and the PCs that the program found."""
    result = session.run(f"/tmp/compare {words} {FILE} {times}", timeout=60)
    assert result.exit_status == 0, result.stderr.decode()
    first, *lines = result.text.splitlines()
    assert first == "errno 0"
    records = [tuple(int(word, 16) for word in x.split()[1:]) for x in lines if x[:3] == "cmp"]
    return records, {int(line.split()[1], 16) for line in lines if line[:3] == "pc "}


def test_operands_of_the_server(session: Session) -> None:
    records, pcs = compare(session, WORDS)
    source = (Path(pyroute2.__file__).parent / "plan9" / "__init__.py").read_text().splitlines()
    by_place: dict[str, list[tuple[int, ...]]] = {}
    for kind, first, second, pc in records:
        location = session.symbolize(pc)
        assert isinstance(location, Location)
        assert location.file.startswith("pyroute2/plan9/")
        if location.file == "pyroute2/plan9/__init__.py":
            lines = location.block.lines
            text = "\n".join(source[line - 1] for line in lines)
            assert any(sign in text for sign in ("<", ">", "==", "!=", " in "))
            by_place.setdefault(text, []).append((kind, first, second))
    # `if key == Rerror`: the type of each message that came is compared with that of errors.
    (messages,) = (of for text, of in by_place.items() if "key == Rerror" in text)
    assert {(KCOV_CMP_SIZE(0), kind, RERROR) for kind in (TWALK, TSTAT, TCLUNK)} <= set(messages)
    # `if not 0 < length <= len(data)`: the literal, and the length of the message.
    (lengths,) = (of for text, of in by_place.items() if "0 < length" in text)
    sized = {second for kind, first, second in lengths if (kind, first) == (KCOV_CMP_CONST, 0)}
    # Tstat and Tclunk are 11 bytes: size[4] type[1] tag[2] fid[4].
    assert 11 in sized
    # Comparisons go to the one instance, PCs to the other one.
    assert {record[3] for record in records} <= pcs
    assert all(session.symbolize(pc) for pc in pcs)


def test_a_full_area_is_counted(session: Session) -> None:
    assert session.device is not None
    before = session.device.totals.comparisons_dropped
    records, _ = compare(session, 512, 50)
    assert len(records) == (512 - 1) // 4
    assert session.device.totals.comparisons_dropped > before
    assert session.device.totals.dropped == 0


def test_comparisons_that_are_dropped_are_warned_of(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert session.compare(["cat", FILE])
    assert "comparisons are missing" not in caplog.text
    monkeypatch.setattr("bridge.sources.comparisons.LIMIT", 4)
    assert session.compare(["cat", FILE])
    assert "comparisons are missing: more than" in caplog.text


def test_nobody_compares_when_nobody_asks(session: Session) -> None:
    device = session.device
    assert device is not None
    before = device.totals.comparisons
    result = session.kcov(["ls", "-l", FILE])
    assert result.exit_status == 0
    assert result.pcs
    assert device.totals.comparisons == before
    assert device.instances == 0


def test_from_the_command_line(session: Session) -> None:
    records = session.compare(["sh", "-c", f"cat {FILE} >/dev/null; true"])
    messages = {first for kind, first, second, _ in records if (kind, second) == (0, RERROR)}
    # The shell's child is followed: it opened, read and closed the file.
    assert {TWALK, TOPEN, TREAD, TCLUNK} <= messages
    assert all(session.symbolize(record[3]) for record in records)
    files = " ".join([FILE] * 20)
    few = session.run(f"kcov-exec -c -n 512 -o - -- stat {files} | grep -c ^0x")
    assert few.text == f"{(512 - 1) // 4}\n"
    assert session.run("kcov-exec -c -u -- true").exit_status == 125


def test_dictionary_for_an_engine_has_the_constants_of_the_server(
    session: Session, tmp_path: Path
) -> None:
    dictionary = Dictionary()
    dictionary.add(session.compare(["ls", "-l", "/mnt/target"], timeout=60))
    words = dict(dictionary.words())
    # `if key == Rerror`: the types that came differ, the constant does not.
    assert {bytes([RERROR]), b"%d" % RERROR} <= words.keys()
    assert words[bytes([RERROR])] >= 10
    assert bytes([TWALK]) not in words
    assert dictionary.write(tmp_path / "words") == len(words)
    assert not dictionary.dropped
