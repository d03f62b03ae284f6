"""Answers for a host that is not there; only what later templates read is made up."""

from __future__ import annotations

import base64
from typing import Any

from ansible.plugins.action import ActionBase

NOTHING = {"changed": False, "rc": 0, "stdout": "", "stdout_lines": [], "stderr": "", "files": []}
# What a cluster that somebody else has set up says of itself.
CONFIG = """SLURM_VERSION           = 24.11.5
AccountingStorageEnforce = none
ClusterName             = beefcake2
GresTypes               = gpu
JobRequeue              = 1
PreemptMode             = OFF
PreemptParameters       = (null)
PreemptType             = (null)
SelectType              = select/cons_tres
SelectTypeParameters    = CR_CORE_MEMORY
SlurmctldParameters     = (null)
"""
SLURM_CONF = """ClusterName=beefcake2
SlurmctldHost=slurm-ctl(10.0.0.5)
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
NodeName=vasp-[01-03] CPUs=40 RealMemory=384000 Gres=gpu:v100s:1
PartitionName=gpu_vasp Nodes=vasp-[01-03] Default=YES
"""
TAILSCALE = """{"Version": "1.102.5", "BackendState": "Running", "Self": {"HostName": "slurm-ctl", "Online": true,
"DNSName": "slurm-ctl.tailc46cd0.ts.net.", "Tags": ["tag:llm-gateway"]}}"""
# By the name of the variable that the task registers.
ANSWERS: dict[str, dict[str, Any]] = {
    "__llama_cpp_apt": {"stdout_lines": ["Debian http://mirror/debian/ trixie main"]},
    "__llama_cpp_toolkit": {"stat": {"exists": False}},
    "__llama_cpp_driver": {"stat": {"exists": False}},
    "__slurm_controller_package": {"stdout": "  Candidate: 24.11.5-4"},
    "__slurm_preemption_accounting": {"commands": []},
    "__slurm_preemption_file": {"content": base64.b64encode(SLURM_CONF.encode()).decode()},
    "__slurm_preemption_files": {"content": base64.b64encode(SLURM_CONF.encode()).decode()},
    "__slurm_preemption_stats": {"stat": {"uid": 0, "gid": 0, "mode": "0644"}},
    "__slurm_preemption_there": {"stat": {"exists": True}},
    "__slurm_preemption_ended": {"stat": {"exists": False}},
    "__cluster_base_known": {"ansible_facts": {"getent_passwd": {"ai-inference": None}}},
    "__tailscale_serve_facts": {"ansible_facts": {"ansible_distribution_release": "trixie"}},
    "__tailscale_serve_there": {"stat": {"exists": True}},
    "__tailscale_serve_status": {"stdout": TAILSCALE},
    "__tailscale_serve_now": {"stdout": TAILSCALE},
    "__tailscale_serve_node": {"foreign": []},
    "__tailscale_serve_others_sources": {"matched": 0},
    "__tailscale_serve_hosted": {"files": []},
}
# By the last word of the question, where one task asks several.
LIVE = {
    "config": CONFIG,
    "partition": "PartitionName=gpu_vasp AllowQos=ALL\n",
    "node": "".join(f"NodeName=vasp-0{n} CPUTot=40 Gres=gpu:v100s:1 RealMemory=384000\n" for n in (1, 2, 3)),
}


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible-core ships no types
    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        question = (task_vars or {}).get("__slurm_preemption_query", ["?"])[-1].split()[-1]
        live = {"stdout": LIVE[question]} if question in LIVE else {}
        return {**NOTHING, **live, **ANSWERS.get(self._task.args["register"] or "", {})}
