"""A failing test on the lab prints what the services said meanwhile."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.lab import cluster

UNITS = ("slurmctld", "gleaner-keeper", "gleaner-upstream", "nginx")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not report.failed:
        return report
    since = int(call.start) - 1
    for name, command in (
        (
            cluster.CONTROLLER,
            f"journalctl --no-pager --since=@{since} -n 60 {' '.join(f'-u {unit}' for unit in UNITS)}",
        ),
        (cluster.CONTROLLER, "squeue --long; sinfo --Node; cat /cluster/shared/ai/endpoints/*.json"),
        (cluster.TIER_NODE, "cd /cluster/shared/ai/logs && tail -n 15 $(ls -td */ | head -n 1)*.log"),
    ):
        try:
            text = cluster.host(name).run(command).stdout
        except RuntimeError as error:
            text = f"cannot be asked: {error}"
        report.sections.append((f"{name}: {command}", text))
    return report
