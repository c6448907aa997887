# SPDX-License-Identifier: Apache-2.0
"""The channel's protocol as Python and as the agent have it must be one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bridge.vm import channel
from bridge.vm.channel import Action, Kind

HEADER = Path(__file__).resolve().parents[2] / "guest" / "agent" / "channel.h"

CONSTANTS = {
    "CHANNEL_VERSION": channel.VERSION,
    "CHANNEL_PAYLOAD_LIMIT": channel.PAYLOAD_LIMIT,
    "CHANNEL_COMMANDS": channel.COMMANDS,
    "CHANNEL_STDIN_WINDOW": channel.STDIN_WINDOW,
    "CHANNEL_SPEC_LIMIT": channel.SPEC_LIMIT,
    "CHANNEL_SEED_BYTES": channel.SEED_BYTES,
    "CHANNEL_NOT_BEGUN": channel.NOT_BEGUN,
    "CHANNEL_MAGIC": channel._MAGIC,
    "CHANNEL_HEADER_BYTES": channel._HEADER.size,
    "CHANNEL_HELLO_BYTES": channel._HELLO.size + channel.SEED_BYTES,
    **{f"CHANNEL_{kind.name}": int(kind) for kind in Kind},
    **{f"CHANNEL_{action.name}": int(action) for action in Action},
}


def test_numbers_of_the_header_are_those_of_the_module(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler: gcc")
    lines = "".join(f'printf("{name} %ld\\n", (long)({name}));\n' for name in CONSTANTS)
    lines += 'printf("%s\\n", CHANNEL_PORT);\n'
    source = tmp_path / "numbers.c"
    source.write_text(f'#include <stdio.h>\n#include "{HEADER}"\nint main(void) {{\n{lines}}}\n')
    subprocess.run([compiler, "-o", tmp_path / "numbers", source], check=True)
    done = subprocess.run([tmp_path / "numbers"], check=True, capture_output=True, text=True)
    *numbers, port = done.stdout.splitlines()
    assert port == channel.PORT_NAME
    assert dict(zip(CONSTANTS, CONSTANTS.values(), strict=True)) == {
        name: int(number) for name, number in (line.split() for line in numbers)
    }
    names = {line.split()[0] for line in HEADER.read_text().splitlines() if " = " in line[:40]}
    assert names <= CONSTANTS.keys()
