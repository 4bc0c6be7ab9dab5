"""`tune-sparse prune` and `validate`, on a checkpoint of each class."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_masks import make_masks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tune_sparse.cli import main, parser
from tune_sparse.cli.command import BAD_INPUT, FAULT, OK
from tune_sparse.cli.prune import calibration_settings, calibration_windows
from tune_sparse.config.protocol import PUBLISHED_CALIBRATION
from tune_sparse.models.architectures import ARCHITECTURES, read_weights
from tune_sparse.models.safetensors_io import TensorWriter, weight_files
from tune_sparse.pruning.calibration import ModelBlocks
from tune_sparse.pruning.mask_io import MaskFile, stem
from tune_sparse.pruning.masks import count_sparsity, mask_sha256
from tune_sparse.pruning.reconstruction import reconstruct_into
from tune_sparse.pruning.streaming import open_checkpoint

METHODS = ("unstructured", "structured", "wanda", "sparsegpt", "random-2:4")
CALIBRATION = ("--calibration", "boolq", "--data-dir", "synthetic", "--calibration-tokens", "512")


@pytest.fixture(params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, architecture_folders: dict[str, Path]) -> Path:
    return architecture_folders[request.param]


@pytest.fixture
def llama_folder(architecture_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy, to be broken."""
    return Path(shutil.copytree(architecture_folders["LlamaForCausalLM"], tmp_path / "llama"))


def prune(folder: Path, out: Path, *arguments: str) -> int:
    return main(["prune", str(folder), "--output", str(out), "--sparsities", "0.5", *arguments])


def validate(checkpoint: Path, masks: Path, *arguments: str) -> int:
    return main(["validate", str(checkpoint), "--masks", str(masks), *arguments])


def test_every_class_is_pruned_and_what_was_written_is_valid(folder: Path, tmp_path: Path) -> None:
    assert prune(folder, tmp_path, "--methods", *METHODS, "--checkpoints", *CALIBRATION) == OK
    written = tmp_path / folder.name
    for method in METHODS:
        masks = MaskFile(written / f"{stem('masks', method, 0.5)}.safetensors")
        checkpoint = written / stem("checkpoint", method, 0.5)
        stats = json.loads((written / f"{stem('stats', method, 0.5)}.json").read_text())
        assert stats["mask_sha256"] == mask_sha256(masks)
        assert stats["actual_sparsity"] == pytest.approx(count_sparsity(masks), abs=1e-12)
        assert abs(stats["actual_sparsity"] - 0.5) < 0.01
        assert stats["kept_by_matrix"] == {name: [int(masks[name].sum()), masks[name].numel()] for name in masks}
        assert ("calibration" in stats) == (method in ("wanda", "sparsegpt"))
        assert (written / f"{stem('histogram', method, 0.5)}.png").read_bytes().startswith(b"\x89PNG")
        assert validate(checkpoint, written / f"{stem('masks', method, 0.5)}.safetensors") == OK
        assert json.loads((checkpoint / "validation_report.json").read_text())["all_valid"]
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        assert all(not weight[~masks[name]].any() for name, weight in read_weights(model).items())
    assert not list(written.glob(".*"))


