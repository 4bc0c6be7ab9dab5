"""The counter of live tensor bytes, which other tests trust."""

from __future__ import annotations

from pathlib import Path

import torch
from live_bytes import LiveBytes
from safetensors.torch import save_file

from tune_sparse.models.safetensors_io import TensorFiles

MEGABYTE = 1 << 20


def test_the_peak_counts_what_lives_at_once() -> None:
    held = torch.zeros(MEGABYTE, dtype=torch.uint8)
    with LiveBytes(held) as live:
        first = held + 1
        view = first[:2]
        assert live.bytes == 2 * MEGABYTE
        del first
        assert live.bytes == 2 * MEGABYTE, "a view keeps all of its storage"
        del view
        second = held.clone()
        assert (live.bytes, live.peak) == (2 * MEGABYTE, 2 * MEGABYTE)
        third = second.float()
        assert live.peak == 6 * MEGABYTE
        del third
        live.restart()
        second.add_(1)
    assert live.peak == 2 * MEGABYTE


def test_pages_of_a_mapped_checkpoint_do_not_count(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2 * MEGABYTE)}, tmp_path / "model.safetensors")
    with LiveBytes() as live:
        mapped = TensorFiles([tmp_path / "model.safetensors"])["w"]
        assert float(mapped.sum()) == 0
        assert live.bytes < MEGABYTE
        own = mapped.clone()
    assert live.bytes >= own.nbytes
