"""site.yml is killed: at random points, on bare hosts and in runs that change much, and before each handler.

Whatever the point, the next run repairs it, and the one after that finds nothing to do. Wants a lab of bare hosts.
The points are drawn from GLEANER_SEED, which is printed.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lab import cluster, processes
from tests.lab.ansible import LAB_ID, ROOT, Run, command, succeed, surroundings
from tests.lab.cluster import CONTROLLER, JOB_NAME, NODES, SMOLLM2, SPLIT_JOB, SPLIT_PORT, THINKING, TIER_NODE
from tests.lab.cluster import run as ask

SEED = int(os.environ.get("GLEANER_SEED") or time.time_ns() % 1_000_000)
# Of runs on bare hosts, and of runs that change much.
BARE_KILLS, RANDOM_KILLS = 2, 8
# At the end of a run, all within a moment: it would be over before it is killed.
LAST_HEADINGS = 10
HEADING = re.compile(r"(?:TASK|RUNNING HANDLER|PLAY) \[.*\]")
# Nothing is claimed of the time: a run that hangs is to end.
RUN_SECONDS = 1500
BACK_SECONDS = 180.0
CONFIGLESS = ("slurm.conf", "gres.conf", "cgroup.conf")


@dataclass(frozen=True)
class Site:
    """What the runs change: the site as its inventory has it, and another one."""

    name: str
    port: int
    lend_port: int
    context_tokens: int
    delay: int
    memory_mib: int
    grace: int

    def variables(self, folder: Path) -> tuple[str, str]:
        """Arguments of ansible-playbook."""
        tiers = yaml.safe_load((ROOT / "inventories/lab/group_vars/all/tiers.yml").read_text())["tiers"]
        for tier in tiers:
            tier["context_tokens"] = self.context_tokens
        tiers[0]["gateway_port"] = self.port
        path = folder / f"{self.name}.json"
        path.write_text(
            json.dumps(
                {
                    "tiers": tiers,
                    "model_store_lend_port": self.lend_port,
                    "tier_node_lend_ports": [self.lend_port],
                    "slurm_controller_scheduler_parameters": [f"batch_sched_delay={self.delay}"],
                    "slurm_controller_default_memory_per_cpu_mib": self.memory_mib,
                    "slurm_grace_seconds": self.grace,
                }
            )
        )
        return "-e", f"@{path}"


HERE = Site("here", 8080, 8098, 2048, 1, 2048, 30)
THERE = Site("there", 8090, 8099, 2304, 2, 2304, 35)


def other(site: Site) -> Site:
    return THERE if site is HERE else HERE


@dataclass
class Play:
    """A run of site.yml, with the moment of each line of its output, in s since its start."""

    process: subprocess.Popen[str]
    began: float = field(default_factory=time.monotonic)
    lines: list[tuple[float, str]] = field(default_factory=list)
    # The heading at which it has to stand still: a look now and then would come too late.
    halt: str = ""
    halted: bool = False

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic() - self.began, line))
            if self.halt and self.halt in line and not self.halted:
                os.kill(self.process.pid, signal.SIGSTOP)
                self.halted = True

    @property
    def headings(self) -> list[tuple[float, str]]:
        return [(moment, found[0]) for moment, line in list(self.lines) if (found := HEADING.match(line))]

    @property
    def run(self) -> Run:
        return Run(self.process.returncode, "".join(line for _, line in self.lines))


def play(arguments: tuple[str, ...], killed: Callable[[Play], bool] = lambda play: False, halt: str = "") -> Play:
    """Run site.yml to its end, or to the moment at which it is to be killed, with all its processes."""
    with subprocess.Popen(
        command("site.yml", *arguments),
        cwd=ROOT,
        # With skipped hosts a heading comes before its task begins, else with the first result.
        env={**surroundings(), "GLEANER_LAB_ID": LAB_ID, "ANSIBLE_DISPLAY_SKIPPED_HOSTS": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        run = Play(process, halt=halt)
        reader = threading.Thread(target=run.read)
        reader.start()
        try:
            while process.poll() is None and not run.halted and not killed(run):
                assert time.monotonic() - run.began < RUN_SECONDS, run.run.output[-3000:]
                time.sleep(0.01)
        finally:
            # Ansible's workers have sessions of their own: they are found as descendants.
            doomed = processes.with_descendants({process.pid})
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                processes.kill(doomed)
            process.wait()
            reader.join()
    return run


def whole(*arguments: str) -> Play:
    run = play(arguments)
    assert run.run.code == 0, run.run.output
    return run


def repaired(*arguments: str) -> Play:
    """The run after a kill, and the one after that, which finds nothing to do."""
    repair = whole(*arguments)
    again = whole(*arguments)
    assert set(again.run.changed.values()) == {0}, again.run.output
    return repair


def killed_at(heading: str, *arguments: str) -> None:
    """Kill a run when it announces this, before it can do it."""
    run = play(arguments, halt=heading)
    assert run.process.returncode == -signal.SIGKILL, f"it ended before {heading}:\n{run.run.output}"
    print(f"killed at {heading}", flush=True)


def killed_past(index: int, rest: float, what: str, *arguments: str) -> None:
    """Kill a run so many seconds after its heading with this number, or when it is done with what that announces.

    `what` says of the kill what the run does not.
    """

    def is_hit(run: Play) -> bool:
        headings = run.headings
        if len(headings) == index + 1:
            return time.monotonic() - run.began >= headings[index][0] + rest
        return len(headings) > index + 1

    run = play(arguments, is_hit)
    where = f"{what}, seed {SEED}: {run.headings[-1][1]} (heading {len(run.headings)})"
    assert run.process.returncode == -signal.SIGKILL, f"it ended before it was killed: {where}\n{run.run.output}"
    print(f"kill {where}", flush=True)


def assert_in_force(site: Site) -> None:
    """Tiers serve, and what runs is what the files say, as it is seen from outside."""
    digests = {tier["job_name"]: tier["digest"] for tier in keeper_tiers()}
    for name in (JOB_NAME, SPLIT_JOB):
        cluster.wait_until(f"{name} runs its plan", lambda name=name: has_digest(name, digests[name]), BACK_SECONDS)  # type: ignore[misc]
    for model, port in ((SMOLLM2, site.port), (THINKING, SPLIT_PORT)):
        cluster.wait_until(f"{port} answers", lambda m=model, p=port: answers(m, p), BACK_SECONDS)  # type: ignore[misc]
    (entry,) = cluster.ask("/v1/models", port=SPLIT_PORT).json["data"]
    assert entry["meta"]["n_ctx"] == site.context_tokens
    assert cluster.ask("/health", port=other(site).port).status == 0

    config = ask(CONTROLLER, "scontrol show config")
    assert f"batch_sched_delay={site.delay}" in config
    assert re.search(rf"DefMemPerCPU\s+= {site.memory_mib}$", config, re.MULTILINE), config
    for file in CONFIGLESS:
        written = ask(CONTROLLER, f"cat /etc/slurm/{file}")
        for node in NODES:
            assert ask(node, f"cat /run/slurm/conf/{file}") == written, f"{node} has another {file}"
    assert grace() == f"00:00:{site.grace}"

    for port, listens in ((site.lend_port, True), (other(site).lend_port, False)):
        reached = cluster.host(NODES[0]).run(f"timeout 5 bash -c '</dev/tcp/{cluster.address(TIER_NODE)}/{port}'")
        assert (reached.rc == 0) is listens, f"port {port}: {reached.stderr}"
    table = ask(TIER_NODE, "nft list table inet gleaner")
    for port in (site.port, site.lend_port):
        assert str(port) in table
    # The tier's port of before stays closed to others, as firewall.nft says; the lending's is forgotten.
    assert str(other(site).lend_port) not in table
    credential = ask(CONTROLLER, "munge -n")
    for node in NODES:
        ask(node, f"echo {shlex.quote(credential)} | unmunge")


def keeper_tiers() -> list[dict[str, Any]]:
    tiers: list[dict[str, Any]] = json.loads(ask(CONTROLLER, "cat /etc/gleaner/keeper.json"))["tiers"]
    return tiers


def has_digest(job_name: str, digest: str) -> bool:
    job = cluster.tier_job(job_name)
    return job is not None and job.state == "RUNNING" and cluster.comment(job.id) == f"gleaner:{digest}"


def answers(model: str, port: int) -> bool:
    return cluster.complete(model, port=port).status == 200


def grace() -> str:
    return ask(CONTROLLER, "sacctmgr --noheader --parsable2 show qos ai_opportunistic format=GraceTime")


def test_a_run_on_bare_hosts_is_killed_when_munge_runs_with_another_key(tmp_path: Path) -> None:
    arguments = HERE.variables(tmp_path)
    killed_at("RUNNING HANDLER [munge : Restart munge]", *arguments)
    repaired(*arguments)
    assert_in_force(HERE)


@pytest.fixture(scope="module")
def bare_headings(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many headings a run has that finds nothing to do; on bare hosts it has handlers besides."""
    return len(whole(*HERE.variables(tmp_path_factory.mktemp("bare"))).headings)


