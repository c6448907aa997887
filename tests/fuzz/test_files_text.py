# SPDX-License-Identifier: Apache-2.0
"""Cases of the harness ``files`` as text: the round trip, the guest's decoder, wrong text."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import InfrastructureError, UsageError
from bridge.fuzz.files_text import Encoding, load_encoding, to_bytes, to_text
from bridge.util.resources import guest_directory
from tests.support import ROOT

AGENT = ROOT / "guest" / "agent"
SEED = 20261126

Decoder = Callable[[Sequence[bytes]], list[str]]


@pytest.fixture(scope="module")
def guest_decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """The guest's decoder: the texts of cases."""
    compiler = shutil.which("gcc")
    assert compiler is not None, "gcc is missing: make packages-test"
    program = tmp_path_factory.mktemp("decode") / "decode"
    sources = (Path(__file__).with_name("decode.c"), AGENT / "files-decode.c")
    command = [compiler, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([*command, "-o", program, *sources], check=True)

    def decode(cases: Sequence[bytes]) -> list[str]:
        data = b"".join(len(case).to_bytes(4, "little") + case for case in cases)
        done = subprocess.run([program], input=data, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().split("\0")[:-1]

    return decode


def random_case(source: random.Random) -> bytes:
    """A case of random bytes, with separators and escapes as often as cases have them."""
    alphabet = bytes(range(256)) + b"\n" * source.randrange(40) + b"\x1b" * source.randrange(20)
    return bytes(source.choices(alphabet, k=source.choice((0, 1, 5, 50, 500, 5000))))


def test_decoders_random_cases_give_the_same_text(guest_decoder: Decoder) -> None:
    source = random.Random(SEED)
    cases = [random_case(source) for _ in range(600)]
    texts = guest_decoder(cases)
    assert texts == [to_text(case) for case in cases]
    # They had something in them.
    words = {line.split(": ")[-1].split(" ")[0] for text in texts for line in text.splitlines()}
    assert words >= set(load_encoding().calls)


def test_decoders_every_byte_of_each_argument_give_the_same_text(guest_decoder: Decoder) -> None:
    calls = range(len(load_encoding().calls))
    records = (bytes([call]) + bytes([value]) * 8 for call in calls for value in range(256))
    cases = [record.replace(b"\x1b", b"\x1b\x5b").replace(b"\n", b"\x1b\x4a") for record in records]
    assert guest_decoder(cases) == [to_text(case) for case in cases]


@given(st.binary(max_size=400))
def test_to_bytes_text_of_any_case_makes_the_same_calls(case: bytes) -> None:
    text = to_text(case)
    canonical = to_bytes(text)
    assert to_text(canonical) == text
    assert to_bytes(to_text(canonical)) == canonical


@given(st.lists(st.binary(max_size=12), max_size=20), st.data())
def test_to_text_changed_record_changes_no_other_line(
    records: list[bytes], data: st.DataObject
) -> None:
    # Sections begin and end with a record, so what such a one changes is not local.
    names = list(load_encoding().calls)
    markers = {names.index("parallel"), names.index("join")}
    plain = [
        b"\x01" + record.translate(None, b"\n\x1b")
        for record in records
        if not record or record[0] % 64 % len(names) not in markers
    ]
    if not plain:
        return
    index = data.draw(st.integers(0, len(plain) - 1))
    changed = plain.copy()
    changed[index] = b"\x02" + data.draw(st.binary(max_size=9)).translate(None, b"\n\x1b")
    before, after = (
        to_text(b"\n".join(plain)).splitlines(),
        to_text(b"\n".join(changed)).splitlines(),
    )
    assert len(before) == len(after) == len(plain)
    assert before[:index] + before[index + 1 :] == after[:index] + after[index + 1 :]


def test_to_text_calls_are_readable() -> None:
    text = (
        "open f0 a rw|creat|trunc 0644\n"
        "parallel\n"
        "0: pwrite f0 100 7 4096\n"
        "2: truncate a 9223372036854775807\n"
        "join\n"
        'put f0 "a \\"line\\"\\x0a\\x1b\\\\"\n'
        "lseek f0 -1 hole\n"
        "utimens d/e/a now omit\n"
        "close f0\n"
    )
    assert to_text(to_bytes(text)) == text


def test_to_bytes_blanks_comments_and_empty_lines_are_nothing() -> None:
    text = "# a case\n\n  close   f1  # the second one\r\n\tlist .\n"
    assert to_text(to_bytes(text)) == "close f1\nlist .\n"


def test_to_text_more_calls_than_are_made_says_how_many() -> None:
    most = load_encoding().numbers["MOST_CALLS"]
    text = to_text(b"\n".join([b"\x01"] * (most + 3)))
    assert text.splitlines()[most:] == ["# 3 more, which are not made"]
    assert to_text(to_bytes(text)) == text.replace("# 3 more, which are not made\n", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("opne f0 a r 0644", "there is no call 'opne'"),
        ("open f0 a r", "open has 4 arguments, not 3"),
        ("open f8 a r 0644", "f8 is no slot of open"),
        ("open f0 /etc/passwd r 0644", "/etc/passwd is no name of open"),
        ("open f0 .. r 0644", ".. is no name of open"),
        ("open f0 a creat 0644", "creat is no open of open"),
        ("read f0 65536", "65536 is no length of read"),
        ("read f0 1_0", "1_0 is no length of read"),
        ("truncate a 49152", "49152 is no number of truncate"),
        ('put f0 "a', '"a is no data of put'),
        ('put f0 "\\n"', '"\\n" is no data of put'),
        ("put f0 a", "a is no data of put"),
        ("0: close f0", "close has a thread"),
        ("join", "join is not possible here"),
        ("0:", "there is no call after the thread"),
    ],
)
def test_to_bytes_wrong_line_has_its_number(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        to_bytes(f"close f0\n# a comment\n{line}\n")
    assert caught.value.message.startswith(f"line 3: {message}")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("close f0", "close has no thread"),
        ("4: close f0", "there is no thread 4"),
        ("parallel", "parallel is not possible here"),
        ("1: join", "join has a thread"),
    ],
)
def test_to_bytes_wrong_line_of_a_section_has_its_number(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^line 2: {message}"):
        to_bytes(f"parallel\n{line}\n")


def test_to_bytes_too_many_calls_are_refused() -> None:
    most = load_encoding().numbers["MOST_CALLS"]
    with pytest.raises(UsageError, match=f"^line {most + 1}: a case has at most {most} calls"):
        to_bytes("close f0\n" * (most + 1))


def test_names_never_leave_the_directory() -> None:
    header = (guest_directory() / "agent" / "files-calls.h").read_text()
    assert len(load_encoding().names) == header.count("\tNAME(")
    for line in header.splitlines():
        if line.startswith("\tNAME("):
            path = line.split(", ", 1)[1]
            assert ".." not in path.split("#")[0]
            assert not path.startswith('"/')


def test_encoding_damaged_table_is_an_error() -> None:
    header = (guest_directory() / "agent" / "files-calls.h").read_text()
    with pytest.raises(InfrastructureError, match="has no whence"):
        Encoding.parse(header.replace("ENTRY(whence", "ENTRY(whither"))
