"""The ``site`` dict: what the inventory says of the cluster, its models and its tiers; checked, then typed.

``problems`` finds everything that is wrong in one go and never raises, whatever it is given; ``read`` gives
the typed model of a site without problems. Variables are named as the administrator writes them
(``tiers[0].nodes[1]``, ``llama_cpp_version``, ``hostvars[vasp-02].gpus``).
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Union

from gleaner import gguf, model_files, tailnet

RPC_PORT = 50052
# Where nodes lend each other models.
LEND_PORT = 8098
# Ports that the cluster's own daemons listen on, and ours.
TAKEN_PORTS = {
    22: "sshd",
    6817: "slurmctld",
    6818: "slurmd",
    6819: "slurmdbd",
    LEND_PORT: "the lending of models",
    RPC_PORT: "the RPC workers",
}
KINDS = ("router", "layer_split")
BACKENDS = ("cpu", "cuda")
KV_TYPES = ("f16", "q8_0", "q4_0")
REASONING_FORMATS = ("deepseek", "deepseek-legacy", "none", "auto")
# Of the grace: what the server's stop, the requeue and Slurm's own signal need after the drain.
STOP_SECONDS = 10

Headers = Mapping[str, Union[Mapping[str, Any], str]]


@dataclass(frozen=True)
class Problem:
    """One thing wrong in the inventory: the variable, the value got, the value wanted, and the cure."""

    variable: str
    got: str
    wanted: str
    cure: str

    def __str__(self) -> str:
        return f"{self.variable} = {self.got}; wanted {self.wanted}; cure: {self.cure}"


@dataclass(frozen=True)
class Gpu:
    model: str
    memory_mib: int
    numa_node: int
    memory_used_mib: int = 0
    # Of gres.conf, where Slurm is ours to manage.
    cores: str | None = None
    device: str | None = None

    @property
    def free_mib(self) -> int:
        return self.memory_mib - self.memory_used_mib


@dataclass(frozen=True)
class Node:
    name: str
    cluster_address: str
    rpc_address: str
    cpus: int
    memory_mib: int
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Model:
    name: str
    parts: tuple[Mapping[str, Any], ...]
    """Source, sha256 and size_bytes of each of its files."""
    facts: Mapping[str, Any]
    aliases: tuple[str, ...] = ()
    """Other names by which clients may ask for it."""

    @property
    def path(self) -> str:
        """What `--model` names, relative to the folder of the models."""
        return model_files.first_file(self.name, len(self.parts))


@dataclass(frozen=True)
class KvCache:
    k: str = "f16"
    v: str = "f16"


@dataclass(frozen=True)
class Tier:
    """A tier; what a site may leave out has its default here."""

    name: str
    kind: str
    job_name: str
    gateway_port: int
    priority: int
    context_tokens: int
    parallel: int = 1
    gpus_per_node: int = 1
    cpus: int | None = None
    threads: int | None = None
    memory_mib: int | None = None
    drain_seconds: int = 5
    load_timeout_seconds: int = 600
    batch_tokens: int = 2048
    ubatch_tokens: int | None = None
    kv_cache: KvCache = KvCache()
    prompt_cache_mib: int = 0
    server_args: tuple[str, ...] = ()
    # router
    nodes: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None
    models_max: int = 2
    # layer_split
    head: str = ""
    workers: tuple[str, ...] = ()
    model: str = ""
    chat_template: str | None = None
    reasoning_format: str = "deepseek"
    rpc_debug: bool = False
    rpc_confined: bool = True

    @property
    def all_nodes(self) -> tuple[str, ...]:
        return self.nodes if self.kind == "router" else (self.head, *self.workers)


@dataclass(frozen=True)
class Engine:
    version: str
    backend: str
    flash_attention: bool
    cuda_architectures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slurm:
    ai_partition: str
    ai_qos: str
    ai_account: str
    grace_seconds: int


@dataclass(frozen=True)
class Site:
    cluster_name: str
    controller: str
    service_user: str
    shared_dir: str
    engine: Engine
    slurm: Slurm
    nodes: Mapping[str, Node]
    models: Mapping[str, Model]
    tiers: Mapping[str, Tier]
    tailnet: tailnet.Tailnet | None = None

    def models_of(self, tier: Tier) -> tuple[Model, ...]:
        """What a tier serves; a router tier without ``models`` serves all that no layer-split tier names."""
        if tier.kind == "layer_split":
            return (self.models[tier.model],)
        if tier.models is not None:
            return tuple(self.models[name] for name in tier.models)
        split = {other.model for other in self.tiers.values() if other.kind == "layer_split"}
        return tuple(model for name, model in self.models.items() if name not in split)


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LOWER = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
# What others may have called their accounts, QoS and users.
_FOREIGN = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,63}")
_FOREIGN_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}")
_JOB = re.compile(r"[a-z0-9-]{1,64}")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_GPU = re.compile(r"[a-z0-9_]{1,64}")
_DEVICE = re.compile(r"/dev(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+")
_CORES = re.compile(r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_ARCHITECTURE = re.compile(r"\d{2,3}[af]?(-real|-virtual)?")
_URL_TAIL = re.compile(r"[^\s\"'`$\\;|<>]+")

_SITE_KEYS = (
    "cluster_name",
    "controller",
    "controllers",
    "controller_address",
    "service_user",
    "shared_dir",
    "llama_cpp",
    "nodes",
    "models",
    "tiers",
    "slurm",
    "tailnet",
    "gateway_listen",
    "inventory_dir",
)
_SLURM_KEYS = (
    "manage_cluster",
    "apply_policy",
    "ai_partition",
    "ai_qos",
    "ai_account",
    "grace_seconds",
    "preempting_qos",
    "vasp_partition",
    "vasp_account",
    "vasp_users",
)
_NODE_KEYS = ("cluster_address", "rpc_address", "cpus", "memory_mib", "gpus", "sockets", "threads_per_core")
_GPU_KEYS = ("model", "memory_mib", "memory_used_mib", "numa_node", "cores", "device")
_MODEL_KEYS = ("name", "aliases", "source", "sha256", "size_bytes", "parts", "header")
_PART_KEYS = ("source", "sha256", "size_bytes")
_COMMON_TIER_KEYS = (
    "name",
    "kind",
    "job_name",
    "gateway_port",
    "priority",
    "context_tokens",
    "parallel",
    "gpus_per_node",
    "cpus",
    "threads",
    "memory_mib",
    "drain_seconds",
    "load_timeout_seconds",
    "batch_tokens",
    "ubatch_tokens",
    "kv_cache",
    "prompt_cache_mib",
    "server_args",
)
_KIND_KEYS = {
    "router": ("nodes", "models", "models_max"),
    "layer_split": ("head", "workers", "model", "chat_template", "reasoning_format", "rpc_debug", "rpc_confined"),
}
TIER_WHOLES = {
    # key: (least, most, the value to start from)
    "gateway_port": (1024, 65535, "8080"),
    "priority": (0, 2**31 - 1, "10"),
    "context_tokens": (1, 2**24, "16384"),
    "parallel": (1, 64, "1"),
    "gpus_per_node": (1, 64, "1"),
    "cpus": (1, 4096, "8"),
    "threads": (1, 4096, "8"),
    "memory_mib": (1, 2**31, "65536"),
    "drain_seconds": (0, 3600, "5"),
    "load_timeout_seconds": (1, 86400, "600"),
    "batch_tokens": (1, 2**20, "512"),
    "ubatch_tokens": (1, 2**20, "512"),
    "prompt_cache_mib": (0, 2**31, "0"),
    "models_max": (1, 64, "2"),
}
_TIER_REQUIRED = ("name", "kind", "job_name", "gateway_port", "priority", "context_tokens")

# Flags of llama-server that the plan or the agent sets: a second one in server_args would win silently.
_PLANNED_FLAGS = frozenset(
    [
        "--host",
        "--port",
        "--models-dir",
        "--models-max",
        "--models-preset",
        "--ctx-size",
        "-c",
        "--parallel",
        "-np",
        "--threads",
        "-t",
        "--load-mode",
        "-lm",
        "--flash-attn",
        "-fa",
        "--fit",
        "-fit",
        "--gpu-layers",
        "--n-gpu-layers",
        "-ngl",
        "--cache-type-k",
        "-ctk",
        "--cache-type-v",
        "-ctv",
        "--batch-size",
        "-b",
        "--ubatch-size",
        "-ub",
        "--timeout",
        "-to",
        "--cache-ram",
        "-cram",
        "--model",
        "-m",
        "--alias",
        "-a",
        "--chat-template",
        "--chat-template-file",
        "--reasoning-format",
        "--rpc",
        "--tensor-split",
        "-ts",
        "--split-mode",
        "-sm",
        "--device",
        "-dev",
        "--main-gpu",
        "-mg",
        "--override-tensor",
        "-ot",
        "--no-kv-offload",
        "-nkvo",
        "--kv-unified",
        "-kvu",
        "--swa-full",
        "--ctx-checkpoints",
        "--swa-checkpoints",
        "--embedding",
        "--embeddings",
        "--reranking",
        "--rerank",
        "--mmproj",
        "-mm",
        "--model-draft",
        "-md",
        "--no-repack",
        "-nr",
        "--op-offload",
        "--no-op-offload",
    ]
)

_TEMPLATE_CHARACTERS = 1 << 16
# What the playbooks take from the vault, and whether it is only for a Slurm that is ours to manage.
SECRETS = {"vault_server_key": False, "vault_munge_key": True, "vault_slurmdbd_password": True}
# What munge takes for a key; the others are held to the same.
_SECRET_CHARACTERS = (32, 1024)

_MISSING = object()


def _show(value: object) -> str:
    if value is _MISSING or value is None:
        return "undefined"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print a number of more than 4300 digits
        text = f"a {type(value).__name__} that is too long to print"
    return text if len(text) <= 80 else text[:79] + "…"


def _word(value: object) -> str:
    return value[:128] if isinstance(value, str) and value.isprintable() else _show(value)


def _nearest(word: object, choices: Iterable[str]) -> str | None:
    found = difflib.get_close_matches(_word(word), list(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


@dataclass
class Checker:
    """Collects problems; each check returns the value when it is good, else None."""

    found: list[Problem] = field(default_factory=list)

    def add(self, variable: str, got: object, wanted: str, cure: str) -> None:
        self.found.append(Problem(variable, _show(got), wanted, cure))

    def mapping(self, value: object, variable: str) -> Mapping[str, Any]:
        if isinstance(value, Mapping):
            return value
        self.add(variable, value, "a dictionary", f"write {variable} as key: value pairs")
        return {}

    def items(self, value: object, variable: str, cure: str = "") -> list[Any]:
        if isinstance(value, Sequence) and _sequence(value):
            return list(value)
        self.add(variable, value, "a list", cure or f"write {variable} as a list, each item after a dash")
        return []

    def keys(self, value: Mapping[str, Any], allowed: Iterable[str], prefix: str) -> None:
        allowed = list(allowed)
        for key in value:
            if key not in allowed:
                near = _nearest(key, allowed)
                cure = f"did you mean {near}?" if near else "remove it"
                self.add(f"{prefix}{_word(key)}", value[key], f"one of {', '.join(allowed)}", cure)

    def entry(self, value: object, variable: str, allowed: Iterable[str]) -> Mapping[str, Any] | None:
        """A dictionary that has none but these keys; None where it is no dictionary at all."""
        if not isinstance(value, Mapping):
            self.mapping(value, variable)
            return None
        self.keys(value, allowed, f"{variable}.")
        return value

    def text(self, value: object, variable: str, pattern: re.Pattern[str], wanted: str, cure: str) -> str | None:
        if isinstance(value, str) and pattern.fullmatch(value):
            return value
        self.add(variable, value, wanted, cure)
        return None

    def whole(self, value: object, variable: str, least: int, most: int, example: str) -> int | None:
        if isinstance(value, int) and _whole(value) and least <= value <= most:
            return value
        self.add(variable, value, f"a whole number from {least} to {most}", f"for example {variable}: {example}")
        return None

    def choice(self, value: object, variable: str, choices: Sequence[str]) -> str | None:
        if isinstance(value, str) and value in choices:
            return value
        near = _nearest(value, choices) if isinstance(value, str) else None
        cure = f"did you mean {near}?" if near else f"set {variable} to one of these"
        self.add(variable, value, " or ".join(choices), cure)
        return None

    def flag(self, value: object, variable: str) -> None:
        if not isinstance(value, bool):
            self.add(variable, value, "true or false", f"set {variable}: false")

    def address(self, value: object, variable: str) -> str | None:
        try:
            if isinstance(value, str):
                return str(ipaddress.IPv4Address(value))
        except ValueError:
            pass
        self.add(
            variable,
            value,
            "an IPv4 address",
            "write the address itself, not a host name: a resolver may lag (`ip -brief -4 address` there tells)",
        )
        return None


def _check_names(check: Checker, site: Mapping[str, Any]) -> None:
    check.text(
        site.get("cluster_name", _MISSING),
        "cluster_name",
        _LOWER,
        "lower-case letters, digits, - and _ (Slurm's ClusterName)",
        "for example cluster_name: beefcake2",
    )
    controller = check.text(
        site.get("controller", _MISSING),
        "controller",
        _HOST,
        "the inventory name of the controller",
        "for example controller: slurm-ctl",
    )
    controllers = site.get("controllers", _MISSING)
    if controllers is not _MISSING and controller is not None and controllers != [controller]:
        check.add(
            "groups['slurm_controller']",
            controllers,
            f"exactly the host {controller}",
            "put the host that `controller` names, and no other, into the inventory group slurm_controller",
        )
    check.address(site.get("controller_address", _MISSING), f"hostvars[{controller or 'CONTROLLER'}].cluster_address")
    user = check.text(
        site.get("service_user", _MISSING),
        "service_user",
        _USER,
        "a user name",
        "for example service_user: ai-inference",
    )
    if user == "root":
        check.add("service_user", user, "an ordinary user", "never run models as root: service_user: ai-inference")
    shared = site.get("shared_dir", _MISSING)
    if not (
        isinstance(shared, str)
        and re.fullmatch(r"/[A-Za-z0-9._/-]+", shared)
        and str(PurePosixPath(shared)) == shared
        and ".." not in PurePosixPath(shared).parts
    ):
        check.add(
            "shared_dir",
            shared,
            "an absolute path without . or ..",
            "for example shared_dir: /cluster/shared",
        )
    inventory = site.get("inventory_dir", _MISSING)
    if not isinstance(inventory, str) or not inventory.startswith("/"):
        check.add(
            "inventory_dir",
            inventory,
            "an absolute path",
            'in site.yml: inventory_dir: "{{ inventory_dir }}"',
        )


def _check_slurm(check: Checker, value: object) -> int | None:
    """Checks ``slurm_*`` and returns the grace."""
    slurm = check.mapping(value, "slurm")
    check.keys(slurm, _SLURM_KEYS, "slurm.")
    check.flag(slurm.get("manage_cluster", _MISSING), "slurm_manage_cluster")
    apply = slurm.get("apply_policy", False)
    # What `-e slurm_apply_policy=true` gives is text.
    if not isinstance(apply, str) or apply.lower() not in ("true", "false"):
        check.flag(apply, "slurm_apply_policy")
    partitions: dict[Any, str] = {}
    for key, example in (("ai_partition", "gpu_ai"), ("vasp_partition", "gpu_vasp")):
        name = check.text(
            slurm.get(key, _MISSING),
            f"slurm_{key}",
            _NAME,
            "a Slurm partition's name",
            f"for example {example}",
        )
        _check_unique(check, partitions, name, f"slurm_{key}", "a partition")
    for key, example in (("ai_qos", "ai_opportunistic"), ("ai_account", "ai")):
        check.text(
            slurm.get(key, _MISSING),
            f"slurm_{key}",
            _LOWER,
            "a lower-case name (the accounting database folds case)",
            f"for example slurm_{key}: {example}",
        )
    _check_paying(check, slurm)
    return check.whole(slurm.get("grace_seconds", _MISSING), "slurm_grace_seconds", STOP_SECONDS + 1, 3600, "30")


def _check_paying(check: Checker, slurm: Mapping[str, Any]) -> None:
    """Whose jobs take the GPUs back: their QoS, their account, and who is to be in it."""
    cure = "for example slurm_preempting_qos: [vasp_priority]"
    value = slurm.get("preempting_qos", _MISSING)
    names = check.items(value, "slurm_preempting_qos", cure)
    if not names and _sequence(value):
        check.add("slurm_preempting_qos", value, "at least one QoS", cure)
    for index, name in enumerate(names):
        variable = f"slurm_preempting_qos[{index}]"
        check.text(name, variable, _FOREIGN, "a lower-case name (the accounting database folds case)", cure)
        if name == slurm.get("ai_qos"):
            check.add(variable, name, "another QoS than slurm_ai_qos, which it preempts", cure)
    account = check.text(
        slurm.get("vasp_account", _MISSING),
        "slurm_vasp_account",
        _FOREIGN,
        "the account of the paying users, whose default QoS becomes the preempting one",
        "`sacctmgr show associations format=account,user` on the cluster tells which it is",
    )
    if account is not None and account == slurm.get("ai_account"):
        check.add("slurm_vasp_account", account, "another account than slurm_ai_account", "rename one of the two")
    if slurm.get("vasp_users") is not None:
        cure = "list users as on the hosts; [] where the site keeps its accounts itself"
        for index, name in enumerate(check.items(slurm["vasp_users"], "slurm_vasp_users", cure)):
            check.text(name, f"slurm_vasp_users[{index}]", _FOREIGN_USER, "a user name", cure)


def _check_source_url(check: Checker, value: object, variable: str) -> None:
    if isinstance(value, str):
        for scheme in ("https://", "file:///"):
            if value.startswith(scheme) and _URL_TAIL.fullmatch(value[len(scheme) :]):
                return
    check.add(
        variable,
        value,
        "https://… or file:///…, without spaces or quotes",
        "give the file's URL; one that is on the shared file system already is file:///…",
    )


def _check_sha256(check: Checker, value: object, variable: str, what: str) -> None:
    check.text(value, variable, _SHA256, "64 lower-case hexadecimal digits", f"write the sha256sum of {what}")


def _check_engine(check: Checker, value: object) -> None:
    engine = check.mapping(value, "llama_cpp")
    known = ("version", "backend", "flash_attention", "cuda_architectures", "source", "releases")
    check.keys(engine, known, "llama_cpp.")
    check.text(
        engine.get("version", _MISSING),
        "llama_cpp_version",
        _VERSION,
        "letters, digits, . _ + and - (it becomes a folder's name)",
        "write the version of the pinned source",
    )
    backend = check.choice(engine.get("backend", _MISSING), "llama_cpp_backend", BACKENDS)
    check.flag(engine.get("flash_attention", False), "llama_cpp_flash_attention")
    architectures = engine.get("cuda_architectures")
    if architectures is not None or backend == "cuda":
        variable = "llama_cpp_cuda_architectures"
        cure = 'for V100 and V100S: ["70-real"]'
        values = check.items(architectures, variable, cure)
        if backend == "cuda" and _sequence(architectures) and not values:
            check.add(variable, architectures, "at least one CUDA architecture", cure)
        for index, item in enumerate(values):
            check.text(item, f"{variable}[{index}]", _ARCHITECTURE, "a CUDA architecture such as 70-real", cure)
    source = engine.get("source", _MISSING)
    if source is _MISSING or source is None or source == {}:
        releases = [str(name) for name in check.items(engine.get("releases", []), "llama_cpp_releases")]
        if releases and engine.get("version") not in releases:
            check.add(
                "llama_cpp_version",
                engine.get("version", _MISSING),
                f"one of llama_cpp_releases: {', '.join(releases)}",
                "name one of them, or add its archive to llama_cpp_releases",
            )
            return
        check.add(
            "llama_cpp_source",
            _MISSING,
            "url, sha256 and subdirectory of the pinned llama.cpp source archive",
            "fill it in: the URL of the release archive, its sha256sum, the folder inside it",
        )
        return
    source = check.mapping(source, "llama_cpp_source")
    check.keys(source, ("url", "sha256", "subdirectory"), "llama_cpp_source.")
    _check_source_url(check, source.get("url", _MISSING), "llama_cpp_source.url")
    _check_sha256(check, source.get("sha256", _MISSING), "llama_cpp_source.sha256", "the archive")
    folder = source.get("subdirectory", "")
    parts = PurePosixPath(folder).parts if isinstance(folder, str) else ("..",)
    if ".." in parts or parts[:1] == ("/",):
        check.add(
            "llama_cpp_source.subdirectory",
            folder,
            "a relative path",
            "name the folder of llama.cpp inside the archive",
        )


def _check_gpus(check: Checker, value: object, host: str, cores: int | None) -> int | None:
    """Checks the GPUs of a node with so many cores, and returns how many there are."""
    if not _sequence(value):
        check.add(
            f"{host}.gpus",
            value,
            "a list (empty for none)",
            "gpus: [{model: v100s, memory_mib: 32768, numa_node: 0}]",
        )
        return None
    gpus = check.items(value, f"{host}.gpus")
    devices: dict[Any, str] = {}
    for index, item in enumerate(gpus):
        variable = f"{host}.gpus[{index}]"
        gpu = check.entry(item, variable, _GPU_KEYS)
        if gpu is None:
            continue
        check.text(
            gpu.get("model", _MISSING),
            f"{variable}.model",
            _GPU,
            "lower-case letters, digits and _",
            "for example v100s",
        )
        memory = check.whole(gpu.get("memory_mib", _MISSING), f"{variable}.memory_mib", 1, 2**31, "32768")
        if "memory_used_mib" in gpu:
            check.whole(gpu["memory_used_mib"], f"{variable}.memory_used_mib", 0, (memory or 2**31) - 1, "512")
        check.whole(gpu.get("numa_node", _MISSING), f"{variable}.numa_node", 0, 1023, "0")
        if "cores" in gpu:
            _check_cores(check, gpu["cores"], f"{variable}.cores", cores)
        # As gres.conf has it where nothing is said.
        device = gpu.get("device", f"/dev/nvidia{index}")
        check.text(
            device, f"{variable}.device", _DEVICE, "a device file", f"for example {variable}.device: /dev/nvidia{index}"
        )
        _check_unique(check, devices, device, f"{variable}.device", "a device")
    return len(gpus)


def _check_cores(check: Checker, value: object, variable: str, cores: int | None) -> None:
    """``Cores=`` of gres.conf: numbers of cores, not of processors, as Slurm counts them."""
    cure = 'as text, for example cores: "0-19"; `nvidia-smi topo -m` shows the processors beside the card'
    text = check.text(value, variable, _CORES, "cores as gres.conf has them, such as 0-19 or 0,2,4", cure)
    for part in text.split(",") if text is not None else ():
        first, _, last = part.partition("-")
        if int(first) > int(last or first):
            check.add(variable, value, f"ranges that go up, unlike {part}", cure)
        elif cores is not None and int(last or first) >= cores:
            check.add(variable, value, f"numbers below {cores}, which is cpus / threads_per_core", cure)


@dataclass(frozen=True)
class _NodeFacts:
    """Of a declared node, what tiers are compared with; None where the inventory is wrong there."""

    cpus: int | None
    memory_mib: int | None
    gpus: int | None


def _check_nodes(check: Checker, value: object) -> dict[str, _NodeFacts]:
    nodes = check.mapping(value, "groups['slurm_nodes']")
    if not nodes and isinstance(value, Mapping):
        check.add(
            "groups['slurm_nodes']",
            value,
            "at least one host",
            "put the compute nodes into the group slurm_nodes",
        )
    known: dict[str, _NodeFacts] = {}
    owner: dict[str, str] = {}
    for name, item in nodes.items():
        host = f"hostvars[{_word(name)}]"
        if not isinstance(name, str) or not _HOST.fullmatch(name):
            check.add(
                "groups['slurm_nodes']",
                name,
                "host names of letters, digits, - and .",
                "rename the inventory host",
            )
        node = check.entry(item, host, _NODE_KEYS)
        if node is None:
            continue
        for key in ("cluster_address", "rpc_address"):
            address = check.address(node.get(key, _MISSING), f"{host}.{key}")
            if address is None:
                continue
            if owner.setdefault(address, host) != host:
                check.add(
                    f"{host}.{key}",
                    address,
                    f"an address of its own ({owner[address]} has this one)",
                    "correct one of them",
                )
        cpus = check.whole(node.get("cpus", _MISSING), f"{host}.cpus", 1, 4096, "40")
        cores = _check_sockets(check, node, host, cpus)
        known[_word(name)] = _NodeFacts(
            cpus,
            check.whole(node.get("memory_mib", _MISSING), f"{host}.memory_mib", 1, 2**31, "384000"),
            _check_gpus(check, node.get("gpus", _MISSING), host, cores),
        )
    return known


def _check_sockets(check: Checker, node: Mapping[str, Any], host: str, cpus: int | None) -> int | None:
    """Checks how a node's processors are laid out, and returns its number of cores; None where that is wrong."""
    sockets = check.whole(node.get("sockets", 1), f"{host}.sockets", 1, 64, "2")
    threads = check.whole(node.get("threads_per_core", 1), f"{host}.threads_per_core", 1, 16, "2")
    if cpus is None or sockets is None or threads is None:
        return None
    if cpus % (sockets * threads):
        check.add(
            f"{host}.cpus",
            cpus,
            f"a multiple of {sockets * threads}, which is sockets * threads_per_core",
            "`slurmd -C` on the node prints CPUs, SocketsPerBoard and ThreadsPerCore",
        )
        return None
    return cpus // threads


