"""The files that the production inventory's hosts would get, each read by the program that it is for.

They are rendered on this machine and put over a lab host's own in namespaces that nothing else sees, with the addresses
of that cluster; no service of the lab takes notice. Every check is also made with a file that is spoilt. What only
Gleaner's own programs read is checked in `tests/render`.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from gleaner import slurmconf
from tests.lab import cluster
from tests.lab.ansible import ROOT
from tests.lab.cluster import CONTROLLER, SERVICE_USER
from tests.render import beefcake2
from tests.render.beefcake2 import ADDRESSES, NODES, Rendered

PLACE = "/run/test-beefcake2"
NODE = NODES[0]
UNITS = {
    CONTROLLER: "gleaner-keeper.service gleaner-upstream.service nginx.service slurmctld.service",
    **dict.fromkeys(NODES, "gleaner-firewall.service gleaner-lend.socket gleaner-lend.service slurmd.service"),
}
# A node has them from its controller.
CONFIGLESS = ("slurm.conf", "gres.conf", "cgroup.conf")

# Daemons of Slurm ask munged at their start.
MUNGED = "install --directory --owner=munge /run/munge; runuser -u munge -- munged --syslog"
# Without accounting, since slurmctld would wait for slurmdbd; `scontrol` reads these lines, too.
ALONE = "sed -i '/^AccountingStorage/d' etc/slurm/slurm.conf"

# What an administrator may have written; every form of it is one that Slurm takes.
BY_HAND = r"""# beefcake2. Do not edit on the nodes!
ClusterName=beefcake2
SlurmctldHost=slurm-ctl(10.0.0.5)    # the old head node is gone
slurmuser = slurm
StateSaveLocation=/var/lib/slurm/slurmctld
SlurmdSpoolDir=/var/lib/slurm/slurmd
ProctrackType=proctrack/linuxproc
#SelectType=select/linear
SelectType=select/cons_tres
selecttypeparameters=CR_Core
GresTypes=gpu
PreemptMode=OFF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=slurm-ctl

NodeName=DEFAULT CPUs=40 RealMemory=384000
NodeName=vasp-[01-03] Gres=gpu:v100s:1 \
    State=UNKNOWN
PartitionName=gpu_vasp Nodes=vasp-[01-03] \
    Default=YES MaxTime=7-0 State=UP
