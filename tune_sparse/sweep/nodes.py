"""Wait until a Ray cluster has so many nodes: `python -m tune_sparse.sweep.nodes COUNT SECONDS`, at RAY_ADDRESS."""

from __future__ import annotations

import os
import sys
import time

from tune_sparse.errors import InputError
from tune_sparse.net import check_listening

POLL_SECONDS = 1.0


def wait_for_nodes(count: int, seconds: float) -> None:
    """Return once `count` nodes are alive. Raises `InputError` that says how many there were after `seconds`."""
    until, alive = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        alive = _alive() if _is_listening(os.environ["RAY_ADDRESS"]) else 0
        if alive >= count:
            return
        time.sleep(POLL_SECONDS)
    raise InputError(
        f"the allocation needs {count} Ray nodes, {alive} joined in {seconds:g} s. See the ray_*.log of the others."
    )


def check_head(address: str) -> None:
    """Raise `InputError` where nobody listens at a `HOST:PORT`; Ray itself would try for minutes."""
    if not _is_listening(address):
        raise InputError(
            f"RAY_ADDRESS must be that of a Ray head that runs, at {address} nobody answers. Start Ray there, fix the "
            "address, or unset it to compute on this machine."
        )


def _is_listening(address: str) -> bool:
    try:
        check_listening(address)
    except OSError:
        return False
    return True


def _alive() -> int:
    import ray

    try:
        ray.init(logging_level="ERROR", log_to_driver=False)
        return sum(node["Alive"] for node in ray.nodes())
    except ConnectionError:  # it listens, and is not ready yet
        return 0
    finally:
        ray.shutdown()


def main() -> int:
    count, seconds = int(sys.argv[1]), float(sys.argv[2])
    try:
        wait_for_nodes(count, seconds)
    except InputError as error:
        print(f"tune-sparse: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