def _check_unique(check: Checker, seen: dict[Any, str], value: object, variable: str, what: str) -> None:
    if not isinstance(value, (str, int)):
        return
    first = seen.setdefault(value, variable)
    if first != variable:
        check.add(
            variable,
            value,
            f"{what} of its own ({first} has this one)",
            f"rename one of {first} and {variable}",
        )


def _check_model(check: Checker, item: object, variable: str, headers: Headers) -> str | None:
    model = check.entry(item, variable, _MODEL_KEYS)
    if model is None:
        return None
    name = check.text(
        model.get("name", _MISSING),
        f"{variable}.name",
        _MODEL,
        "a file's stem: letters, digits, . _ and -, without a path",
        "write the name that clients ask for; the file is called <name>.gguf",
    )
    if name is not None:
        if ".gguf" in name:
            check.add(f"{variable}.name", name, "the stem, without .gguf", f"name: {name.replace('.gguf', '')}")
        elif "mmproj" in name or name.startswith(("mtp-", "dspark-", "dflash-")):
            check.add(
                f"{variable}.name",
                name,
                "a name that llama-server lists (it takes this one for another model's companion)",
                "rename the model",
            )
        elif re.search(r"-\d{5}-of-\d{5}$", name):
            check.add(
                f"{variable}.name",
                name,
                "the name of the whole model",
                "leave the number of the part out, and list all parts as parts: [{source, sha256}, …]",
            )
    if "parts" in model:
        _check_parts(check, model, variable)
    else:
        _check_part(check, model, variable)
    _check_header(check, model, name, variable, headers)
    return name