@pytest.mark.parametrize("number", range(BARE_KILLS))
def test_a_run_on_bare_hosts_is_killed_at_a_random_point(number: int, bare_headings: int, tmp_path: Path) -> None:
    """While packages are installed, accounting is set up, the engine built, models brought: whatever it is then."""
    succeed("playbooks/lab_down.yml")
    succeed("playbooks/lab_up.yml")
    for name in (CONTROLLER, *NODES):
        cluster.forget(name)
    draw = random.Random(SEED + number)
    # One in each half: most of the time goes by in the first, most tasks are in the second.
    index, rest = int((number + draw.random()) / BARE_KILLS * bare_headings), draw.random()
    arguments = HERE.variables(tmp_path)
    killed_past(index, rest, f"{number + 1} of {BARE_KILLS} on bare hosts", *arguments)
    repaired(*arguments)
    assert_in_force(HERE)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, str]]:
    """The headings of a run that changes much, and when each came."""
    run = whole(*THERE.variables(tmp_path_factory.mktemp("reference")))
    assert_in_force(THERE)
    return [*run.headings, (run.lines[-1][0], "the end")]


def points() -> list[float]:
    """Shares of a run's duration, one in each of its equal parts, in any order."""
    draw = random.Random(SEED)
    shares = [(part + draw.random()) / RANDOM_KILLS for part in range(RANDOM_KILLS)]
    draw.shuffle(shares)
    return shares


