# SPDX-License-Identifier: Apache-2.0
"""What a machine's PCs mean is kept; the code of its modules is that which ran."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from capstone import CS_ARCH_X86, CS_MODE_64, Cs

from bridge import Session, Settings
from bridge.fuzz.places import keep_places
from bridge.fuzz.progress import PROGRESS_FILE, ProgressWriter, Sample
from bridge.fuzz.records import read_record
from bridge.fuzz.report import CampaignReport
from bridge.fuzz.store import JOBS_DIRECTORY, Offer, Store
from bridge.results.kernel_export import is_kernel_pc, read_blocks
from tests.support.campaign_data import FACTS

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(Settings(source="python,kernel")) as started:
        yield started


@pytest.fixture(scope="module")
def campaign(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign whose only case reads a file of the mount."""
    out = tmp_path_factory.mktemp("campaign") / "out"
    facts = {**FACTS, "image": session.image.name, "sources": ["python", "kernel"]}
    with Store.create(out, facts) as store, ProgressWriter(out / PROGRESS_FILE) as progress:
        job = out / JOBS_DIRECTORY / "0"
        job.mkdir()
        pcs = session.kcov(["cat", "/mnt/target/README"]).pcs
        keep_places(session, job)
        # A second time adds to what is there.
        pcs = [*pcs, *session.kcov(["ls", "/mnt/target"]).pcs]
        keep_places(session, job)
        store.add([Offer(b"x", 1.0, 1, pcs)])
        progress.write(Sample(1.0, 1, len(set(pcs)), 1))
    return out


@pytest.fixture(scope="module")
def report(campaign: Path) -> CampaignReport:
    return CampaignReport(read_record(campaign))


def test_places_code_of_modules_is_what_the_guest_ran(
    campaign: Path, report: CampaignReport
) -> None:
    job = campaign / JOBS_DIRECTORY / "0"
    names = {path.name.partition(".")[0] for path in (job / "modules").iterdir()}
    assert {"9p", "9pnet"} <= names
    text = report.places.kernel_text()
    symbols = report.places.symbols
    assert text is not None
    assert symbols is not None
    decoder = Cs(CS_ARCH_X86, CS_MODE_64)
    odd = []
    blocks = [
        block
        for block in read_blocks(job / "kernel-blocks.tsv")
        if (at := symbols.text_at(block.start)) is not None and at[2] in ("9p", "9pnet")
    ]
    assert len(blocks) > 100
    for block in blocks:
        code = text.read(block.start, block.size)
        assert len(code) == block.size
        decoded = sum(each.size for each in decoder.disasm(code, block.start))
        # Where the file jumps to the return thunk, the kernel has put a return, of one byte.
        if code[decoded:] not in (b"", b"\xe9"):
            odd.append(code[decoded:])
    # All others end where an instruction does, but for what the kernel patches.
    assert len(odd) <= 0.02 * len(blocks), odd


def test_places_frontier_has_target_kernel_and_modules(report: CampaignReport) -> None:
    assert not [each for each in report.problems if "9p" in each or "image" in each]
    covered = report.campaign.covered()
    for edge in report.frontier:
        assert edge.at in covered
        assert edge.to not in covered
    symbols = report.places.symbols
    assert symbols is not None
    modules = {
        symbol.module
        for edge in report.frontier
        if is_kernel_pc(edge.at) and (symbol := symbols.lookup(edge.at)) is not None
    }
    assert {"", "9p", "9pnet"} <= modules
    # A call of a module to the kernel: linked, and with the name of what it calls.
    calls = {
        (symbol.module, edge.to_symbol)
        for edge in report.frontier
        if edge.kind == "call"
        and is_kernel_pc(edge.at)
        and (symbol := symbols.lookup(edge.at)) is not None
        and (to := symbols.lookup(edge.to)) is not None
        and symbol.module != to.module
    }
    assert calls
    places = {row[5].partition(":")[0] for row in report.data()["frontier"]}
    assert "pyroute2/plan9/server.py" in places
