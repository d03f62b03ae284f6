#!/usr/bin/python3
"""Ansible module: a node is drained in Slurm, or resumed."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: slurm_node_state
short_description: Drain a node in Slurm, or resume it
description:
  - Runs where C(scontrol) may change nodes, as a rule as root on the controller.
  - No job is ever cancelled. What runs on a node that is drained runs on to its end, nothing new starts there.
options:
  name: {description: The node's name in Slurm., type: str, required: true}
  state:
    description:
      - V(drained) starts no new job on the node. A drain of a person, one with another reason, stays as it is; what
        Slurm itself has found about the node is replaced by O(reason).
      - V(resumed) ends a drain that has O(reason), and what Slurm itself says of a machine that was away or was
        rebooted. A node that is drained for another reason is left so, which the result and a warning say.
      - V(joined) changes nothing. It waits until the node's slurmd has told Slurm what the node has, and fails where
        Slurm does not find there what it was told of the node.
    type: str
    choices: [drained, joined, resumed]
    required: true
  reason:
    description: Why it is drained. Without one, V(resumed) ends every drain.
    type: str
  wait_seconds:
    description:
      - With V(drained), how long jobs that run on the node are waited for; with 0 they are only named in the result.
      - With V(joined) and V(resumed), how long it may take until slurmd answers, or Slurm starts jobs there.
    type: int
    default: 0
  missing_ok:
    description: Whether a node that Slurm does not know is nothing to complain about.
    type: bool
    default: false
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
author: Gleaner
"""

EXAMPLES = r"""
- name: No new job starts on the node
  slurm_node_state:
    name: vasp-02
    state: drained
    reason: "gleaner: replaced"
"""

RETURN = r"""
before: {description: 'The node in the words of Slurm, with the reason.', type: str, returned: always}
after: {description: The same afterwards. In check mode what it would be., type: str, returned: always}
known: {description: Whether Slurm knows the node., type: bool, returned: always}
up: {description: Whether Slurm starts jobs on the node now., type: bool, returned: always}
answers: {description: 'Whether the node''s slurmd answers, as far as Slurm knows.', type: bool, returned: always}
listens: {description: Whether something listens on slurmd's port of the node now., type: bool, returned: always}
kept: {description: 'A drain that was left, since it has another reason, or empty.', type: str, returned: always}
jobs:
  description: 'Jobs that Slurm has on the node: C(id), C(user), C(state), C(name), and all of it in C(words).'
  type: list
  elements: dict
  returned: always
wanted_by:
  description: 'With V(drained), jobs that wait and name the node as one that they must have, in the same form.'
  type: list
  elements: dict
  returned: always
"""

POLL_SECONDS = 1.0
# Slurm's commands try a controller that does not answer again and again.
COMMAND_SECONDS = 30
CONNECT_SECONDS = 3.0
# What slurmctld says of a machine that is another one now. Whatever else it finds is still so after a resume.
_OF_THE_OLD_MACHINE = re.compile(r"Not responding|Node unexpectedly rebooted", re.IGNORECASE)
_UP_STATES = {"IDLE", "MIXED", "ALLOCATED"}
_UP_FLAGS = {"CLOUD", "COMPLETING", "DYNAMIC_NORM", "PLANNED"}
_JOB_STATES = "running,configuring,completing,suspended,stopped"


class NodeError(Exception):
    """The node cannot be brought into the state; the text says why and what cures it."""


@dataclass(frozen=True)
class Node:
    """What `scontrol show node` says of one."""

    name: str
    state: str
    flags: frozenset[str]
    reason: str = ""
    by: str = ""
    """Who set the reason."""
    address: str = ""
    port: int = 0
    """Of its slurmd; 0 is that of the whole cluster."""

    @property
    def answers(self) -> bool:
        return not self.state.endswith("*") and "NOT_RESPONDING" not in self.flags

    @property
    def drained(self) -> bool:
        return "DRAIN" in self.flags

    @property
    def down(self) -> bool:
        return self.state.rstrip("*") == "DOWN"

    @property
    def up(self) -> bool:
        """Slurm starts jobs there: any other mark (`*` does not answer, MAINT, …) keeps them away."""
        return self.state in _UP_STATES and _UP_FLAGS.issuperset(self.flags)

    @property
    def told(self) -> str:
        state = "+".join([self.state, *sorted(self.flags)])
        return f"{state} ({self.reason})" if self.reason else state


