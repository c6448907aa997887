# SPDX-License-Identifier: Apache-2.0
"""A campaign from its beginning to its end: seeds, jobs, figures, results.

The parts are made elsewhere: the directory (:mod:`bridge.fuzz.store`), the jobs
(:mod:`bridge.fuzz.campaign_job`), where they run (:mod:`bridge.fuzz.cluster`) and what becomes of
their news (:mod:`bridge.fuzz.hub`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import bridge
from bridge.config import Settings
from bridge.errors import BridgeError, InfrastructureError, UsageError
from bridge.fuzz.board import MAP_CELLS, Fold
from bridge.fuzz.campaign_job import Plan, make_job
from bridge.fuzz.cluster import Cluster, adopt_leftovers, check_scheduler
from bridge.fuzz.engine import DEFAULT_SEED, find_engine, read_seeds
from bridge.fuzz.findings import FINDING, Findings
from bridge.fuzz.harness import Harness
from bridge.fuzz.hub import CampaignView, Hub
from bridge.fuzz.job import FoundFinding
from bridge.fuzz.learn_words import learn_words
from bridge.fuzz.progress import PROGRESS_FILE, ProgressWriter, Sample, read_progress
from bridge.fuzz.store import JOBS_DIRECTORY, Offer, Store, check_unused, read_campaign
from bridge.guest.guest_image import find_guest_image
from bridge.session.target_host import TargetState
from bridge.targets.registry import check_name, find_factory
from bridge.util.files import remove
from bridge.vm.accel import choose_accelerator

__all__ = ["Campaign", "End", "run_campaign"]

logger = logging.getLogger(__name__)

_STEP_SECONDS: Final = 0.5
_SAMPLE_SECONDS: Final = 1.0
_LATER_SAMPLE_SECONDS: Final = 5.0
_EARLY_SECONDS: Final = 120.0
"""Until then there is a sample each second."""
_STOP_SECONDS: Final = 90.0
_LEARN: Final = "words"
"""The directory in that of the jobs where the dictionary is made; it is gone afterwards."""
_PLAN: Final = "plan"
"""The key of ``campaign.json`` under which the plan stands."""


@dataclass(frozen=True)
class Campaign:
    """What a campaign is to do.

    Attributes:
        out: its directory.
        plan: what each job does; of no account if it is resumed.
        corpus: directory of seeds; None for none.
        jobs: engines with a VM each, at the same time; None for one, or as many as before.
        seconds: it ends after this time; None for no limit.
        executions: it ends after so many; None for no limit.
        scheduler: address of a scheduler of Dask; empty for this machine.
        resume: go on with the campaign in the directory.
    """

    out: Path
    plan: Plan
    corpus: Path | None = None
    jobs: int | None = None
    seconds: float | None = None
    executions: int | None = None
    scheduler: str = ""
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("jobs", "seconds", "executions"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"{name} of a campaign: {value} is not above 0")


@dataclass(frozen=True)
class End:
    """How a campaign ended.

    Attributes:
        view: its last figures.
        new_findings: how many it found in this run.
        report: the page with its results; None if it could not be made.
        unreported: why it could not.
        interrupted: what ended it, if it was neither a limit nor an error.
    """

    view: CampaignView
    new_findings: int
    report: Path | None
    unreported: BridgeError | None = None
    interrupted: KeyboardInterrupt | None = None


def run_campaign(
    campaign: Campaign,
    *,
    shown: Callable[[CampaignView], object] = lambda view: None,
    said: Callable[[str], object] = logger.info,
) -> End:
    """Run a campaign until a limit, Ctrl-C, or an error ends it.

    Args:
        shown: is given the figures, about twice a second.
        said: is told what takes long, and what happened.

    Raises:
        BridgeError: what ended it. All that was announced is in its directory.
    """
    with ExitStack() as stack:
        running = _Running(campaign, stack, said)
        return running.run(shown)


class _Running:
    """A campaign whose directory this process holds."""

    def __init__(self, campaign: Campaign, stack: ExitStack, said: Callable[[str], object]) -> None:
        self._campaign = campaign
        self._said = said
        facts: dict[str, Any] = {}
        jobs = campaign.jobs
        plan = campaign.plan
        if campaign.resume:
            facts = dict(read_campaign(campaign.out).facts)
            if _PLAN not in facts:
                raise UsageError(f"{campaign.out} is the directory of another kind of campaign")
            plan = Plan.of(facts[_PLAN])
            jobs = jobs if jobs is not None else int(facts["jobs"])
        else:
            check_unused(campaign.out)
        self._jobs = jobs if jobs is not None else 1
        engine = find_engine(plan.engine)
        plan.find_modules()
        harness = plan.make_harness()
        settings = Settings.of(plan.settings)
        check_name(settings.target)
        if campaign.scheduler:
            # The workers have the target, and maybe only they.
            check_scheduler(campaign.scheduler)
        else:
            find_factory(settings.target)
        said("the guest image (the first time it is built, which takes some minutes)")
        image = find_guest_image(settings)
        seeds = [] if campaign.resume else self._seeds(harness)
        accelerator = choose_accelerator(settings.accel).name
        sources = sorted(settings.sources(accelerator))
        fold = Fold.EDGES if "kernel" in sources else Fold.BLOCKS
        versions = {"kcov-bridge": bridge.__version__, "AFL++": engine.version}
        plan = dataclasses.replace(plan, versions=versions, map_size=MAP_CELLS[fold])
        if "python" not in sources and plan.target_state == TargetState.FORK.value:
            # A target that is not measured runs in the job's own process.
            plan = dataclasses.replace(plan, target_state=TargetState.RESTART.value)
        if "python" in sources and plan.learn and not campaign.resume:
            place = campaign.out / JOBS_DIRECTORY / _LEARN
            # Of a campaign that was killed meanwhile; learn_words complains if it cannot go.
            with contextlib.suppress(OSError):
                remove(place)
            try:
                words = learn_words(plan, seeds, place, said)
            finally:
                with contextlib.suppress(OSError):
                    remove(place)
            plan = dataclasses.replace(plan, dictionary=plan.dictionary + words)
        facts |= {
            "target": settings.target,
            "harness": plan.harness or " ".join(plan.command),
            "sources": sources,
            "image": image.name,
            "accel": accelerator,
            "jobs": self._jobs,
            "engine": f"AFL++ {engine.version}".strip(),
            "fold": fold.name.lower(),
            "feedback": plan.feedback,
            _PLAN: plan.as_values(),
        }
        make = Store.resume if campaign.resume else Store.create
        self._store = store = stack.enter_context(make(campaign.out, facts))
        for problem in store.problems:
            said(problem)
        elapsed, executions = self._before()
        self._executions = executions
        self._plan = dataclasses.replace(plan, zero=time.time() - elapsed)
        self._findings = Findings(store.findings, readable=harness.readable)
        self._new_findings = 0
        # The hub hands out what the store has when it begins, and what jobs find later.
        if seeds:
            store.add(Offer(seed, 0.0, 0, seed=True) for seed in seeds)
        self._hub = Hub(
            store,
            self._jobs,
            elapsed=elapsed,
            executions=executions,
            keep_finding=self._keep,
            tell=said,
        )
        stack.callback(self._hub.close)
        self._began = self._hub.seconds
        self._writer = stack.enter_context(ProgressWriter(campaign.out / PROGRESS_FILE))
        if adopted := adopt_leftovers(self._hub, store):
            said(f"{adopted} cases and findings of jobs that were killed are taken over")
        self._cluster = stack.enter_context(
            Cluster(
                self._hub,
                store,
                make_job,
                self._jobs,
                ordered=fold is Fold.EDGES,
                values=self._plan.as_values(),
                scheduler=campaign.scheduler,
                progress=said,
            )
        )

    def _seeds(self, harness: Harness) -> list[bytes]:
        """Read the corpus; what the engine cannot use is said."""
        defaults = tuple(harness.seeds) or (DEFAULT_SEED,)
        seeds, chosen = read_seeds(self._campaign.corpus, defaults=defaults)
        self._said(chosen.sentence())
        return seeds

    def _before(self) -> tuple[float, int]:
        """Return the campaign's clock and its executions so far."""
        store, path = self._store, self._campaign.out / PROGRESS_FILE
        last = read_progress(path).last if path.is_file() else None
        if last is None:
            return store.elapsed, store.executions
        return max(store.elapsed, last.seconds), max(store.executions, last.executions)

    def _keep(self, found: FoundFinding) -> bool:
        """Keep a finding; see :class:`bridge.fuzz.hub.FindingSink`."""
        known = (self._store.findings / found.name / FINDING).is_file()
        if found.files:
            finding = self._findings.add(found.files, found.times, executions=self._hub.executions)
        elif known:
            finding = self._findings.count(found.name, found.times)
        else:
            raise InfrastructureError(f"a job counted the finding {found.name}, which is not there")
        if not known:
            self._new_findings += 1
            self._said(f"finding: {finding.title} (in {self._store.findings / finding.name})")
        return not known

    def run(self, shown: Callable[[CampaignView], object]) -> End:
        """Run until something ends it."""
        interrupted: KeyboardInterrupt | None = None
        try:
            self._loop(shown)
        except KeyboardInterrupt as interrupt:
            interrupted = interrupt
            self._said("ending the jobs")
        try:
            if not self._cluster.stop(_STOP_SECONDS):
                self._said(f"some jobs did not end in {_STOP_SECONDS:g} s; they are killed")
        finally:
            view = self._hub.view()
            self._sample(view)
        self._cluster.close()
        shown(view)
        if interrupted is None and view.executions == self._executions:
            self._said("no case was executed before the limit: give a longer --time")
        report, unreported = self._results()
        return End(view, self._new_findings, report, unreported, interrupted)

    def _loop(self, shown: Callable[[CampaignView], object]) -> None:
        campaign = self._campaign
        sampled = 0.0
        while True:
            self._cluster.step(_STEP_SECONDS)
            view = self._hub.view()
            shown(view)
            ran = view.seconds - self._began
            interval = _SAMPLE_SECONDS if ran < _EARLY_SECONDS else _LATER_SAMPLE_SECONDS
            if view.seconds - sampled >= interval:
                self._sample(view)
                sampled = view.seconds
            if campaign.seconds is not None and ran >= campaign.seconds:
                return
            if campaign.executions is not None and view.executions >= campaign.executions:
                return

    def _sample(self, view: CampaignView) -> None:
        self._writer.write(
            Sample(
                seconds=view.seconds,
                executions=view.executions,
                blocks=view.blocks,
                corpus=view.corpus,
                findings=view.findings,
                vms=view.vms,
                stability=view.stability,
            )
        )

    def _results(self) -> tuple[Path | None, BridgeError | None]:
        """Write the page, or return why it cannot be; that loses nothing that was announced."""
        from bridge.fuzz.report import write_campaign_report

        try:
            return write_campaign_report(self._campaign.out), None
        except BridgeError as error:
            self._said(f"the report could not be made: {error.message}")
            return None, error
