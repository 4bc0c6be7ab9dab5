"""A pruning is stored once, whole, and never read in part or changed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import done_record, failed_record, make_cell, make_run, make_sweep, write_run
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tune_sparse.cli import main
from tune_sparse.cli.command import BAD_INPUT, OK
from tune_sparse.config import BudgetOptions, Protocol
from tune_sparse.errors import NotReadyError
from tune_sparse.files import read_json, write_json
from tune_sparse.ledger import prunings
from tune_sparse.ledger.ledger import Ledger
from tune_sparse.ledger.pruning_io import read_masks, read_weights, write_pruning
from tune_sparse.ledger.prunings import StoredPruning, pruning_bytes, read_pruning
from tune_sparse.ledger.reader import MergedLedger
from tune_sparse.ledger.run import Run
from tune_sparse.models.dims import ModelDims
from tune_sparse.pruning.bit_masks import BitMasks

CPU = torch.device("cpu")
SHAPES = {"model.layers.1.mlp.up_proj.weight": (3, 5), "model.layers.0.mlp.up_proj.weight": (4, 4)}
SPARSEGPT = make_run(make_cell(method="sparsegpt"))
WANDA = make_run(make_cell(method="wanda"))


def drawn(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple[BitMasks, dict[str, Tensor]]:
    """Masks and pruned weights of two matrices, one of the kept weights 0."""
    generator = torch.Generator().manual_seed(seed)
    keep = {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in SHAPES.items()}
    weights = {name: torch.randn(mask.shape, generator=generator).to(dtype) * mask for name, mask in keep.items()}
    first = next(iter(SHAPES))
    weights[first][tuple(keep[first].nonzero()[0])] = 0.0
    return BitMasks.pack(keep.items()), weights


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results")


def stored(ledger: Ledger, run: Run = SPARSEGPT, seed: int = 0) -> StoredPruning:
    masks, weights = drawn(seed)
    ledger.write_pruning(run, masks, weights if run.cell.method == "sparsegpt" else None, {"hardware": "abacus"})
    found = ledger.pruning(run)
    assert found is not None
    return found


@given(st.integers(0, 2**32), st.sampled_from([torch.float32, torch.bfloat16]))
def test_masks_and_weights_come_out_as_they_went_in(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: torch.dtype
) -> None:
    masks, weights = drawn(seed, dtype)
    folder = tmp_path_factory.mktemp("prunings") / "one"
    write_pruning(folder, {}, masks, weights, {})
    found = read_pruning(folder)
    assert found is not None
    again = read_masks(found, CPU)
    assert (list(again), again.kept, again.sha256) == (list(masks), masks.kept, masks.sha256)
    kept = read_weights(found, again)
    assert all(torch.equal(kept[name], weights[name]) and kept[name].dtype == dtype for name in SHAPES)


def test_its_description_says_what_it_is(ledger: Ledger) -> None:
    found = stored(ledger)
    assert found.folder.name == SPARSEGPT.pruning_id
    assert sorted(path.name for path in found.folder.iterdir()) == [
        *("masks.safetensors", "pruning.json", "weights.safetensors"),
    ]
    described = read_json(found.folder / "pruning.json")
    assert described["settings"] == SPARSEGPT.pruning_settings
    assert described["mask_sha256"] == drawn()[0].sha256
    assert described["provenance"] == {"hardware": "abacus"}
    assert found.bytes == sum((found.folder / name).stat().st_size for name in described["bytes_by_file"])


def test_a_method_that_updates_no_weight_stores_masks_alone(ledger: Ledger) -> None:
    found = stored(ledger, WANDA)
    assert (found.has_weights, list(found.bytes_by_file)) == (False, ["masks.safetensors"])


def test_what_is_not_there_is_none(ledger: Ledger) -> None:
    assert ledger.pruning(SPARSEGPT) is None
    assert ledger.pruning(make_run(make_cell(method="unstructured"))) is None


def test_the_first_to_finish_wins(ledger: Ledger) -> None:
    first, second = stored(ledger, seed=0), stored(ledger, seed=1)
    assert first == second
    assert [path.name for path in (ledger.folder / "prunings").iterdir()] == [SPARSEGPT.pruning_id]


def _write(folder: Path, seed: int, barrier: Any) -> None:
    masks, weights = drawn(seed)
    barrier.wait()
    write_pruning(folder, {}, masks, weights, {"seed": seed})


def test_of_two_writers_at_once_one_wins_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    folder = tmp_path / "prunings" / "one"
    writers = [context.Process(target=_write, args=(folder, seed, barrier)) for seed in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = read_pruning(folder)
    assert found is not None
    assert read_masks(found, CPU).sha256 == drawn(found.provenance["seed"])[0].sha256
    assert list(folder.parent.iterdir()) == [folder]


def _killed_before(file: str, folder: Path) -> None:
    def kill(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    from tune_sparse.ledger import pruning_io

    setattr(pruning_io, file, kill)
    write_pruning(folder, {}, *drawn(), {})


@pytest.mark.parametrize("before", ["_write_kept", "write_json", "take_free_name"])
def test_a_writer_that_is_killed_between_files_leaves_nothing_to_read(before: str, ledger: Ledger) -> None:
    folder = ledger.pruning_folder("one")
    writer = multiprocessing.get_context("fork").Process(target=_killed_before, args=(before, folder))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert read_pruning(folder) is None
    assert len(list(folder.parent.iterdir())) == 1
    ledger.remove_partial()
    assert list(folder.parent.iterdir()) == []


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def rewrite(folder: Path, **changes: Any) -> None:
    write_json(folder / "pruning.json", read_json(folder / "pruning.json") | changes)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of a mask": (lambda f: flip(f / "masks.safetensors", -1), "masks.safetensors must have the checksum"),
    "a bit of a header": (lambda f: flip(f / "masks.safetensors", 20), "masks.safetensors must have the checksum"),
    "a bit of a weight": (lambda f: flip(f / "weights.safetensors", -1), "weights.safetensors must have the checksum"),
    "a cut file": (lambda f: os.truncate(f / "weights.safetensors", 100), "weights.safetensors must have .+, got 100"),
    "a lost file": (lambda f: (f / "weights.safetensors").unlink(), "weights.safetensors must have .+ bytes, got 0"),
    "a lost description": (lambda f: (f / "pruning.json").unlink(), "pruning.json cannot be read"),
    "a cut description": (lambda f: os.truncate(f / "pruning.json", 30), "pruning.json cannot be read"),
    "another format": (lambda f: rewrite(f, format_version=7), "reads format 2, pruning.json is of format 7"),
    "no format": (lambda f: write_json(f / "pruning.json", []), "pruning.json cannot be read"),
    "another pruning": (lambda f: rewrite(f, settings={}), "it is of another pruning, calibration, .+ differ"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_whole_is_named_and_not_read(fault: str, ledger: Ledger) -> None:
    folder = stored(ledger).folder
    break_it, message = FAULTS[fault]
    break_it(folder)
    with pytest.raises(NotReadyError, match=f"a stored pruning must be whole, {folder} is not: .*{message}"):
        read_masks(ledger.pruning(SPARSEGPT), CPU)  # type: ignore[arg-type]


def test_a_file_is_hashed_once_until_it_changes(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    found, hashed = stored(ledger), []
    monkeypatch.setattr(
        prunings, "file_sha256", lambda path: hashed.append(path.name) or found.sha256_by_file[path.name]
    )
    masks = read_masks(found, CPU)
    read_weights(found, masks)
    assert hashed == ["masks.safetensors", "weights.safetensors"]
    os.utime(found.folder / "weights.safetensors", (1, 1))
    read_masks(found, CPU)
    assert hashed == ["masks.safetensors", "weights.safetensors", "weights.safetensors"]


def test_several_folders_read_the_pruning_beside_the_run(ledger: Ledger, tmp_path: Path) -> None:
    other = Ledger(tmp_path / "other")
    stored(ledger, seed=0), stored(other, seed=1)
    write_run(other, SPARSEGPT, done_record(SPARSEGPT))
    found = MergedLedger([ledger.folder, other.folder]).pruning(SPARSEGPT)
    assert found is not None
    assert found.folder.parents[1] == other.folder


class TestIdentity:
    @pytest.mark.parametrize(
        ("method", "changes"),
        [
            ("wanda", {"mode": "sparse-to-sparse", "backend": "cerebras", "seed": 7}),
            ("random", {"mode": "sparse-to-sparse", "task": "gsm8k"}),
        ],
    )
    def test_neither_mode_nor_training_is_of_it(self, method: str, changes: dict[str, Any]) -> None:
        run = make_run(make_cell(method=method))
        trained = Protocol(steps=7, learning_rate=1e-3, lora_rank=4)
        other = replace(run, cell=replace(run.cell, **changes), protocol=trained, budgets=BudgetOptions(64, 64, 64))
        assert run.identity != other.identity
        assert run.pruning_id == other.pruning_id

    @pytest.mark.parametrize(
        ("method", "differs"),
        [
            ("wanda", lambda run: replace(run, model_fingerprint="x")),
            ("wanda", lambda run: replace(run, data_fingerprint="x")),
            ("wanda", lambda run: replace(run, prompt_version="2")),
            ("wanda", lambda run: replace(run, cell=replace(run.cell, sparsity=0.6))),
            ("wanda", lambda run: replace(run, cell=replace(run.cell, method="sparsegpt"))),
            *(
                ("wanda", lambda run, change=change: replace(run, protocol=replace(run.protocol, **change)))
                for change in (
                    {"max_tokens": 512},
                    {"n_train": 5},
                    {"precision": "float32"},
                    {"calibration_tokens": 300},
                    {"calibration_window": 3},
                    {"calibration_order": "sequential"},
                )
            ),
            ("random", lambda run: replace(run, cell=replace(run.cell, seed=1))),
        ],
    )
    def test_all_that_decides_it_is_of_it(self, method: str, differs: Callable[[Run], Run]) -> None:
        run = make_run(make_cell(method=method))
        assert differs(run).pruning_id != run.pruning_id

    def test_a_text_calibrates_for_every_task(self) -> None:
        text = Protocol(calibration="wikitext2")
        run = make_run(make_cell(method="wanda"), protocol=text, calibration_fingerprint="t")
        other = replace(run, cell=replace(run.cell, task="gsm8k"), data_fingerprint="x", prompt_version="2")
        assert run.pruning_id == other.pruning_id
        assert replace(run, calibration_fingerprint="u").pruning_id != run.pruning_id

    def test_what_is_the_same_everywhere_or_dense_is_not_stored(self) -> None:
        for method, sparsity in (("unstructured", 0.5), ("structured", 0.5), ("wanda", 0.0), ("none", 0.0)):
            assert make_run(make_cell(method=method, sparsity=sparsity)).pruning_id is None

    def test_its_name_can_be_read(self) -> None:
        assert SPARSEGPT.pruning_id is not None
        assert SPARSEGPT.pruning_id.startswith("tiny_boolq_sparsegpt_s50_")
        assert str(make_run(make_cell(method="random")).pruning_id).startswith("tiny_uncalibrated_random_s50_")


def test_bytes_of_a_7b_are_those_of_the_forecast() -> None:
    dims = ModelDims(4096, 32, 32, 32, 128, 11008, 32000, None, 4096)
    assert pruning_bytes(dims, 0.5, 2, has_weights=False) == pytest.approx(0.81e9, rel=0.01)
    assert pruning_bytes(dims, 0.5, 2, has_weights=True) == pytest.approx(0.81e9 + 6.48e9, rel=0.01)


def test_bytes_are_those_that_are_written(ledger: Ledger) -> None:
    found = stored(ledger)
    headers = sum(8 + int.from_bytes((found.folder / file).read_bytes()[:8], "little") for file in found.bytes_by_file)
    masks, _ = drawn()
    assert found.bytes - headers == sum(map(len, masks.bits.values())) + 2 * sum(masks.kept.values())
    assert json.loads((found.folder / "pruning.json").read_text())["format_version"] == 2


class TestDiscard:
    @pytest.fixture
    def discard(self, ledger: Ledger) -> Callable[..., int]:
        results = ["--results-dir", str(ledger.folder)]
        return lambda *sweeps: main(["discard", "--prunings", *sweeps, "--reason", "r", *results])

    @pytest.fixture
    def sweep(self, ledger: Ledger) -> str:
        """Both modes of two methods requested, all finished but one run of random."""
        cells = [
            make_cell(method=method, mode=mode)
            for method in ("wanda", "random")
            for mode in ("sparse-to-dense", "sparse-to-sparse")
        ]
        ledger.write_sweep(make_sweep(cells))
        for cell in cells:
            stored(ledger, make_run(cell))
        for cell in cells[:-1]:
            write_run(ledger, make_run(cell), done_record(make_run(cell)))
        return "sweep1000"

    def test_it_removes_what_no_unfinished_run_needs(
        self, discard: Callable[..., int], sweep: str, ledger: Ledger, capsys: pytest.CaptureFixture[str]
    ) -> None:
        random = make_run(make_cell(method="random"))
        assert discard(sweep) == OK
        assert [path.name for path in (ledger.folder / "prunings").iterdir()] == [random.pruning_id]
        printed = capsys.readouterr().out
        assert f"1 prunings of 0.00 GB are removed: {WANDA.pruning_id}" in printed
        assert "1 are kept, since runs that are not finished, or failed, need them" in printed
        assert "2 finished runs cannot be merged, evaluated or repeated any more: torch_tiny_boolq_wanda" in printed
        [kept] = (ledger.folder / "set_aside").iterdir()
        assert read_json(kept / "set_aside.json")["reason"] == "r"
        assert read_json(kept / "pruning.json")["settings"] == WANDA.pruning_settings

    def test_a_failed_run_needs_its_pruning_too(self, discard: Callable[..., int], sweep: str, ledger: Ledger) -> None:
        """It may be tried again, and is then compared with the other mode."""
        failed = make_run(make_cell(method="random", mode="sparse-to-sparse"))
        write_run(ledger, failed, failed_record(failed))
        assert discard(sweep) == OK
        assert ledger.pruning(failed) is not None

    def test_a_pruning_that_cannot_be_read_is_removed_too(
        self, discard: Callable[..., int], sweep: str, ledger: Ledger
    ) -> None:
        (ledger.pruning_folder(str(WANDA.pruning_id)) / "pruning.json").unlink()
        assert discard(sweep) == OK
        assert ledger.pruning(WANDA) is None

    def test_an_unknown_sweep_or_both_choices_are_bad_input(
        self, discard: Callable[..., int], sweep: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert discard("sweep100") == BAD_INPUT
        assert f"unknown sweep 'sweep100'. Did you mean '{sweep}'?" in capsys.readouterr().err
        assert main(["discard", "run", "--prunings", sweep, "--reason", "r"]) == BAD_INPUT
        assert "discard takes a run or --prunings, got both. Give" in capsys.readouterr().err