@dataclass(frozen=True)
class Job:
    """One job that Slurm has on a node."""

    id: str
    user: str
    state: str
    name: str

    def __str__(self) -> str:
        return f"job {self.id} of {self.user} ({self.name}, {self.state.lower()})"


def parse_node(text: str) -> Node:
    """The line of `scontrol show node --oneliner`; NodeError when it is none."""
    fields: dict[str, str] = {}
    keys = list(re.finditer(r"(?:^|\s)([A-Z][A-Za-z0-9/:_]*)=", text))
    for here, after in zip(keys, [*keys[1:], None]):
        fields.setdefault(here.group(1), text[here.end() : after.start() if after else len(text)].strip())
    if "NodeName" not in fields or "State" not in fields:
        raise NodeError(f"scontrol: cannot read the node {text.strip()[:80]!r}")
    state, *flags = fields["State"].split("+")
    said = re.fullmatch(r"(.*?)\s*\[([^@\]]*)@[^\]]*\]", fields.get("Reason", ""), re.DOTALL)
    reason, by = said.groups() if said else (fields.get("Reason", ""), "")
    return Node(
        name=fields["NodeName"],
        state=state,
        flags=frozenset(flags),
        reason="" if reason == "(null)" else reason,
        by=by,
        address=fields.get("NodeAddr", fields["NodeName"]),
        port=int(fields.get("Port", "0")),
    )


def parse_jobs(text: str) -> list[Job]:
    """Lines of `squeue --Format` with these columns."""
    lines = [line.split("|", 3) for line in text.splitlines() if line.strip()]
    if strange := next((line for line in lines if len(line) != 4), None):
        raise NodeError(f"squeue: cannot read the line {'|'.join(strange)!r}")
    return [Job(*(cell.strip() for cell in line)) for line in lines]


def by_slurm_itself(node: Node, slurm_user: str) -> bool:
    """Whether the reason was found by slurmctld: where it runs as root, nobody can tell it from a person."""
    return bool(node.reason) and node.by == slurm_user != "root"


def drain_needed(node: Node, reason: str, slurm_user: str) -> bool:
    """Whether the node has to be drained with the reason; the drain of a person is one already."""
    # What another playbook of ours began is not for it to end any more.
    ours = node.by == "root" and node.reason.startswith("gleaner: ")
    return not node.drained or (node.reason != reason and (ours or by_slurm_itself(node, slurm_user)))


def kept_drain(node: Node, reason: str, slurm_user: str) -> str:
    """Why a node stays away although it is to be resumed; empty when nothing speaks against it."""
    if not (node.drained or node.down) or not reason or node.reason in ("", reason):
        return ""
    # Where slurmctld is root, a person would have had to choose the same words.
    own = by_slurm_itself(node, slurm_user) or node.by == slurm_user
    if own and _OF_THE_OLD_MACHINE.match(node.reason):
        return ""
    return f"{node.reason} (by {node.by or 'unknown'})"


