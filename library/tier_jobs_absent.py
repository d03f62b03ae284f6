#!/usr/bin/python3
"""Ansible module: no job of a tier is in Slurm's queue."""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import dataclass

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: tier_jobs_absent
short_description: End the jobs of the tiers that are left
description:
  - For when no keeper runs any more, which would submit others. Streams in flight get the tier's drain budget, as the
    job's supervisor drains on a signal. What does not end is cancelled.
  - A job is a tier's when it belongs to the service user and has the name of a tier's job, or a comment of ours. Others
    of that user stay.
  - A job that completes on a node that is dead cannot be ended by anybody, and is named. One that was preempted would
    come back from there, which a cancel prevents, where Slurm takes it.
options:
  uid:
    description: The service user's number, by which its jobs are known also when the user is gone.
    type: int
    required: true
  names: {description: Names of the tiers' jobs., type: list, elements: str, required: true}
  drain_seconds: {description: How long a job that runs may take., type: int, default: 60}
  wait_seconds: {description: How long one that is cancelled may., type: int, default: 60}
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
author: Gleaner
"""

EXAMPLES = r"""
- name: absent | No job of a tier is left
  tier_jobs_absent:
    uid: 64200
    names: [llama-14b, llama-72b]
"""

RETURN = r"""
jobs: {description: "What was ended, or would be.", type: list, elements: str, returned: always}
completing: {description: "What Slurm has not given up yet.", type: list, elements: str, returned: always}
"""

OURS = "gleaner:"
COMMAND_SECONDS = 30.0
POLL_SECONDS = 1.0


class SlurmError(Exception):
    """Slurm does not do what it is asked; the text says what."""


@dataclass(frozen=True)
class Job:
    id: str
    state: str
    name: str
    nodes: str

    @property
    def in_words(self) -> str:
        where = f" on {self.nodes}" if self.nodes else ""
        return f"{self.name}: job {self.id}, {self.state.lower()}{where}"


def run(*argv: str) -> str:
    """What it printed; SlurmError with its words when it fails."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{argv[0]}: no answer within {COMMAND_SECONDS:g} s") from None
    if done.returncode != 0:
        raise SlurmError(f"{' '.join(argv)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


# Everybody's, since squeue finds none of a user that is gone. Name and comment last: they may hold the separator.
QUEUE = ("squeue", "--noheader", "--format=%i|%T|%U|%N|%j|%k")


def ours(text: str, uid: int, names: list[str]) -> list[Job]:
    """The tiers' jobs of a queue."""
    found = []
    for line in filter(None, text.splitlines()):
        cells = line.split("|", 5)
        if len(cells) != 6:
            raise SlurmError(f"squeue: cannot read the line {line!r}")
        job, state, whose, nodes, name, comment = cells
        if whose == str(uid) and (name in names or comment.startswith(OURS)):
            # While a node has not answered to a signal, Slurm shows that in place of the state.
            found.append(Job(job, "RUNNING" if state == "SIGNALING" else state, name, nodes))
    return found


class Queue:
    """The tiers' jobs, and the ways to end them."""

    def __init__(self, uid: int, names: list[str]) -> None:
        self.uid, self.names = uid, names
        # Told not to come back, once they have completed.
        self.kept: set[str] = set()

    def jobs(self) -> list[Job]:
        return ours(run(*QUEUE), self.uid, self.names)

    def keep(self, job: Job) -> None:
        """One that completes may have been preempted, and would wait anew, for a program that is gone by then."""
        if job.id not in self.kept:
            self.kept.add(job.id)
            self.end(job, signal=False)

    def end(self, job: Job, signal: bool) -> None:
        """One that went in this moment is as wished."""
        try:
            run("scancel", *(["--batch", "--signal=TERM"] if signal else []), job.id)
        except SlurmError as error:
            if not re.search(r"Invalid job id|already complet", str(error), re.IGNORECASE):
                raise

    def wait(self, seconds: float) -> list[Job]:
        """Until none is left but those that complete; one that comes back waits, and is cancelled."""
        deadline = time.monotonic() + seconds
        while True:
            left = self.jobs()
            for job in left:
                if job.state == "PENDING":
                    self.end(job, signal=False)
                elif job.state == "COMPLETING":
                    self.keep(job)
            if not left or time.monotonic() >= deadline:
                return left
            time.sleep(POLL_SECONDS)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "uid": {"type": "int", "required": True},
            "names": {"type": "list", "elements": "str", "required": True},
            "drain_seconds": {"type": "int", "default": 60},
            "wait_seconds": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    if module.get_bin_path("squeue") is None:
        # A host that was never provisioned.
        module.exit_json(changed=False, jobs=[], completing=[])
    queue = Queue(module.params["uid"], module.params["names"])
    left: list[Job] = []
    try:
        queued = queue.jobs()
        jobs = [job for job in queued if job.state != "COMPLETING"]
        if queued and not module.check_mode:
            for job in jobs:
                queue.end(job, signal=job.state == "RUNNING")
            # Also for one that completes: it may come back, or be kept from that.
            left = queue.wait(module.params["drain_seconds"])
            late = [job for job in left if job.state != "COMPLETING"]
            for job in late:
                queue.end(job, signal=False)
            left = queue.wait(module.params["wait_seconds"]) if late else left
    except SlurmError as error:
        module.fail_json(msg=str(error))
    stuck = [job.in_words for job in left if job.state != "COMPLETING"]
    if stuck:
        module.fail_json(msg=f"cancelled, and still there: {'; '.join(stuck)}: `scontrol show job` tells more")
    module.exit_json(
        changed=bool(jobs),
        jobs=[job.in_words for job in jobs],
        completing=[job.in_words for job in left],
        diff={"before": "".join(f"{job.in_words}\n" for job in jobs), "after": ""} if jobs else {},
    )


if __name__ == "__main__":
    main()
