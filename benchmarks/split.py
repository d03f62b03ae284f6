"""What splitting a model over nodes costs: tokens a second of one node and of the split, and where the time goes.

Run against a lab that serves: `PYTHONPATH=src python -m benchmarks.split`; or against another site, with its
`--inventory` and a `--model` of it that fits into one GPU. The site's tiers are away meanwhile. Writes a section of
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import jobs, lab, report
from gleaner import plan as planner
from gleaner import site as site_model

GROUP = "slurm_controller"
KEEPER = "gleaner-keeper"
PROGRAMS = ("split_host.py", "sizing_host.py")
AWAY_SECONDS = 120
JOB_SECONDS = 2 * 60 * 60
ALONE, AGAIN, OWN_RPC, SPLIT = "one node", "one node again", "RPC within one node", "split"
WAYS = (ALONE, AGAIN, OWN_RPC, SPLIT)
PHASES = {"prompt": "reading a prompt", "answer": "writing an answer"}
# Flags with a value that only a split has.
SPLIT_FLAGS = ("--rpc", "--split-mode", "--tensor-split")


@dataclass(frozen=True)
class Measurement:
    """One phase of one way in one round, by llama-server's own clock and the node's own counters."""

    round: int
    way: str
    phase: str
    tokens: int
    tokens_per_second: float
    bytes: int
    packets: int


@dataclass(frozen=True)
class Shares:
    """Of the time of a token in the split: what one node needs, too, what RPC adds, and what the network adds."""

    computing: float
    rpc: float
    network: float

    @property
    def lost(self) -> float:
        return self.rpc + self.network


def shares(speeds: Mapping[str, float]) -> Shares:
    """Shares of the split's time for a token, from tokens a second of each way; they add up to 1.

    A share below 0 says that this part came out faster than without it, which noise and luck can do.
    """
    whole = 1 / speeds[SPLIT]
    computing, within = 1 / speeds[ALONE], 1 / speeds[OWN_RPC]
    return Shares(computing / whole, (within - computing) / whole, (whole - within) / whole)


def speeds(measured: Sequence[Measurement], phase: str) -> dict[str, list[float]]:
    """Tokens a second of each way, in the order of the rounds."""
    chosen = sorted((one for one in measured if one.phase == phase), key=lambda one: one.round)
    return {way: [one.tokens_per_second for one in chosen if one.way == way] for way in WAYS}


def medians(figures: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {way: statistics.median(values) for way, values in figures.items()}


def noise(figures: Mapping[str, Sequence[float]]) -> float:
    """What one node differs by from itself within a round, as a share; the median of the rounds."""
    return statistics.median(abs(1 - again / alone) for alone, again in zip(figures[ALONE], figures[AGAIN]))


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def spread(values: Sequence[float]) -> str:
    return f"{percent(statistics.median(values))} ({percent(min(values))} to {percent(max(values))})"


def speed_rows(measured: Sequence[Measurement]) -> Iterator[tuple[str, ...]]:
    for phase, words in PHASES.items():
        for way, values in speeds(measured, phase).items():
            yield words, way, f"{statistics.median(values):.1f}", f"{min(values):.1f} to {max(values):.1f}"


def verdict(lost: Sequence[float], noise: float) -> str:
    """The share lost, or why a run does not tell: its rounds disagree, or one node differs as much from itself."""
    if abs(statistics.median(lost)) <= noise:
        return f"untold: the noise is {percent(noise)}"
    if min(lost) < 0 < max(lost):
        return f"untold: the rounds say {percent(min(lost))} to {percent(max(lost))}"
    return spread(lost)


def share_rows(measured: Sequence[Measurement]) -> Iterator[tuple[str, ...]]:
    """Where the time of a token goes, by the rounds, each of which compares what was measured within a minute."""
    for phase, words in PHASES.items():
        figures = speeds(measured, phase)
        rounds = [shares(dict(zip(figures, row))) for row in zip(*figures.values())]
        each = (spread([getattr(one, part) for one in rounds]) for part in ("computing", "rpc", "network"))
        yield words, *each, verdict([one.lost for one in rounds], noise(figures)), percent(noise(figures))


def wire_rows(measured: Sequence[Measurement]) -> Iterator[tuple[str, ...]]:
    """What crossed the head's interface in the split, and the time that it took, for each token."""
    for phase, words in PHASES.items():
        chosen = [one for one in measured if (one.phase, one.way) == (phase, SPLIT)]
        middle = medians(speeds(measured, phase))
        yield (
            words,
            f"{statistics.median(one.bytes / one.tokens for one in chosen) / 1000:.1f}",
            f"{statistics.median(one.packets / one.tokens for one in chosen):.1f}",
            f"{1000 / middle[SPLIT]:.3f}",
            f"{1000 * (1 / middle[SPLIT] - 1 / middle[ALONE]):+.3f}",
            f"{1000 * (1 / middle[SPLIT] - 1 / middle[OWN_RPC]):+.3f}",
        )