class Slurm:
    """Slurm's commands on this host; `run` takes an argv and gives exit code, stdout and stderr."""

    def __init__(self, run: Callable[[Sequence[str]], tuple[int, str, str]]) -> None:
        self._run = run

    def ask(self, *argv: str) -> str:
        code, out, err = self._run(["timeout", str(COMMAND_SECONDS), *argv])
        if code == 124:
            raise NodeError(f"{argv[0]}: no answer within {COMMAND_SECONDS} s: does slurmctld run? scontrol ping")
        if code != 0:
            raise NodeError(f"{' '.join(argv)}: {(err or out).strip() or f'exit code {code}'}")
        return out

    def nodes(self) -> dict[str, Node]:
        """All that Slurm knows, by name: of one that it does not know, releases differ in exit code and words."""
        lines = self.ask("scontrol", "show", "node", "--oneliner").splitlines()
        return {node.name: node for node in (parse_node(line) for line in lines if line.startswith("NodeName="))}

    def node(self, name: str) -> Node:
        nodes = self.nodes()
        if name not in nodes:
            known = ", ".join(sorted(nodes)) or "it knows none"
            raise NodeError(f"name: got {name!r}, want a node that Slurm knows: {known}")
        return nodes[name]

    def setting(self, name: str) -> str:
        """A value of `scontrol show config`, up to its first space or bracket."""
        said = re.search(rf"^{name}\s*=\s*([^\s(]+)", self.ask("scontrol", "show", "config"), re.MULTILINE)
        if said is None:
            raise NodeError(f"scontrol show config: tells no {name}")
        return said.group(1)

    def user(self) -> str:
        """Whom slurmctld runs as."""
        return self.setting("SlurmUser")

    def listens(self, node: Node) -> bool:
        """Asked of the node itself: Slurm may go on for minutes to believe in one that has lost its power."""
        # Of a range of ports the first is slurmd's own.
        port = node.port or int(self.setting("SlurmdPort").partition("-")[0])
        try:
            with socket.create_connection((node.address, port), CONNECT_SECONDS):
                return True
        except OSError:
            return False

    def jobs(self, name: str) -> list[Job]:
        form = "JobID:32|,UserName:64|,State:24|,Name:64"
        argv = ["--noheader", f"--nodelist={name}", f"--states={_JOB_STATES}", f"--Format={form}"]
        return parse_jobs(self.ask("squeue", *argv))

    def wanted_by(self, name: str) -> list[Job]:
        """Jobs that wait and name the node as one that they must have."""
        form = "JobID:32|,UserName:64|,State:24|,ReqNodes:4096|,Name:64"
        found = []
        for line in self.ask("squeue", "--noheader", "--states=pending", f"--Format={form}").splitlines():
            cells = [cell.strip() for cell in line.split("|", 4)]
            if len(cells) != 5:
                raise NodeError(f"squeue: cannot read the line {line.strip()[:80]!r}")
            if cells[3] and name in self.ask("scontrol", "show", "hostnames", cells[3]).split():
                found.append(Job(cells[0], cells[1], cells[2], cells[4]))
        return found

    def update(self, name: str, state: str, reason: str | None = None) -> None:
        more = [f"Reason={reason}"] if reason else []
        self.ask("scontrol", "update", f"NodeName={name}", f"State={state}", *more)


@dataclass(frozen=True)
class Done:
    """What became of the node."""

    changed: bool
    after: Node
    jobs: list[Job]
    kept: str


