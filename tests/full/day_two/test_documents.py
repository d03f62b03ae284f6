"""What the documents of day two have people type, typed: on a cluster that is well, and on one that is not.

What docs/troubleshooting.md says is printed when all is well is not printed while the thing is broken which that
command is to show. docs/operations.md's commands are run in their order.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from benchmarks.preemption import PORTS
from tests.docs import sessions
from tests.docs.sessions import DOCUMENTS, HERE, Command
from tests.lab import cluster, preempt
from tests.lab.ansible import LAB_ID, ROOT, succeed, surroundings
from tests.lab.cluster import CONTROLLER, OTHER_KEY, SMOLLM2, TIER_NODE, WORKERS, run

OPERATIONS, TROUBLESHOOTING = DOCUMENTS
GPUS = "/etc/lab-gpus.json"
PAYING, AI = "vasp_priority", "ai_opportunistic"


def typed(document: Path) -> list[Command]:
    """The commands that are run here."""
    return [one for one in sessions.commands(document) if not (one.needs or one.run_by)]


LOOKS = typed(TROUBLESHOOTING)
# Slurm counts no memory in the lab, which lacks the cgroups for it.
UNBREAKABLE = ("--state=OUT_OF_MEMORY",)


def type_in(command: Command, more: str = "") -> tuple[int, str]:
    """Exit code and all that it prints, with the lab's addresses as the documents have them."""
    if command.host == HERE:
        mine = (
            command.text.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
            .replace("inventories/SITE", "inventories/lab")
            .replace("http://10.213.0.", f"http://10.213.{LAB_ID}.")
        )
        done = subprocess.run(
            mine + more,
            shell=True,
            cwd=ROOT,
            env={**surroundings(), "GLEANER_LAB_ID": LAB_ID, "PYTHONPATH": "src", "COLUMNS": "200"},
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=900,
        )
        code, output = done.returncode, done.stdout
    else:
        there = cluster.host(command.host).run(f"{{ {command.text}; }} 2>&1")
        code, output = there.rc, str(there.stdout)
    return code, re.sub(rf"\b10\.(213|214)\.{LAB_ID}\.", r"10.\1.0.", output)


def is_well(command: Command) -> bool:
    return sessions.printed_as(command.well, type_in(command)[1])


def serve() -> None:
    """Both tiers answer, the fast one with a model in memory."""
    preempt.wait_served()
    assert cluster.complete(SMOLLM2).status == 200


@pytest.fixture(scope="module", autouse=True)
def _served() -> Iterator[None]:
    serve()
    yield
    for tier in preempt.BOTH:
        if cluster.status(tier)["held"]:
            run(CONTROLLER, f"gleaner tier {tier} started")
    serve()


@pytest.mark.parametrize("command", LOOKS, ids=lambda command: command.name)
def test_when_all_is_well_it_prints_this(command: Command) -> None:
    code, output = type_in(command)
    assert code == 0, output
    assert sessions.printed_as(command.well, output), output


# What can be broken, which of the commands are to show it, and what cures it: the document's cure, where it has one.


@contextmanager
def stopped(host: str, unit: str) -> Iterator[None]:
    run(host, f"systemctl stop {unit}")
    try:
        yield
    finally:
        run(host, f"systemctl restart {unit}")


@contextmanager
def spoilt_site_of_nginx() -> Iterator[None]:
    run(CONTROLLER, "echo spoilt >> /etc/nginx/sites-available/ai-inference")
    try:
        yield
    finally:
        succeed("playbooks/gateway.yml")


@contextmanager
def held(tier: str) -> Iterator[None]:
    run(CONTROLLER, f"gleaner tier {tier} held")
    try:
        assert cluster.ask("/health", port=PORTS[tier]).status == 503
        yield
    finally:
        run(CONTROLLER, f"gleaner tier {tier} started")


@contextmanager
def unloaded() -> Iterator[None]:
    """The tier serves, and has no model in memory."""
    run(CONTROLLER, "gleaner tier fast restarted")
    cluster.wait_served()
    yield


@contextmanager
def moved(host: str, path: str) -> Iterator[None]:
    """A file is away for a while."""
    aside = f"{path.rpartition('/')[0]}/.aside"
    run(host, f"mv {path} {aside}")
    try:
        yield
    finally:
        run(host, f"mv {aside} {path}")


@contextmanager
def stranger_on_the_gpu() -> Iterator[None]:
    before = run(TIER_NODE, f"cat {GPUS}")
    state = json.loads(before)
    state["processes"] = [{"gpu_bus_id": state["gpus"][0]["pci.bus_id"], "pid": 1, "process_name": "init"}]
    cluster.put(TIER_NODE, GPUS, json.dumps(state))
    try:
        yield
    finally:
        cluster.put(TIER_NODE, GPUS, before)


@contextmanager
def drained() -> Iterator[None]:
    run(CONTROLLER, f"scontrol update nodename={TIER_NODE} state=drain reason='a new disk'")
    try:
        yield
    finally:
        run(CONTROLLER, f"scontrol update nodename={TIER_NODE} state=resume")


@contextmanager
def waiting() -> Iterator[None]:
    """A paying job waits; that its owner wants it to is all the same here."""
    job = cluster.submit("-p gpu_vasp --hold --wrap true")
    try:
        yield
    finally:
        cluster.cancel(job)


@contextmanager
def paying() -> Iterator[None]:
    with preempt.paying("reasoning") as job:
        preempt.wait_runs(job)
        yield


@contextmanager
def preempting_nothing() -> Iterator[None]:
    run(CONTROLLER, f"sacctmgr --immediate modify qos {PAYING} set preempt-={AI}")
    try:
        yield
    finally:
        run(CONTROLLER, f"sacctmgr --immediate modify qos {PAYING} set preempt={AI}")


