"""Fifty preemptions in a row, of both tiers, by several paying jobs at once: nothing is left behind, nothing fails."""

from __future__ import annotations

import contextlib
import functools
import re
import time

from benchmarks.preemption import FAST, REASONING
from tests.lab import cluster, preempt
from tests.lab.cluster import HOSTS, NODES, RPC_PORT, SERVICE_USER, run

PREEMPTIONS = 50
# Each round preempts both tiers: all nodes at once, or one after another, a second apart.
ROUNDS = PREEMPTIONS // 2


def traces(name: str) -> dict[str, str]:
    """What yields could leave on a host; numbers that differ between two runs of the same are left out."""
    asked = {
        "programs": f"ps -u {SERVICE_USER} -o args= | grep -vE '^(/usr/bin/)?(squeue|scontrol|sacct|ps) ' | sort",
        "ports": "ss --listening --tcp --numeric --no-header | awk '{print $4}' | sort",
        "shared memory": f"find /dev/shm -user {SERVICE_USER}; "
        f"awk -v uid=$(id -u {SERVICE_USER}) '$8 == uid' /proc/sysvipc/shm",
        "run": "[ ! -d /run/gleaner ] || ls -A /run/gleaner",
        "registry": "ls /cluster/shared/ai/endpoints; find /cluster/shared/ai/endpoints -name '.*' -mmin +1",
        "upstreams": "[ ! -d /etc/nginx/ai-inference ] || cat /etc/nginx/ai-inference/upstream-*.conf",
        "temporary": "find $(ls -d /tmp /scratch/*/) -ignore_readdir_race "
        f"-user {SERVICE_USER} -newer /run/before -name '*tmp*'",
    }
    found = {what: run(name, command) for what, command in asked.items()}
    # Agents and supervisors listen on ports that the kernel chooses, and so do the processes of a router's models.
    chosen = range(*map(int, run(name, "cat /proc/sys/net/ipv4/ip_local_port_range").split()))
    ports = [
        line
        for line in found["ports"].splitlines()
        if (port := int(line.rpartition(":")[2])) not in chosen or port == RPC_PORT
    ]
    found["ports"] = "\n".join(ports)
    found["programs"] = re.sub(r"\d+", "N", found["programs"])
    return found


def is_as_before(name: str, before: dict[str, str]) -> bool:
    after = traces(name)
    print(name, {what: (before[what], after[what]) for what in before if before[what] != after[what]})
    return after == before


def served() -> None:
    preempt.wait_served()
    for model, port in ((cluster.SMOLLM2, cluster.PORT), (cluster.THINKING, cluster.SPLIT_PORT)):
        assert cluster.complete(model, port=port).status == 200


def test_fifty_preemptions_leave_nothing_behind() -> None:
    served()
    began = int(time.time())
    for name in HOSTS:
        run(name, "touch /run/before")
    before = {name: traces(name) for name in HOSTS}
    jobs = {tier: preempt.tier_job(tier) for tier in (FAST, REASONING)}
    for number in range(ROUNDS):
        with contextlib.ExitStack() as stack:
            if number % 2:
                paying = [stack.enter_context(preempt.paying(FAST, REASONING))]
            else:
                # An ordinary sbatch for each node, about a second apart by itself.
                paying = [stack.enter_context(preempt.paying(tier)) for tier in (REASONING, FAST)]
            for number_of in paying:
                preempt.wait_runs(number_of)
            assert all(preempt.left_on(node) == [] for node in NODES)
        preempt.wait_served()
    served()

    for tier, job in jobs.items():
        after = preempt.tier_job(tier)
        assert (after.id, after.restarts) == (job.id, job.restarts + ROUNDS)
        assert preempt.states(job.id) <= {"PREEMPTED", "REQUEUED", "RUNNING", "PENDING"}, tier
        assert preempt.ledger(tier, f"@{began}")["differences"] == []
        assert preempt.ledger(tier, f"@{began}")["preemptions"] == ROUNDS
    for name in HOSTS:
        # A record that is just being written has another name for a moment.
        cluster.wait_until(f"{name} is as before", functools.partial(is_as_before, name, before[name]), 30, 1)
        run(name, "rm /run/before")
