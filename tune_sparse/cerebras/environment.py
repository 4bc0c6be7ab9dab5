"""The site's Cerebras environment: where it is, what it holds, how a program is run in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.request import getproxies, proxy_bypass

from tune_sparse.config import Cerebras
from tune_sparse.errors import InputError, NotReadyError

CLUSTER_CONFIG = Path("/opt/cerebras/config_v2")
"""On a CS-3 user node: the address of the appliance."""
RELEASES = ("2.5", "2.6", "2.7", "2.8", "2.9", "2.10")
"""Those whose Model Zoo was read; only 2.10 was run. What a training imports of 2.5 is that of 2.6 but for a line."""
CLUSTER_DOMAIN = ".cerebras.internal"
"""Where the appliance's nodes are: a proxy that is asked for them closes the connection."""
NEEDED = ("cerebras_pytorch", "torch", "transformers", "h5py", "safetensors")
PROBE_SECONDS = 60
PROBE = """
import importlib.metadata as m, json, sys
found = {}
for name in %r:
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: found[name] = None
print(json.dumps({"python": sys.version.split()[0], "packages": found}))
"""


MINORS_BEHIND, MINORS_AHEAD = 10, 5
ASK_CLUSTER = """
import json
from cerebras.appliance._version import __cluster_semantic_version__ as client
from cerebras.appliance.cluster.client import ClusterManagementClient
with ClusterManagementClient() as cluster:
    print(json.dumps([client, cluster.server_config.cluster_server_semantic_version]))
"""


@dataclass(frozen=True)
class SiteEnvironment:
    """A virtual environment with cerebras_pytorch, and a checkout of Model Zoo."""

    venv: Path
    modelzoo: Path
    """what PYTHONPATH needs: the checkout's `src`"""
    python_version: str
    packages: Mapping[str, str]

    @property
    def release(self) -> str:
        return self.packages["cerebras_pytorch"]

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def checkpoint_format(self) -> str:
        """The newest that the release's converter reads and writes for Llama and Mistral."""
        return "cs-2.9" if _major_minor(self.release) >= (2, 9) else "cs-2.5"

    def variables(self, threads: int = 1) -> dict[str, str]:
        """Return the variables of a program in this environment. Ray's, and our own packages, are not passed on."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))}
        path = f"{self.venv / 'bin'}{os.pathsep}{own.get('PATH', '')}"  # torch-cirh-opt is found there
        return own | {"PATH": path, "PYTHONPATH": str(self.modelzoo), "OMP_NUM_THREADS": str(threads)}


def find_environment() -> SiteEnvironment:
    """Find the environment that CEREBRAS_VENV and MODELZOO name, and ask what it holds.

    Raises `NotReadyError` for what is missing.
    """
    venv, modelzoo = _read_folder_variable("CEREBRAS_VENV"), _read_folder_variable("MODELZOO")
    if not (modelzoo / "cerebras" / "modelzoo").is_dir() and (modelzoo / "src" / "cerebras").is_dir():
        modelzoo = modelzoo / "src"
    if not (modelzoo / "cerebras" / "modelzoo").is_dir():
        raise NotReadyError(
            f"MODELZOO must name a checkout of Cerebras Model Zoo, {modelzoo} has no cerebras/modelzoo. Give its `src`."
        )
    python_version, packages = probed(venv)
    missing = [name for name in NEEDED if not packages[name]]
    if missing:
        raise NotReadyError(
            f"the Cerebras environment {venv} lacks {', '.join(missing)}. Install them there, with the pins of "
            "cluster/constraints-cerebras.txt if it is yours to change."
        )
    found = SiteEnvironment(venv, modelzoo, python_version, {name: str(packages[name]) for name in NEEDED})
    if not any(found.release == known or found.release.startswith(f"{known}.") for known in RELEASES):
        raise InputError(f"the Cerebras release must be one of {', '.join(RELEASES)}, {venv} has {found.release}.")
    return found


def _read_folder_variable(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        raise NotReadyError(
            f"the backend cerebras needs {variable}, which is not set. Set CEREBRAS_VENV to the site's virtual "
            "environment and MODELZOO to the `src` of a checkout of Model Zoo; `tune-sparse doctor --cerebras` helps."
        )
    folder = Path(value).expanduser().resolve()
    if not folder.is_dir():
        raise NotReadyError(f"{variable} must name a folder, {folder} does not exist. Fix it.")
    return folder


@cache
def probed(venv: Path) -> tuple[str, dict[str, str | None]]:
    """(version of Python, {package: version or None}) of a virtual environment, without importing any of them."""
    python = venv / "bin" / "python"
    try:
        completed = subprocess.run(
            [python, "-I", "-c", PROBE % (NEEDED,)], capture_output=True, text=True, check=True, timeout=PROBE_SECONDS
        )
        found = json.loads(completed.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise NotReadyError(f"CEREBRAS_VENV must be a virtual environment, {python} does not run: {error}.") from error
    return found["python"], found["packages"]


def cerebras_identity(settings: Cerebras) -> dict[str, str]:
    """Return the settings and versions of the Cerebras side that change a result."""
    known = {"target": settings.cerebras_target, "release": find_environment().release}
    is_other = settings.half_precision != Cerebras.half_precision
    return known | ({"half_precision": settings.half_precision} if is_other else {})


@dataclass(frozen=True)
class ClusterVersions:
    """Semantic versions, as 1.14.0: of the client's protocol, and of the cluster's server."""

    client: str
    server: str

    def __post_init__(self) -> None:
        for version in (self.client, self.server):
            if not re.match(r"\d+\.\d+", str(version)):
                raise InputError(f"a semantic version must begin as 1.14, got {version!r}. Ask `csctl --version`.")

    @property
    def go_together(self) -> bool:
        """The client's own rule (cerebras.appliance.cluster.client): one major, few minors behind or ahead."""
        client, server = (tuple(map(int, version.split(".")[:2])) for version in (self.client, self.server))
        behind = server[1] - client[1]
        return client[0] == server[0] and -MINORS_AHEAD <= behind <= MINORS_BEHIND


