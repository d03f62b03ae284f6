"""What paying jobs wait for because of the tiers, and how soon the tiers are back: measured, beside idle nodes.

Run against a lab that serves: `PYTHONPATH=src python -m benchmarks.preemption`. Writes a section of docs/preemption.md
for the lab's version of Slurm; exits with 1 when a bar is missed.

Every round has each case once: a paying job for the fast tier's node while nothing is in flight, with a stream that
needs less than the drain budget, or with one that needs more; a paying job for all nodes, which both tiers leave; and
the same two jobs on idle nodes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import lab, report
from gleaner import events
from gleaner.events import Event, Kind

DOCUMENT = lab.ROOT / "docs" / "preemption.md"
CONTROLLER = "slurm-ctl"
USER = "alice"
FOLDER = "/cluster/shared/preemption"
EVENTS = "/cluster/shared/ai/events"
# The tiers of inventories/lab.
FAST, REASONING = "fast", "reasoning"
JOBS = {FAST: "llama-14b", REASONING: "llama-72b"}
PORTS = {FAST: 8080, REASONING: 8081}
MODELS = {FAST: "smollm2-135m-instruct-q4_1", REASONING: "smollm2-135m-thinking-q4_1"}
NODES = {FAST: ("vasp-02",), REASONING: ("vasp-01", "vasp-03")}
PERIOD_SECONDS = 0.1
# A request may have to wait for a long stream, since the lab's models answer one at a time.
ASK_SECONDS = 30.0
SERVED_SECONDS = 180.0
# A paying job that ends sooner may find the tier's own job in the wait that Slurm gives a requeued one; the keeper ends
# that within some four seconds.
PAYING_SECONDS = 5.0
QUIET_SECONDS = 4.0
# A refusal by the gateway alone takes less; what takes longer was handed over.
REFUSAL_SECONDS = 0.3
COMMAND_SECONDS = 180.0
# One case that cannot be played does not cost the others.
FAILURES = (RuntimeError, subprocess.SubprocessError, ValueError)

# Bars, in seconds.
EXTRA_BAR = 1.0
WORST_BAR = 3.0
ROUTED_BAR = 1.0
CUT_BAR = 1.0
CUT_EARLY = 0.3
# Slurm starts a job in the second whose end the ledger has; its script runs a moment later, more on a busy machine.
LEDGER_BARS = (-2.0, 1.0)
RETURN_BAR = 3.0

IDLE, SHORT, LONG, WIDE = "nothing in flight", "a short stream", "a long stream", "all nodes, nothing in flight"
CASES = (IDLE, SHORT, LONG, WIDE)
STREAMS = (SHORT, LONG)
# A short stream takes this share of the drain budget, a long one all that the context has room for.
SHORT_SHARE = 0.6
LONG_TOKENS = 1900

PAYING = """#!/bin/sh
# A paying job: notes when it starts and when it ends, and runs until it is told to end.
note() { date +%s.%N >"$SLURM_JOB_ID.$1.new" && mv "$SLURM_JOB_ID.$1.new" "$SLURM_JOB_ID.$1"; }
note start
while [ ! -e "$SLURM_JOB_ID.stop" ]; do sleep 0.05; done
note end
"""


@dataclass(frozen=True)
class Asked:
    """One request of the client that never stops asking, and what is wrong with its answer, if anything."""

    at: float
    status: int
    seconds: float
    wrong: str = ""


@dataclass
class Stream:
    """One stream through the gateway: when it ended, and whether it said that it was whole."""

    ended: float = 0.0
    done: bool = False
    pieces: int = 0
    error: str = ""
    thread: threading.Thread | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Yield:
    """What a tier did for a paying job, by its own events and by the client that kept asking. Unix seconds."""

    tier: str
    signalled: float
    drained: float
    left: float
    last_sent: float
    """When the last request was sent that was handed over."""
    in_flight: float
    """When the last of them had its answer."""
    running: float
    served: float


@dataclass(frozen=True)
class Round:
    """One case of one round."""

    case: str
    job: int
    wait: float
    """From sbatch to the job's first line."""
    baseline: float
    """The same on idle nodes, in this round."""
    ended: float
    started: float
    yields: tuple[Yield, ...]
    wrong: tuple[str, ...]
    stream: Stream | None = None

    @property
    def drain(self) -> float:
        """How long after the signal clients had what was in flight, at most until the tier knew of it; else nothing."""
        if self.stream is None:
            return 0.0
        (one,) = self.yields
        return max(0.0, min(max(self.stream.ended, one.in_flight), one.drained) - one.signalled)

    @property
    def extra(self) -> float:
        return self.wait - self.baseline - self.drain


