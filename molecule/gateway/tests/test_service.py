"""How the gateway's programs sit on the controller."""

from __future__ import annotations

import re

import pytest

from tests.lab import cluster
from tests.lab.cluster import CONTROLLER, JOB_NAME, PORT, SMOLLM2, SPLIT_PORT, run


def test_nginx_listens_where_the_inventory_says_and_nowhere_else() -> None:
    lines = run(CONTROLLER, "ss --no-header --listening --tcp --numeric --processes").splitlines()
    listening = {line.split()[3] for line in lines if '"nginx"' in line}
    addresses = ("127.0.0.1", cluster.address(CONTROLLER))
    assert listening == {f"{address}:{port}" for address in addresses for port in (PORT, SPLIT_PORT)}


@pytest.mark.parametrize(("unit", "exposure"), [("gleaner-upstream", 2.5), ("gleaner-keeper", 2.0)])
def test_units_are_hardened(unit: str, exposure: float) -> None:
    # SYSTEMD_COLORS: the arrow before the line is coloured otherwise.
    report = run(CONTROLLER, f"SYSTEMD_COLORS=0 systemd-analyze security --no-pager {unit}.service")
    found = re.search(r"exposure level for .*: ([\d.]+)", report)
    assert found, report
    assert float(found[1]) <= exposure


def test_the_keeper_is_not_root_and_the_updater_has_three_capabilities() -> None:
    keeper = run(CONTROLLER, "grep ^CapEff /proc/$(systemctl show -p MainPID --value gleaner-keeper)/status")
    assert int(keeper.split()[1], 16) == 0
    updater = run(CONTROLLER, "grep ^CapEff /proc/$(systemctl show -p MainPID --value gleaner-upstream)/status")
    assert (
        int(updater.split()[1], 16) == 1 << 1 | 1 << 10 | 1 << 12
    )  # CAP_DAC_OVERRIDE, CAP_NET_BIND_SERVICE, CAP_NET_ADMIN


@pytest.mark.parametrize("unit", ["gleaner-upstream", "gleaner-keeper", "nginx"])
def test_a_killed_daemon_comes_back(unit: str) -> None:
    pid = f"systemctl show -p MainPID --value {unit}"
    before = run(CONTROLLER, pid)
    run(CONTROLLER, f"kill -KILL {before}")
    cluster.wait_until(f"{unit} is back", lambda: run(CONTROLLER, pid) not in ("0", before), 20)
    cluster.watch(lambda answers: answers[-1].status == 200, refused=unit == "nginx")
    assert cluster.complete(SMOLLM2).status == 200


def test_the_seeds_name_of_the_updater_is_the_program() -> None:
    script = "/usr/local/bin/ai-inference-upstream.sh"
    assert cluster.host(CONTROLLER).file(script).linked_to == script.removesuffix(".sh")
    assert "usage: gleaner route" in run(CONTROLLER, f"{script} --help")
    asked = cluster.host(CONTROLLER).run(f"{script} --config /dev/null")
    assert asked.rc != 0
    assert "/dev/null: " in f"{asked.stdout}{asked.stderr}"


def test_the_seeds_way_to_the_logs_of_jobs_leads_there() -> None:
    job = cluster.running_job()
    listed = {line.split()[-1] for line in run(CONTROLLER, "ls -lt /scratch/ai/logs/").splitlines()}
    assert {str(job.id), f"{JOB_NAME}.log"} <= listed
    assert f"tier fast: job {job.id}" in run(CONTROLLER, f"cat /scratch/ai/logs/{job.id}/supervisor.log")


def test_nginx_is_not_reloaded_while_nothing_changes() -> None:
    workers = run(CONTROLLER, "pgrep --full 'nginx: worker'")
    run(CONTROLLER, "systemctl restart gleaner-upstream")
    cluster.wait_served()
    assert run(CONTROLLER, "pgrep --full 'nginx: worker'") == workers
