# SPDX-License-Identifier: Apache-2.0
"""The region's layout as Python and as the guest module have it must be one."""

from __future__ import annotations

import shutil
import subprocess
from enum import IntEnum
from pathlib import Path

import pytest

from bridge.device import abi

HEADER = Path(__file__).resolve().parents[2] / "guest" / "module" / "kcov_bridge_abi.h"

# C name -> what abi.py says. Fields are compared as byte offsets.
CONSTANTS = {
    "KB_PCI_VENDOR_ID": abi.PCI_VENDOR_ID,
    "KB_PCI_DEVICE_ID": abi.PCI_DEVICE_ID,
    "KB_MAGIC": abi.MAGIC,
    "KB_VERSION": abi.VERSION,
    "KB_SLOTS": abi.SLOTS,
    "KB_REQUESTS_OFFSET": abi.REQUESTS_OFFSET,
    "KB_RESPONSES_OFFSET": abi.RESPONSES_OFFSET,
    "KB_PAYLOAD_OFFSET": abi.PAYLOAD_OFFSET,
    "KB_AREAS_OFFSET": abi.AREAS_OFFSET,
    "KB_KICK_SLOT_BITS": abi.KICK_SLOT_BITS,
    "sizeof(struct kb_request)": abi.SLOT_WORDS * abi.WORD,
    "sizeof(struct kb_response)": abi.SLOT_WORDS * abi.WORD,
    "KCOV_INIT_TRACE": abi.KCOV_INIT_TRACE,
    "KCOV_ENABLE": abi.KCOV_ENABLE,
    "KCOV_DISABLE": abi.KCOV_DISABLE,
    "KCOV_REMOTE_ENABLE": abi.KCOV_REMOTE_ENABLE,
    "KCOV_REMOTE_MAX_HANDLES": abi.KCOV_REMOTE_MAX_HANDLES,
    "KCOV_TRACE_PC": abi.KCOV_TRACE_PC,
    "KCOV_TRACE_CMP": abi.KCOV_TRACE_CMP,
    "KCOV_CMP_CONST": abi.KCOV_CMP_CONST,
    "KCOV_CMP_SIZE(3)": abi.KCOV_CMP_SIZE(3),
    "KCOV_UNIQUE_ENABLE": abi.KCOV_UNIQUE_ENABLE,
    "KCOV_RESET_TRACE": abi.KCOV_RESET_TRACE,
    "KCOV_BRIDGE_STREAM": abi.KCOV_BRIDGE_STREAM,
    "KCOV_BRIDGE_FOLLOW": abi.FOLLOW_FLAG,
    "KCOV_BRIDGE_LANE": abi.KCOV_BRIDGE_LANE,
    "KCOV_BRIDGE_LANE_SHIFT": abi.LANE_INDEX_SHIFT,
    "KCOV_BRIDGE_WIRE": abi.KCOV_BRIDGE_WIRE,
    "KB_WIRE_VECTOR": abi.WIRE_VECTOR,
    "KB_WIRE_RING_BYTES": abi.WIRE_RING_BYTES,
    "sizeof(struct kb_wire)": abi.WIRE_BYTES,
    "offsetof(struct kb_wire, to_host)": abi.PAGE_SIZE,
    "offsetof(struct kb_wire, to_guest)": abi.PAGE_SIZE + abi.WIRE_RING_BYTES,
    **{f"KB_WIRE_{kind.name}": int(kind) for kind in abi.WireEnd},
    "KB_KERNEL_CPUS": abi.KERNEL_CPUS,
    "offsetof(struct kb_kernel, cpus)": abi.KernelWord.CPUS * abi.WORD,
    "offsetof(struct kb_kernel, syscall_entry)": abi.KernelWord.SYSCALL_ENTRY * abi.WORD,
    "offsetof(struct kb_kernel, marker)": abi.KernelWord.MARKER * abi.WORD,
    "offsetof(struct kb_kernel, marker_physical)": abi.KernelWord.MARKER_PHYSICAL * abi.WORD,
    "offsetof(struct kb_kernel, cpu)": abi.KernelWord.CPU * abi.WORD,
    "offsetof(struct kb_kernel, cpu[0].preempt_count)": (abi.KernelWord.CPU + 1) * abi.WORD,
    "offsetof(struct kb_kernel, vectors)": abi.KernelWord.VECTORS * abi.WORD,
    **{f"KB_ANSWER_{flag.name}": int(flag) for flag in abi.Answer},
    **{f"KB_CALL_{flag.name}": int(flag) for flag in abi.CallFlag},
    "KB_CALL_WORDS_BITS": abi.CALL_WORDS_BITS,
    "KB_CALL_MOST_WORDS": abi.CALL_MOST_WORDS,
    "KB_CALL_STRINGS": abi.CALL_STRINGS,
    "KB_CALL_STRING_BYTES": abi.CALL_STRING_BYTES,
    "KB_CALL_CUT_SHIFT": abi.CALL_CUT_SHIFT,
    "sizeof(struct kb_call)": abi.CallWord.STRINGS * abi.WORD,
}


