"""The files that the production inventory's hosts would get, each read by the program that it is for.

They are rendered on this machine and put over a lab host's own in namespaces that nothing else sees, with the addresses
of that cluster; no service of the lab takes notice. Every check is also made with a file that is spoilt.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.lab import cluster
from tests.lab.cluster import CONTROLLER, SERVICE_USER
from tests.render import beefcake2

PLACE = "/run/test-beefcake2"
NODE = "vasp-01"
ADDRESSES = {CONTROLLER: "10.0.0.5", NODE: "10.0.0.11"}
UNITS = {
    CONTROLLER: "gleaner-keeper.service gleaner-upstream.service nginx.service slurmctld.service",
    NODE: "gleaner-firewall.service gleaner-lend.socket gleaner-lend.service slurmd.service",
}


def bring(rendered: beefcake2.Rendered, host: str) -> None:
    ssh = f"ssh -F {shlex.quote(cluster.SSH_CONFIG)} {host}"
    unpack = f"rm -rf {PLACE} && mkdir {PLACE} && tar --extract --no-same-owner --file=- --directory={PLACE}"
    pack = f"tar --create --file=- --directory={shlex.quote(str(rendered.folder / host))} ."
    subprocess.run(f"{pack} | {ssh} {shlex.quote(unpack)}", shell=True, check=True)


@pytest.fixture(scope="module", autouse=True)
def _rendered(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With a Slurm of our own, so that its files are there, too."""
    rendered = beefcake2.render(Path(tmp_path_factory.mktemp("beefcake2")), slurm_manage_cluster=True)
    for host in ADDRESSES:
        bring(rendered, host)


def as_there(host: str, command: str, spoil: str = "") -> tuple[int, str]:
    """Run a command among the rendered files; `spoil` is a command that breaks one first, in a copy."""
    script = f"""
        ip link set lo up
        ip address add {ADDRESSES[host]}/32 dev lo
        mount -t tmpfs none /mnt
        cp --archive {PLACE}/. /mnt
        cd /mnt
        {spoil or ":"}
        mount -t overlay none -o lowerdir=/mnt/etc:/etc /etc
        {command}
    """
    done = cluster.host(host).run(f"unshare --mount --net --pid --fork sh -euc {shlex.quote(script)}")
    return done.rc, f"{done.stdout}{done.stderr}"


def test_nginx_takes_its_configuration() -> None:
    assert as_there(CONTROLLER, "nginx -t")[0] == 0
    code, said = as_there(CONTROLLER, "nginx -t", "echo 'listen;' >>etc/nginx/sites-available/ai-inference")
    assert code != 0, said


@pytest.mark.parametrize("host", UNITS)
def test_systemd_takes_its_units(host: str) -> None:
    verify = f"systemd-analyze verify --man=no {UNITS[host]}"
    code, said = as_there(host, verify)
    assert (code, said) == (0, "")
    unit = UNITS[host].split()[0]
    code, said = as_there(host, verify, f"echo 'ExecStart=nowhere' >>etc/systemd/system/{unit}")
    assert said, code


def test_nftables_takes_the_firewall() -> None:
    check = "nft --check --file /etc/gleaner/firewall.nft"
    assert as_there(NODE, check) == (0, "")
    assert as_there(NODE, check, "echo 'tabel x' >>etc/gleaner/firewall.nft")[0] != 0


def test_slurm_takes_its_configuration() -> None:
    # It says that nobody answers, which is so in a network of its own, but first it reads the file: what it says is
    # judged here, since its exit code tells of the answer alone.
    read = "SLURM_CONF=/etc/slurm/slurm.conf scontrol ping 2>&1 || true"
    _, said = as_there(CONTROLLER, read)
    assert "slurm-ctl is DOWN" in said
    assert "error" not in said.lower()
    _, said = as_there(CONTROLLER, read, "echo 'Preemption=yes' >>etc/slurm/slurm.conf")
    assert "unrecognized key: Preemption" in said


@pytest.mark.parametrize("script", ["run-14b", "run-72b-distributed"])
def test_slurm_takes_the_job_scripts(script: str) -> None:
    path = f"{PLACE}/cluster/shared/scripts/llama-cpp/{script}.slurm"

    def submit(edit: str) -> tuple[int, str]:
        command = f"sed {shlex.quote(edit)} {path} | runuser -u {SERVICE_USER} -- sbatch --test-only"
        done = cluster.host(CONTROLLER).run(command)
        return done.rc, done.stderr

    code, said = submit("")
    assert code == 0, said
    assert "to start at" in said
    code, said = submit("s/^#SBATCH --qos=.*/#SBATCH --qos=nonexistent/")
    assert code != 0
    assert "qos" in said.lower()


def test_tmpfiles_and_apt_take_theirs() -> None:
    clean = "systemd-tmpfiles --clean --dry-run /etc/tmpfiles.d/gleaner-logs.conf"
    assert as_there(CONTROLLER, clean)[0] == 0
    assert as_there(CONTROLLER, clean, "echo 'Q' >>etc/tmpfiles.d/gleaner-logs.conf")[0] != 0
    sources = "apt-get update --print-uris"
    code, said = as_there(CONTROLLER, sources)
    assert code == 0, said
    assert "http://mirror/debian/dists/trixie/InRelease" in said
    assert as_there(CONTROLLER, sources, "sed -i /Suites/d etc/apt/sources.list.d/gleaner-non-free.sources")[0] != 0
