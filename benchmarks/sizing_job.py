"""Whether a job lives within the host memory that was planned for it, and not within four fifths of that.

Two real jobs on the lab, by the product's own supervisor: one with the planned --mem, one with 80 % of it. Both load
a model and read a prompt as long as its context.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from dataclasses import dataclass
from typing import Any

from benchmarks import jobs, lab
from gleaner import files
from gleaner import plan as planner
from gleaner import site as site_model

NODE = "vasp-03"
MODEL = "smollm2-135m-instruct-q4_1"
CONTEXT_TOKENS = 8192
PORT = 8099
SHARE = 0.8
START_SECONDS = 120
PROMPT_SECONDS = 900
ASK = """\
import sys, urllib.request
url, seconds, key = sys.argv[1], float(sys.argv[2]), open(sys.argv[3]).read().strip()
headers = {"Content-Type": "application/json", "Authorization": "Bearer " + key}
request = urllib.request.Request(url, sys.stdin.buffer.read(), headers)
urllib.request.urlopen(request, timeout=seconds).read()
"""
TIER = {
    "name": "sizing",
    "kind": "router",
    "job_name": "llama-sizing",
    "gateway_port": PORT,
    "nodes": [NODE],
    "priority": 1,
    "models": [MODEL],
    "models_max": 1,
    "context_tokens": CONTEXT_TOKENS,
    # As large as the context allows: the scores of a micro-batch are then most of the job, and all of them are used.
    "batch_tokens": 2048,
    "ubatch_tokens": 2048,
    "threads": 2,
}


@dataclass(frozen=True)
class Figures:
    """Planned and measured host memory of the job, in MiB, and what became of the one with less."""

    planned_mib: int
    peak_mib: float
    survived: bool
    starved_mib: int
    starved_end: str

    @property
    def bar_met(self) -> bool:
        return self.survived and self.peak_mib <= self.planned_mib and "exceeded memory limit" in self.starved_end

    def text(self) -> str:
        return (
            f"A job that loads {MODEL} and reads {CONTEXT_TOKENS - 64} tokens: planned `--mem` {self.planned_mib} MiB, "
            f"measured peak {self.peak_mib:.0f} MiB ({100 * self.peak_mib / self.planned_mib:.0f} %). "
            f"The same job with {self.starved_mib} MiB: {self.starved_end}. "
            f"Bar: the first lives, the second does not: {'met' if self.bar_met else 'missed'}."
        )


class _Site:
    """The lab's site with one more tier, and a folder on its shared file system for what belongs to it."""

    def __init__(self, here: lab.Lab) -> None:
        self.controller, self.node = here.ssh("slurm-ctl"), here.ssh(NODE)
        site = here.value("slurm-ctl", "site")
        site["tiers"] = [TIER]
        self.user = str(site["service_user"])
        self.plan = planner.plan_tier(site, str(TIER["name"]), site_model.read_headers(site))
        arguments = self.plan["server"]["args"]
        # The lab's own files, so that nothing has to be staged on a node that serves no tier.
        arguments[arguments.index("--models-dir") + 1] = "/srv/sources"
        self.folder = f"{site['shared_dir']}/ai/sizing"
        self.address = str(site["nodes"][NODE]["cluster_address"])

    def prepare(self) -> None:
        folders = " ".join(f"{self.folder}/{name}" for name in ("plans", "endpoints", "logs"))
        command = f"rm -rf {self.folder} && mkdir -p {folders} && cat > {self.folder}/plans/sizing.json"
        command += f" && chown -R {self.user} {self.folder}"
        subprocess.run([*self.controller, command], input=json.dumps(self.plan), text=True, check=True)

    def submit(self, mem_mib: int) -> int:
        slurm = self.plan["slurm"]
        command = [
            *("runuser", "-u", self.user, "--", "sbatch", "--parsable", "--chdir=/", f"--job-name={TIER['job_name']}"),
            *(f"--partition={slurm['partition']}", f"--qos={slurm['qos']}", f"--account={slurm['account']}"),
            *(f"--nodelist={NODE}", f"--cpus-per-task={slurm['cpus_per_node']}", f"--mem={mem_mib}M"),
            *("--no-requeue", "--propagate=NONE", "--acctg-freq=task=1", f"--output={self.folder}/logs/%j.log"),
            f"--wrap=exec /usr/local/bin/gleaner supervise --plan {self.folder}/plans/sizing.json",
        ]
        return int(lab.output(self.controller, *command))

    def ready(self, job: int) -> bool:
        """Wait until the tier serves; False when its job ended before."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if ".json" in lab.output(self.controller, "ls", f"{self.folder}/endpoints"):
                return True
            if jobs.state(self.controller, job) not in jobs.LIVING:
                return False
            time.sleep(1)
        raise RuntimeError(f"job {job} does not serve after {START_SECONDS} s: see {self.folder}/logs")

    def read_prompt(self) -> subprocess.Popen[bytes]:
        """Send a prompt that fills the context, from the node itself."""
        tokens: list[Any] = [100 + number % 4000 for number in range(CONTEXT_TOKENS - 64)]
        body = {"model": MODEL, "prompt": tokens, "max_tokens": 1, "temperature": 0}
        url = f"http://{self.address}:{PORT}/v1/completions"
        command = shlex.join(["python3", "-c", ASK, url, str(PROMPT_SECONDS), str(files.SERVER_KEY)])
        process = subprocess.Popen(
            [*self.node, command], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(body).encode())
        process.stdin.close()
        return process

    def peak_mib(self, job: int) -> float:
        """The largest memory of each step that slurmd saw so far, added up."""
        command = ["sstat", "--noheader", "--allsteps", "--parsable2", f"--jobs={job}", "--format=MaxRSS"]
        # A job that ends meanwhile has no steps to tell of.
        told = subprocess.run([*self.controller, shlex.join(command)], check=False, stdout=subprocess.PIPE, text=True)
        sizes = re.findall(r"^(\d+(?:\.\d+)?)([KMG]?)$", told.stdout, re.MULTILINE)
        return sum(float(number) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit] for number, unit in sizes) / 2**20

    def words(self, job: int) -> str:
        """How a job ended: Slurm's word, and what slurmd said of its memory."""
        command = [
            "sed",
            "-n",
            r"s/.*exceeded memory limit (\([0-9]* > [0-9]*\)).*/\1/p",
            f"{self.folder}/logs/{job}.log",
        ]
        state, sizes = jobs.wait_for_end(self.controller, job), lab.output(self.controller, *command).splitlines()
        return f"{state}, slurmd: exceeded memory limit ({sizes[0]} bytes)" if sizes else state

    def clear(self) -> None:
        lab.output(self.controller, "rm", "-rf", self.folder)


def _live(site: _Site, mem_mib: int) -> tuple[bool, float, str]:
    """Whether a job with so much memory reads its prompt, its peak in MiB, and how it ended if not."""
    site.prepare()
    job = site.submit(mem_mib)
    peak = 0.0
    try:
        if not site.ready(job):
            return False, peak, site.words(job)
        prompt = site.read_prompt()
        while prompt.poll() is None:
            if jobs.state(site.controller, job) == "RUNNING":
                peak = max(peak, site.peak_mib(job))
            time.sleep(1)
        if prompt.returncode == 0:
            # The last look of slurmd is a second old at most.
            time.sleep(2)
            return True, max(peak, site.peak_mib(job)), "it lived"
        return False, peak, site.words(job)
    finally:
        jobs.end(site.controller, job)


def run(here: lab.Lab) -> Figures:
    """Run both jobs and clear up after them."""
    site = _Site(here)
    planned = int(site.plan["slurm"]["mem_mib"])
    starved = int(SHARE * planned)
    try:
        survived, peak, _ = _live(site, planned)
        lived, _, end = _live(site, starved)
    finally:
        site.clear()
    return Figures(planned, peak, survived, starved, "it lived" if lived else end)