class Controller:
    """The lab's controller, over ssh."""

    def __init__(self, here: lab.Lab) -> None:
        self.ssh = here.ssh(CONTROLLER)
        self.address = here.variable(CONTROLLER, "cluster_address")

    def run(self, script: str) -> str:
        """What a command prints; RuntimeError with its words when it fails."""
        done = subprocess.run([*self.ssh, script], check=False, capture_output=True, text=True, timeout=COMMAND_SECONDS)
        if done.returncode != 0:
            raise RuntimeError(f"{script}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def submit(self, options: str) -> tuple[int, float]:
        """A paying job; its number, and when it was submitted."""
        command = (
            f"sbatch --parsable --partition=gpu_vasp --chdir={FOLDER} --output=/dev/null --time=5 {options} paying.sh"
        )
        before, job = self.run(f"cd {FOLDER} && date +%s.%N && runuser -u {USER} -- {command}").split()
        return int(job), float(before)

    def queue(self, states: str = "") -> list[int]:
        """Paying jobs in these states, or all that have not ended.

        Not by their numbers, which Slurm may have forgotten: a question that fails is no idle node.
        """
        only = f" --states={states}" if states else ""
        return [int(job) for job in self.run(f"squeue --noheader --user={USER} --format=%A{only}").split()]

    def noted(self, job: int, what: str, seconds: float) -> float:
        """What a paying job has noted, once it has."""
        path = f"{FOLDER}/{job}.{what}"
        loop = f"for i in $(seq {int(seconds / 0.05)}); do [ -e {path} ] && break; sleep 0.05; done; cat {path}"
        return float(self.run(loop))

    def end(self, job: int) -> float:
        """End a paying job; when it was over."""
        self.run(f"runuser -u {USER} -- touch {FOLDER}/{job}.stop")
        return self.noted(job, "end", 30)

    def events(self, tier: str) -> list[Event]:
        text = self.run(f"cat {EVENTS}/*.jsonl")
        return sorted(
            (one for line in text.splitlines() if (one := events.parse(line.encode())).tier == tier),
            key=lambda one: one.at,
        )


def prepare(controller: Controller) -> None:
    """A folder for paying jobs, and what they run."""
    controller.run(f"install -d -o {USER} {FOLDER}")
    lab.put(controller.ssh, f"{FOLDER}/paying.sh", PAYING)


def request(tier: str, tokens: int, **more: object) -> bytes:
    return json.dumps({"model": MODELS[tier], "prompt": "Once", "max_tokens": tokens, **more}).encode()


def ask(place: str, tier: str, *, health: bool = False) -> Asked:
    """One completion of one token, or a look at /health: 200, or a 503 as clients are promised it."""
    at, began = time.time(), time.monotonic()
    connection = http.client.HTTPConnection(place, PORTS[tier], timeout=ASK_SECONDS)
    try:
        if health:
            connection.request("GET", "/health")
        else:
            connection.request("POST", "/v1/completions", request(tier, 1), {"Content-Type": "application/json"})
        response = connection.getresponse()
        body, status, wrong = response.read(), response.status, ""
        value = json.loads(body)
        if status == 200:
            wrong = "" if value.get("status") == "ok" or value.get("choices") else f"200 without an answer: {body!r}"
        elif status != 503 or not response.headers["Retry-After"] or value["error"]["code"] != 503:
            wrong = f"status {status}: {body[:200]!r}"
    except (OSError, http.client.HTTPException, AttributeError, TypeError, ValueError, KeyError) as error:
        status, wrong = 0, repr(error)
    finally:
        connection.close()
    return Asked(at, status, time.monotonic() - began, wrong)


class Asking:
    """A client of one tier that asks ten times a second, each time over a connection of its own."""

    def __init__(self, place: str, tier: str, *, health: bool) -> None:
        self.place, self.tier, self.health = place, tier, health
        self.answers: list[Asked] = []
        self._enough = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def _tick(self) -> None:
        while not self._enough.is_set():
            # An answer that takes long holds no other one up.
            thread = threading.Thread(target=self._one, daemon=True)
            thread.start()
            self._threads = [one for one in self._threads if one.is_alive()] + [thread]
            self._enough.wait(PERIOD_SECONDS)

    def _one(self) -> None:
        answer = ask(self.place, self.tier, health=self.health)
        with self._lock:
            self.answers.append(answer)

    def __enter__(self) -> Asking:
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._clock.join()
        for thread in self._threads:
            thread.join(2 * ASK_SECONDS)
            if thread.is_alive():
                self.answers.append(Asked(time.time(), 0, 2 * ASK_SECONDS, "no answer at all"))

    def handed_over(self, before: float, cut: float) -> list[Asked]:
        """Requests sent before a time that reached the tier: answered, or refused only when the server was cut."""
        with self._lock:
            return [
                one
                for one in self.answers
                if one.at < before
                and (
                    one.status == 200
                    or (one.status == 503 and one.seconds > REFUSAL_SECONDS and one.at + one.seconds > cut)
                )
            ]

    def first_served(self, after: float) -> float | None:
        with self._lock:
            return min(
                (one.at + one.seconds for one in self.answers if one.status == 200 and one.at > after), default=None
            )


def begin_stream(place: str, tokens: int) -> Stream:
    """A stream of the fast tier that flows."""
    one = Stream()

    def read() -> None:
        connection = http.client.HTTPConnection(place, PORTS[FAST], timeout=60)
        tail = b""
        try:
            body = request(FAST, tokens, stream=True, ignore_eos=True)
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                # Not by lines: these end a body that is cut off as if it were whole.
                while piece := response.read1(65536):
                    one.pieces += piece.count(b"data: ")
                    tail = (tail + piece)[-100:]
            one.done = tail.rstrip().endswith(b"data: [DONE]")
        except (OSError, http.client.HTTPException) as error:
            one.error = repr(error)
        finally:
            connection.close()
        one.ended = time.time()

    one.thread = threading.Thread(target=read, daemon=True)
    one.thread.start()
    wait_until("the stream flows", lambda: one.pieces > 3 or one.ended, 30, 0.01)
    if one.ended:
        raise RuntimeError(f"the stream was over before it flowed: {one}")
    return one


def short_tokens(place: str, budget: float) -> int:
    """How many tokens a short stream has, by the speed of one that nothing disturbs."""
    began = time.monotonic()
    one = begin_stream(place, 200)
    assert one.thread is not None
    one.thread.join(60)
    if not one.done:
        raise RuntimeError(f"a stream that nothing disturbs was not whole: {one}")
    return max(50, int(200 / (time.monotonic() - began) * SHORT_SHARE * budget))


def wait_until(what: str, claim: Callable[[], Any], seconds: float, every: float = 0.2) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := claim()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {seconds:g} s: {what}")
        time.sleep(every)
    return value


def serves(controller: Controller, tier: str) -> bool:
    return ask(controller.address, tier).status == 200


def wait_served(controller: Controller, tiers: Sequence[str]) -> None:
    for tier in tiers:
        wait_until(f"{tier} is served", functools.partial(serves, controller, tier), SERVED_SECONDS)


def options(tiers: Sequence[str]) -> str:
    nodes = [node for tier in tiers for node in NODES[tier]]
    return f"--nodes={len(nodes)} --ntasks-per-node=1 --gres=gpu:1 --nodelist={','.join(sorted(nodes))}"


@contextlib.contextmanager
def paying(controller: Controller, tiers: Sequence[str]) -> Iterator[tuple[int, float]]:
    """A paying job on these tiers' nodes, and when it was submitted; ended at the latest with the block."""
    job, submitted = controller.submit(options(tiers))
    try:
        yield job, submitted
    finally:
        controller.run(f"runuser -u {USER} -- touch {FOLDER}/{job}.stop")
        # One that waits does not see that. One that runs is not cancelled: it may be over by then, which is an error.
        if job in controller.queue("PENDING"):
            controller.run(f"scancel {job}")
        wait_until("the paying job is over", lambda: job not in controller.queue(), 30)


def idle_wait(controller: Controller, tiers: Sequence[str]) -> float:
    """What a paying job waits on idle nodes; the tiers are held."""
    # Slurm lets some seconds pass between two looks at its queue: not right after the job before.
    time.sleep(QUIET_SECONDS)
    with paying(controller, tiers) as (job, submitted):
        started = controller.noted(job, "start", 60)
        controller.end(job)
    wait_until("the nodes are idle again", lambda: not controller.queue(), 30)
    return started - submitted


def baselines(controller: Controller) -> dict[tuple[str, ...], float]:
    """What the two kinds of paying jobs wait on idle nodes."""
    try:
        for tier in (FAST, REASONING):
            controller.run(f"gleaner tier {tier} held")
        return {tiers: idle_wait(controller, tiers) for tiers in ((FAST,), (FAST, REASONING))}
    finally:
        for tier in (FAST, REASONING):
            with contextlib.suppress(*FAILURES):
                controller.run(f"gleaner tier {tier} started")
        wait_served(controller, (FAST, REASONING))


def yielded(controller: Controller, tier: str, since: float, asking: Asking) -> Yield | None:
    """What the tier has done since then, once it serves again."""
    found = [one for one in controller.events(tier) if one.at >= since]

    def at(kind: Kind, after: float = 0.0) -> float | None:
        return next((one.at for one in found if one.kind is kind and one.at >= after), None)

    signalled, left = at(Kind.SIGNALLED), at(Kind.LEFT)
    running = at(Kind.STARTED, left or 0.0)
    if signalled is None or left is None or running is None:
        return None
    served = asking.first_served(running)
    if served is None:
        return None
    drained = at(Kind.DRAINED) or left
    handed = asking.handed_over(left, drained - CUT_EARLY)
    if not any(one.status == 200 for one in handed):
        raise RuntimeError(f"{tier}: nothing was asked before it left")
    return Yield(
        tier=tier,
        signalled=signalled,
        drained=drained,
        left=left,
        last_sent=max(one.at for one in handed),
        in_flight=max(one.at + one.seconds for one in handed if one.status == 200),
        running=running,
        served=served,
    )


def tiers_of(case: str) -> tuple[str, ...]:
    """Which tiers have to leave in this case."""
    return (FAST, REASONING) if case == WIDE else (FAST,)


class NotPlayedError(RuntimeError):
    """A case came out otherwise than it is meant: the machine had something else to do. It tells nothing."""


def play(controller: Controller, case: str, baseline: float, budget: float) -> Round:
    """One case: a paying job comes, the tiers leave, it ends, and they are back. The drain budget is in seconds."""
    tiers = tiers_of(case)
    wait_served(controller, tiers)
    # Measured each time: the machine may be faster now, and the stream over before the paying job comes.
    tokens = short_tokens(controller.address, budget) if case == SHORT else LONG_TOKENS
    with contextlib.ExitStack() as stack:
        # Where nothing is to be in flight, looks at /health; else completions, which wait for the stream.
        health = case not in STREAMS
        asking = {tier: stack.enter_context(Asking(controller.address, tier, health=health)) for tier in tiers}
        time.sleep(0.5)
        stream = begin_stream(controller.address, tokens) if case in STREAMS else None
        with paying(controller, tiers) as (job, submitted):
            started = controller.noted(job, "start", 60)
            time.sleep(PAYING_SECONDS)
            ended = controller.end(job)
        yields = [
            wait_until(
                f"{tier} is back",
                functools.partial(yielded, controller, tier, submitted, asking[tier]),
                SERVED_SECONDS,
                0.5,
            )
            for tier in tiers
        ]
        if stream is not None and stream.thread is not None:
            stream.thread.join(60)
            if stream.ended <= yields[0].signalled:
                raise NotPlayedError(f"the stream was not in flight when the signal came: {stream}, {yields[0]}")
    return Round(
        case=case,
        job=job,
        wait=started - submitted,
        baseline=baseline,
        ended=ended,
        started=started,
        yields=tuple(yields),
        wrong=tuple(one.wrong for client in asking.values() for one in client.answers if one.wrong),
        stream=stream,
    )


# What it says


@dataclass(frozen=True)
class Claim:
    """One bar, its figures, and whether they meet it; None where there is no bar."""

    name: str
    values: Sequence[float]
    bar: str = ""
    met: bool | None = None

    def row(self) -> tuple[str, ...]:
        middle = f"{statistics.median(self.values):.2f}" if self.values else "-"
        # Of what may lie on both sides of its aim, the one that is farthest away.
        worst = f"{max(self.values, key=abs if ' to ' in self.bar else None):.2f}" if self.values else "-"
        verdict = "" if self.met is None else "met" if self.met else "missed"
        return self.name, str(len(self.values)), middle, worst, self.bar, verdict


def claims(rounds: Sequence[Round], budget: float) -> list[Claim]:
    """The bars of the whole run, by this program's own clock."""
    found = []
    for case in CASES:
        mine = [one for one in rounds if one.case == case]
        extra = [one.extra for one in mine]
        over = [one.wait - one.baseline for one in mine]
        most = WORST_BAR + (budget if case in STREAMS else 0.0)
        found += [
            Claim(f"{case}: wait on idle nodes", [one.baseline for one in mine]),
            Claim(f"{case}: wait", [one.wait for one in mine]),
            Claim(f"{case}: drain used", [one.drain for one in mine]),
            Claim(
                f"{case}: wait beyond idle nodes and drain",
                extra,
                f"median ≤ {EXTRA_BAR:g}",
                bool(extra) and statistics.median(extra) <= EXTRA_BAR,
            ),
            Claim(f"{case}: wait beyond idle nodes", over, f"worst ≤ {most:g}", bool(over) and max(over) <= most),
        ]
    each = [one for played in rounds for one in played.yields]
    routed = [one.last_sent - one.signalled for one in each]
    back = [one.running - played.ended for played in rounds for one in played.yields]
    streams = {
        case: [(one.stream, one.yields[0]) for one in rounds if one.case == case and one.stream] for case in STREAMS
    }
    cut = [stream.ended - one.signalled - budget for stream, one in streams[LONG]]
    lied = sum(stream.done or not stream.error for stream, _ in streams[LONG])
    broken = sum(not stream.done for stream, _ in streams[SHORT])
    wrong = sum(len(played.wrong) for played in rounds)
    return [
        *found,
        Claim(
            "from the signal to the last request handed over",
            routed,
            f"≤ {ROUTED_BAR:g}",
            bool(routed) and max(routed) <= ROUTED_BAR,
        ),
        Claim(
            "from the last paying job's end to running again",
            back,
            f"≤ {RETURN_BAR:g}",
            bool(back) and max(back) <= RETURN_BAR,
        ),
        Claim("from then until it answers again", [one.served - one.running for one in each]),
        Claim(
            "a long stream's end beyond the budget",
            cut,
            f"{-CUT_EARLY:g} to {CUT_BAR:g}",
            bool(cut) and min(cut) >= -CUT_EARLY and max(cut) <= CUT_BAR,
        ),
        Claim("long streams that ended as if they were whole", [lied], "0", lied == 0),
        Claim("short streams that were cut", [broken], "0", broken == 0),
        Claim("answers that were neither 200 nor a proper 503", [wrong], "0", wrong == 0),
    ]


def ledger_claims(controller: Controller, since: float, rounds: Sequence[Round]) -> list[Claim]:
    """What `gleaner report` says of the same, against this program's clock.

    Its waits are to the end of the second in which Slurm started the job, whose script starts a moment later.
    """
    told = json.loads(controller.run(f"gleaner report --json --since @{int(since)}"))["tiers"]
    waited = {(tier["tier"], wait["job"]): wait["seconds"] for tier in told for wait in tier["waits"]}
    parts = [(one, part) for one in rounds for part in one.yields]
    missing = sum((part.tier, one.job) not in waited for one, part in parts)
    off = [
        waited[part.tier, one.job] - (one.started - part.signalled)
        for one, part in parts
        if (part.tier, one.job) in waited
    ]
    differs = [text for tier in told for text in tier["differences"]]
    for text in differs:
        print(f"gleaner report: {text}", file=sys.stderr)
    return [
        Claim(
            "the ledger's wait, less the one by this clock",
            off,
            "{:g} to {:g}".format(*LEDGER_BARS),
            bool(off) and min(off) >= LEDGER_BARS[0] and max(off) <= LEDGER_BARS[1],
        ),
        Claim("waits that the ledger does not know", [missing], "0", missing == 0),
        Claim("differences between events and accounting", [len(differs)], "0", not differs),
    ]


def preemption_report(found: Sequence[Claim]) -> str:
    return "\n\n".join(
        [
            report.table(
                ("seconds, or a count", "figures", "median", "worst", "bar", ""), [one.row() for one in found]
            ),
            report.raw("Raw figures", {one.name: one.values for one in found if len(one.values) > 1}, 2),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="at least 20, or nothing is written")
    parser.add_argument("--no-report", action="store_true", help="leave docs/preemption.md alone")
    arguments = parser.parse_args()
    controller = Controller(lab.lab_from_environment())
    version = lab.output(controller.ssh, "sinfo", "--version").split()[-1]
    budget = float(json.loads(controller.run(f"cat /cluster/shared/ai/plans/{FAST}.json"))["drain_seconds"])
    about = {
        **lab.machine(),
        "versions": f"Slurm {version}, ansible-core {lab.ansible_version()}",
        "drain budget": f"{budget:g} s",
    }
    began = time.time()
    rounds: list[Round] = []
    failed: list[str] = []
    try:
        prepare(controller)
        wait_served(controller, (FAST, REASONING))
        for number in range(1, arguments.rounds + 1):
            try:
                idle = baselines(controller)
            except FAILURES as error:
                failed.append(f"round {number}, idle nodes: {error!r}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            # Who comes later finds warmer caches, so each case is first in its turn.
            shift = number % len(CASES)
            for case in CASES[shift:] + CASES[:shift]:
                baseline = idle[tiers_of(case)]
                try:
                    one = play(controller, case, baseline, budget)
                except FAILURES as error:
                    failed.append(f"round {number}, {case}: {error!r}")
                    print(failed[-1], file=sys.stderr, flush=True)
                    continue
                rounds.append(one)
                print(
                    f"round {number} of {arguments.rounds}, {case}: waited {one.wait:.2f} s, {one.baseline:.2f} s on "
                    f"idle nodes, drain {one.drain:.2f} s; back after {one.yields[0].running - one.ended:.2f} s",
                    flush=True,
                )
        # Accounting lags by a moment.
        time.sleep(5)
        found = [
            *claims(rounds, budget),
            *ledger_claims(controller, began, rounds),
            Claim("cases that could not be played", [len(failed)], "0", not failed),
        ]
    finally:
        controller.run(f"rm -rf {FOLDER}")
    text = f"{report.facts(about)}\n\n{preemption_report(found)}"
    print(text)
    for one in rounds:
        for words in one.wrong:
            print(f"{one.case}: {words}", file=sys.stderr)
    if not arguments.no_report and arguments.rounds >= 20:
        report.write(f"slurm-{'.'.join(version.split('.')[:2])}", text, DOCUMENT)
    return 0 if all(one.met is not False for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
