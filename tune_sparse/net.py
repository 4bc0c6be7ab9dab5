"""Addresses of servers: none may hold a secret, and somebody must listen there."""

from __future__ import annotations

import re
import socket
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from tune_sparse.errors import InputError

SECRET_NAMES = re.compile("pass|secret|token|key|credential", re.IGNORECASE)
"""Names of the parameters of an address that nobody should read."""
DEFAULT_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "ray": 10001}
PROBE_SECONDS = 2.0


def check_address(name: str, address: str) -> None:
    """Raise `InputError` if an address has no number as its port, or holds a password: what is given as `name` is kept
    in records, and seen in lists of processes."""
    parts = urlsplit(address)
    if parts.password is not None or any(SECRET_NAMES.search(key) for key, _ in parse_qsl(parts.query)):
        raise InputError(
            f"{name} must hold no password, since it is written to records and logs, got {without_secret(address)!r} "
            "with one. Leave it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, "
            "PGPASSWORD or ~/.pgpass for PostgreSQL."
        )
    try:
        host_and_port(address)
    except ValueError as error:
        raise InputError(f"{name} must be an address, got {address!r} ({error}). Fix its port.") from error


def without_secret(address: str) -> str:
    """Return what of an address may be shown: neither a password nor the parameters."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def host_and_port(address: str) -> tuple[str, int] | None:
    """Read `http://host:port/...`, `postgresql+driver://host/...` or `host:port`; None for what is no server."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    port = parts.port or DEFAULT_PORTS.get(parts.scheme.partition("+")[0])
    return (parts.hostname, port) if parts.hostname and port else None


def check_listening(address: str) -> None:
    """Raise `OSError` if nobody listens there. Asked first, since clients try for minutes."""
    server = host_and_port(address)
    if server is not None:
        socket.create_connection(server, PROBE_SECONDS).close()