def _check_parts(check: Checker, model: Mapping[str, Any], variable: str) -> None:
    """Of a split model: each file has a source and a sum, and the model has none of its own."""
    for key in _PART_KEYS:
        if key in model:
            check.add(f"{variable}.{key}", model[key], "nothing beside parts, which have their own", "remove it")
    cure = "list its files in the order of their numbers, each with source and sha256"
    parts = check.items(model["parts"], f"{variable}.parts", cure)
    if _sequence(model["parts"]) and len(parts) < 2:
        check.add(f"{variable}.parts", model["parts"], "two parts or more", "write source and sha256 of a single file")
    for index, item in enumerate(parts):
        part = check.entry(item, f"{variable}.parts[{index}]", _PART_KEYS)
        if part is not None:
            _check_part(check, part, f"{variable}.parts[{index}]")


def _check_part(check: Checker, part: Mapping[str, Any], variable: str) -> None:
    _check_source_url(check, part.get("source", _MISSING), f"{variable}.source")
    _check_sha256(check, part.get("sha256", _MISSING), f"{variable}.sha256", "the GGUF file")
    size = part.get("size_bytes")
    if size is not None:
        check.whole(size, f"{variable}.size_bytes", 1, 2**63 - 1, "98000000")


def _check_header(check: Checker, model: Mapping[str, Any], name: str | None, variable: str, headers: Headers) -> None:
    header = model.get("header", _MISSING)
    stem = name or "MODEL"
    cure = f"gleaner gguf inspect {stem}.gguf --output models/{stem}.json, in the inventory's folder"
    path = PurePosixPath(header) if isinstance(header, str) and header else None
    if path is None or path.is_absolute() or ".." in path.parts:
        check.add(f"{variable}.header", header, "the path of its header facts, relative to the inventory", cure)
        return
    facts = headers.get(name) if name is not None else None
    if name is None:
        return
    if isinstance(facts, str):
        check.add(f"{variable}.header", header, f"readable header facts ({facts})", cure)
        return
    fault = "the file was not read" if facts is None else gguf.facts_fault(facts)
    if fault is not None or facts is None:
        check.add(f"{variable}.header", header, f"header facts of version {gguf.FACTS_VERSION} ({fault})", cure)
        return
    wanted, parts = (facts.get("split") or {}).get("count", 1), model.get("parts")
    listed = len(parts) if isinstance(parts, Sequence) and _sequence(parts) else 1
    if listed != wanted and (listed > 1 or "parts" not in model):
        check.add(
            f"{variable}.{'parts' if 'parts' in model else 'header'}",
            f"{listed} parts" if "parts" in model else header,
            f"as many files as the header facts are of, which is {wanted}",
            "list its files as parts: [{source, sha256}, …], or inspect the model that is meant",
        )
    size = model.get("size_bytes")
    if _whole(size) and size != facts["size_bytes"]:
        check.add(
            f"{variable}.size_bytes",
            size,
            f"{facts['size_bytes']}, as in {header}",
            "correct it, or inspect the file anew",
        )


