"""Addresses: what may be written down, and who listens."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_sparse.errors import InputError
from tune_sparse.net import check_address, check_listening, host_and_port, without_secret

SECRET = "hunter2"


@pytest.mark.parametrize(
    "address",
    [
        f"http://me:{SECRET}@mlflow:5000",
        f"postgresql://me:{SECRET}@db/mlflow",
        f"postgresql+psycopg2://me:{SECRET}@/mlflow?host=/run/postgresql",
        f"postgresql://db/mlflow?user=me&password={SECRET}",
        f"https://mlflow/?access_token={SECRET}",
        f"http://:{SECRET}@mlflow",
        f"http://me:{SECRET}@mlflow:notaport",
    ],
)
def test_an_address_with_a_secret_is_refused_without_repeating_it(address: str) -> None:
    with pytest.raises(InputError) as refused:
        check_address("tracking_uri", address)
    assert SECRET not in str(refused.value)
    assert "tracking_uri must hold no password" in str(refused.value)
    assert "MLFLOW_TRACKING_PASSWORD" in str(refused.value)
    assert "~/.pgpass" in str(refused.value)


def test_a_port_is_a_number() -> None:
    with pytest.raises(InputError, match=r"tracking_uri must be an address, got 'http://mlflow:x'.*Fix its port"):
        check_address("tracking_uri", "http://mlflow:x")


@pytest.mark.parametrize(
    "address",
    ["", "http://mlflow:5000", "sqlite:////tmp/a/mlflow.db", "postgresql://me@db:5432/mlflow?sslmode=require"],
)
def test_an_address_without_one_is_left_alone(address: str) -> None:
    check_address("tracking_uri", address)


@given(st.text(alphabet="abcXYZ019-_.~%", min_size=8))
def test_no_password_is_ever_shown(password: str) -> None:
    secret = f"Q{password}Q"
    assert secret not in without_secret(f"postgresql://me:{secret}@db:5432/mlflow?password={secret}#{secret}")


@pytest.mark.parametrize(
    ("address", "server"),
    [
        ("http://mlflow:5000/path", ("mlflow", 5000)),
        ("https://mlflow", ("mlflow", 443)),
        ("postgresql+psycopg2://me@db/mlflow", ("db", 5432)),
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("[::1]:6379", ("::1", 6379)),
        ("sqlite:////tmp/mlflow.db", None),
        ("/tmp/mlruns", None),
        ("postgresql:///mlflow", None),
    ],
)
def test_where_a_server_is(address: str, server: tuple[str, int] | None) -> None:
    assert host_and_port(address) == server


def test_nobody_listens_where_nobody_does() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        check_listening(address)
    with pytest.raises(ConnectionRefusedError):
        check_listening(address)
    check_listening("sqlite:////tmp/mlflow.db")
