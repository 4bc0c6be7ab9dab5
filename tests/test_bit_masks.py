"""Masks as bits are the masks."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tune_sparse.pruning.bit_masks import BitMasks, pack_bits, unpack_bits
from tune_sparse.pruning.masks import count_sparsity, mask_sha256


def test_the_first_weight_is_the_highest_bit():
    mask = torch.tensor([[True, False, False], [False, False, True], [True, True, False]])

    assert pack_bits(mask).tolist() == [0b10000111, 0b00000000]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_a_mask_comes_out_as_it_went_in(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5

    assert torch.equal(unpack_bits(pack_bits(mask), (rows, columns)), mask)


def test_counts_and_checksum_are_those_of_the_masks():
    masks = {"b": torch.rand(5, 7) < 0.5, "a": torch.rand(3, 3) < 0.5}
    found = BitMasks.pack(masks.items())

    assert list(found) == ["b", "a"]
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    assert found.kept == {name: int(mask.sum()) for name, mask in masks.items()}
    assert count_sparsity(found) == found.sparsity == count_sparsity(masks)
    assert mask_sha256(found) == found.sha256 == mask_sha256(masks)


def test_the_checksum_has_the_form_of_the_specification():
    mask = torch.tensor([[True, False]])
    by_hand = hashlib.sha256(b"w(1, 2)" + np.packbits(mask.numpy()).tobytes()).hexdigest()

    assert BitMasks.pack([("w", mask)]).sha256 == by_hand