def _check_models(check: Checker, value: object, headers: Headers) -> set[str]:
    names: set[str] = set()
    seen: dict[Any, str] = {}
    for index, item in enumerate(check.items(value, "models")):
        name = _check_model(check, item, f"models[{index}]", headers)
        if name is not None:
            _check_unique(check, seen, name, f"models[{index}].name", "a name")
            names.add(name)
        if isinstance(item, Mapping) and item.get("aliases") is not None:
            _check_aliases(check, item["aliases"], f"models[{index}].aliases", seen)
    return names


def _check_aliases(check: Checker, value: object, variable: str, seen: dict[Any, str]) -> None:
    for index, alias in enumerate(check.items(value, variable, f"{variable}: [another name of this model]")):
        name = check.text(
            alias,
            f"{variable}[{index}]",
            _MODEL,
            "letters, digits, . _ and -",
            "write the other name that clients ask for",
        )
        _check_unique(check, seen, name, f"{variable}[{index}]", "a name")


def _check_host(check: Checker, value: object, variable: str, nodes: Mapping[str, _NodeFacts]) -> str | None:
    if isinstance(value, str) and value in nodes:
        return value
    near = _nearest(value, nodes) if isinstance(value, str) else None
    known = ", ".join(list(nodes)[:8]) + (" …" if len(nodes) > 8 else "")
    check.add(
        variable,
        value,
        f"a host of the group slurm_nodes ({known or 'which is empty'})",
        f"did you mean {near}?" if near else "add the host to the inventory, or name another",
    )
    return None