def cluster_versions(environment: SiteEnvironment) -> ClusterVersions | str:
    """Ask the cluster through the environment's own client; returns why not where there is no answer."""
    if not CLUSTER_CONFIG.exists():
        return f"{CLUSTER_CONFIG} does not exist"
    try:
        answer = subprocess.run(
            [environment.python, "-c", ASK_CLUSTER],
            env=environment.variables(),
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
        )
        client, server = json.loads(answer.stdout.splitlines()[-1])
        return ClusterVersions(client, server) if server else "the cluster's server does not say"
    except InputError as error:
        return str(error)
    except (OSError, subprocess.SubprocessError):
        return "the environment's client cannot be asked"
    except (IndexError, ValueError):
        return (answer.stderr.strip().splitlines() or ["no answer"])[-1]


def check_cluster(settings: Cerebras) -> None:
    """Raise `InputError` where no appliance is known, or a folder for it is missing, before anything is trained."""
    if not CLUSTER_CONFIG.exists():
        raise InputError(
            f"training on a CS-3 needs a cluster, this machine knows none: {CLUSTER_CONFIG} does not exist. Start the "
            "sweep on a user node of the CS-3, or set --cerebras-target cpu (trains on the CPU) or validate (lowers)."
        )
    for name in ("mount_dirs", "python_paths"):
        for folder in getattr(settings, name):
            if not Path(folder).is_dir():
                raise InputError(f"{name} must name folders that exist, {folder} does not. Fix it, or leave it out.")
    check_proxies()


def check_proxies() -> None:
    """Raise `InputError` where a proxy would be asked for the appliance: every try would end in `Socket closed`."""
    proxies = getproxies()
    if not {"http", "https", "grpc"} & proxies.keys():
        return
    for host in (f"node{CLUSTER_DOMAIN}", *cluster_hosts()):
        if not proxy_bypass(host, proxies):
            raise InputError(
                f"no_proxy must cover the appliance where a proxy is set, {proxies.get('no', '')!r} does not cover "
                f"{host.removeprefix('node')}. Write `export no_proxy={host.removeprefix('node')},$no_proxy "
                "NO_PROXY=$no_proxy` and start again."
            )


def cluster_hosts() -> list[str]:
    """Return the hosts of the appliance's servers that the cluster's configuration names."""
    try:
        found = json.loads(CLUSTER_CONFIG.read_text())
        servers = [cluster["server"] for cluster in found["clusters"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return list(dict.fromkeys(re.sub(r"^\w+://|:\d+$", "", server) for server in servers if server))


def _major_minor(release: str) -> tuple[int, int]:
    major, minor, *_ = release.split(".")
    return int(major), int(minor)