"""


def bring(rendered: Rendered, host: str) -> None:
    ssh = f"ssh -F {shlex.quote(cluster.SSH_CONFIG)} {host}"
    unpack = f"rm -rf {PLACE} && mkdir {PLACE} && tar --extract --no-same-owner --file=- --directory={PLACE}"
    pack = f"tar --create --file=- --directory={shlex.quote(str(rendered.folder / host))} ."
    subprocess.run(f"{pack} | {ssh} {shlex.quote(unpack)}", shell=True, check=True)


@pytest.fixture(scope="module", autouse=True)
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """With a Slurm of our own, so that its files are there, too."""
    rendered = beefcake2.render(Path(tmp_path_factory.mktemp("beefcake2")), slurm_manage_cluster=True)
    for node in NODES:
        folder = rendered.folder / node / "etc/slurm"
        folder.mkdir()
        for name in CONFIGLESS:
            shutil.copy(rendered.folder / CONTROLLER / "etc/slurm" / name, folder)
    for host in ADDRESSES:
        bring(rendered, host)
    return rendered


def as_there(host: str, command: str, spoil: str = "") -> tuple[int, str]:
    """Run a command among the rendered files; `spoil` is a command that breaks one first, in a copy."""
    # What the lab's own programs listen on is out of reach: slurmd tells steps that run on its node of its
    # configuration, whatever it was started for.
    script = f"""
        ip link set lo up
        ip address add {ADDRESSES[host]["cluster"]}/32 dev lo
        mount -t tmpfs none /mnt
        cp --archive {PLACE}/. /mnt
        cd /mnt
        chown munge etc/munge/munge.key
        [ ! -e etc/slurm/slurmdbd.conf ] || chown slurm etc/slurm/slurmdbd.conf
        {spoil or ":"}
        mount -t overlay none -o lowerdir=/mnt/etc:/etc /etc
        mount -t tmpfs none /run
        mkdir --mode=0700 /run/gleaner-tailnet
        mount -t tmpfs none /var/lib/slurm
        mkdir /var/lib/slurm/slurmd
        {command}
    """
    done = cluster.host(host).run(f"unshare --mount --net --pid --fork sh -euc {shlex.quote(script)}")
    return done.rc, f"{done.stdout}{done.stderr}"


def start(program: str, until: str, spoil: str = "", then: str = "") -> str:
    """What a daemon of the controller says until it has said this or fails, and what a command says after that."""
    # One that says neither within that time (124) is judged by what it said.
    told = shlex.quote(f"until grep -Eq '{until}|fatal:' /run/said; do sleep 0.05; done")
    command = f"""
        {MUNGED}
        install --directory --owner=slurm /var/lib/slurm/slurmctld
        {program} >/run/said 2>&1 &
        timeout 20 sh -c {told} || [ $? = 124 ]
        cat /run/said
        {then}
    """
    code, said = as_there(CONTROLLER, command, spoil)
    assert code == 0, said
    return said


def test_every_file_is_one_that_a_program_reads(rendered: Rendered) -> None:
    """A new one needs a check here or, of Gleaner's own programs, in `tests/render`."""
    here = (
        "/cluster/shared/scripts/", "/etc/apt/", "/etc/default/slurmd", "/etc/gleaner/firewall.nft",
        "/etc/munge/munge.key", "/etc/mysql/", "/etc/nginx/", "/etc/slurm/", "/etc/systemd/system/", "/etc/tmpfiles.d/",
    )  # fmt: skip
    own = (r"/cluster/shared/ai/plans/.*\.json", r"/etc/gleaner/.*\.json", "/usr/local/bin/ai-inference-upstream")
    # Words that are read as they are, and the program itself.
    plain = ("/cluster/shared/.gleaner-site", "/etc/gleaner/server.key", r"/usr/local/lib/gleaner/gleaner-.*\.pyz")
    for host in ADDRESSES:
        rest = {path for path in rendered.paths(host) if not path.startswith(here)}
        assert not {path for path in rest if not re.fullmatch("|".join((*own, *plain)), path)}
        units = {path.split("/")[4].removesuffix(".d") for path in rendered.paths(host) if "/systemd/system/" in path}
        assert units == set(UNITS[host].split())


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


@pytest.mark.parametrize("node", NODES)
def test_nftables_takes_the_firewall(node: str) -> None:
    check = "nft --check --file /etc/gleaner/firewall.nft"
    assert as_there(node, check) == (0, "")
    assert as_there(node, check, "echo 'tabel x' >>etc/gleaner/firewall.nft")[0] != 0


def errors_of_slurm_conf(spoil: str = "") -> str:
    """What a command of Slurm says of the file that it reads."""
    # It says that nobody answers, which is so in a network of its own, but first it reads the file: what it says is
    # judged here, since its exit code tells of the answer alone.
    _, said = as_there(CONTROLLER, "SLURM_CONF=/etc/slurm/slurm.conf scontrol ping 2>&1 || true", spoil)
    assert "slurm-ctl is DOWN" in said or "error" in said
    return "\n".join(line for line in said.splitlines() if "error" in line.lower())


STARTED = "Running as primary controller"
SLURMCTLD = "slurmctld -D -c -f /etc/slurm/slurm.conf"


def test_slurm_takes_its_configuration() -> None:
    assert errors_of_slurm_conf() == ""
    assert "unrecognized key: Preemption" in errors_of_slurm_conf("echo 'Preemption=yes' >>etc/slurm/slurm.conf")
    # The commands do not look at what nodes and partitions say.
    assert STARTED in start(SLURMCTLD, STARTED, ALONE)
    unknown = "sed -i s/Nodes=ALL/Nodes=vasp-04/ etc/slurm/slurm.conf"
    assert STARTED not in start(SLURMCTLD, STARTED, f"{ALONE}; {unknown}")


def written(text: str) -> str:
    return f"printf %s {shlex.quote(text)} >etc/slurm/slurm.conf"


