# SPDX-License-Identifier: Apache-2.0
"""The synthetic PC space and the block table."""

from __future__ import annotations

import random
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.errors import SourceError
from bridge.sources import pcs
from bridge.sources.pcs import (
    PC_BASE,
    PC_END,
    SLOT_BYTES,
    SYSCALL_SLOTS,
    BlockTable,
    Location,
    syscall_pc,
)
from bridge.sources.python.blocks import Block, find_blocks

SOURCE = "a = 1\nif a:\n    b = 2\nelse:\n    b = 3\n"
"""Four lines of code in three blocks: 1-2, 3, 4-5."""


def program(blocks: int) -> str:
    """A source of the given number of blocks."""
    return "if a:\n    a\n" * (blocks // 2) + "a\n" * (blocks % 2)


def table_of(count: int, blocks: int = 3) -> BlockTable:
    return BlockTable.from_sources({f"pkg/m{n}.py": program(blocks) for n in range(count)})


def home_of(name: str) -> int:
    """The PC of a file's first block where no other file is."""
    return BlockTable().add(name, SOURCE).first_pc


def test_the_space_lies_where_syzkaller_and_the_contract_want_it() -> None:
    assert (PC_BASE, PC_END) == (0xFFFFFFFFF0000000, 0xFFFFFFFFFF000000)
    assert (PC_END - PC_BASE) // SLOT_BYTES == 15_728_640


def test_pcs_are_in_the_middle_of_their_slots_and_inside_the_space() -> None:
    table = table_of(200, 41)
    found = [pc for pc, _ in table]
    assert len(found) == len(set(found)) == len(table) == 200 * 41
    for pc in found:
        assert PC_BASE + SYSCALL_SLOTS * SLOT_BYTES <= pc < PC_END
        assert pc % SLOT_BYTES == 8


def test_every_address_of_a_slot_stands_for_the_block() -> None:
    table = table_of(20)
    for pc, location in table:
        for address in range(pc - 8, pc + 8):
            assert table.lookup(address) == location


def test_a_pc_survives_what_syzkaller_does_to_it() -> None:
    table = table_of(100, 11)
    found = dict(table)
    assert len({pc & 0xFFFF_FFFF for pc in found}) == len(found)
    assert len({pc >> 3 for pc in found}) == len(found)
    for pc, location in found.items():
        restored = 0xFFFF_FFFF_0000_0000 | (pc & 0xFFFF_FFFF)
        for moved in (*range(pc - 5, pc + 1), pc >> 3 << 3, (pc - 5) >> 3 << 3, restored):
            assert table.lookup(moved) == location


def test_what_no_block_lies_at_is_unknown() -> None:
    table = BlockTable.from_sources({"pkg/a.py": SOURCE})
    last = max(pc for pc, _ in table)
    assert table.lookup(last + SLOT_BYTES) is None
    for address in (0, -1, PC_BASE - 1, PC_END, PC_END + 8, 1 << 64, 0xFFFFFFFF81000000):
        assert table.lookup(address) is None


def test_pcs_are_the_same_on_every_machine() -> None:
    """These are the numbers of the first release: to change them breaks recorded coverage."""
    table = BlockTable.from_sources({"pyroute2/plan9/server.py": SOURCE})
    assert [(hex(pc), str(location)) for pc, location in table] == [
        ("0xfffffffff75a0908", "pyroute2/plan9/server.py:1.1,2.6"),
        ("0xfffffffff75a0918", "pyroute2/plan9/server.py:3.5,3.10"),
        ("0xfffffffff75a0928", "pyroute2/plan9/server.py:4.1,5.10"),
    ]


def test_pcs_do_not_depend_on_the_order_of_the_files_or_on_other_files() -> None:
    names = [f"pkg/m{n}.py" for n in range(300)]
    whole = BlockTable.from_sources(dict.fromkeys(names, SOURCE))
    random.Random(1).shuffle(names)
    assert list(BlockTable.from_sources(dict.fromkeys(names, SOURCE))) == list(whole)
    for name in names[:20]:
        alone = BlockTable.from_sources({name: SOURCE})
        assert [pc for pc, where in whole if where.file == name] == [pc for pc, _ in alone]


def colliding_names() -> tuple[str, str]:
    homes: dict[int, str] = {}
    for n in range(20_000):
        name = f"pkg/c{n}.py"
        other = homes.setdefault(home_of(name), name)
        if other != name:
            return min(other, name), max(other, name)
    raise AssertionError("no two of 20,000 names meet: is the hash one?")


def test_files_that_would_overlap_are_kept_apart_in_the_order_of_their_names() -> None:
    first, second = colliding_names()
    table = BlockTable.from_sources({second: program(35), first: program(35)})
    mine, other = table.file(first), table.file(second)
    assert mine is not None
    assert other is not None
    assert mine.first_pc == home_of(first)
    assert other.first_pc == mine.first_pc + 3 * 16 * SLOT_BYTES
    for file in (mine, other):
        for index in range(35):
            assert table.lookup(file.pc(index)) == Location(file.name, file.block(index))


def test_a_full_space_is_an_error_and_all_of_it_is_used_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pcs, "_CHUNKS", pcs._FIRST_CHUNK + 50)
    table = BlockTable()
    for n in range(50):
        table.add(f"pkg/m{n}.py", SOURCE)
    with pytest.raises(SourceError, match=r"no room for the 3 blocks of pkg/more\.py") as caught:
        table.add("pkg/more.py", SOURCE)
    assert caught.value.hint
    assert len({table.lookup(pc) for pc, _ in table}) == 150
    with pytest.raises(SourceError, match="no room"):
        BlockTable.from_sources({"pkg/big.py": program(801)}, on_error=lambda *_: None)


