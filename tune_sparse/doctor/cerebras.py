"""Checks of the Cerebras side of this machine, each fault with its fix."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tune_sparse.cerebras import appliance
from tune_sparse.cerebras.content_cache import limit_bytes, size_bytes
from tune_sparse.cerebras.environment import (
    CLUSTER_CONFIG,
    CLUSTER_DOMAIN,
    SiteEnvironment,
    check_proxies,
    cluster_versions,
    find_environment,
)
from tune_sparse.doctor import Check, check
from tune_sparse.errors import InputError
from tune_sparse.files import cache_dir

TESTED = {"cerebras_pytorch": "2.10.0", "torch": "2.4.0"}
QUOTA_SECONDS = 20


def examine() -> Iterator[Check]:
    """Environment, Model Zoo, compiler, cluster, csctl, proxies and disk.

    A laptop lacks a cluster: --cerebras-target csx alone needs one.
    """
    try:
        environment = find_environment()
    except InputError as error:
        message, _, fix = str(error).partition(". ")
        yield Check("environment", False, message, fix)
    else:
        yield from _environment(environment)
    yield _cluster()
    yield _controller()
    yield _proxies()
    yield from _disk()


def _environment(environment: SiteEnvironment) -> Iterator[Check]:
    versions = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    yield Check("environment", True, f"{environment.venv}: Python {environment.python_version}, {versions}")
    untested = [f"{name} {environment.packages[name]}" for name in TESTED if environment.packages[name] != TESTED[name]]
    if untested:
        yield Check("versions", True, f"{', '.join(untested)}: never run with this program; {TESTED} was")
    zoo = _zoo_release(environment.modelzoo)
    if zoo is not None and zoo != environment.release:
        fix = f"Check out Release_{environment.release} of Model Zoo."
        yield Check("Model Zoo", False, f"{environment.modelzoo} is {zoo}, not {environment.release}", fix)
    else:
        yield Check("Model Zoo", True, f"{environment.modelzoo}, release {zoo or 'unknown'}")
    compiler = environment.venv / "bin" / "torch-cirh-opt"
    fix = "" if compiler.exists() else "Install cerebras_pytorch again: --cerebras-target validate needs it."
    yield Check("compiler front end", compiler.exists(), str(compiler), fix)
    yield _same_release(environment)


def _zoo_release(modelzoo: Path) -> str | None:
    """Read the release from the checkout's setup.py or requirements.txt."""
    for name in ("setup.py", "requirements.txt"):
        path = modelzoo.parent / name
        text = path.read_text(errors="replace") if path.exists() else ""
        if found := re.search(r"(?:__version__ = \"|cerebras_pytorch==)(\d+(?:\.\d+)+)", text):
            return found[1]
    return None


def _cluster() -> Check:
    if CLUSTER_CONFIG.exists():
        return Check("cluster", True, f"configured by {CLUSTER_CONFIG}")
    fix = "Go to a user node of the CS-3. Without one, --cerebras-target cpu trains and validate lowers."
    return Check("cluster", False, f"none: {CLUSTER_CONFIG} does not exist", fix)


def _controller() -> Check:
    try:
        waiting, version = appliance.unfinished_jobs(), appliance.controller_version()
    except appliance.ApplianceUnreachableError as error:
        return Check("csctl", False, str(error), "Without it a job that is left over cannot be cancelled.")
    return Check("csctl", True, f"{version}, answers; {len(waiting)} unfinished jobs of this program")


def _proxies() -> Check:
    try:
        check_proxies()
    except InputError as error:
        message, _, fix = str(error).partition(". ")
        return Check("proxies", False, message, fix)
    return Check("proxies", True, f"none is asked for {CLUSTER_DOMAIN}")


def _same_release(environment: SiteEnvironment) -> Check:
    """Compare client and cluster as the client itself does."""
    found = cluster_versions(environment)
    if isinstance(found, str):
        fix = "Ask on a user node of the CS-3; a training that cannot run there fails with ApplianceVersionError."
        return Check("cluster's release", False, f"not known: {found}", fix)
    shown = f"semantic version {found.server}, the environment's is {found.client}"
    fix = "Set CEREBRAS_VENV to the environment of the cluster's release."
    return check("cluster's release", found.go_together, shown, fix)


def _disk() -> Iterator[Check]:
    cache = cache_dir() / "cerebras"
    used = size_bytes(cache) if cache.is_dir() else 0
    limit = f"{used / 1e9:.1f} of {limit_bytes() / 1e9:.0f} GB used in {cache}"
    yield Check("conversions", True, limit)
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    yield Check("disk", True, f"{free / 1e9:.0f} GB free at {here}")
    program = shutil.which("quota")
    if program is not None:
        completed = subprocess.run([program, "-s"], capture_output=True, text=True, timeout=QUOTA_SECONDS)
        over = "*" in completed.stdout
        fix = "Free some: a sweep writes adapters, and two checkpoints for each training that runs." if over else ""
        shown = " ".join(completed.stdout.split()) or "none"
        yield Check("quota", not over, shown, fix)