def _check_model_name(check: Checker, value: object, variable: str, models: set[str]) -> None:
    if isinstance(value, str) and value in models:
        return
    near = _nearest(value, models) if isinstance(value, str) else None
    check.add(
        variable,
        value,
        f"a model of `models` ({', '.join(sorted(models)) or 'which is empty'})",
        f"did you mean {near}?" if near else "add the model to `models`, or name another",
    )


def _check_tier_nodes(
    check: Checker, tier: Mapping[str, Any], prefix: str, kind: str, nodes: Mapping[str, _NodeFacts]
) -> None:
    places: list[tuple[str, object]] = []
    if kind == "router":
        values = check.items(tier.get("nodes", _MISSING), f"{prefix}.nodes", "nodes: [the hosts this tier may run on]")
        if not values and _sequence(tier.get("nodes")):
            check.add(f"{prefix}.nodes", [], "at least one node", "nodes: [the hosts this tier may run on]")
        places = [(f"{prefix}.nodes[{index}]", value) for index, value in enumerate(values)]
    else:
        places = [(f"{prefix}.head", tier.get("head", _MISSING))]
        values = check.items(
            tier.get("workers", _MISSING), f"{prefix}.workers", "workers: [the other nodes of this tier]"
        )
        if not values and _sequence(tier.get("workers")):
            check.add(
                f"{prefix}.workers",
                [],
                "at least one worker",
                "a model for one node is a tier of kind router",
            )
        places += [(f"{prefix}.workers[{index}]", value) for index, value in enumerate(values)]

    seen: dict[Any, str] = {}
    for variable, value in places:
        name = _check_host(check, value, variable, nodes)
        if name is None:
            continue
        if seen.setdefault(name, variable) != variable:
            check.add(variable, name, f"each node once ({seen[name]} is the same)", "remove one of the two")
            continue
        _check_node_holds(check, tier, prefix, name, nodes[name])