@contextmanager
def frozen_worker() -> Iterator[None]:
    """Each worker that starts is frozen, so that the tier never comes back."""
    loop = f"while :; do pkill -STOP --uid {cluster.SERVICE_USER} --exact ggml-rpc-server; sleep 0.1; done"
    run(WORKERS[0], f'systemd-run --quiet --collect --unit=freeze-workers sh -c "{loop}"')
    try:
        cluster.wait_until("the tier is away", lambda: cluster.ask("/health", port=cluster.SPLIT_PORT).status == 503)
        yield
    finally:
        run(WORKERS[0], "systemctl stop freeze-workers")


@contextmanager
def drifted() -> Iterator[None]:
    """Somebody has changed a file by hand."""
    run(CONTROLLER, "chmod 0600 /etc/nginx/sites-available/ai-inference")
    try:
        yield
    finally:
        run(CONTROLLER, "chmod 0644 /etc/nginx/sites-available/ai-inference")


BUILD = "/cluster/shared/ai/llama.cpp/current/bin/llama-fit-params"
# By words of the commands that are to show it, the end of which is a `$`.
Broken = tuple[Callable[[], AbstractContextManager[None]], tuple[str, ...]]
BROKEN: dict[str, Broken] = {
    "nginx is stopped": (lambda: stopped(CONTROLLER, "nginx"), ("8080/health", "nginx -t", "is-active nginx")),
    "the gateway's file is spoilt": (spoilt_site_of_nginx, ("nginx -t",)),
    "the updater is stopped": (lambda: stopped(CONTROLLER, "gleaner-upstream"), ("is-active nginx gleaner",)),
    "the keeper is stopped": (lambda: stopped(CONTROLLER, "gleaner-keeper"), ("is-active nginx gleaner",)),
    "slurmctld is stopped": (
        lambda: stopped(CONTROLLER, "slurmctld"),
        ("gleaner status", "is-active nginx gleaner", "name=llama"),
    ),
    "a tier is held": (
        lambda: held("fast"),
        (
            "gleaner status$",
            "8080/health",
            "upstream-fast.conf",
            "v1/models",
            "access.log",
            "name=llama",
            "-n llama-14b",
        ),
    ),
    "no model is in memory": (unloaded, ("(id|value)",)),
    "a model's file is gone": (
        lambda: moved(TIER_NODE, f"/scratch/ai/models/{cluster.TINY}.gguf"),
        ("gleaner models check",),
    ),
    "a stranger is on the GPU": (stranger_on_the_gpu, ("gleaner gpus check",)),
    "a file of the engine is gone": (lambda: moved(CONTROLLER, BUILD), ("gleaner engine verify",)),
    "a paying job has the nodes": (paying, ("gleaner status$", "gpu_vasp --noheader", "name=llama")),
    "a paying job waits": (waiting, ("gpu_vasp --noheader", "gpu_vasp --states=PENDING")),
    "a node is drained": (drained, ("--list-reasons",)),
    "paying jobs preempt nothing": (preempting_nothing, ("PreemptType", "Preempt(")),
    "workers freeze": (frozen_worker, ("gleaner status$", "-n llama-72b")),
    "a tier without workers": (lambda: held("reasoning"), ("ggml-rpc-server",)),
    "a node runs no slurmd": (lambda: stopped(WORKERS[0], "slurmd"), ("is-active slurmd",)),
    "a file was changed by hand": (drifted, ("site.yml",)),
}


def shown_by(words: tuple[str, ...]) -> list[Command]:
    return [command for command in LOOKS if any(one in f"{command.text}$" for one in words)]


@pytest.mark.parametrize("broken", BROKEN)
def test_when_it_is_broken_it_does_not_print_that(broken: str) -> None:
    breaking, words = BROKEN[broken]
    commands = shown_by(words)
    with contextlib.ExitStack() as stack:
        stack.enter_context(breaking())
        still = [command.name for command in commands if is_well(command)]
    serve()
    assert not still, f"all is well, these say while {broken}"


def test_a_rule_that_is_broken_is_told_by_validate() -> None:
    (validate,) = shown_by(("validate.yml",))
    code, output = type_in(validate, " -e slurm_grace_seconds=1")
    assert code != 0
    assert not sessions.printed_as(validate.well, output), output


def test_every_command_is_seen_to_show_something() -> None:
    seen = {command.text for _, words in BROKEN.values() for command in shown_by(words)}
    seen |= {command.text for command in shown_by((*UNBREAKABLE, "validate.yml"))}
    assert not [command.name for command in LOOKS if command.text not in seen]


REKEY = "Change the server key"


def does(command: Command, more: str = "") -> None:
    code, output = type_in(command, more)
    assert code == 0, output
    assert not command.well or sessions.printed_as(command.well, output), output


@pytest.mark.parametrize(
    "command", [one for one in typed(OPERATIONS) if one.section != REKEY], ids=lambda command: command.name
)
def test_an_action_does_what_its_text_says(command: Command) -> None:
    """In their order: what one holds a later one starts."""
    if "started" not in command.text:
        serve()
    does(command)


def test_another_key_is_brought_and_then_the_one_before() -> None:
    key = "/etc/gleaner/server.key"
    before = run(CONTROLLER, f"sha256sum {key}")
    for new, other in ((f" -e vault_server_key={OTHER_KEY}", True), ("", False)):
        serve()
        for command in typed(OPERATIONS):
            if command.section == REKEY:
                does(command, new if "site.yml" in command.text else "")
        assert (run(CONTROLLER, f"sha256sum {key}") != before) is other
    serve()
