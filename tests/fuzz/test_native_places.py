# SPDX-License-Identifier: Apache-2.0
"""What native PCs of a campaign mean, by what its jobs kept."""

from __future__ import annotations

from pathlib import Path

from bridge.fuzz.progress import PROGRESS_FILE, ProgressWriter, Sample
from bridge.fuzz.records import read_record
from bridge.fuzz.report import CampaignReport
from bridge.fuzz.store import JOBS_DIRECTORY, Offer, Store
from bridge.results.merge import add_native
from bridge.sources.native.modules import ModuleTable
from bridge.sources.native.source import NativeSource
from bridge.sources.symbolize import NATIVE_FILE
from tests.support.campaign_data import FACTS
from tests.support.native import build, needs_clang, run

PROGRAM = """\
__attribute__((noinline)) int one(int x) { return x + 1; }
__attribute__((noinline)) int two(int x) { return x + 2; }
int main(int argc, char **argv) {
    return (argc > 1 ? one(argc) : two(argc)) < 0;
}
"""


@needs_clang
def test_places_of_native_pcs_are_known_of_all_jobs_and_machines(tmp_path: Path) -> None:
    (tmp_path / "program.c").write_text(PROGRAM)
    program = build(tmp_path / "program", tmp_path / "program.c")
    out = tmp_path / "out"
    with Store.create(out, FACTS) as store, ProgressWriter(out / PROGRESS_FILE) as progress:
        pcs = []
        # Two machines of a job, one after the other, and one of another job.
        for job, words in (("0", ()), ("0", ("x",)), ("1", ("x",))):
            directory = out / JOBS_DIRECTORY / job
            directory.mkdir(exist_ok=True)
            source = NativeSource()
            source.start()
            run(source, program, *words)
            pcs += source.consume()
            add_native(source.places().table, directory / NATIVE_FILE)
            source.stop()
        store.add([Offer(b"x", 1.0, 1, pcs)])
        progress.write(Sample(1.0, 1, len(set(pcs)), 1))
    report = CampaignReport(read_record(out))
    places = {report.places.of(pc) for pc in pcs}
    assert {function for _, function, _ in places} == {"main", "one", "two"}
    lines = PROGRAM.splitlines()
    for place, _, text in places:
        file, _, line = place.rpartition(":")
        assert file == str(tmp_path / "program.c")
        assert text == lines[int(line) - 1].strip()
    (module,) = ModuleTable.load(out / JOBS_DIRECTORY / "0" / NATIVE_FILE)
    assert module.covered.count(1) == len(set(pcs))
    assert not [problem for problem in report.problems if "lines" in problem]