def _check_node_holds(check: Checker, tier: Mapping[str, Any], prefix: str, name: str, node: _NodeFacts) -> None:
    gpus = tier.get("gpus_per_node", 1)
    if _whole(gpus) and gpus >= 1 and node.gpus is not None and gpus > node.gpus:
        check.add(
            f"{prefix}.gpus_per_node",
            gpus,
            f"at most {node.gpus}, the GPUs that {name} declares",
            f"declare the GPU in hostvars[{name}].gpus, or take {name} out of the tier",
        )
    for key, limit in (("cpus", node.cpus), ("memory_mib", node.memory_mib)):
        value = tier.get(key)
        if isinstance(value, int) and _whole(value) and limit is not None and value > limit:
            check.add(
                f"{prefix}.{key}",
                value,
                f"at most {limit}, the {key} of {name}",
                f"lower it, or correct hostvars[{name}].{key}",
            )


def _check_tier(
    check: Checker,
    tier: Mapping[str, Any],
    prefix: str,
    nodes: Mapping[str, _NodeFacts],
    models: set[str],
    grace: int | None,
) -> None:
    kind = check.choice(tier.get("kind", _MISSING), f"{prefix}.kind", KINDS)
    every = {key: owner for owner, keys in _KIND_KEYS.items() for key in keys}
    for key, owner in every.items():
        if key in tier and kind is not None and owner != kind:
            check.add(
                f"{prefix}.{key}",
                tier[key],
                f"no such key in a tier of kind {kind} ({owner} has it)",
                f"remove it, or set {prefix}.kind: {owner}",
            )
    check.keys(tier, (*_COMMON_TIER_KEYS, *every), f"{prefix}.")
    check.text(
        tier.get("name", _MISSING),
        f"{prefix}.name",
        _LOWER,
        "lower-case letters, digits, - and _",
        "for example fast",
    )
    check.text(
        tier.get("job_name", _MISSING),
        f"{prefix}.job_name",
        _JOB,
        "lower-case letters, digits and - (a Slurm job's name)",
        "for example job_name: llama-14b",
    )
    for key, (least, most, example) in TIER_WHOLES.items():
        value = tier.get(key, _MISSING)
        absent = value is _MISSING or value is None
        if absent and key not in _TIER_REQUIRED:
            continue
        check.whole(value, f"{prefix}.{key}", least, most, example)
    port = tier.get("gateway_port")
    if _whole(port) and port in TAKEN_PORTS:
        check.add(
            f"{prefix}.gateway_port",
            port,
            f"a free port ({port} belongs to {TAKEN_PORTS[port]})",
            "for example 8080",
        )
    drain = tier.get("drain_seconds", 5)
    if isinstance(drain, int) and grace is not None and drain > grace - STOP_SECONDS:
        check.add(
            f"{prefix}.drain_seconds",
            drain,
            f"at most {grace - STOP_SECONDS}: slurm_grace_seconds {grace}, less {STOP_SECONDS} to stop",
            "drain for a shorter time, or lengthen the grace of the QoS",
        )
    batch, ubatch = tier.get("batch_tokens", 2048), tier.get("ubatch_tokens", 512)
    if _whole(batch) and _whole(ubatch) and "ubatch_tokens" in tier and ubatch > batch:
        check.add(f"{prefix}.ubatch_tokens", ubatch, f"at most batch_tokens ({batch})", "lower it")
    _check_kv_cache(check, tier, prefix)
    _check_server_args(check, tier, prefix)
    if kind is not None:
        _check_tier_nodes(check, tier, prefix, kind, nodes)
    if kind == "layer_split":
        _check_model_name(check, tier.get("model", _MISSING), f"{prefix}.model", models)
        _check_answers(check, tier, prefix)
    elif kind == "router" and tier.get("models") is not None:
        names = check.items(tier["models"], f"{prefix}.models")
        if not names and _sequence(tier["models"]):
            check.add(f"{prefix}.models", [], "at least one model", "leave it out to serve every model")
        for index, name in enumerate(names):
            _check_model_name(check, name, f"{prefix}.models[{index}]", models)


