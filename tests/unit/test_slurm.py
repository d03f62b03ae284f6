"""What Slurm prints, in both releases, and what is read from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gleaner import slurm
from gleaner.states import Cause
from tests.unit.fakes import Home, home, job_text, node_line, queue_line

# Slurm 22.05.8 and 24.11.5: fields differ, those that matter here do not.
HEAD = (
    "JobId=41 JobName=llama-14b UserId=ai-inference(64200) GroupId=ai-inference(64200) MCS_label=N/A "
    "Priority=100 Nice=0 Account=ai QOS=ai_opportunistic JobState=RUNNING Reason=None Dependency=(null) "
    "Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:00:42 TimeLimit=UNLIMITED TimeMin=N/A "
    "SubmitTime=2026-11-24T01:00:00 EligibleTime=2026-11-24T01:00:00 StartTime=2026-11-24T01:00:01 "
    "EndTime=Unknown Deadline=N/A PreemptEligibleTime=2026-11-24T01:00:01 PreemptTime={preempted} "
    "SuspendTime=None Partition=gpu_ai AllocNode:Sid=slurm-ctl:99 ReqNodeList=(null) ExcNodeList=(null) "
    "NodeList=vasp-02 BatchHost=vasp-02 "
)
SHOW_2205 = HEAD + (
    "NumNodes=1 NumCPUs=8 NumTasks=1 CPUs/Task=8 ReqB:S:C:T=0:0:*:* TRES=cpu=8,mem=64G,node=1 "
    "MinCPUsNode=8 Features=(null) Comment=a b PreemptTime=x c Power= TresPerNode=gres:gpu:1 \n"
)
SHOW_2411 = HEAD + (
    "StepMgrEnabled=Yes NumNodes=1 NumCPUs=8 NumTasks=1 CPUs/Task=8 ReqB:S:C:T=0:0:*:* "
    "ReqTRES=cpu=8,mem=64G,node=1,gres/gpu=1 AllocTRES=cpu=8,mem=64G,node=1,gres/gpu=1 OverSubscribe=OK "
    "Comment=a b PreemptTime=x c TresPerNode=gres/gpu:1 \n"
)


@pytest.mark.parametrize("text", [SHOW_2205, SHOW_2411])
def test_job_fields_of_both_releases(text: str) -> None:
    fields = slurm.parse_job(text.format(preempted="None"))
    assert fields["JobId"] == "41"
    assert fields["Restarts"] == "2"
    assert fields["CPUs/Task"] == "8"
    assert slurm.cause_of_stop(fields) is Cause.ASKED
    fields = slurm.parse_job(text.format(preempted="2026-11-24T01:00:43"))
    assert slurm.cause_of_stop(fields) is Cause.PREEMPTED


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({}, Cause.ASKED),
        ({"preempted": "2026-11-24T01:10:00"}, Cause.PREEMPTED),
        ({"preempted": "2026-11-24T00:10:00"}, Cause.ASKED),
        ({"state": "SIGNALING"}, Cause.ASKED),
        ({"state": "SIGNALING", "preempted": "2026-11-24T01:10:00"}, Cause.PREEMPTED),
        ({"state": "COMPLETING"}, Cause.CANCELLED),
        ({"state": "CANCELLED"}, Cause.CANCELLED),
        ({"state": "CANCELLED", "preempted": "2026-11-24T01:10:00"}, Cause.CANCELLED),
        ({"state": "COMPLETING", "preempted": "2026-11-24T01:10:00"}, Cause.CANCELLED),
        ({"state": "PENDING"}, Cause.CANCELLED),
        ({"comment": "gleaner:0123456789abcdef replaced"}, Cause.REPLACED),
        ({"comment": "gleaner:0123456789abcdef outranked"}, Cause.OUTRANKED),
        ({"comment": "gleaner:0123456789abcdef outranked", "preempted": "2026-11-24T01:10:00"}, Cause.PREEMPTED),
        ({"comment": "gleaner:0123456789abcdef outranked", "state": "CANCELLED"}, Cause.CANCELLED),
        ({"comment": "a person's replaced"}, Cause.ASKED),
        ({"comment": "gleaner:0123456789abcdef replaced", "state": "COMPLETING"}, Cause.CANCELLED),
        ({"comment": "gleaner:0123456789abcdef replaced", "preempted": "2026-11-24T01:10:00"}, Cause.PREEMPTED),
        ({"state": "TIMEOUT"}, Cause.TIME_LIMIT),
        ({"state": "COMPLETING", "reason": "TimeLimit"}, Cause.TIME_LIMIT),
        ({"ran": "23:58:40", "limit": "1-00:00:00"}, Cause.TIME_LIMIT),
        ({"ran": "23:50:00", "limit": "1-00:00:00"}, Cause.ASKED),
        ({"ran": "23:58:40", "limit": "1-00:00:00", "preempted": "2026-11-24T01:10:00"}, Cause.PREEMPTED),
    ],
)
def test_cause_of_stop(fields: dict[str, str], cause: Cause) -> None:
    assert slurm.cause_of_stop(slurm.parse_job(job_text(**fields)), signal_seconds=25) is cause


@pytest.mark.parametrize("text", ["", "\n", "No job", "JobId=41"])
def test_unreadable_job_is_an_error(text: str) -> None:
    with pytest.raises(slurm.SlurmError):
        slurm.parse_job(text)


def test_a_job_that_is_being_signalled_runs() -> None:
    (found,) = slurm.parse_jobs(queue_line(state="SIGNALING"))
    assert found.state == "RUNNING"


def test_queue_lines() -> None:
    text = queue_line() + queue_line(
        job="42", state="PENDING", restarts="3", nodes="", ran="0:00", reason="(launch failed requeued held)"
    )
    running, pending = slurm.parse_jobs(text)
    assert (running.id, running.state, running.nodes, running.run_seconds) == (41, "RUNNING", "vasp-02", 600)
    assert not running.preempted
    assert (pending.restarts, pending.reason) == (3, "launch failed requeued held")
    assert slurm.parse_jobs(queue_line(preempted="2026-11-24T01:10:00"))[0].preempted
    assert not slurm.parse_jobs(queue_line(preempted="2026-11-24T00:10:00"))[0].preempted, "an earlier run's"
    assert slurm.parse_jobs("") == []


@pytest.mark.parametrize("comment", ["gleaner:0123456789abcdef replaced", "(null)", "a|b", ""])
def test_comments_are_read_whole(comment: str) -> None:
    (job,) = slurm.parse_jobs(queue_line(comment=comment))
    assert job.comment == comment


VASP_02 = slurm.Node("vasp-02", True, 2, 2, 1, 38, 8, 380000, 65536)


def test_nodes_are_read() -> None:
    text = node_line(VASP_02, "MIXED+PLANNED") + node_line(dataclasses.replace(VASP_02, name="vasp-03"), "IDLE+DRAIN")
    found = slurm.parse_nodes(text)
    assert found["vasp-02"] == VASP_02
    assert (found["vasp-03"].up, len(found)) == (False, 2)


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", 0),
        ("gpu:1", 1),
        ("gpu:v100s:2(S:0-1)", 2),
        ("gpu:a:1(IDX:0),gpu:b:3(IDX:1,3-4),shard:a:8(4/4)", 4),
        ("shard:4,gpu:v100s:1(IDX:0)", 1),
    ],
)
def test_gpus_of_a_node(gres: str, gpus: int) -> None:
    text = node_line(VASP_02, "IDLE").replace("Gres=gpu:v100s:2(S:0)", f"Gres={gres}")
    assert slurm.parse_nodes(text)["vasp-02"].gpus == gpus


def test_node_of_22_05_and_what_it_keeps_for_the_system() -> None:
    text = (
        node_line(VASP_02, "IDLE").replace("CPUEfctv=38 ", "").replace(" AllocTRES=", " MemSpecLimit=4096 AllocTRES=")
    )
    assert slurm.parse_nodes(text)["vasp-02"] == dataclasses.replace(VASP_02, mem_mib=380000 - 4096)


@pytest.mark.parametrize(
    "text", ["garbage", "NodeName=vasp-02 State=IDLE", node_line(VASP_02, "").replace("State=", "X=")]
)
def test_unreadable_node_is_an_error(text: str) -> None:
    with pytest.raises(slurm.SlurmError, match="cannot read the node"):
        slurm.parse_nodes(text)


def test_unreadable_queue_is_an_error() -> None:
    with pytest.raises(slurm.SlurmError, match="cannot read"):
        slurm.parse_jobs("slurm_load_jobs error\n")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:00", 0),
        ("10:05", 605),
        ("01:00:00", 3600),
        ("2-01:00:00", 176400),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_durations(text: str, seconds: int | None) -> None:
    assert slurm.seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("vasp-02", ["vasp-02"]),
        ("vasp-[01-03]", ["vasp-01", "vasp-02", "vasp-03"]),
        ("vasp-[01,03],gpu1", ["vasp-01", "vasp-03", "gpu1"]),
        ("a[9-11]b,c", ["a9b", "a10b", "a11b", "c"]),
        ("", []),
    ],
)
def test_host_lists(text: str, names: list[str]) -> None:
    assert slurm.hosts(text) == names


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> object:
    with home() as place:
        for name, value in place.environment().items():
            monkeypatch.setenv(name, value)
        yield place


def test_commands_ask_with_explicit_formats(commands: Home) -> None:
    commands.set(commands.slurm / "queue", queue_line())
    assert [job.id for job in slurm.jobs("ai-inference", ["llama-14b", "llama-72b"])] == [41]
    (call,) = commands.calls_of("squeue")
    assert "--user=ai-inference --name=llama-14b,llama-72b" in call
    assert "PreemptTime:24|" in call
    assert call.endswith("Comment:128|")


def test_systemds_variables_do_not_reach_the_job(commands: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JOURNAL_STREAM", "NOTIFY_SOCKET", "SBATCH_EXPORT", "SQUEUE_FORMAT"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("LC_ALL", "de_DE")
    Home.program(commands.bin / "sbatch", "#!/bin/sh\nenv\n")
    told = slurm.run(["sbatch"]).splitlines()
    assert "LC_ALL=C" in told
    assert not [line for line in told if line.endswith("=x")]


def test_failure_carries_slurms_words(commands: Home) -> None:
    commands.set(commands.slurm / "squeue.fails", "one\nslurm_load_jobs error: Unable to contact slurm controller\n")
    with pytest.raises(slurm.SlurmError, match="squeue: slurm_load_jobs error: Unable to contact"):
        slurm.jobs("ai-inference", ["llama-14b"])


def test_slow_command_is_given_up(commands: Home) -> None:
    commands.set(commands.slurm / "scontrol.sleep", "5")
    with pytest.raises(slurm.SlurmError, match="no answer within"):
        slurm.job(41, timeout_seconds=0.2)


def test_missing_command_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(slurm.SlurmError, match="squeue: No such file"):
        slurm.jobs("ai-inference", ["llama-14b"])


def test_a_job_is_told_to_yield_in_its_batch_step_only(commands: Home) -> None:
    slurm.comment(41, "gleaner:0123456789abcdef replaced")
    slurm.terminate(41)
    assert commands.calls == [
        "scontrol update JobId=41 Comment=gleaner:0123456789abcdef replaced",
        "scancel --batch --signal=TERM 41",
    ]


def test_submission_and_canceller(commands: Home) -> None:
    commands.set(commands.slurm / "submitted", "77;beefcake2\n")
    assert slurm.submit("/x/run-14b.slurm") == 77
    commands.set(commands.slurm / "submitted", "Submitted\n")
    with pytest.raises(slurm.SlurmError, match="cannot read"):
        slurm.submit("/x/run-14b.slurm")
    assert slurm.canceller(41) is None
    commands.set(commands.slurm / "accounting", "CANCELLED by 1000\n")
    assert slurm.canceller(41) == 1000


LISTPIDS = (
    "PID      JOBID    STEPID   LOCALID GLOBALID\n"
    "310      14       batch    0       0\n"
    "412      14       0        -       -\n"
)
REFUSED = "Unable to connect to slurmstepd: Connection refused"


def scontrol(commands: Home, script: str) -> None:
    Home.program(commands.bin / "scontrol", f'#!/bin/sh\ncd "$FAKE_SLURM"\n{script}\n')


def titled(commands: Home, *titles: str) -> Path:
    """A folder as /proc with processes of these titles, and one that ended while it was looked at."""
    proc = commands.root / "proc"
    (proc / "299").mkdir(parents=True)
    for pid, title in enumerate(titles, 300):
        (proc / str(pid)).mkdir()
        commands.set(proc / str(pid) / "cmdline", f"{title}\0\0")
    return proc


def test_a_step_that_ends_hides_no_processes_of_others(commands: Home) -> None:
    commands.set(commands.slurm / "ends", REFUSED + "\n")
    commands.set(commands.slurm / "pids", LISTPIDS)
    # Refused for all and then for the job, and not any more.
    scontrol(commands, '[ ! -e ends ] || { cat ends >&2; [ -z "$2" ] || rm ends; exit 1; }\ncat pids')
    assert slurm.job_processes(titled(commands, "slurmstepd: [14.batch]")) == {14: [310, 412]}


def test_a_slurmstepd_that_was_killed_hides_no_processes_of_other_jobs(commands: Home) -> None:
    commands.set(commands.slurm / "refused", REFUSED + "\n")
    commands.set(commands.slurm / "14", LISTPIDS)
    commands.set(commands.slurm / "15", LISTPIDS.replace("14", "15").replace("310", "510").replace("412", "512"))
    commands.set(commands.slurm / "none", "There are no steps for job 16 on node vasp-03.\n")
    scontrol(commands, 'case $2 in 14 | 15) cat "$2";; 16) cat none >&2; exit 1;; *) cat refused >&2; exit 1;; esac')
    proc = titled(
        commands,
        "slurmstepd: [14.extern]",
        "slurmstepd: [14.batch]",
        "slurmstepd: [15.0]",
        "slurmstepd: [16.extern]",
        "/usr/sbin/slurmstepd\0infinity",
        "grep\0slurmstepd: [17.0]",
    )
    assert slurm.job_processes(proc) == {14: [310, 412], 15: [510, 512]}


def test_a_job_that_cannot_be_asked_is_told_in_the_end(commands: Home) -> None:
    commands.set(commands.slurm / "scontrol.fails", REFUSED + "\n")
    with pytest.raises(slurm.SlurmError, match=REFUSED):
        slurm.job_processes(titled(commands, "slurmstepd: [14.batch]"), patience_seconds=0.0)


def test_a_slurm_that_fails_otherwise_is_told_at_once(commands: Home) -> None:
    commands.set(commands.slurm / "scontrol.fails", "scontrol: error: could not establish a configuration source\n")
    with pytest.raises(slurm.SlurmError, match="configuration source"):
        slurm.job_processes(titled(commands))


def test_a_node_without_a_job_has_no_processes(commands: Home) -> None:
    commands.set(commands.slurm / "scontrol.fails", "No job steps exist on this node.\n")
    assert slurm.job_processes(titled(commands)) == {}