def test_system_call_numbers_have_pcs() -> None:
    table = BlockTable()
    seen = set()
    for nr in range(SYSCALL_SLOTS):
        pc = syscall_pc(nr)
        assert pc is not None
        assert pc % SLOT_BYTES == 8
        assert str(table.lookup(pc - 5)) == f"syscall/x86_64:{nr}.1,{nr}.1"
        seen.add(pc)
    assert len(seen) == SYSCALL_SLOTS
    assert (min(seen), max(seen)) == (PC_BASE + 8, PC_BASE + 16 * 4095 + 8)
    assert [syscall_pc(nr) for nr in (-1, 4096, 1 << 63)] == [None, None, None]
    assert len(table) == 0
    assert list(table) == []


def test_lines_lead_to_their_block() -> None:
    table = BlockTable.from_sources({"pkg/a.py": "\n" + SOURCE, "pkg/empty.py": ""})
    file = table.file("pkg/a.py")
    assert file is not None
    by_line = [file.line_pc(line) for line in range(8)]
    assert by_line == [None, None, file.pc(0), file.pc(0), file.pc(1), file.pc(2), file.pc(2), None]
    assert file.line_pcs() == [pc or 0 for pc in by_line[:7]]
    assert table.line_pc("pkg/a.py", 4) == file.pc(1)
    assert table.line_pc("pkg/b.py", 4) is None
    assert table.line_pc("pkg/empty.py", 1) is None
    empty = table.file("pkg/empty.py")
    assert empty is not None
    assert (len(empty), empty.line_pcs(), empty.blocks()) == (0, [0], [])


def test_block_numbers_out_of_range_are_refused() -> None:
    file = BlockTable().add("pkg/a.py", SOURCE)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            file.pc(index)
        with pytest.raises(IndexError):
            file.block(index)


def test_a_name_is_added_once() -> None:
    table = BlockTable.from_sources({"pkg/a.py": SOURCE})
    with pytest.raises(SourceError, match="already"):
        table.add("pkg/a.py", SOURCE)


def test_a_source_that_cannot_be_parsed_is_reported_and_left_out() -> None:
    sources = {"pkg/a.py": SOURCE, "pkg/bad.py": "def ("}
    with pytest.raises(SourceError):
        BlockTable.from_sources(sources)
    left_out = []
    table = BlockTable.from_sources(sources, on_error=lambda name, error: left_out.append(name))
    assert left_out == ["pkg/bad.py"]
    assert table.files == ["pkg/a.py"]


# File names of any bytes, as Python has them: surrogates where they are no UTF-8.
names = st.lists(
    st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\x00")
        | st.sampled_from("\udc80\udcff%\t\n\r/"),
        min_size=1,
        max_size=12,
    ),
    unique=True,
    max_size=6,
)