def split_report(measured: Sequence[Measurement]) -> str:
    rounds = len({one.round for one in measured})
    raw = {
        f"{words}, {way}": values for phase, words in PHASES.items() for way, values in speeds(measured, phase).items()
    }
    return "\n\n".join(
        [
            f"Tokens a second, medians over {rounds} rounds; each round asks every way once, and each is first in its "
            "turn.",
            report.table(("", "way", "tokens/s", "from and to"), speed_rows(measured)),
            "Where the time of the split goes: medians of the rounds, with the least and the most. Lost is what one "
            "node does without: 1 - split / one node.",
            report.table(
                ("", "computing", "RPC", "network", "lost in all", "noise: one node against itself"),
                share_rows(measured),
            ),
            "What a token takes in the split: what crosses the head's interface, both directions, and milliseconds.",
            report.table(("", "kB", "packets", "ms", "of them lost", "of them to the network"), wire_rows(measured)),
            report.raw("Raw figures, in tokens/s", raw, 1),
        ]
    )


def read(lines: str) -> list[Measurement]:
    """What `split_host` wrote; RuntimeError with its words where it failed."""
    found: list[Measurement] = []
    for line in (json.loads(line) for line in lines.splitlines() if line.startswith("{")):
        if "failed" in line:
            raise RuntimeError(f"after {len(found) // len(PHASES)} measurements: {line['failed']}")
        found += [Measurement(line["round"], line["way"], phase, **line[phase]) for phase in PHASES]
    return found


def whole(measured: Sequence[Measurement], rounds: int) -> bool:
    """Whether every way was measured in every round."""
    return all(len(values) == rounds for phase in PHASES for values in speeds(measured, phase).values())


# The job


def without_split(arguments: Sequence[str]) -> list[str]:
    """The head's arguments for a server that has the whole model."""
    kept, words = [], iter(arguments)
    for word in words:
        if word in SPLIT_FLAGS:
            next(words)
        else:
            kept.append(word)
    return kept


def with_values(arguments: Sequence[str], **values: str) -> list[str]:
    """The same arguments with other values of some flags."""
    changed = list(arguments)
    for name, value in values.items():
        changed[changed.index(f"--{name}") + 1] = value
    return changed


def ways(arguments: Sequence[str], model_file: str) -> dict[str, list[str]]:
    """The arguments of each way, all of which follow from those that the plan gives the head of the split."""
    head = with_values(arguments, model=model_file, rpc="RPC")
    alone = without_split(head)
    return {ALONE: alone, AGAIN: alone, OWN_RPC: with_values(head, rpc="RPC-HERE"), SPLIT: head}


def model_file(site: Mapping[str, Any], name: str) -> str:
    """Where the head reads the model: a file of the site where it lies, else what a tier has staged."""
    (source,) = (str(model["source"]) for model in site["models"] if model["name"] == name)
    return source[len("file://") :] if source.startswith("file://") else f"{planner.MODELS_DIR}/{name}.gguf"


