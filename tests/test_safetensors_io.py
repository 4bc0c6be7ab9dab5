from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tune_sparse.errors import InputError
from tune_sparse.models.safetensors_io import DTYPES, FiniteTensors, TensorFiles, TensorWriter


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {str(dtype): torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype in DTYPES}
    return drawn | {"empty": torch.zeros(0, 4), "scalar": torch.tensor(7.0)}


def test_what_is_written_in_any_order_safetensors_reads(tmp_path: Path) -> None:
    tensors = some_tensors()
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with TensorWriter(tmp_path / "a.safetensors", shapes, {"note": "x"}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
        assert list(tmp_path.glob("*.safetensors")) == []
        writer.done()
    read = load_file(tmp_path / "a.safetensors")
    assert {name: (tuple(t.shape), t.dtype) for name, t in read.items()} == shapes
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert TensorFiles([tmp_path / "a.safetensors"]).metadata() == {"format": "pt", "note": "x"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_view_is_written_as_its_values(tmp_path: Path) -> None:
    view = torch.arange(6.0).view(2, 3).T
    with TensorWriter(tmp_path / "a.safetensors", {"v": (view.shape, view.dtype)}) as writer:
        writer.write("v", view)
        writer.done()
    assert torch.equal(load_file(tmp_path / "a.safetensors")["v"], view)


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TensorWriter(tmp_path / "a", {"v": ((2,), torch.float32)}):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_files_are_one_mapping(tmp_path: Path) -> None:
    tensors = some_tensors()
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:4]}, tmp_path / "1.safetensors")
    save_file({name: tensors[name] for name in names[4:]}, tmp_path / "2.safetensors")
    files = TensorFiles([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert sorted(files) == sorted(names)
    assert len(files) == len(names)
    for name in names:
        assert torch.equal(files[name], tensors[name])
        assert (files.shapes[name], files.dtypes[name]) == (tuple(tensors[name].shape), tensors[name].dtype)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"v": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"a\.safetensors must be a safetensors file: .+ Fetch it again"):
        TensorFiles([path])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tensor_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"good": torch.ones(4), "bad": torch.tensor([1.0, value]), "whole": torch.tensor([1])}, path)
    tensors = FiniteTensors([path])
    assert torch.equal(tensors["good"], torch.ones(4))
    assert torch.equal(tensors["whole"], torch.tensor([1]))
    with pytest.raises(InputError, match=r"weights must be finite, bad in .+a\.safetensors has NaN or inf"):
        tensors["bad"]
