"""Tiers that compete: who yields for whom, and that neither starves, against a small Slurm of our own."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gleaner import claims, digest, keeper, slurm, status
from gleaner.record import Withdrawn
from gleaner.states import Tier
from tests.unit.fakes import DIGEST, job_text, node_line, queue_line

OTHER = "fedcba9876543210"
POLL_SECONDS = 2
CLAIM_SECONDS = 60
YIELD_SECONDS = 30
DRAIN_SECONDS = 4
NODES = ("vasp-01", "vasp-02", "vasp-03")
FAST = claims.Need(10, ("vasp-02",), 1, 1, 8, 60_000)
REASONING = claims.Need(20, NODES, 3, 1, 12, 90_000)
IDLE = slurm.Node("", True, 1, 1, 0, 16, 0, 100_000, 0)


# The choice


def holder(job: int, need: claims.Need, *nodes: str) -> claims.Holder:
    return claims.Holder(job, need, frozenset(nodes))


def machine(**nodes: slurm.Node) -> dict[str, slurm.Node]:
    """Three nodes, idle but for those that are given."""
    given = {name.replace("_", "-"): node for name, node in nodes.items()}
    return {name: dataclasses.replace(given.get(name, IDLE), name=name) for name in NODES}


def held_by(*needs: claims.Need, of: slurm.Node = IDLE) -> slurm.Node:
    return dataclasses.replace(
        of,
        gpus_held=sum(need.gpus for need in needs),
        cpus_held=sum(need.cpus for need in needs),
        mem_held_mib=sum(need.mem_mib for need in needs),
    )


LOW = dataclasses.replace(FAST, priority=5)
ANY = dataclasses.replace(REASONING, node_count=1)
WIDE = dataclasses.replace(LOW, nodes=NODES, node_count=3)
HALF = dataclasses.replace(FAST, gpus=0, cpus=8, mem_mib=50_000)
FULL = held_by(FAST)
TWO_GPUS = dataclasses.replace(IDLE, gpus=2, cpus=32, mem_mib=200_000)


@pytest.mark.parametrize(
    ("need", "nodes", "holders", "yields"),
    [
        (REASONING, machine(), [], []),
        (REASONING, machine(vasp_02=FULL), [holder(1, FAST, "vasp-02")], [1]),
        (REASONING, machine(vasp_02=FULL), [], None),
        (REASONING, machine(vasp_02=FULL, vasp_03=FULL), [holder(1, FAST, "vasp-02")], None),
        (
            REASONING,
            machine(vasp_01=FULL, vasp_02=FULL),
            [holder(1, FAST, "vasp-01"), holder(2, LOW, "vasp-02")],
            [1, 2],
        ),
        (REASONING, machine(vasp_02=dataclasses.replace(FULL, up=False)), [holder(1, FAST, "vasp-02")], None),
        (REASONING, machine(vasp_01=dataclasses.replace(IDLE, up=False)), [], None),
        # Processors and memory count as GPUs do.
        (REASONING, machine(vasp_02=dataclasses.replace(FULL, cpus_held=13)), [holder(1, FAST, "vasp-02")], None),
        (
            REASONING,
            machine(vasp_02=dataclasses.replace(FULL, mem_held_mib=70_001)),
            [holder(1, FAST, "vasp-02")],
            None,
        ),
        (REASONING, machine(vasp_02=dataclasses.replace(FULL, mem_held_mib=70_000)), [holder(1, FAST, "vasp-02")], [1]),
        # Whole cores: 7 of 2 threads each are 8 processors.
        (
            dataclasses.replace(REASONING, cpus=15),
            machine(vasp_02=dataclasses.replace(FULL, threads_per_core=2, cpus_held=8)),
            [holder(1, dataclasses.replace(FAST, cpus=7), "vasp-02")],
            [1],
        ),
        # A router tier takes the one of its nodes that costs least.
        (ANY, machine(vasp_01=FULL, vasp_02=FULL, vasp_03=FULL), [holder(1, FAST, "vasp-02")], [1]),
        (ANY, machine(vasp_01=FULL, vasp_02=FULL), [holder(1, FAST, "vasp-02")], []),
        (
            ANY,
            machine(vasp_01=FULL, vasp_02=FULL, vasp_03=FULL),
            [holder(1, FAST, "vasp-01"), holder(2, LOW, "vasp-02"), holder(3, FAST, "vasp-03")],
            [2],
        ),
        (
            ANY,
            machine(vasp_01=held_by(HALF, HALF), vasp_02=FULL, vasp_03=dataclasses.replace(IDLE, up=False)),
            [holder(1, HALF, "vasp-01"), holder(2, HALF, "vasp-01"), holder(3, FAST, "vasp-02")],
            [3],
        ),
        # One yield frees all nodes of a wide job.
        (REASONING, machine(vasp_01=FULL, vasp_02=FULL, vasp_03=FULL), [holder(1, WIDE, *NODES)], [1]),
        # On nodes with room for both nobody yields, and of two that hold the last GPU the lower one does.
        (REASONING, machine(vasp_01=TWO_GPUS, vasp_02=held_by(FAST, of=TWO_GPUS)), [holder(1, FAST, "vasp-02")], []),
        (
            REASONING,
            machine(vasp_02=held_by(FAST, LOW, of=TWO_GPUS)),
            [holder(1, FAST, "vasp-02"), holder(2, LOW, "vasp-02")],
            [2],
        ),
        # The queue still shows what the node has given back already.
        (REASONING, machine(vasp_02=dataclasses.replace(IDLE, gpus=0)), [holder(1, FAST, "vasp-02")], None),
    ],
)
def test_fewest_and_lowest_yield(
    need: claims.Need, nodes: dict[str, slurm.Node], holders: Sequence[claims.Holder], yields: list[int] | None
) -> None:
    way = claims.best_way(need, nodes, holders)
    assert (None if way is None else [one.job for one in way.yields]) == yields


def test_only_a_lower_priority_on_shared_nodes_is_outranked() -> None:
    assert REASONING.outranks(FAST)
    assert not FAST.outranks(REASONING)
    assert not REASONING.outranks(dataclasses.replace(FAST, priority=20))
    assert not REASONING.outranks(dataclasses.replace(FAST, nodes=("vasp-04",)))


# A small Slurm


@dataclass
class Job:
    id: int
    name: str
    need: claims.Need
    state: str = "PENDING"
    reason: str = "Resources"
    nodes: tuple[str, ...] = ()
    comment: str = "gleaner:" + DIGEST
    restarts: int = 0
    started: float = 0.0
    ran: float = 0.0
    ends_at: float = float("inf")
    ends_as: str = "COMPLETED"
    preempted: bool = False


LIVING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")


@dataclass
class Cluster:
    """Starts whatever fits, in the order of submission: a small job never waits for a big one."""

    folder: Path
    nodes: dict[str, slurm.Node] = field(default_factory=machine)
    node_states: dict[str, str] = field(default_factory=dict)
    paying: dict[str, claims.Need] = field(default_factory=dict)
    needs: dict[str, claims.Need] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    now: float = 1000.0
    run_seconds: dict[str, float] = field(default_factory=dict)
    """How long jobs of this name run before they fail."""
    ignores_term: bool = False
    keeps_comments: bool = False
    stale_queue: str = ""
    """What the next squeue says."""

    # The clock

    def monotonic(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += POLL_SECONDS
        for job in self.jobs:
            if job.state == "RUNNING":
                job.ran = self.now - job.started
            if job.state == "RUNNING" and self.now >= job.ends_at:
                job.state, job.nodes = job.ends_as, ()
        for job in self.jobs:
            if job.state == "PENDING" and not self.others_of(job) and job.reason in ("Resources", "None"):
                self.start(job)

    def others_of(self, job: Job) -> bool:
        return any(other.name == job.name and other.state in LIVING and other.id < job.id for other in self.jobs)

    def start(self, job: Job) -> None:
        free = [name for name in job.need.nodes if self.fits(job.need, name)]
        if len(free) < job.need.node_count:
            return
        job.state, job.nodes, job.started, job.ran = "RUNNING", tuple(free[: job.need.node_count]), self.now, 0.0
        if job.name in self.run_seconds:
            job.ends_at, job.ends_as = self.now + self.run_seconds[job.name], "FAILED"

    def fits(self, need: claims.Need, name: str) -> bool:
        node = self.look(name)
        return (
            name not in self.node_states
            and node.gpus - node.gpus_held >= need.gpus
            and node.cpus - node.cpus_held >= need.cpus
            and node.mem_mib - node.mem_held_mib >= need.mem_mib
        )

    def look(self, name: str) -> slurm.Node:
        there = [job.need for job in self.jobs if name in job.nodes and job.state in ("RUNNING", "COMPLETING")]
        return held_by(*there, *([self.paying[name]] if name in self.paying else []), of=self.nodes[name])

    def pay(self, *names: str) -> None:
        """A paying user's job starts on these nodes; ours there are preempted, and wait again."""
        for name in names:
            self.paying[name] = claims.Need(0, (name,), 1, 1, 16, 100_000)
            for job in self.jobs:
                if name in job.nodes and job.state == "RUNNING":
                    job.state, job.nodes, job.restarts = "PENDING", (), job.restarts + 1

    def leave(self, *names: str) -> None:
        for name in names:
            del self.paying[name]

    # The commands

    def run(self, argv: list[str], timeout_seconds: float = 10.0) -> str:
        line = " ".join(argv)
        self.calls.append(line)
        if argv[0] == "squeue" and self.stale_queue:
            queue, self.stale_queue = self.stale_queue, ""
            return queue
        if argv[0] == "squeue":
            return "".join(self.row(job) for job in self.jobs if job.state in LIVING)
        if line.startswith("scontrol show node"):
            return "".join(self.node_row(name) for name in argv[-1].split(","))
        if argv[0] == "sbatch":
            name = Path(argv[-1]).stem
            made_from = digest.read(Path(argv[-1]).read_text())
            self.jobs.append(Job(41 + len(self.jobs), name, self.needs[name], comment=f"gleaner:{made_from}"))
            return f"{self.jobs[-1].id}\n"
        if argv[0] == "sacct":
            return f"CANCELLED by {os.getuid()}\n"
        job = next(one for one in self.jobs if str(one.id) in line.replace("=", " ").split())
        if argv[0] == "scancel" and "--signal=TERM" in argv:
            job.ends_at, job.ends_as = (self.now + DRAIN_SECONDS, "COMPLETED") if not self.ignores_term else (1e9, "")
        elif argv[0] == "scancel":
            job.state, job.nodes = "CANCELLED", ()
        elif "Comment=" in line and self.keeps_comments:
            raise slurm.SlurmError("scontrol: Access/permission denied")
        elif "Comment=" in line:
            job.comment = line.partition("Comment=")[2]
        elif argv[:3] == ["scontrol", "show", "job"]:
            text = job_text(job=str(job.id), state=job.state, ran=clock(job.ran), comment=job.comment)
            return text.replace("llama-14b", job.name)
        return ""

    @staticmethod
    def row(job: Job) -> str:
        return queue_line(
            job=str(job.id),
            name=job.name,
            state=job.state,
            restarts=str(job.restarts),
            preempted="2026-11-24T01:10:00" if job.preempted else "N/A",
            ran=clock(job.ran),
            nodes=",".join(job.nodes),
            reason=job.reason if job.state == "PENDING" else "None",
            comment=f"{job.comment:<60}",
        )

    def node_row(self, name: str) -> str:
        return node_line(self.look(name), state=self.node_states.get(name, "MIXED"))


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600:02d}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