def test_a_flipped_weight_is_named_with_its_position(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune(folder, tmp_path, "--checkpoints")
    written = tmp_path / folder.name
    checkpoint, masks = (
        written / "checkpoint_sparsity50_unstructured",
        written / "masks_sparsity50_unstructured.safetensors",
    )
    name = sorted(MaskFile(masks))[-1]
    position = tuple((~MaskFile(masks)[name]).nonzero()[5].tolist())
    path = open_checkpoint(str(checkpoint)).tensors.paths[name]
    tensors = load_file(path)
    tensors[name][position] = -0.25
    save_file(tensors, path, metadata={"format": "pt"})
    assert validate(checkpoint, masks) == FAULT
    assert f"{name}{list(position)}: masked weights must be 0 within 1e-06, got -0.25" in capsys.readouterr().out
    assert validate(checkpoint, masks, "--tolerance", "0.3") == OK


def test_a_prune_in_memory_and_from_files_agree(folder: Path, tmp_path: Path) -> None:
    prune(folder, tmp_path, "--methods", "unstructured", "structured", "random", "--seed", "3")
    checkpoint = open_checkpoint(str(folder))
    weights = {matrix.name: checkpoint.tensors[matrix.name] for matrix in checkpoint.prunable.matrices}
    for method in ("unstructured", "structured", "random"):
        expected = mask_sha256(make_masks(method, weights, checkpoint.dims, 0.5, seed=3))
        stats = json.loads((tmp_path / folder.name / f"stats_sparsity50_{method}.json").read_text())
        assert stats["mask_sha256"] == expected


@pytest.mark.parametrize("format", ["pt", "levels"])
def test_other_formats_hold_the_same_masks(format: str, llama_folder: Path, tmp_path: Path) -> None:
    levels = ("--sparsities", "0.2", "0.5", "0.7", "--methods", "unstructured", "structured", "wanda", *CALIBRATION)
    assert prune(llama_folder, tmp_path / "plain", *levels, "--checkpoints") == OK
    assert prune(llama_folder, tmp_path / "other", *levels, "--format", format) == OK
    for method in ("unstructured", "structured", "wanda"):
        for sparsity in (0.2, 0.5, 0.7):
            name = stem("masks", method, sparsity)
            plain = MaskFile(tmp_path / "plain" / "llama" / f"{name}.safetensors")
            path = (
                tmp_path / "other" / "llama" / (f"levels_{method}.safetensors" if format == "levels" else f"{name}.pt")
            )
            other = MaskFile(path, sparsity)
            assert mask_sha256(other) == mask_sha256(plain)
            assert {mask.dtype for mask in other.values()} == {torch.bool}
            checkpoint = tmp_path / "plain" / "llama" / stem("checkpoint", method, sparsity)
            assert validate(checkpoint, path, "--sparsity", str(sparsity)) == OK
    files = sorted((tmp_path / "other" / "llama").glob(f"*.{'pt' if format == 'pt' else 'safetensors'}"))
    assert len(files) == (9 if format == "pt" else 3)


def test_a_packed_map_of_nine_levels_is_half_a_byte_a_weight(llama_folder: Path, tmp_path: Path) -> None:
    main(["prune", str(llama_folder), "--output", str(tmp_path), "--format", "levels"])
    packed = load_file(tmp_path / "llama" / "levels_unstructured.safetensors")
    weights = sum(open_checkpoint(str(llama_folder)).prunable.sizes.values())
    assert 2 * sum(levels.numel() for levels in packed.values()) == weights


def test_structured_checkpoints_become_compact(llama_folder: Path, tmp_path: Path) -> None:
    assert prune(llama_folder, tmp_path, "--methods", "structured", "--compact", "--checkpoints") == OK
    small, masked = (tmp_path / "llama" / f"{kind}_sparsity50_structured" for kind in ("compact", "checkpoint"))
    sizes = [sum(path.stat().st_size for path in weight_files(folder)) for folder in (small, masked)]
    assert sizes[0] < sizes[1]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits for f in (small, masked)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_sequential_pruning_gives_other_masks_than_the_dense_model(llama_folder: Path, tmp_path: Path) -> None:
    arguments = ("--methods", "wanda", "sparsegpt", *CALIBRATION)
    assert prune(llama_folder, tmp_path / "dense", *arguments) == OK
    assert prune(llama_folder, tmp_path / "sequential", *arguments, "--sequential") == OK
    for method in ("wanda", "sparsegpt"):
        stats = [
            json.loads((tmp_path / way / "llama" / f"stats_sparsity50_{method}.json").read_text())
            for way in ("dense", "sequential")
        ]
        assert [s["calibration"]["calibration_order"] for s in stats] == ["dense", "sequential"]
        assert stats[0]["mask_sha256"] != stats[1]["mask_sha256"]


def test_a_text_file_calibrates_too(llama_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat is red and the dog is blue. " * 300)
    size = ("--calibration-tokens", "128", "--calibration-window", "32")
    assert prune(llama_folder, tmp_path, "--methods", "taylor", "--calibration", str(text), *size) == OK
    stats = json.loads((tmp_path / "llama" / "stats_sparsity50_taylor.json").read_text())
    assert stats["calibration"] == {
        "calibration": str(text),
        "calibration_tokens": 128,
        "calibration_window": 32,
        "calibration_order": "dense",
        "calibration_tokens_seen": 128,
    }


def test_as_published_is_wikitext2_in_sequence(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "data" / "wikitext2" / "train.txt"
    text.parent.mkdir(parents=True)
    text.write_text("the cat is red and the dog is blue. " * 30)
    published = ("--calibration", "published", "--data-dir", str(tmp_path / "data"), "--calibration-tokens", "8")
    assert prune(llama_folder, tmp_path, "--methods", "sparsegpt", *published) == OK
    found = json.loads((tmp_path / "llama" / "stats_sparsity50_sparsegpt.json").read_text())["calibration"]
    seen = found.pop("calibration_tokens_seen")
    assert found == PUBLISHED_CALIBRATION
    assert 2 < seen < 128 * 2048
    assert f"sparsegpt calibrated on {seen} tokens" in capsys.readouterr().out


def test_a_calibration_file_that_is_not_text_is_refused(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.bin").write_bytes(b"\xff\xfe\x00")
    calibration = ("--calibration", str(tmp_path / "text.bin"))
    assert prune(llama_folder, tmp_path, "--methods", "wanda", *calibration) == BAD_INPUT
    assert "a calibration text must be UTF-8" in capsys.readouterr().err


def test_examples_are_no_longer_than_the_models_context(architecture_folders: dict[str, Path], tmp_path: Path) -> None:
    """OPT's positions are a table of 128: a longer example would fall off it."""
    (tmp_path / "text.txt").write_text("the cat is red and the dog is blue. " * 300)
    text = ("--calibration", str(tmp_path / "text.txt"), "--calibration-tokens", "300")
    assert prune(architecture_folders["OPTForCausalLM"], tmp_path, "--methods", "wanda", *text) == OK


def change(folder: Path, name: str, write: Callable[[torch.Tensor], Any]) -> None:
    path = open_checkpoint(str(folder)).tensors.paths[name]
    tensors = load_file(path)
    write(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


def nan_weight(folder: Path) -> None:
    change(folder, NAME, lambda weight: weight.view(-1)[7].fill_(math.nan))


def cut_shard(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def missing_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def missing_tensor(folder: Path) -> None:
    path = open_checkpoint(str(folder)).tensors.paths[NAME]
    tensors = load_file(path)
    del tensors[NAME]
    save_file(tensors, path, metadata={"format": "pt"})


def other_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (nan_weight, rf"weights must be finite, {NAME} in .+ has NaN or inf"),
        (cut_shard, r"model-00002-.+ must be a safetensors file: .+ Fetch it again"),
        (missing_shard, r"needs its safetensors weights, .+model-00002-.+ is missing"),
        (missing_tensor, rf"a checkpoint needs all its weights, .+ lacks {NAME}"),
        (other_class, r"the class of a model must be LlamaForCausalLM or .+, got BertForMaskedLM"),
    ],
)
def test_a_broken_checkpoint_leaves_no_file(
    mistake: Callable[[Path], None],
    message: str,
    llama_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mistake(llama_folder)
    assert prune(llama_folder, tmp_path / "masks", "--checkpoints") == BAD_INPUT
    assert re.search(message, capsys.readouterr().err)
    assert [path for path in (tmp_path / "masks").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "wnda"), "unknown method 'wnda'. Did you mean 'wanda'"),
        (("--methods", "wanda-global"), "Wanda's scores compare within an output row"),
        (("--methods", "wanda"), "wanda needs calibration examples, got none. Give --calibration."),
        (("--sparsities", "50"), "a sparsity is the fraction of zeros, in [0, 1), got 50.0. Did you mean 0.5?"),
        (("--sparsities", "0"), "sparsities must ascend from above 0, got [0.0]"),
        (("--sparsities", "0.5", "0.2"), "sparsities must ascend from above 0, got [0.5, 0.2]"),
        (("--methods", "random-2:4", "--sparsities", "0.6"), "the sparsity of random-2:4 is 0.5, got 0.6"),
        (("--methods", "structured", "--sparsities", "0.999"), "structured sparsity must come within 0.01"),
        (("--sparsities", *(str(s / 20) for s in range(1, 17))), "one pass makes 15 levels, got 16. Ask for fewer."),
        (("--format", "onnx"), "unknown format 'onnx'"),
        (("--format", "levels", "--methods", "sparsegpt", *CALIBRATION), "those of sparsegpt are not"),
        (("--format", "levels", "--sequential", "--methods", "wanda", *CALIBRATION), "--sequential prunes block after"),
        (("--compact",), "only structured masks make a model smaller, got unstructured"),
        (("--methods", "wanda", "--calibration", "bolq"), "unknown task or text file 'bolq'. Did you mean 'boolq'?"),
        (("--methods", "wanda", "--calibration", "boolq"), "examples of the tasks are needed, got no data_dir"),
        (("--methods", "wanda", *CALIBRATION, "--calibration-tokens", "1"), "calibration_tokens must be at least 2"),
        (("--methods", "magnitude-global", "--sparsities", "0.99999"), "no layer may be 100% sparse"),
    ],
)
def test_a_wrong_request_is_refused(
    arguments: tuple[str, ...], message: str, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(llama_folder, tmp_path / "masks", *arguments) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert [path for path in (tmp_path / "masks").rglob("*") if path.is_file()] == []


def test_a_text_that_is_too_short_is_refused(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("")
    assert prune(llama_folder, tmp_path, "--methods", "wanda", "--calibration", str(tmp_path / "text.txt")) == BAD_INPUT
    assert "calibration needs at least 2 tokens, got 0" in capsys.readouterr().err


def test_too_little_room_is_refused(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 10**3))
    assert prune(llama_folder, tmp_path / "masks") == BAD_INPUT
    assert re.search(r"pruning needs room for what it writes, about 0\.00 GB, .+ has 0\.00 GB", capsys.readouterr().err)


def test_a_disk_that_runs_full_leaves_no_file(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, written = TensorWriter.write, []

    def full_at_the_twentieth(self: TensorWriter, name: str, tensor: torch.Tensor) -> None:
        written.append(name)
        if len(written) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "write", full_at_the_twentieth)
    assert prune(llama_folder, tmp_path / "masks", "--checkpoints") == BAD_INPUT
    assert re.search(r"pruning needs room .+/masks ran full: .+ No space left", capsys.readouterr().err)
    assert [path for path in (tmp_path / "masks").rglob("*") if path.is_file()] == []


@pytest.fixture
def pruned(llama_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A pruned checkpoint and its mask."""
    prune(llama_folder, tmp_path / "masks", "--checkpoints")
    written = tmp_path / "masks" / "llama"
    return written / "checkpoint_sparsity50_unstructured", written / "masks_sparsity50_unstructured.safetensors"


def rewrite(path: Path, **masks: Any) -> None:
    save_file({name: mask for name, mask in (load_file(path) | masks).items() if mask is not None}, path)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((96, 64), 2, dtype=torch.uint8), f"{NAME}: a mask must be binary, it has values besides 0 and 1"),
        (torch.zeros(96, 64, dtype=torch.bool), f"{NAME}: no layer may be 100% sparse"),
        (torch.ones(96, 64, dtype=torch.bool), "the masks must be the ones that were made"),
        (None, f"{NAME}: a matrix needs a mask"),
    ],
    ids=["not binary", "empty", "another one", "missing"],
)
def test_a_bad_mask_is_found(
    mask: torch.Tensor | None, message: str, pruned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(pruned[1], **{NAME: mask})
    assert validate(*pruned) == FAULT
    assert message in capsys.readouterr().out


def test_masks_as_numbers_are_masks(pruned: tuple[Path, Path]) -> None:
    masks = load_file(pruned[1])
    rewrite(pruned[1], **{name: mask.float() for name, mask in masks.items()})
    assert validate(*pruned) == OK


def test_another_sparsity_than_the_asked_one_is_found(
    pruned: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate(*pruned, "--sparsity", "0.6", "--json") == FAULT
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["violations"] == ["the masks' sparsity must be within 0.01 of 0.6, got 0.5000"]


@pytest.mark.parametrize("name", ["MistralForCausalLM", "MixtralForCausalLM", "OPTForCausalLM"])
def test_a_mask_of_another_model_is_refused_with_the_first_tensor(
    name: str,
    architecture_folders: dict[str, Path],
    pruned: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "MistralForCausalLM":
        rewrite(pruned[1], **{"model.layers.0.mlp.up_proj.weight": torch.ones(95, 64, dtype=torch.bool)})
    status = validate(architecture_folders[name], pruned[1])
    first = (
        "model.layers.0.mlp.down_proj.weight" if name != "MistralForCausalLM" else "model.layers.0.mlp.up_proj.weight"
    )
    assert status == BAD_INPUT
    assert f"a mask must be of the same model: {first} is" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not a mask"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_without_masks_is_refused(
    suffix: str, content: bytes, pruned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"masks.{suffix}"
    assert validate(pruned[0], path) == BAD_INPUT
    assert "a mask is a file" in capsys.readouterr().err
    path.write_bytes(content)
    assert validate(pruned[0], path) == BAD_INPUT
    assert f"masks.{suffix} must be" in capsys.readouterr().err


RECOVER = ("--checkpoints", "--recover", "reconstruct", *CALIBRATION)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GPT2LMHeadModel"])
def test_a_checkpoint_is_recovered_as_a_model_in_memory_is(
    name: str, architecture_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = architecture_folders[name]
    assert prune(folder, tmp_path, "--methods", "random", "--calibration-window", "32", *RECOVER) == OK
    written = tmp_path / folder.name
    masks_file = written / f"{stem('masks', 'random', 0.5)}.safetensors"
    masks = MaskFile(masks_file)
    dense, model, recovered = (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).requires_grad_(False).eval()
        for place in (folder, written / stem("checkpoint", "random", 0.5), written / stem("recovered", "random", 0.5))
    )
    chosen = parser().parse_args(["prune", str(folder), *CALIBRATION, "--calibration-window", "32"])
    windows = calibration_windows(chosen, calibration_settings(chosen))
    found = list(reconstruct_into(ModelBlocks(model), read_weights(dense), masks, windows))
    for matrix, weight in read_weights(recovered).items():
        torch.testing.assert_close(weight, read_weights(model)[matrix], atol=1e-4, rtol=1e-3)
        assert not weight[~masks[matrix]].any()
    stats = json.loads((written / f"{stem('stats', 'random', 0.5)}.json").read_text())
    assert [block["is_accepted"] for block in stats["recovery"]] == [block.is_accepted for block in found]
    assert any(block.is_accepted for block in found)
    assert stats["calibration"]["calibration_tokens_seen"] == 512
    assert validate(written / stem("recovered", "random", 0.5), masks_file) == OK


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recover", "reconstruct", *CALIBRATION), "changes weights, and masks alone have none. Add --checkpoints"),
        (("--recover", "reconstruct", "--checkpoints"), "reconstruct needs calibration examples, got none"),
        ((*RECOVER, "--format", "levels"), "recovery reads a file a level, got --format levels"),
        ((*RECOVER, "--methods", "structured"), "recover=reconstruct solves .* got structured"),
        ((*RECOVER, "--recover", "reconstrct"), "reconstrct"),
        (
            (*RECOVER, "--calibration-tokens", "96", "--calibration-window", "32"),
            "needs 4 calibration windows, .* got 3",
        ),
    ],
)
def test_a_recovery_that_cannot_be_is_refused(
    arguments: tuple[str, ...], message: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(llama, tmp_path, *arguments) == BAD_INPUT
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