@given(names=names, sizes=st.lists(st.integers(0, 20), min_size=6, max_size=6))
@settings(deadline=None)
def test_a_table_is_saved_and_loaded(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], sizes: list[int]
) -> None:
    path = tmp_path_factory.mktemp("saved") / "blocks.tsv"
    sources = {name: program(size) for name, size in zip(names, sizes, strict=False)}
    table = BlockTable.from_sources(sources)
    table.save(path)
    loaded = BlockTable.load(path)
    assert len(loaded) == len(table)
    assert loaded.files == table.files
    for pc, location in table:
        assert loaded.lookup(pc) == location
        assert loaded.line_pc(location.file, location.block.start_line) == pc
    assert list(loaded) == list(table)
    again = path.with_name("again.tsv")
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_the_saved_format_is_the_documented_one(tmp_path: Path) -> None:
    table = BlockTable.from_sources({"pkg/a\tb%.py": SOURCE, "a.py": ""})
    table.save(tmp_path / "blocks.tsv")
    first = next(iter(table))[0]
    assert (tmp_path / "blocks.tsv").read_text(encoding="utf-8").split("\n") == [
        "kcov-bridge-blocks\t1",
        f"a.py\t{pcs._chunk_pc(pcs._FIRST_CHUNK):#x}\t",
        f"pkg/a%09b%25.py\t{first:#x}\t1.1,2.6 3.5,3.10 4.1,5.10",
        "",
    ]


GOOD = "pkg/a.py\t0xfffffffff1000008\t1.1,2.6 3.5,3.10\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a block table"),
        ("\x7fELF\n", "not a block table"),
        ("kcov-bridge-blocks\t2\n", "version 2"),
        ("kcov-bridge-blocks\t1\n" + GOOD[:-1], "is truncated"),
        ("kcov-bridge-blocks\t1", "is truncated"),
        ("kcov-bridge-blocks\t1\nx\n", "damaged"),
        ("kcov-bridge-blocks\t1\n" + GOOD.replace("0xf", "0xg", 1), "damaged"),
        ("kcov-bridge-blocks\t1\n" + GOOD.replace("fff1", "fff0", 1), "damaged"),
        ("kcov-bridge-blocks\t1\n" + GOOD.replace("00008", "00018", 1), "damaged"),
        ("kcov-bridge-blocks\t1\n" + GOOD.replace("0xffffffff", "0x", 1), "damaged"),
        ("kcov-bridge-blocks\t1\n" + GOOD + GOOD, "damaged"),
        ("kcov-bridge-blocks\t1\n" + GOOD + GOOD.replace("a.py", "b.py"), "damaged"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "blocks.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match=message):
        BlockTable.load(path)


@pytest.mark.parametrize("blocks", ["1.1,2", "1.1,2.x", "1.1,2.99999999999", "1.1,2.3 4.5,6.7,8.9"])
def test_damaged_blocks_are_found_when_they_are_asked_for(tmp_path: Path, blocks: str) -> None:
    path = tmp_path / "blocks.tsv"
    path.write_text(
        f"kcov-bridge-blocks\t1\na.py\t0xfffffffff1000008\t{blocks}\n", encoding="utf-8"
    )
    table = BlockTable.load(path)
    with pytest.raises(SourceError, match=r"a\.py are damaged"):
        table.lookup(0xFFFFFFFFF1000008)


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot read"):
        BlockTable.load(tmp_path / "none.tsv")
    with pytest.raises(SourceError, match="cannot write"):
        BlockTable().save(tmp_path / "none" / "blocks.tsv")


def test_a_large_table_loads_and_finds(tmp_path: Path) -> None:
    """10,000 files: what a lookup gives is right, and loading does not parse them all."""
    table = BlockTable()
    blocks = find_blocks(program(101))
    for n in range(10_000):
        table._place(f"pkg/sub/m{n}.py", blocks)
    table.save(tmp_path / "blocks.tsv")
    before = time.perf_counter()
    loaded = BlockTable.load(tmp_path / "blocks.tsv")
    print(f"10,000 files, 1,010,000 blocks: loaded in {time.perf_counter() - before:.2f} s")
    assert len(loaded) == 1_010_000
    extents = sorted((f.first_pc, len(f)) for f in loaded._files.values())
    assert all(pc + n * SLOT_BYTES <= following for (pc, n), (following, _) in pairwise(extents))
    for name in ("pkg/sub/m0.py", "pkg/sub/m9999.py"):
        file = loaded.file(name)
        assert file is not None
        assert loaded.lookup(file.pc(100)) == Location(name, Block(101, 1, 101, 2))
