# SPDX-License-Identifier: Apache-2.0
"""Canonical places of modules, and how much text a module file has."""

from __future__ import annotations

import json
import lzma
import struct
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import InfrastructureError, SourceError
from bridge.sources.guest_kernel.placement import (
    MODULES_BASE,
    MODULES_END,
    ModulePlacement,
    core_text_size,
)
from bridge.sources.pcs import PC_BASE

PAGE = 4096


def test_known_modules_lie_in_the_order_of_their_names_with_a_page_between() -> None:
    placement = ModulePlacement({"9pnet-virtio": 5000, "9p": 1, "zzz": PAGE})
    assert placement.sizes == {"9pnet_virtio": 2 * PAGE, "9p": PAGE, "zzz": PAGE}
    assert placement.place("9p", 1) == MODULES_BASE
    assert placement.place("9pnet_virtio", 8000) == MODULES_BASE + 2 * PAGE
    assert placement.place("9pnet-virtio", 8192) == MODULES_BASE + 2 * PAGE
    assert placement.place("zzz", PAGE) == MODULES_BASE + 5 * PAGE


def test_others_get_the_room_behind_in_the_order_of_appearance() -> None:
    placement = ModulePlacement({"a": PAGE, "b": PAGE})
    end = MODULES_BASE + 4 * PAGE
    assert placement.place("zeta", 10) == end
    assert placement.place("b", PAGE + 1) == end + 2 * PAGE, "too large for its place"
    assert placement.place("alpha", 10) == end + 5 * PAGE
    # Each keeps what it has, as long as it fits.
    assert placement.place("zeta", PAGE) == end
    assert placement.place("b", 2 * PAGE) == end + 2 * PAGE
    assert placement.place("b", PAGE) == MODULES_BASE + 2 * PAGE
    assert placement.place("zeta", PAGE + 1) == end + 7 * PAGE


@given(
    st.dictionaries(st.text("ab_-9", min_size=1, max_size=4), st.integers(0, 70000), max_size=8),
    st.lists(st.tuples(st.text("abc_9", min_size=1, max_size=4), st.integers(1, 70000))),
)
def test_no_two_modules_overlap(sizes: dict[str, int], wanted: list[tuple[str, int]]) -> None:
    placement, again = ModulePlacement(sizes), ModulePlacement(dict(reversed(sizes.items())))
    places: dict[int, tuple[str, int]] = {}
    for name, size in wanted:
        base = placement.place(name, size)
        assert base % PAGE == 0
        assert again.place(name, size) == base
        before = places.get(base, (name, 0))
        assert before[0] == name
        places[base] = name, max(size, before[1])
    ends = [(base, base + size) for base, (_, size) in sorted(places.items())]
    assert all(a[1] + 1 <= b[0] for a, b in pairwise(ends))
    assert all(a >= MODULES_BASE and b <= MODULES_END <= PC_BASE for a, b in ends)


def test_where_there_is_no_room() -> None:
    room = MODULES_END - MODULES_BASE
    placement = ModulePlacement({"big": room - 3 * PAGE})
    assert placement.place("small", PAGE) == MODULES_END - 2 * PAGE
    with pytest.raises(SourceError, match="no room for the 4096 bytes of module other"):
        placement.place("other", 1)
    with pytest.raises(SourceError, match="no room"):
        ModulePlacement({"big": room})


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "modules.json"
    ModulePlacement({"b": 9000, "a": 3}).save(path)
    assert json.loads(path.read_text())["sizes"] == {"a": PAGE, "b": 3 * PAGE}
    loaded = ModulePlacement.load(path)
    assert loaded.place("b", 9000) == MODULES_BASE + 2 * PAGE
    assert [p.name for p in tmp_path.iterdir()] == ["modules.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "kcov-bridge-modules", "version": 2, "sizes": {}}',
        '{"format": "kcov-bridge-modules", "version": 1, "sizes": {"a": "x"}}',
    ],
)
def test_a_file_that_is_no_list(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(SourceError, match="not a list of modules"):
        ModulePlacement.load(tmp_path / "modules.json")
    with pytest.raises(SourceError, match="cannot read"):
        ModulePlacement.load(tmp_path / "none")
    with pytest.raises(InfrastructureError, match="cannot write"):
        ModulePlacement({}).save(tmp_path / "none" / "modules.json")


MODULE = """\
    .text
    .skip 5
    .section .text.unlikely, "ax"
    .p2align 4
    .skip 3
    .section .init.text, "ax"
    .skip 1000
    .section .exit.text, "ax"
    .skip 7
    .data
    .skip 500
    .section .notes.x, "x"
    .skip 900
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    source, path = tmp_path / "m.s", tmp_path / "m.ko"
    source.write_text(MODULE)
    subprocess.run(["gcc", "-c", str(source), "-o", str(path)], check=True)
    return path


def test_the_text_of_a_module(module: Path) -> None:
    # 5, then 3 at a multiple of 16, then 7 right behind.
    assert core_text_size(module) == 16 + 3 + 7
    packed = module.with_suffix(".ko.xz")
    packed.write_bytes(lzma.compress(module.read_bytes()))
    assert core_text_size(packed) == 26


def test_files_that_are_no_modules(tmp_path: Path, module: Path) -> None:
    path = tmp_path / "bad.ko"
    whole = module.read_bytes()
    for data in (b"", b"\x7fELF", whole[:80], b"\x7fELF\x01\x01" + whole[6:]):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=r"bad\.ko is not a kernel module"):
            core_text_size(path)
    # e_shoff beyond the end
    path.write_bytes(whole[:40] + struct.pack("<Q", 1 << 40) + whole[48:])
    with pytest.raises(SourceError, match="not a kernel module"):
        core_text_size(path)
    for name in ("bad.ko.xz", "none.ko", "bad.ko.zst"):
        if name.startswith("bad"):
            (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(
            SourceError, match=r"which this program cannot read|cannot read the module"
        ):
            core_text_size(tmp_path / name)


def test_place_names_that_a_guest_makes_up_are_bounded() -> None:
    placement = ModulePlacement({"known": 4096})
    places = {placement.place(f"m{number}", 4096) for number in range(1024)}
    assert len(places) == 1024
    with pytest.raises(SourceError, match="m1024 after 1024 others"):
        placement.place("m1024", 4096)
    assert placement.place("m7", 4096) in places
    assert placement.place("known", 4096) not in places