# A run in parallel would draw other points; the names of the tests are to be the same for all who collect them.
@pytest.mark.parametrize("number", range(RANDOM_KILLS))
def test_a_run_that_changes_much_is_killed_at_a_random_point(
    number: int, reference: list[tuple[float, str]], tmp_path: Path
) -> None:
    site = (HERE, THERE)[number % 2]
    arguments = site.variables(tmp_path)
    share = points()[number]
    moment = share * reference[-1][0]
    # Named by the heading, since no two runs are equally fast.
    index = max(place for place, (start, _) in enumerate(reference[:-LAST_HEADINGS]) if start <= moment)
    rest = moment - reference[index][0]
    killed_past(index, rest, f"{number + 1} of {RANDOM_KILLS}, at {share:.0%} of a run", *arguments)
    repaired(*arguments)
    assert_in_force(site)


def refuses_two_mib() -> bool:
    """nginx refuses a body of two MiB."""
    return cluster.ask("/v1/completions", b"x" * (2 << 20)).status == 413


def command_line(name: str, unit: str) -> str:
    """Of a unit's first process."""
    return ask(name, f"tr '\\0' ' ' </proc/$(systemctl show --property=MainPID --value {unit})/cmdline")


def is_younger(unit: str, file: str) -> bool:
    """The unit's process was started after the file was written."""
    started = ask(CONTROLLER, f'date +%s --date="$(systemctl show --property=ExecMainStartTimestamp --value {unit})"')
    return int(started) >= int(ask(CONTROLLER, f"stat --format=%Y {file}"))