def lacking(text: str) -> list[str]:
    """The lines that a controller which runs with this slurm.conf lacks."""
    given = yaml.safe_load((ROOT / beefcake2.INVENTORY / "group_vars/all/slurm.yml").read_text())
    wanted = [
        {"name": given["slurm_vasp_partition"], "qos": given["slurm_preempting_qos"]},
        {"name": given["slurm_ai_partition"], "qos": [given["slurm_ai_qos"]]},
    ]
    ask = "echo; echo @; scontrol show config; echo @; scontrol --oneliner show partition"
    said = start(SLURMCTLD, STARTED, f"{written(text)}; {ALONE}", ask)
    assert STARTED in said
    _, config, partitions = said.split("\n@\n")
    version = re.search(r"SLURM_VERSION\s+= (\S+)", config)
    assert version is not None, config
    return [
        *slurmconf.policy_gap(config, version.group(1)),
        *slurmconf.partition_gap(partitions, wanted, NODES),
    ]


def test_slurm_takes_what_a_file_that_was_written_by_hand_lacks() -> None:
    """As on the first cluster, whose Slurm is there already."""
    lines = lacking(BY_HAND)
    assert lines == [
        "PreemptType=preempt/qos",
        "PreemptMode=REQUEUE",
        "PreemptParameters=send_user_signal",
        "SelectTypeParameters=CR_CORE_Memory",
        "AccountingStorageEnforce=qos",
        "PartitionName=gpu_ai Nodes=vasp-01,vasp-02,vasp-03 AllowQos=ai_opportunistic MaxTime=INFINITE State=UP",
    ]
    text = slurmconf.with_lines({"slurm.conf": BY_HAND}, lines, ["gpu_vasp"])["slurm.conf"]
    assert errors_of_slurm_conf(written(text)) == ""
    assert lacking(text) == ["AccountingStorageEnforce=qos"]
    # A line that is not taken for the one it is.
    assert errors_of_slurm_conf(written(text.replace("PreemptType=", "PreemptTyp="))) != ""


@pytest.mark.parametrize("spoil", ["s/Name=gpu/Nam=gpu/' etc/slurm/gres.conf", "s/=yes/=maybe/' etc/slurm/cgroup.conf"])
def test_slurmd_takes_its_gpus_and_constraints(spoil: str) -> None:
    read = f"{MUNGED}; slurmd -G -N {NODE} -f /etc/slurm/slurm.conf"
    code, said = as_there(NODE, read)
    assert code == 0, said
    assert re.findall(r"Gres Name=(\S+) Type=(\S+) Count=(\d+) .*File=(\S+)", said) == [
        ("gpu", "v100s", "1", "/dev/nvidia0")
    ]
    assert "error" not in said
    code, said = as_there(NODE, read, f"sed -i '{spoil}")
    assert code != 0, said


def test_slurmd_takes_its_options() -> None:
    # As systemd hands them over; with -C it only looks at the machine.
    read = ". /etc/default/slurmd; slurmd $SLURMD_OPTIONS -C"
    assert as_there(NODE, read)[0] == 0
    assert as_there(NODE, read, "sed -i s/conf-server/conf-servant/ etc/default/slurmd")[0] != 0


def test_slurmdbd_takes_its_configuration_and_munged_its_key() -> None:
    # What it says of the database, which is not there, it says when it has read the file.
    until = "The database must be up"
    assert until in start("slurmdbd -D", until)
    assert "unrecognized key: Storage" in start("slurmdbd -D", until, "echo Storage=x >>etc/slurm/slurmdbd.conf")
    code, said = as_there(CONTROLLER, MUNGED, "echo short >etc/munge/munge.key")
    assert code != 0
    assert "Keyfile" in said


def test_mariadb_takes_its_configuration() -> None:
    read = "mariadbd --user=mysql --verbose --help"
    _, said = as_there(CONTROLLER, read)
    assert re.search(r"^innodb-lock-wait-timeout +900$", said, flags=re.MULTILINE)
    assert "[ERROR]" not in said
    # It exits with 0 all the same.
    _, said = as_there(CONTROLLER, read, "sed -i 's/= 256M/= large/' etc/mysql/mariadb.conf.d/60-slurm.cnf")
    assert "[ERROR]" in said


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
    assert "https://pkgs.tailscale.com/stable/debian/dists/trixie/InRelease" in said
    for name in ("gleaner-non-free", "tailscale"):
        assert as_there(CONTROLLER, sources, f"sed -i /Suites/d etc/apt/sources.list.d/{name}.sources")[0] != 0
    assert as_there(CONTROLLER, "apt-cache policy >/dev/null") == (0, "")
    spoilt = "sed -i s/^Pin-Priority:/Pin-Prio:/ etc/apt/preferences.d/tailscale"
    assert as_there(CONTROLLER, "apt-cache policy", spoilt)[0] != 0
