# SPDX-License-Identifier: Apache-2.0
"""The lane: its layout as Python and as the runner have it must be one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bridge.device.abi import WORD
from bridge.fuzz import lane
from bridge.fuzz.lane import LaneFlag, LaneWord

HEADER = Path(__file__).resolve().parents[2] / "guest" / "agent" / "lane.h"
CONSTANTS = [name for name in lane.__all__ if name.startswith("LANE_")]


def expected() -> dict[str, int]:
    """C expression -> what lane.py says. Fields are compared as byte offsets."""
    return {
        **{name: getattr(lane, name) for name in CONSTANTS},
        **{f"offsetof(struct lane, {word.name.lower()})": word * WORD for word in LaneWord},
        **{f"LANE_{flag.name}": int(flag) for flag in LaneFlag},
        "sizeof(struct lane)": (LaneWord.AREA_COUNTS + lane.LANE_MOST_AREAS) * WORD,
    }


def test_layout_header_of_the_runner_is_the_same(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    assert compiler, "a C compiler is needed (Debian: gcc libc6-dev linux-libc-dev)"
    names = list(expected())
    prints = "\n".join(f'\tprintf("%llu\\n", (unsigned long long)({name}));' for name in names)
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n"
        f'#include "{HEADER}"\n\nint main(void)\n{{\n{prints}\n\treturn 0;\n}}\n'
    )
    program = tmp_path / "layout"
    subprocess.run([compiler, "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert dict(zip(names, map(int, output.split()), strict=True)) == expected()


def test_layout_everything_fits_in_the_control_page() -> None:
    assert (LaneWord.AREA_COUNTS + lane.LANE_MOST_AREAS) * WORD <= lane.LANE_CONTROL_BYTES


@pytest.mark.parametrize("word", [word for word in LaneWord if word < LaneWord.DONE])
def test_layout_two_writers_never_share_a_cache_line(word: LaneWord) -> None:
    guest = {other // 8 for other in LaneWord if other >= LaneWord.DONE}
    assert word // 8 not in guest