def has_default_memory(mib: int) -> bool:
    return f"DefMemPerCPU={mib}" in re.sub(r"\s+= ", "=", ask(CONTROLLER, "scontrol show config"))


def nodes_have(line: str) -> bool:
    return all(line in ask(node, "cat /run/slurm/conf/slurm.conf").splitlines() for node in NODES)


def lends_at(port: int) -> bool:
    return all(f":{port} " in ask(node, "ss --listening --tcp --numeric") for node in NODES)


def lets_in(port: int) -> bool:
    return all(str(port) in ask(node, "nft list table inet gleaner") for node in NODES)


# What a run is stopped before is over in an instant, so it is stopped before the one ahead of it.
STOPPED_BEFORE = {"slurm_controller : Nodes fetch the configuration": "slurm_controller : Slurmctld answers"}
# Tag, handler, what changes the file that it is for, and what the service does with it.
HANDLERS: list[tuple[str, str, dict[str, object], Callable[[], bool]]] = [
    (
        "slurm_accounting",
        "slurm_accounting : Restart slurmdbd",
        {"vault_slurmdbd_password": "another-password-long-enough-for-the-checks"},
        lambda: is_younger("slurmdbd", "/etc/slurm/slurmdbd.conf") and grace() != "",
    ),
    (
        "slurm_controller",
        "slurm_controller : Restart slurmctld",
        {"slurm_controller_default_memory_per_cpu_mib": 1024},
        lambda: has_default_memory(1024) and nodes_have("DefMemPerCPU=1024"),
    ),
    (
        "slurm_controller",
        "slurm_controller : Nodes fetch the configuration",
        {"slurm_controller_default_memory_per_cpu_mib": 1536},
        lambda: nodes_have("DefMemPerCPU=1536"),
    ),
    (
        "slurm_node",
        "slurm_node : Restart slurmd",
        {"slurm_node_controller": cluster.address(CONTROLLER)},
        lambda: all(cluster.address(CONTROLLER) in command_line(node, "slurmd") for node in NODES),
    ),
    ("tier_node", "tier_node : Load the firewall table", {"tier_node_lend_ports": [8098, 8097]}, lambda: lets_in(8097)),
    ("model_store", "model_store : Restart the lending", {"model_store_lend_port": 8097}, lambda: lends_at(8097)),
    (
        "tier_keeper",
        "tier_keeper : Restart the keeper",
        {"gleaner_program_path": "/usr/local/bin/gleaner"},
        lambda: "/usr/local/bin/gleaner keep" in command_line(CONTROLLER, "gleaner-keeper"),
    ),
    ("gateway", "gateway : Reload nginx", {"gateway_max_body_mib": 1}, refuses_two_mib),
    (
        "gateway",
        "gateway : Restart the updater",
        {"gateway_poll_seconds": 2},
        lambda: is_younger("gleaner-upstream", "/etc/gleaner/gateway.json"),
    ),
]


@pytest.mark.parametrize(("tag", "handler", "variables", "claim"), HANDLERS, ids=[entry[1] for entry in HANDLERS])
def test_a_run_is_killed_between_a_file_and_its_handler(
    tag: str, handler: str, variables: dict[str, object], claim: Callable[[], bool]
) -> None:
    arguments = ("--tags", tag, "-e", json.dumps(variables))
    killed_at(f"RUNNING HANDLER [{STOPPED_BEFORE.get(handler, handler)}]", *arguments)
    assert not claim(), "it was told all the same"
    dry = play((*arguments, "--check"))
    assert dry.run.code == 0, dry.run.output
    assert set(dry.run.changed.values()) != {0}, dry.run.output
    assert f"RUNNING HANDLER [{handler}]" in dry.run.output
    repaired(*arguments)
    assert claim()


def test_the_site_of_the_inventory_comes_back(tmp_path: Path) -> None:
    repaired(*HERE.variables(tmp_path))
    assert_in_force(HERE)
    assert set(whole().run.changed.values()) == {0}