def plans(
    site: Mapping[str, Any], headers: site_model.Headers, wish: argparse.Namespace, nodes: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plan of the split, and of the same model on the head's node alone."""
    context = -(-(wish.prompt_tokens + wish.answer_tokens + 1) // 256) * 256
    common = {"context_tokens": context, "threads": wish.threads}
    head, *workers = nodes
    split = {"name": "split", "kind": "layer_split", "job_name": "split", "gateway_port": 8097, "priority": 1}
    split |= {"head": head, "workers": workers, "model": wish.model, **common}
    alone = {"name": "alone", "kind": "router", "job_name": "alone", "gateway_port": 8099, "priority": 2}
    alone |= {"nodes": [head], "models": [wish.model], "models_max": 1, **common}
    wanted = {**site, "tiers": [split, alone]}
    return planner.plan_tier(wanted, "split", headers), planner.plan_tier(wanted, "alone", headers)


def script(plan: Mapping[str, Any], memory_mib: int, folder: str, programs: str, threads: int) -> str:
    """The batch script: an RPC server on each worker, and the program that measures on the head's node."""
    slurm, nodes = plan["slurm"], plan["nodes"]
    step = f"srun --nodes=1 --ntasks=1 --cpus-per-task={slurm['cpus_per_node']} --mem=0 --input=none --propagate=NONE"
    lines = [
        "#!/bin/sh",
        *(f"#SBATCH --{name}={slurm[name]}" for name in ("partition", "qos", "account")),
        f"#SBATCH --nodes={len(nodes)} --nodelist={','.join(nodes)} --ntasks-per-node=1",
        f"#SBATCH --gres=gpu:{slurm['gpus_per_node']} --gres-flags=enforce-binding",
        f"#SBATCH --cpus-per-task={slurm['cpus_per_node']} --mem={memory_mib}M",
        f"#SBATCH --no-requeue --propagate=NONE --chdir={folder} --output={folder}/job.log",
    ]
    for name, node in nodes.items():
        if node["role"] == "worker":
            server = f"{programs}/ggml-rpc-server -H {node['rpc_address']} -p {plan['rpc_port']} -t {threads}"
            # A client that leaves while it is answered must not end the server.
            lines.append(f"{step} --nodelist={name} sh -c \"trap '' PIPE; exec {server}\" &")
    (head,) = (name for name, node in nodes.items() if node["role"] == "head")
    # With the batch script end the steps of the workers.
    lines.append(f"{step} --nodelist={head} python3 -m benchmarks.split_host task.json >results.jsonl")
    return "\n".join(lines) + "\n"


def host_memory_mib(site: Mapping[str, Any], split: Mapping[str, Any], alone: Mapping[str, Any]) -> int:
    """MiB for the job on each node: on the head's node all parts of the split run, too, in one of the ways."""
    wanted = max(len(split["nodes"]) * split["slurm"]["mem_mib"], alone["slurm"]["mem_mib"])
    least = min(int(site["nodes"][name]["memory_mib"]) for name in split["nodes"])
    return min(int(wanted), least)


@contextlib.contextmanager
def tiers_away(controller: list[str], site: Mapping[str, Any]) -> Iterator[None]:
    """No keeper and none of its jobs, until the end of the block."""
    user, names = str(site["service_user"]), [str(tier["job_name"]) for tier in site["tiers"]]
    waiting = ("squeue", "--noheader", f"--user={user}", f"--name={','.join(names)}")
    lab.output(controller, "systemctl", "stop", KEEPER)
    try:
        # Cancelled by the service user they are not held, as they are when a person cancels them.
        for name in names:
            lab.output(controller, "runuser", "-u", user, "--", "scancel", f"--user={user}", f"--name={name}")
        deadline = time.monotonic() + AWAY_SECONDS
        while lab.output(controller, *waiting):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{','.join(names)}: still there {AWAY_SECONDS} s after they were cancelled")
            time.sleep(1)
        yield
    finally:
        lab.output(controller, "systemctl", "start", KEEPER)


def run(here: lab.Lab, site: Mapping[str, Any], wish: argparse.Namespace, nodes: Sequence[str]) -> str:
    """Submit the job as the service user, wait for it, and give what its program wrote."""
    controller, user = here.ssh(str(site["controller"])), str(site["service_user"])
    split, alone = plans(site, site_model.read_headers(site), wish, nodes)
    folder, programs = f"{site['shared_dir']}/ai/split", f"{split['engine']['prefix']}/bin"
    workers = [node for node in split["nodes"].values() if node["role"] == "worker"]
    threads = wish.threads or split["slurm"]["cpus_per_node"]
    task = {
        "bin": programs,
        "arguments": ways(split["server"]["args"], model_file(site, wish.model)),
        "environment": split["server"]["environment"],
        "endpoints": [f"{node['rpc_address']}:{split['rpc_port']}" for node in workers],
        "address": split["nodes"][nodes[0]]["rpc_address"],
        "threads": threads,
        **{name: getattr(wish, name) for name in ("prompt_tokens", "answer_tokens", "rounds")},
    }
    memory_mib = host_memory_mib(site, split, alone)
    lab.output(controller, "install", "-d", "-o", user, folder, f"{folder}/benchmarks")
    try:
        for name in PROGRAMS:
            lab.put(controller, f"{folder}/benchmarks/{name}", Path(__file__).with_name(name).read_text())
        lab.put(controller, f"{folder}/task.json", json.dumps(task))
        lab.put(controller, f"{folder}/split.slurm", script(split, memory_mib, folder, programs, threads))
        with tiers_away(controller, site):
            submit = ("runuser", "-u", user, "--", "sbatch", "--parsable", "--job-name=split", f"{folder}/split.slurm")
            job = int(lab.output(controller, *submit))
            try:
                state = jobs.wait_for_end(controller, job, JOB_SECONDS)
            finally:
                jobs.end(controller, job)
        # Without an error when the job never came so far.
        results = lab.output(controller, "find", folder, "-name", "results.jsonl", "-exec", "cat", "{}", "+")
        if state != "COMPLETED" and "failed" not in results:
            raise RuntimeError(f"job {job}: {state}\n{lab.output(controller, 'tail', f'{folder}/job.log')}")
        return results
    finally:
        lab.output(controller, "rm", "-rf", folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inventory", default=lab.INVENTORY)
    parser.add_argument(
        "--nodes", default="vasp-01,vasp-02,vasp-03", help="the head, on which the model is staged, then its workers"
    )
    parser.add_argument("--model", default="smollm2-135m-instruct-q4_1")
    parser.add_argument("--threads", type=int, help="of each process; the lab's machine has 2 processors")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8, help="a multiple of 4 has every way first equally often")
    parser.add_argument("--no-report", action="store_true", help="leave docs/benchmarks.md alone")
    wish = parser.parse_args()
    if wish.rounds < 3:
        parser.error(f"--rounds {wish.rounds}: wanted 3 or more")
    here = lab.Lab(lab.lab_from_environment().id, wish.inventory)
    if here.is_lab and wish.threads is None:
        wish.threads = 2
    site = here.value(GROUP, "site")
    nodes = wish.nodes.split(",")
    about = {
        **lab.machine(),
        "engine": f"llama.cpp {site['llama_cpp']['version']}, {site['llama_cpp']['backend']}",
        "model": f"{wish.model}, {wish.prompt_tokens} tokens read, {wish.answer_tokens} written",
        "nodes": f"{nodes[0]} alone, and as head of {', '.join(nodes[1:])}"
        + (", which are all on this machine" if here.is_lab else f", of {wish.inventory}; the machine is another"),
    }
    measured = read(run(here, site, wish, nodes))
    if not whole(measured, wish.rounds):
        raise RuntimeError(f"{len(measured)} figures; wanted every way in each of {wish.rounds} rounds")
    text = f"{report.facts(about)}\n\n{split_report(measured)}"
    print(text)
    if not wish.no_report:
        report.write("split", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