def _expected() -> dict[str, int]:
    expected = dict(CONSTANTS)
    for struct, words in (
        ("kb_header", abi.HeaderWord),
        ("kb_request", abi.RequestWord),
        ("kb_response", abi.ResponseWord),
        ("kb_call_log", abi.CallLogWord),
        ("kb_wire", abi.WireWord),
        ("kb_call", [word for word in abi.CallWord if word is not abi.CallWord.STRINGS]),
    ):
        for word in words:
            expected[f"offsetof(struct {struct}, {word.name.lower()})"] = word * abi.WORD
    prefixes: dict[str, type[IntEnum]] = {
        "KB_OP_": abi.Op,
        "KB_HOST_": abi.HostState,
        "KB_HIDDEN_": abi.Hidden,
    }
    for prefix, values in prefixes.items():
        for value in values:
            expected[prefix + value.name] = value
    return expected


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    compiler = shutil.which("cc")
    assert compiler, "a C compiler is needed (Debian: gcc libc6-dev linux-libc-dev)"
    directory = tmp_path_factory.mktemp("abi")
    names = list(_expected())
    prints = "\n".join(f'\tprintf("%llu\\n", (unsigned long long)({name}));' for name in names)
    source = directory / "layout.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n#include <linux/kcov.h>\n"
        f'#include "{HEADER}"\n\nint main(void)\n{{\n{prints}\n\treturn 0;\n}}\n'
    )
    program = directory / "layout"
    subprocess.run([compiler, "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return dict(zip(names, map(int, output.split()), strict=True))


def test_layout_module_header_is_the_same(compiled: dict[str, int]) -> None:
    assert compiled == _expected()


def test_everything_fits_in_its_place() -> None:
    assert max(abi.HeaderWord) * abi.WORD < abi.REQUESTS_OFFSET
    assert abi.SLOTS <= 1 << abi.KICK_SLOT_BITS
    assert abi.AREAS_OFFSET % abi.PAGE_SIZE == 0
    assert abi.KCOV_REMOTE_MAX_HANDLES * abi.WORD <= abi.AREAS_OFFSET - abi.PAYLOAD_OFFSET
    assert max(*abi.RequestWord, *abi.ResponseWord) < abi.SLOT_WORDS


def test_header_two_writers_never_share_a_cache_line() -> None:
    guest = {
        abi.HeaderWord.KICK,
        abi.HeaderWord.GUEST_TIMEOUTS,
        abi.HeaderWord.GUEST_SKIPPED,
        abi.HeaderWord.GUEST_UNTRACED,
    }
    # Written by relays, too.
    relays = {abi.HeaderWord.COVERAGE_EPOCH}
    guest_lines = {word // 8 for word in guest}
    relay_lines = {word // 8 for word in relays}
    host_lines = {word // 8 for word in abi.HeaderWord if word not in guest | relays}
    assert not guest_lines & host_lines
    assert not relay_lines & (guest_lines | host_lines)
