# SPDX-License-Identifier: Apache-2.0
"""The object for synthetic PCs, read by the programs that it is for."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from bridge.cli.main import main
from bridge.errors import InfrastructureError, MissingDependencyError, UsageError
from bridge.results.compile_units import python_units, system_call_units
from bridge.results.elf_export import write_elf
from bridge.sources.guest_kernel.symbols import KernelSymbols
from bridge.sources.pcs import BlockTable
from bridge.trace.names import system_calls

KERNEL = 0xFFFF_FFFF_8100_0000
KALLSYMS = f"""\
{KERNEL:x} T _stext
{KERNEL:x} T vfs_read
{KERNEL + 0x100:x} t helper
{KERNEL + 0x200:x} t helper
{KERNEL + 0x1000:x} T _etext
"""

SHOP = """\
import math


class Shop:
    \"\"\"Sells things.\"\"\"

    tax = 3

    def price(self, n):
        def rounded(x):
            if x > 2:
                return math.ceil(x)
            return 0

        total = 0
        for _ in range(n):
            total += rounded(n)
        return total


@staticmethod
def unused():
    return 1
"""

MEASURE = """\
import sys
from pathlib import Path
from bridge.sources.python.source import PythonSource
source = PythonSource(["bazaar"], data_file=Path(sys.argv[1], ".coverage"))
source.start()
from bazaar.shop import Shop
import bazaar.stall
Shop().price(3)
pcs = source.consume()
source.stop()
source.table.save(Path(sys.argv[1], "blocks.tsv"))
print(*map(hex, pcs))
"""

BODIES = {
    "Shop.price.rounded": range(11, 14),
    "Shop.price": range(10, 19),
    "Shop": range(5, 10),
    "unused": range(23, 24),
    "(module)": range(1, 23),
}
"""The lines of the code of each function, inner ones first; a header is of the code around it."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that a real source left, with symbols of a kernel beside it."""
    run = tmp_path_factory.mktemp("run")
    package = run / "src" / "bazaar"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "shop.py").write_text(SHOP)
    (package / "stall.py").write_text("OPEN = True\nif OPEN:\n    NAME = 'café'\n")
    environment = {**os.environ, "PYTHONPATH": f"{run / 'src'}:{Path(__file__).parents[2]}"}
    command = [sys.executable, "-c", MEASURE, str(run)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    (run / "pcs.txt").write_text("\n".join([*done.stdout.split(), ""]))
    KernelSymbols.from_kallsyms(KALLSYMS).save(run / "kernel-symbols.tsv")
    return run


@pytest.fixture(scope="module")
def vmlinux(run: Path) -> Path:
    out = run / "vmlinux"
    assert main(["export", "--run", str(run), "--format", "elf", "-o", str(out)]) == 0
    return out


def read(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def places(vmlinux: Path, *pcs: int) -> list[tuple[str, str]]:
    """What addr2line says of addresses: function and file:line."""
    words = read("addr2line", "-f", "-e", str(vmlinux), *map(hex, pcs)).splitlines()
    return list(zip(words[::2], words[1::2], strict=True))


def expected(run: Path) -> dict[int, tuple[str, str]]:
    """Function and file:line of each block by its PC, by the table and by hand."""
    found = {}
    for pc, location in BlockTable.load(run / "blocks.tsv"):
        line = location.block.start_line
        name = "(module)"
        if location.file == "bazaar/shop.py":
            name = next(name for name, lines in BODIES.items() if line in lines)
        module = location.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        found[pc] = f"{module}.{name}", f"{run}/src/{location.file}:{line}"
    return found


def test_every_block_has_its_function_and_line(run: Path, vmlinux: Path) -> None:
    blocks = expected(run)
    assert len(blocks) > 10
    assert {name for name, _ in blocks.values()} >= {f"bazaar.shop.{name}" for name in BODIES}
    # As given, before it (in the call), at the call, and with the low three bits cleared.
    for moved in (0, 1, 5, 8):
        found = places(vmlinux, *(pc - moved for pc in blocks))
        plain = [(re.sub(r"\.\d+$", "", name), place) for name, place in found]
        assert dict(zip(blocks, plain, strict=True)) == blocks


def test_covered_pcs_of_a_real_run_are_blocks(run: Path) -> None:
    covered = {int(line, 16) for line in (run / "pcs.txt").read_text().split()}
    assert covered
    assert covered < set(expected(run)), "unused() did not run"


def test_calls_end_at_the_pcs_and_nowhere_else(run: Path, vmlinux: Path) -> None:
    calls, slots = python_units(run), system_call_units()
    pcs = {block.pc for unit in calls + slots for block in unit.blocks}
    assert pcs > set(expected(run))
    assert len(pcs) == len(expected(run)) + len(system_calls())
    code = read("objdump", "-d", "-j", ".text", str(vmlinux))
    found = re.findall(r"^([0-9a-f]{16}):\s(?:[0-9a-f]{2} ){5}\s*call\s.*<(\w+)>$", code, re.M)
    assert {name for _, name in found} == {"__sanitizer_cov_trace_pc"}
    assert sorted(int(at, 16) + 5 for at, _ in found) == sorted(pcs)
    assert calls_at_any_byte(vmlinux) == sorted(pcs)


def calls_at_any_byte(vmlinux: Path) -> list[int]:
    """Where the calls end that syzkaller finds, which looks at each byte of the section."""
    headers = read("readelf", "-SW", str(vmlinux))
    match = re.search(r"\.text +PROGBITS +(\w+) (\w+) (\w+)", headers)
    assert match is not None
    address, offset, size = (int(text, 16) for text in match.groups())
    symbol = re.search(r"(\w+) T __sanitizer_cov_trace_pc", read("nm", str(vmlinux)))
    assert symbol is not None
    target, found = int(symbol[1], 16), []
    with vmlinux.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    at = data.find(b"\xe8")
    while at >= 0:
        distance = int.from_bytes(data[at + 1 : at + 5], "little", signed=True)
        end = address + at + 5
        if end + distance == target:
            found.append(end)
        at = data.find(b"\xe8", at + 1)
    return found


def test_functions_are_symbols_without_overlap(run: Path, vmlinux: Path) -> None:
    symbols = re.findall(
        r"(\w{16}) +(\d+) FUNC +LOCAL +DEFAULT +\d+ (bazaar\S*)",
        read("readelf", "-sW", str(vmlinux)),
    )
    names = {name for _, _, name in symbols}
    assert names >= {f"bazaar.shop.{name}" for name in BODIES} | {"bazaar.shop.Shop.price.2"}
    extents = sorted((int(start, 16), int(start, 16) + int(size)) for start, size, _ in symbols)
    assert all(end <= start for (_, end), (start, _) in pairwise(extents))
    for pc in expected(run):
        assert sum(start <= pc < end for start, end in extents) == 1


def test_functions_of_the_kernel_and_system_calls_have_names(vmlinux: Path) -> None:
    found = places(vmlinux, KERNEL + 4, KERNEL + 0x104, KERNEL + 0x2FF, 0xFFFFFFFFF0000018)
    assert [name for name, _ in found] == ["vfs_read", "helper", "helper.2", "syscall.write"]
    assert found[-1][1] == "syscall/x86_64:1"
    assert f"{KERNEL:x} A _stext" in read("nm", str(vmlinux))


def test_most_of_the_object_is_a_hole(vmlinux: Path) -> None:
    status = vmlinux.stat()
    assert status.st_size > 100 << 20
    assert status.st_blocks * 512 < 4 << 20
    assert not list(vmlinux.parent.glob(".vmlinux*"))


def test_source_that_is_gone_has_lines(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    BlockTable.from_sources({"gone/it.py": "a = 1\nif a:\n    b = 2\n"}).save(
        tmp_path / "blocks.tsv"
    )
    write_elf(tmp_path, tmp_path / "out")
    pcs = [pc for pc, _ in BlockTable.load(tmp_path / "blocks.tsv")]
    names = places(tmp_path / "out", *pcs)
    assert names == [("gone.it.(module)", f"gone/it.py:{line}") for line in (1, 3)]
    assert "1 source files were not found" in caplog.text


def test_source_that_is_newer_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "odd.py").write_text("def f(:\n")
    BlockTable.from_sources({"odd.py": "a = 1\n"}).save(tmp_path / "blocks.tsv")
    os.utime(tmp_path / "blocks.tsv", (1000, 1000))
    with caplog.at_level(logging.WARNING):
        (unit,) = python_units(tmp_path)
    assert [block.function for block in unit.blocks] == ["odd.(module)"]
    assert "were changed after the run" in caplog.text


def test_export_without_blocks_or_file_fails(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "--run", str(tmp_path), "--format", "elf"]
    assert main(arguments) == UsageError.exit_status
    assert "name a file with -o" in capsys.readouterr().err
    arguments += ["-o", str(tmp_path / "out")]
    assert main(arguments) == UsageError.exit_status
    assert "has no block of a target" in capsys.readouterr().err
    BlockTable().save(tmp_path / "blocks.tsv")
    assert main(arguments) == UsageError.exit_status
    assert "has no block" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_or_failing_binutils_is_an_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="has no as") as missing:
        write_elf(run, tmp_path / "out")
    assert "binutils" in missing.value.report()
    for name, status in (("as", 1), ("ld", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\necho broken >&2\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(InfrastructureError, match="as failed"):
        write_elf(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["as", "ld"]


def test_output_that_cannot_be_written_is_an_error(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="cannot write"):
        write_elf(run, tmp_path / "none" / "out")
