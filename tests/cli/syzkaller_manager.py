# SPDX-License-Identifier: Apache-2.0
"""The real manager of syzkaller, built by the user, on the stock kernel: its pages, and its end.

Where there is Chromium, the page of coverage is opened in it.
``make syzkaller-check SYZKALLER=directory`` runs it: it takes some minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.cli.main import main
from bridge.cli.syzkaller_directory import COVERAGE
from bridge.results.kernel_export import read_blocks
from tests.support.browser import chromium

pytestmark = pytest.mark.vm

CHECKOUT = os.environ.get("SYZKALLER", "")
PROGRAMS = 20
"""The corpus is to have so many before its pages are looked at."""
SECONDS = 1800.0
"""How long that may take: a busy machine is slow, and the machine check alone takes minutes."""
CALL = 5
"""Bytes by which the manager moves PCs."""

# What a person sees who clicks on a file: its covered lines.
CLICK_FILE = """
for (const directory of document.querySelectorAll("span.caret")) directory.click();
const links = [...document.querySelectorAll('a[onclick^="onFileClick"]')];
links.find((link) => link.textContent.trim() === arguments[0]).click();
return [...document.querySelectorAll(".file")]
  .filter((file) => getComputedStyle(file).display !== "none")
  .flatMap((file) => [...file.querySelectorAll(".covered")].map((line) => line.textContent));
"""


class Pages:
    """The manager's pages."""

    def __init__(self, address: str) -> None:
        self._address = address

    def get(self, name: str) -> str:
        with urllib.request.urlopen(f"http://{self._address}/{name}", timeout=300) as answer:
            text: bytes = answer.read()
        return text.decode()


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the manager; end it in order."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(180)
        finally:
            process.kill()
            process.wait()


def wait_for_corpus(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        found = re.findall(r"corpus=(\d+) coverage=(\d+)", log.read_text(errors="replace"))
        if found and int(found[-1][0]) >= PROGRAMS:
            print(f"corpus {found[-1][0]}, coverage {found[-1][1]}")
            return
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
        time.sleep(1)


def lines_in_browser(address: str) -> list[str] | None:
    """Return the covered lines of the kernel as Chromium shows them; None without Chromium."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        print("no Chromium: the page was not opened")
        return None
    with chromium() as browser:
        browser.driver.get(f"http://{address}/cover")
        lines = [str(line) for line in browser.run(CLICK_FILE, "vmlinux")]
        assert browser.errors() == []
    return lines


@pytest.mark.skipif(not CHECKOUT, reason="make syzkaller-check SYZKALLER=directory")
def test_manager_shows_functions_of_the_kernel_and_nothing_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    directory, log = tmp_path / "campaign", tmp_path / "log"
    with capsys.disabled():
        assert main(["syzkaller", str(directory), "--syzkaller", CHECKOUT, "--http", address]) == 0
        command = [f"{CHECKOUT}/bin/syz-manager", f"-config={directory}/manager.cfg"]
        with running(command, log) as manager:
            wait_for_corpus(manager, log)
            pages = Pages(address)
            raw = {int(word, 16) for word in pages.get("rawcover").split()}
            functions = [line.split(",") for line in pages.get("funccover").splitlines()[1:]]
            files = pages.get("filecover")
            lines = pages.get("rawcoverfiles")
            html = pages.get("cover")
            shown = lines_in_browser(address)
            again = main(["syzkaller", str(directory), "--syzkaller", CHECKOUT])
    covered = [name for _, _, name, count, _ in functions if int(count)]
    print(f"{len(raw)} PCs, {len(covered)} of {len(functions)} functions")
    assert again == 2, "a directory is not changed while a manager runs in it"
    assert len(raw) > 1000
    assert len(functions) > 30_000
    assert len(covered) > 300
    assert re.search(r"^,functions/vmlinux,[1-9]", files, re.M), files[:500]
    assert re.search(r"^0xffffffff8[0-9a-f]{7},,.*,functions/vmlinux,false,", lines, re.M)
    assert "functions%2fvmlinux" in html
    if shown is not None:
        # There may be more than a moment ago.
        inside = [row for row in functions if row[1] == "functions/vmlinux" and int(row[3])]
        assert len(shown) >= len(inside)
        assert all(re.fullmatch(r"\s*0xffffffff8[0-9a-f]{7} +\d+  \S+\s*", line) for line in shown)
    said = log.read_text(errors="replace")
    for feature in ("Coverage", "SandboxNone", "NetInjection"):
        assert re.search(rf"^{feature} *: enabled", said, re.M), said[-4000:]
    # All that the manager has is in the results of the guests, which it killed.
    results = directory / COVERAGE
    deadline = time.monotonic() + 120
    # The summary is the last that a guest writes.
    while not (results / "summary.json").exists() or list(results.glob("guest-*")):
        assert time.monotonic() < deadline, sorted(results.iterdir())
        time.sleep(0.5)
    starts = {block.start for block in read_blocks(results / "kernel-blocks.tsv")}
    assert {pc + CALL for pc in raw} <= starts
    # What did not fit into the executor's areas is counted, and is none of the manager's.
    assert json.loads((results / "summary.json").read_text())["returns"] > 0