def _check_answers(check: Checker, tier: Mapping[str, Any], prefix: str) -> None:
    """What of a layer-split tier shapes its answers and its logs."""
    check.choice(tier.get("reasoning_format", "deepseek"), f"{prefix}.reasoning_format", REASONING_FORMATS)
    for key in ("rpc_debug", "rpc_confined"):
        if key in tier:
            check.flag(tier[key], f"{prefix}.{key}")
    text = tier.get("chat_template")
    if text is not None and not (isinstance(text, str) and "messages" in text and len(text) <= _TEMPLATE_CHARACTERS):
        check.add(
            f"{prefix}.chat_template",
            text,
            f"the text of a chat template, of at most {_TEMPLATE_CHARACTERS} characters, that goes through `messages`",
            "chat_template: \"{{ lookup('ansible.builtin.file', PATH) }}\", or leave it out to use the model's own",
        )


def _check_kv_cache(check: Checker, tier: Mapping[str, Any], prefix: str) -> None:
    if tier.get("kv_cache") is None:
        return
    variable = f"{prefix}.kv_cache"
    cache = check.mapping(tier["kv_cache"], variable)
    check.keys(cache, ("k", "v"), f"{variable}.")
    for key in ("k", "v"):
        check.choice(cache.get(key, "f16"), f"{variable}.{key}", KV_TYPES)


def _check_server_args(check: Checker, tier: Mapping[str, Any], prefix: str) -> None:
    if tier.get("server_args") is None:
        return
    for index, value in enumerate(check.items(tier["server_args"], f"{prefix}.server_args")):
        variable = f"{prefix}.server_args[{index}]"
        if not isinstance(value, str) or not value or any(ord(letter) < 32 for letter in value):
            check.add(
                variable,
                value,
                "one argument as text",
                'quote it, one list item an argument: ["--verbosity", "4"]',
            )
        elif value.split("=")[0] in _PLANNED_FLAGS:
            check.add(variable, value, "a flag that the plan does not set", "use the tier's own key for it")


def _check_tiers(
    check: Checker,
    value: object,
    nodes: Mapping[str, _NodeFacts],
    models: set[str],
    grace: int | None,
) -> None:
    seen: dict[str, dict[Any, str]] = {"name": {}, "job_name": {}, "gateway_port": {}}
    for index, item in enumerate(check.items(value, "tiers")):
        prefix = f"tiers[{index}]"
        tier = check.mapping(item, prefix)
        if not isinstance(item, Mapping):
            continue
        _check_tier(check, tier, prefix, nodes, models, grace)
        for key, what in (("name", "a name"), ("job_name", "a job name"), ("gateway_port", "a port")):
            _check_unique(check, seen[key], tier.get(key), f"{prefix}.{key}", what)


def problems(site: object, headers: Headers) -> list[Problem]:
    """Everything that is wrong with a site, in the order of the inventory; empty when nothing is.

    ``headers`` maps model names to header facts, or to why they could not be read (``read_headers``).
    Never raises: a value of a wrong type is a problem like any other.
    """
    check = Checker()
    whole = check.mapping(site, "site")
    if not isinstance(site, Mapping):
        return check.found
    check.keys(whole, _SITE_KEYS, "site.")
    _check_names(check, whole)
    grace = _check_slurm(check, whole.get("slurm", _MISSING))
    _check_engine(check, whole.get("llama_cpp", _MISSING))
    nodes = _check_nodes(check, whole.get("nodes", _MISSING))
    models = _check_models(check, whole.get("models", _MISSING), headers)
    _check_tiers(check, whole.get("tiers", _MISSING), nodes, models, grace)
    if whole.get("tailnet") is not None:
        tailnet.examine(check, whole["tailnet"], gateway_ports(whole))
    if whole.get("gateway_listen") is not None:
        _check_listen(check, whole["gateway_listen"])
    return check.found


def gateway_ports(site: Mapping[str, Any]) -> dict[str, int]:
    """The port of the gateway of each tier whose name and port can be read."""
    tiers: Any = site.get("tiers")
    return {
        tier["name"]: tier["gateway_port"]
        for tier in (tiers if _sequence(tiers) else ())
        if isinstance(tier, Mapping) and isinstance(tier.get("name"), str) and _whole(tier.get("gateway_port"))
    }