class Site:
    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.config = keeper.Config(
            service_user="ai-inference",
            poll_seconds=POLL_SECONDS,
            yield_seconds=YIELD_SECONDS,
            accounting_seconds=120,
            claim_after_seconds=CLAIM_SECONDS,
            lost_seconds=60,
            # Not there, so nobody is judged by a sign of life.
            registry=folder / "endpoints",
            state=folder / "keeper.json",
            tiers=(),
        )
        self.keeper = keeper.Keeper(self.config)

    def keep(self, **needs: claims.Need) -> Site:
        """A keeper, started anew, of these tiers."""
        self.cluster.needs = needs
        for name in needs:
            (self.folder / f"{name}.slurm").write_text(f"#SBATCH --comment=gleaner:{DIGEST}\n")
        tiers = tuple(
            keeper.TierConfig(name, name, str(self.folder / f"{name}.slurm"), DIGEST, need)
            for name, need in needs.items()
        )
        self.config = dataclasses.replace(self.config, tiers=tiers)
        self.keeper = keeper.Keeper(self.config)
        return self

    def restart_keeper(self) -> None:
        self.keeper = keeper.Keeper(self.config)

    def pass_time(self, seconds: float, until: Callable[[], bool] = lambda: False) -> float:
        """Let time pass, to the end or until something is so; how long it took."""
        begin = self.cluster.now
        while self.cluster.now < begin + seconds and not until():
            self.cluster.step()
            self.keeper.poll()
        return self.cluster.now - begin

    def job(self, name: str) -> Job:
        """The newest."""
        return next(job for job in reversed(self.cluster.jobs) if job.name == name)

    def runs(self, name: str) -> bool:
        return any(job.name == name and job.state == "RUNNING" for job in self.cluster.jobs)

    def state(self, name: str) -> keeper.TierState:
        return keeper.load_state(self.config.state)[name]

    def shown(self, name: str) -> tuple[Tier, str]:
        jobs = [job for job in slurm.jobs("ai-inference", [name]) if job.name == name]
        state = self.state(name)
        return status.state_of(jobs, Withdrawn(), False, state), state.why

    def count(self, start: str) -> int:
        return len([call for call in self.cluster.calls if call.startswith(start)])


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Site:
    cluster = Cluster(tmp_path)
    monkeypatch.setattr(time, "monotonic", cluster.monotonic)
    monkeypatch.setattr(slurm, "run", cluster.run)
    return Site(tmp_path, cluster)