def wait_for_jobs(slurm: Slurm, name: str, seconds: float) -> list[Job]:
    """Jobs that are still there after so many seconds."""
    deadline = time.monotonic() + seconds
    while (jobs := slurm.jobs(name)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return jobs


def wait_until_up(slurm: Slurm, name: str, seconds: float) -> Node:
    deadline = time.monotonic() + seconds
    while not (node := slurm.node(name)).up and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return node


def drain(slurm: Slurm, node: Node, reason: str, seconds: int, dry: bool) -> Done:
    changed = drain_needed(node, reason, slurm.user())
    after = node
    if changed and dry:
        after = replace(node, flags=node.flags | {"DRAIN"}, reason=reason)
    elif changed:
        slurm.update(node.name, "DRAIN", reason)
        after = slurm.node(node.name)
    jobs = wait_for_jobs(slurm, node.name, 0 if dry else seconds)
    if jobs and seconds and not dry:
        raise NodeError(
            f"{node.name} is drained, and still has after {seconds} s: {', '.join(map(str, jobs))}; nothing new starts "
            "there, and nothing is cancelled: wait for the end of these jobs"
            + ("" if node.answers else ", which the node cannot report: Slurm gives it up after its SlurmdTimeout")
        )
    kept = "" if after.reason == reason else f"{after.reason} (by {after.by or 'unknown'})"
    return Done(changed, after, jobs, kept)


def resume(slurm: Slurm, node: Node, reason: str, seconds: int, dry: bool) -> Done:
    kept = kept_drain(node, reason, slurm.user())
    changed = (node.drained or node.down) and not kept
    after = node
    if changed and dry:
        after = replace(node, state="IDLE" if node.down else node.state, flags=node.flags - {"DRAIN"}, reason="")
    elif changed:
        slurm.update(node.name, "RESUME")
        after = slurm.node(node.name)
    if not kept and not dry and seconds:
        after = wait_until_up(slurm, node.name, seconds)
        if not after.up:
            raise NodeError(
                f"{node.name} was resumed, and after {seconds} s Slurm starts nothing there: {after.told}; see "
                f"journalctl -u slurmd on {node.name}, and scontrol show node {node.name} on the controller"
            )
    return Done(changed, after, slurm.jobs(node.name), kept)


def join(slurm: Slurm, node: Node, reason: str, seconds: int, dry: bool) -> Done:
    deadline = time.monotonic() + (0 if dry else seconds)
    while not (node.answers and slurm.listens(node)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        node = slurm.node(node.name)
    if not dry and not node.answers:
        raise NodeError(
            f"{node.name}: its slurmd has not answered within {seconds} s: {node.told}; see journalctl -u slurmd there"
        )
    wrong = by_slurm_itself(node, slurm.user()) and not _OF_THE_OLD_MACHINE.match(node.reason)
    if not dry and (wrong or "INVALID_REG" in node.flags):
        raise NodeError(
            f"{node.name}: Slurm does not find there what it was told of the node: {node.told}; compare slurmd -C on "
            f"{node.name} with hostvars[{node.name}].cpus, .memory_mib and .gpus of the inventory"
        )
    return Done(False, node, slurm.jobs(node.name), "")


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "required": True, "choices": ["drained", "joined", "resumed"]},
            "reason": {"type": "str"},
            "wait_seconds": {"type": "int", "default": 0},
            "missing_ok": {"type": "bool", "default": False},
        },
        required_if=[("state", "drained", ["reason"])],
        supports_check_mode=True,
    )
    name, state, reason, seconds = (module.params[key] for key in ("name", "state", "reason", "wait_seconds"))

    def run(argv: Sequence[str]) -> tuple[int, str, str]:
        code, out, err = module.run_command(list(argv), environ_update={"LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"})
        return int(code), str(out), str(err)

    slurm = Slurm(run)
    try:
        if module.params["missing_ok"] and name not in slurm.nodes():
            unknown = "unknown to Slurm"
            module.exit_json(
                changed=False,
                known=False,
                up=False,
                answers=False,
                listens=False,
                before=unknown,
                after=unknown,
                kept="",
                jobs=[],
                wanted_by=[],
            )
        node = slurm.node(name)
        do = {"drained": drain, "joined": join, "resumed": resume}[state]
        done = do(slurm, node, reason or "", seconds, module.check_mode)
        listens = slurm.listens(done.after)
        waiting = slurm.wanted_by(name) if state == "drained" else []
    except NodeError as error:
        module.fail_json(msg=str(error))
    if state == "resumed" and done.kept:
        cure = f"whoever did that ends it: scontrol update nodename={name} state=resume"
        module.warn(f"{name} stays away: {done.kept}; {cure}")
    before, after = node.told, done.after.told
    module.exit_json(
        changed=done.changed,
        before=before,
        after=after,
        known=True,
        up=done.after.up,
        answers=done.after.answers,
        listens=listens,
        kept=done.kept,
        jobs=[{**asdict(job), "words": str(job)} for job in done.jobs],
        wanted_by=[{**asdict(job), "words": str(job)} for job in waiting],
        diff={"before": f"{name}: {before}\n", "after": f"{name}: {after}\n"} if done.changed else {},
    )


if __name__ == "__main__":
    main()