def _check_listen(check: Checker, value: object) -> None:
    """Where nginx listens: addresses by name, never all that the host has or will have."""
    cure = 'for example gateway_listen: ["127.0.0.1", "{{ cluster_address }}"]'
    addresses = check.items(value, "gateway_listen", cure)
    for index, item in enumerate(addresses):
        variable = f"gateway_listen[{index}]"
        try:
            address = ipaddress.ip_address(item.strip("[]") if isinstance(item, str) else "")
            bracketed = f"[{address}]" if address.version == 6 else str(address)
        except ValueError:
            check.add(variable, item, "an address of the controller, IPv6 in brackets", cure)
            continue
        if item != bracketed:
            check.add(variable, item, f"it as {bracketed}", cure)
        elif address.is_unspecified:
            check.add(variable, item, "single addresses: this is every interface, that of the tailnet, too", cure)
    if _sequence(value) and not addresses:
        check.add("gateway_listen", value, "at least one address", cure)


def secret_problems(site: object, lengths: Mapping[str, int]) -> list[Problem]:
    """What is wrong with the secrets of a site, of which no more is known here than how many characters each has."""
    whole: Mapping[str, Any] = site if isinstance(site, Mapping) else {}
    slurm = whole.get("slurm")
    managed = isinstance(slurm, Mapping) and slurm.get("manage_cluster") is True
    least, most = _SECRET_CHARACTERS
    file = f"{whole.get('inventory_dir')}/group_vars/all/vault.yml"
    return [
        Problem(
            name,
            f"{lengths.get(name)} characters" if lengths.get(name) else "undefined",
            f"a text of {least} to {most} characters" + (" while slurm_manage_cluster is true" if ours else ""),
            f"`ansible-vault edit {file}` (`create` for a new one), and write there {name}: "
            "and what `openssl rand -hex 32` prints",
        )
        for name, ours in SECRETS.items()
        if (managed or not ours) and not least <= lengths.get(name, 0) <= most
    ]


def read_headers(site: object) -> dict[str, Mapping[str, Any] | str]:
    """The recorded header facts of each model of a site, or why they cannot be read; never raises."""
    found: dict[str, Mapping[str, Any] | str] = {}
    if not isinstance(site, Mapping):
        return found
    folder, models = site.get("inventory_dir"), site.get("models")
    if not isinstance(folder, str) or not isinstance(models, Sequence):
        return found
    for model in models:
        if not isinstance(model, Mapping):
            continue
        name, header = model.get("name"), model.get("header")
        if not isinstance(name, str) or not isinstance(header, str) or "\0" in header:
            continue
        try:
            facts = json.loads((Path(folder) / header).read_text(encoding="utf-8"))
        except OSError as error:
            found[name] = error.strerror or str(error)
        except (ValueError, RecursionError) as error:
            found[name] = f"not JSON: {error}"
        else:
            found[name] = facts if isinstance(facts, Mapping) else "not a JSON object"
    return found


def read(site: Mapping[str, Any], headers: Headers) -> Site:
    """The typed model of a site. Raises ValueError with all of ``problems`` when there are any."""
    found = problems(site, headers)
    if found:
        raise ValueError("the inventory has problems:\n" + "\n".join(str(problem) for problem in found))
    engine, slurm = site["llama_cpp"], site["slurm"]
    return Site(
        cluster_name=site["cluster_name"],
        controller=site["controller"],
        service_user=site["service_user"],
        shared_dir=site["shared_dir"],
        engine=Engine(
            engine["version"],
            engine["backend"],
            engine.get("flash_attention", False),
            tuple(engine.get("cuda_architectures") or ()),
        ),
        slurm=Slurm(slurm["ai_partition"], slurm["ai_qos"], slurm["ai_account"], slurm["grace_seconds"]),
        nodes={
            name: Node(
                name=name,
                cluster_address=node["cluster_address"],
                rpc_address=node["rpc_address"],
                cpus=node["cpus"],
                memory_mib=node["memory_mib"],
                gpus=tuple(Gpu(**gpu) for gpu in node["gpus"]),
            )
            for name, node in site["nodes"].items()
        },
        models={
            model["name"]: Model(
                name=model["name"],
                parts=tuple(
                    {"source": part["source"], "sha256": part["sha256"], "size_bytes": part.get("size_bytes")}
                    for part in model.get("parts") or [model]
                ),
                facts=_facts(headers, model["name"]),
                aliases=tuple(model.get("aliases") or ()),
            )
            for model in site["models"]
        },
        tiers={tier["name"]: _tier(tier) for tier in site["tiers"]},
        tailnet=None if site.get("tailnet") is None else tailnet.read(site["tailnet"], gateway_ports(site)),
    )


def _facts(headers: Headers, name: str) -> Mapping[str, Any]:
    facts = headers[name]
    assert not isinstance(facts, str)
    return facts


def _tier(tier: Mapping[str, Any]) -> Tier:
    given = {key: value for key, value in tier.items() if value is not None}
    for key in ("nodes", "workers", "models", "server_args"):
        if key in given:
            given[key] = tuple(given[key])
    if "kv_cache" in given:
        given["kv_cache"] = KvCache(**given["kv_cache"])
    return Tier(**given)


def node_models(site: Mapping[str, Any], headers: Headers, node: str) -> list[dict[str, Any]]:
    """What a node must hold, in the site's order: name, parts, sums and header of each.

    A router tier's nodes hold all of its models; of a layer-split tier only the head does, since workers get
    their layers from it. Raises ValueError with all of ``problems``, and for an unknown node.
    """
    whole = read(site, headers)
    if node not in whole.nodes:
        raise ValueError(f"node = {node!r}; wanted one of {', '.join(whole.nodes)}")
    wanted = {
        model.name
        for tier in whole.tiers.values()
        if node in (tier.nodes if tier.kind == "router" else (tier.head,))
        for model in whole.models_of(tier)
    }
    return [
        {
            "name": model.name,
            "parts": [dict(part) for part in model.parts],
            "sums": [part["sha256"] for part in model.parts],
            "header": dict(model.facts),
        }
        for model in whole.models.values()
        if model.name in wanted
    ]


def places_of_node(tiers: Iterable[Mapping[str, Any]], node: str) -> list[str]:
    """Where tiers name a node, in the words of the inventory."""
    found = []
    for tier in tiers:
        for key in ("nodes", "head", "workers"):
            value = tier.get(key)
            named = value if isinstance(value, (list, tuple)) else [value]
            if node in named:
                found.append(f"tiers[{tier['name']}].{key} = {', '.join(map(str, named))}")
    return found