def starved(site: Site) -> Site:
    """The big tier waits: the small one had its node first."""
    site.keep(fast=FAST, reasoning=REASONING)
    site.cluster.pay("vasp-01")
    site.pass_time(10)
    site.cluster.leave("vasp-01")
    assert site.runs("fast")
    assert not site.runs("reasoning")
    return site


def test_the_tier_that_slurm_starves_runs_after_a_while(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    starved(site)
    assert site.pass_time(200, lambda: site.job("fast").comment.endswith("outranked")) == CLAIM_SECONDS + POLL_SECONDS
    assert digest.read(site.job("fast").comment) == DIGEST
    words = "reasoning (priority 20) wants vasp-01,vasp-02,vasp-03"
    assert site.shown("fast") == (Tier.YIELDING, f"job 41 yields: {words}")
    assert site.shown("reasoning")[0] is Tier.QUEUED
    assert site.pass_time(200, lambda: site.runs("reasoning")) <= DRAIN_SECONDS + POLL_SECONDS
    site.pass_time(10)
    assert site.shown("fast") == (Tier.QUEUED, "")
    assert (site.state("fast").failures, site.state("fast").held) == (0, False)
    site.pass_time(1000)
    assert site.runs("reasoning")
    assert site.count("scancel --batch") == 1, "yielded more than once"
    assert site.state("reasoning").claims == 0, "a good run forgives"
    assert "reasoning: claims vasp-01,vasp-02,vasp-03, which lower tiers held for 60 s" in capfd.readouterr().err


def test_while_the_claim_lives_the_lower_tier_is_paused_in_words(site: Site) -> None:
    starved(site)
    site.pass_time(200, lambda: site.count("scancel --batch") == 1)
    # As if Slurm took its time.
    site.job("reasoning").reason = "Priority"
    site.pass_time(10)
    assert site.shown("fast") == (Tier.PAUSED, "reasoning (priority 20) wants vasp-01,vasp-02,vasp-03")
    assert site.count("sbatch") == 2, "submitted into the claim"
    assert site.state("fast").failures == 0


def test_a_claim_that_slurm_does_not_honour_ends(site: Site) -> None:
    starved(site)
    site.pass_time(200, lambda: site.count("scancel --batch") == 1)
    site.job("reasoning").reason = "Priority"
    site.pass_time(20, lambda: not site.runs("fast"))
    assert site.pass_time(1000, lambda: site.runs("fast")) <= CLAIM_SECONDS + keeper.START_SECONDS + 5 * POLL_SECONDS
    assert site.state("reasoning").claims == 1
    assert site.shown("fast") == (Tier.LOADING, "")


def test_nothing_yields_where_slurm_can_start_it_anyway(site: Site) -> None:
    site.keep(fast=FAST, reasoning=dataclasses.replace(REASONING, nodes=("vasp-01", "vasp-03"), node_count=2))
    site.cluster.pay("vasp-01")
    site.pass_time(10)
    site.cluster.leave("vasp-01")
    site.pass_time(500)
    assert site.runs("fast")
    assert site.runs("reasoning")
    assert site.count("scontrol show node") == 0, "asked for nodes although no tier competes"


@pytest.mark.parametrize(
    "state", ["MIXED+DRAIN", "DOWN", "IDLE*", "IDLE+NOT_RESPONDING", "IDLE+MAINT+RESERVED", "FAIL"]
)
def test_a_node_that_starts_nothing_means_no_claim(site: Site, state: str) -> None:
    site.cluster.node_states["vasp-03"] = state
    site.keep(fast=FAST, reasoning=REASONING).pass_time(500)
    assert site.runs("fast")
    assert site.count("scancel") == 0
    del site.cluster.node_states["vasp-03"]
    assert CLAIM_SECONDS <= site.pass_time(500, lambda: site.runs("reasoning")) <= CLAIM_SECONDS + 10


def test_paying_jobs_that_come_and_go_start_the_wait_anew(site: Site) -> None:
    starved(site)
    for _ in range(5):
        site.pass_time(CLAIM_SECONDS - 10)
        site.cluster.pay("vasp-03")
        site.pass_time(POLL_SECONDS)
        site.cluster.leave("vasp-03")
    assert site.count("scancel") == 0
    site.pass_time(CLAIM_SECONDS + 10, lambda: site.runs("reasoning"))
    assert site.runs("reasoning")


def test_paying_jobs_that_take_the_claimed_nodes_end_the_claim(site: Site) -> None:
    starved(site)
    site.pass_time(200, lambda: site.count("scancel --batch") == 1)
    site.cluster.pay("vasp-01", "vasp-03")
    site.pass_time(20, lambda: site.runs("fast") and site.job("fast").id != 41)
    assert site.runs("fast"), "the lower tier does not run while the higher one cannot"
    assert (site.state("reasoning").claims, site.state("reasoning").claimed) == (1, [])
    site.pass_time(1000)
    assert site.count("scancel --batch") == 1
    site.cluster.leave("vasp-01", "vasp-03")
    assert site.pass_time(1000, lambda: site.runs("reasoning")) >= 2 * CLAIM_SECONDS


def test_a_higher_tier_that_crashes_gets_its_nodes_ever_more_seldom(site: Site) -> None:
    starved(site)
    site.cluster.run_seconds["reasoning"] = 20
    gaps = []
    for _ in range(9):
        gaps.append(site.pass_time(10_000, lambda: site.runs("reasoning")))
        site.pass_time(100, lambda: not site.runs("reasoning"))
    waits = [CLAIM_SECONDS * 2**count for count in (0, 1, 2, 3, 4, 5, 6, 6, 6)]
    # Besides the wait itself: the pause after its failure, and the yield.
    assert all(wait <= gap <= wait + 330 for wait, gap in zip(waits, gaps)), gaps
    assert site.state("fast").failures == 0
    del site.cluster.run_seconds["reasoning"]
    site.pass_time(10_000, lambda: site.runs("reasoning"))
    site.pass_time(keeper.GOOD_RUN_SECONDS + 10)
    assert site.state("reasoning").claims == 0


def test_the_lower_tier_runs_between_the_crashes_of_the_higher_one(site: Site) -> None:
    starved(site)
    site.cluster.run_seconds["reasoning"] = 20
    served = 0
    for _ in range(2000):
        site.pass_time(POLL_SECONDS)
        served += site.runs("fast")
    assert served / 2000 > 0.8


def test_keeper_restarted_in_the_middle_of_a_claim_goes_on_with_it(site: Site) -> None:
    starved(site)
    site.pass_time(200, lambda: site.count("scancel --batch") == 1)
    site.restart_keeper()
    assert site.pass_time(60, lambda: site.runs("reasoning")) <= DRAIN_SECONDS + POLL_SECONDS
    site.restart_keeper()
    site.pass_time(20)
    assert site.shown("fast")[0] is Tier.QUEUED
    assert site.state("reasoning").claims == 1


def test_keeper_restarted_while_the_tier_waits_waits_anew(site: Site) -> None:
    starved(site)
    site.pass_time(CLAIM_SECONDS - 10)
    site.restart_keeper()
    site.pass_time(CLAIM_SECONDS - 10)
    assert site.count("scancel") == 0
    site.pass_time(20)
    assert site.runs("reasoning")


def test_two_lower_tiers_on_one_set_of_nodes_yield_both(site: Site) -> None:
    second = dataclasses.replace(FAST, priority=15, nodes=("vasp-03",))
    site.keep(fast=FAST, second=second, reasoning=REASONING).pass_time(10)
    assert site.runs("fast")
    assert site.runs("second")
    assert site.pass_time(200, lambda: site.runs("reasoning")) < CLAIM_SECONDS + 20
    assert site.count("scancel --batch") == 2
    site.pass_time(10)
    assert [site.shown(name)[0] for name in ("fast", "second")] == [Tier.QUEUED, Tier.QUEUED]


def test_a_lower_tier_that_waits_is_kept_out_of_the_claim_and_not_held(site: Site) -> None:
    second = dataclasses.replace(FAST, priority=5, nodes=("vasp-02", "vasp-03"), gpus=1)
    site.keep(fast=FAST, reasoning=REASONING)
    site.pass_time(4)
    site.keep(fast=FAST, reasoning=REASONING, second=second)
    site.cluster.pay("vasp-03")
    site.pass_time(10)
    assert site.shown("second")[0] is Tier.QUEUED
    # It gets nothing, however long: the paying job leaves, and the small tier takes its node.
    site.cluster.leave("vasp-03")
    site.pass_time(200, lambda: site.runs("reasoning"))
    assert site.runs("reasoning")
    site.pass_time(10)
    assert [(site.state(name).held, site.state(name).failures) for name in ("fast", "second")] == [(False, 0)] * 2
    assert [site.shown(name)[0] for name in ("fast", "second")] == [Tier.QUEUED, Tier.QUEUED]


def test_a_waiting_job_of_a_lower_tier_is_cancelled_and_follows_later(site: Site) -> None:
    second = dataclasses.replace(FAST, priority=5, mem_mib=200_000)
    starved(site).keep(fast=FAST, reasoning=REASONING, second=second)
    site.pass_time(200, lambda: site.count("scancel") > 1)
    assert site.job("second").state == "CANCELLED"
    site.pass_time(30)
    assert site.runs("reasoning")
    assert site.shown("second") == (Tier.QUEUED, "")
    assert (site.state("second").held, site.state("second").failures) == (False, 0)


def test_a_higher_router_tier_makes_the_fewest_and_lowest_yield(site: Site) -> None:
    lower = {
        name: dataclasses.replace(FAST, priority=priority, nodes=(node,))
        for name, priority, node in (("one", 10, "vasp-01"), ("two", 5, "vasp-02"), ("three", 10, "vasp-03"))
    }
    site.keep(**lower).pass_time(4)
    behind = dataclasses.replace(FAST, priority=1, nodes=("vasp-01",))
    site.keep(**lower, behind=behind, high=dataclasses.replace(FAST, priority=20, nodes=NODES))
    site.pass_time(300, lambda: site.runs("high"))
    assert site.count("scancel") == 1, "a tier that waits for another node than the claimed one was in the way"
    assert site.job("high").nodes == ("vasp-02",)
    assert site.count("scancel --batch") == 1
    assert [site.runs(name) for name in lower] == [True, False, True]
    site.pass_time(20)
    assert site.shown("two")[0] is Tier.QUEUED


@pytest.mark.parametrize(
    "need",
    [
        dataclasses.replace(REASONING, priority=10),
        dataclasses.replace(REASONING, priority=9),
        dataclasses.replace(REASONING, cpus=17),
        dataclasses.replace(REASONING, mem_mib=100_001),
        dataclasses.replace(REASONING, gpus=2),
    ],
)
def test_never_a_claim(site: Site, need: claims.Need) -> None:
    site.keep(fast=FAST, reasoning=need).pass_time(1000)
    assert site.runs("fast")
    assert site.count("scancel") == 0


@pytest.mark.parametrize(
    "reason",
    [
        "JobHeldUser",
        "JobHeldAdmin",
        "BeginTime",
        "Dependency",
        "QOSMaxJobsPerUserLimit",
        "(launch failed requeued held)",
    ],
)
def test_a_job_that_waits_for_something_else_claims_nothing(site: Site, reason: str) -> None:
    starved(site).job("reasoning").reason = reason
    site.pass_time(300)
    assert site.runs("fast")
    assert site.count("scancel") == 0


def test_a_job_held_in_the_middle_of_its_claim_gives_it_up(site: Site) -> None:
    starved(site)
    site.pass_time(200, lambda: site.count("scancel --batch") == 1)
    site.job("reasoning").reason = "JobHeldUser"
    site.pass_time(20)
    assert site.runs("fast")
    assert site.state("reasoning").claimed == []


def test_what_a_paying_job_is_just_taking_is_nobodys_to_claim(site: Site) -> None:
    starved(site).job("fast").preempted = True
    site.pass_time(300)
    assert site.count("scancel") == 0


def test_another_tier_is_untouched(site: Site) -> None:
    site.cluster.nodes["vasp-04"] = dataclasses.replace(IDLE, name="vasp-04")
    apart = dataclasses.replace(FAST, priority=1, nodes=("vasp-04",))
    site.keep(fast=FAST, reasoning=REASONING, apart=apart)
    site.pass_time(200, lambda: site.runs("reasoning"))
    assert site.runs("reasoning")
    assert site.runs("apart")
    assert len([job for job in site.cluster.jobs if job.name == "apart"]) == 1


def test_a_lower_tier_that_does_not_yield_is_cancelled(site: Site) -> None:
    site.cluster.ignores_term = True
    starved(site)
    took = site.pass_time(300, lambda: site.runs("reasoning"))
    assert CLAIM_SECONDS + YIELD_SECONDS <= took <= CLAIM_SECONDS + YIELD_SECONDS + 10
    site.pass_time(10)
    assert (site.state("fast").held, site.state("fast").failures) == (False, 0)
    assert site.shown("fast")[0] is Tier.QUEUED


def test_three_ranks_end_with_the_highest(site: Site) -> None:
    middle = dataclasses.replace(REASONING, priority=15, nodes=("vasp-02", "vasp-03"), node_count=2)
    site.keep(fast=FAST, middle=middle, reasoning=REASONING)
    site.pass_time(1000, lambda: site.runs("reasoning"))
    assert site.runs("reasoning")
    assert site.state("middle").claims == 0, "both claimed at once"
    site.pass_time(1000)
    assert site.runs("reasoning")
    assert [site.shown(name)[0] for name in ("fast", "middle")] == [Tier.QUEUED, Tier.QUEUED]


def test_nodes_are_asked_for_only_while_a_tier_waits_for_a_lower_one(site: Site) -> None:
    site.keep(fast=FAST, reasoning=REASONING)
    site.cluster.pay("vasp-02")
    site.pass_time(100)
    assert site.count("scontrol show node") == 0, "nobody of ours holds anything"
    site.cluster.leave("vasp-02")
    site.pass_time(CLAIM_SECONDS + 30)
    assert site.runs("reasoning")
    asked = site.count("scontrol show node")
    site.pass_time(100)
    assert site.count("scontrol show node") == asked, "asked although the tier runs"


def test_a_lower_tier_that_runs_elsewhere_goes_on(site: Site) -> None:
    site.cluster.nodes["vasp-04"] = dataclasses.replace(IDLE, name="vasp-04")
    both = dataclasses.replace(FAST, nodes=("vasp-02", "vasp-04"))
    site.cluster.pay("vasp-02")
    site.keep(both=both).pass_time(4)
    assert site.job("both").nodes == ("vasp-04",)
    site.cluster.leave("vasp-02")
    site.keep(both=both, fast=FAST).pass_time(4)
    site.keep(both=both, fast=FAST, reasoning=REASONING)
    site.pass_time(300, lambda: site.runs("reasoning"))
    assert site.runs("both")
    assert site.count("scancel") == 1


def test_nodes_are_not_asked_for_while_lower_tiers_run_elsewhere(site: Site) -> None:
    site.cluster.nodes["vasp-04"] = dataclasses.replace(IDLE, name="vasp-04")
    site.cluster.pay("vasp-02")
    site.keep(both=dataclasses.replace(FAST, nodes=("vasp-02", "vasp-04")), reasoning=REASONING).pass_time(100)
    assert site.runs("both")
    assert site.count("scontrol show node") == 0


def test_a_job_for_which_there_is_room_claims_nothing_however_long_slurm_takes(site: Site) -> None:
    for name in NODES:
        site.cluster.nodes[name] = dataclasses.replace(TWO_GPUS, name=name)
    site.keep(fast=FAST).pass_time(4)
    site.keep(fast=FAST, reasoning=REASONING).pass_time(0)
    site.keeper.poll()
    site.job("reasoning").reason = "Priority"
    site.pass_time(500)
    assert not site.runs("reasoning")
    assert (site.state("reasoning").claims, site.count("scancel")) == (0, 0)


def test_a_second_job_in_the_queue_of_a_tier_that_runs_claims_nothing(site: Site) -> None:
    lower = {
        name: dataclasses.replace(FAST, nodes=(node,)) for name, node in (("two", "vasp-02"), ("three", "vasp-03"))
    }
    high = dataclasses.replace(FAST, priority=20, nodes=NODES)
    site.keep(**lower, high=high).pass_time(10)
    assert site.runs("high")
    site.cluster.jobs.append(Job(99, "high", high, reason="Priority"))
    site.pass_time(500)
    assert site.count("scancel") == 0


def test_a_lower_tier_that_ends_and_comes_back_does_not_start_the_wait_anew(site: Site) -> None:
    starved(site)
    site.pass_time(CLAIM_SECONDS // 2)
    site.job("fast").state = "COMPLETING"
    site.pass_time(POLL_SECONDS)
    site.job("fast").state = "RUNNING"
    site.pass_time(CLAIM_SECONDS // 2)
    assert site.count("scancel --batch") == 1


def test_a_start_that_the_queue_does_not_show_yet_is_not_taken_for_a_paying_job(
    site: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    starved(site)
    site.pass_time(200, lambda: site.count("scancel --batch") == 1)
    queue = site.cluster.run(["squeue"])
    site.pass_time(200, lambda: not site.runs("fast"))
    assert site.runs("reasoning")
    kept = keeper.load_state(site.config.state)
    claimed = dataclasses.replace(kept["reasoning"], claimed=list(NODES))
    keeper.save_state(site.config.state, {**kept, "reasoning": claimed})
    reasoning = next(line for line in queue.splitlines() if "reasoning" in line)
    site.cluster.stale_queue = reasoning + "\n"
    site.keeper.poll()
    assert site.state("reasoning").claimed == list(NODES)
    site.keeper.poll()
    assert site.state("reasoning").claimed == []
    assert "others have its nodes" not in capfd.readouterr().err


def test_a_job_that_was_told_to_yield_does_so_whatever_becomes_of_the_claim(site: Site) -> None:
    site.cluster.ignores_term = site.cluster.keeps_comments = True
    starved(site)
    site.pass_time(200, lambda: site.count("scancel --batch") == 1)
    site.cluster.pay("vasp-03")
    site.pass_time(20)
    assert site.state("reasoning").claimed == []
    assert site.job("fast").state == "RUNNING"
    site.pass_time(YIELD_SECONDS)
    assert site.count("scancel 41") == 1
    site.pass_time(10)
    assert site.runs("fast")


def test_a_mark_outlives_the_keepers_memory(site: Site) -> None:
    site.keep(fast=FAST).pass_time(4)
    site.job("fast").comment = digest.outranked(DIGEST)
    site.config.state.unlink()
    site.restart_keeper()
    site.pass_time(2)
    assert site.shown("fast") == (Tier.YIELDING, "job 41 yields: a tier of higher priority wanted its nodes")
    site.pass_time(20)
    assert site.runs("fast")
    assert not digest.is_outranked(site.job("fast").comment)


def refuse_nodes(names: Sequence[str], timeout_seconds: float) -> dict[str, slurm.Node]:
    raise slurm.SlurmError(f"scontrol: Node {names[-1]} not found")


def test_a_claim_ends_even_if_slurm_does_not_show_its_nodes_any_more(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    starved(site)
    site.pass_time(200, lambda: site.count("scancel --batch") == 1)
    site.job("reasoning").reason = "Priority"
    with monkeypatch.context() as patch:
        patch.setattr(slurm, "nodes", refuse_nodes)
        site.pass_time(20)
        site.restart_keeper()
        site.pass_time(20)
        assert not site.runs("fast")
        assert site.pass_time(1000, lambda: site.runs("fast")) <= 2 * YIELD_SECONDS + CLAIM_SECONDS + 60 + 10
    assert site.state("reasoning").claimed == []


def test_slurm_that_does_not_show_its_nodes_is_said_and_claims_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm, "nodes", refuse_nodes)
    starved(site).pass_time(300)
    assert site.runs("fast")
    assert capfd.readouterr().err.count("cannot see which nodes it could have") == 1


def test_outranked_jobs_do_not_wipe_out_failures_of_their_own(site: Site) -> None:
    starved(site)
    keeper.save_state(
        site.config.state, {**keeper.load_state(site.config.state), "fast": keeper.TierState(job=41, failures=3)}
    )
    site.pass_time(200, lambda: site.runs("reasoning"))
    site.pass_time(10)
    assert site.state("fast").failures == 3


def test_new_plan_of_the_higher_tier_forgets_its_failed_claims(site: Site) -> None:
    starved(site)
    kept = keeper.load_state(site.config.state)
    keeper.save_state(site.config.state, {**kept, "reasoning": dataclasses.replace(kept["reasoning"], claims=6)})
    (site.folder / "reasoning.slurm").write_text(f"#SBATCH --comment=gleaner:{OTHER}\n")
    fast, reasoning = site.config.tiers
    site.config = dataclasses.replace(site.config, tiers=(fast, dataclasses.replace(reasoning, digest=OTHER)))
    site.restart_keeper()
    site.pass_time(CLAIM_SECONDS + 20)
    assert site.runs("reasoning")
    assert site.job("reasoning").comment == f"gleaner:{OTHER}"


def test_both_run_where_there_is_a_node_for_each(site: Site) -> None:
    site.cluster.nodes["vasp-04"] = dataclasses.replace(IDLE, name="vasp-04")
    site.keep(fast=dataclasses.replace(FAST, nodes=("vasp-02", "vasp-04")), reasoning=REASONING)
    site.pass_time(CLAIM_SECONDS + 100)
    assert site.runs("reasoning")
    assert site.job("fast").nodes == ("vasp-04",)
    site.pass_time(1000)
    assert site.runs("reasoning")
    assert site.runs("fast")
    assert site.count("scancel --batch") <= 1
