"""What goes to the Cerebras environment and comes back: names, examples, bits, tokens, conversions, and where it is."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from factories import TINY_PROTOCOL
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from stand_in_cerebras import write_environment
from stand_in_csctl import jobs_with, write_csctl

from tune_sparse.cerebras import content_cache, environment
from tune_sparse.cerebras.content_cache import cached
from tune_sparse.cerebras.conversion import check_convertible, to_cerebras
from tune_sparse.cerebras.environment import ClusterVersions, cluster_versions, find_environment
from tune_sparse.cerebras.job import (
    encoded_tokens,
    examples_in_order,
    longest_tokens,
    new_lines,
    step_order,
)
from tune_sparse.cerebras.preflight import working_bytes
from tune_sparse.cli import main
from tune_sparse.config import Cerebras, Protocol, SweepConfig
from tune_sparse.data.splits import Encoded
from tune_sparse.doctor.cerebras import examine
from tune_sparse.errors import InputError, NotReadyError, RunError
from tune_sparse.models.architectures import pruned_weights
from tune_sparse.models.dims import ModelDims
from tune_sparse.models.model_zoo import NAMES, cerebras_name, hugging_face_name, interleaved, separated
from tune_sparse.training.loop import batches

EXAMPLES = [Encoded(tuple(range(1, 2 + n)), tuple(range(50, 52 + n % 3))) for n in range(6)]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_environment(tmp_path / "site", tmp_path / "losses")
    monkeypatch.setenv("CEREBRAS_VENV", str(folder / "venv"))
    monkeypatch.setenv("MODELZOO", str(folder / "modelzoo"))
    monkeypatch.setenv("TUNE_SPARSE_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return folder


@pytest.mark.parametrize("module", NAMES)
def test_names_go_there_and_back(module: str) -> None:
    weight = f"model.layers.11.{module}.weight"
    assert cerebras_name(weight).startswith("transformer_decoder.layers.11.")
    assert hugging_face_name(cerebras_name(weight)) == weight


Q, K, V = (f"model.layers.0.self_attn.{module}.weight" for module in ("q_proj", "k_proj", "v_proj"))


def test_rotated_rows_are_interleaved_within_each_head() -> None:
    rows = torch.arange(8)[:, None]  # two heads of four rows: halves 0 1 | 2 3
    assert interleaved(Q, rows, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(interleaved(V, rows, 4), rows)


@given(heads=st.integers(1, 4), half=st.integers(1, 5))
def test_rows_come_back_where_they_were(heads: int, half: int) -> None:
    rows = torch.rand(heads * 2 * half, 3)
    assert torch.equal(separated(K, interleaved(K, rows, 2 * half), 2 * half), rows)


def test_tokens_are_inputs_loss_mask_and_what_follows() -> None:
    tokens = encoded_tokens([Encoded((5, 6), (7, 8)), Encoded((9,), (3,))], train_on_prompt=False, width=4)
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == [[[5, 6, 7, 0], [0, 1, 1, 0], [6, 7, 8, 0]], [[9, 3, 0, 0], [1, 0, 0, 0], [3, 0, 0, 0]]]


def test_examples_are_in_the_order_of_the_torch_backend(site: Path) -> None:
    protocol = replace(TINY_PROTOCOL, steps=5)
    expected = [example for batch in islice(batches(EXAMPLES, protocol, 3), 5) for example in batch]
    assert [EXAMPLES[at] for at in step_order(EXAMPLES, protocol, 3)] == expected
    folder = examples_in_order(EXAMPLES, protocol, 3)
    written = load_file(folder / "tokens.safetensors")
    assert torch.equal(
        written["examples"][written["order"]],
        encoded_tokens(EXAMPLES, False, longest_tokens(EXAMPLES))[step_order(EXAMPLES, protocol, 3)],
    )
    assert examples_in_order(EXAMPLES, protocol, 3) == folder, "written once"
    assert examples_in_order(EXAMPLES, protocol, 4) != folder


def test_only_whole_lines_of_a_growing_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert new_lines(path, 0) == ([], 0)
    path.write_text('{"step": 1}\n{"ste')
    lines, at = new_lines(path, 0)
    assert lines == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert new_lines(path, at)[0] == [{"step": 2}]


def fill(size: int) -> object:
    return lambda folder: (folder / "file").write_bytes(bytes(size))


def test_the_least_recently_used_folders_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_SPARSE_CACHE", str(tmp_path))
    monkeypatch.setenv(content_cache.LIMIT_VARIABLE, "250")
    for age, name in ((30, "a"), (20, "b")):
        os.utime(cached(name, fill(100)), (1e9 - age, 1e9 - age))  # type: ignore[arg-type]
    cached("a", fill(100))  # type: ignore[arg-type]
    cached("c", fill(100))  # type: ignore[arg-type]
    assert sorted(path.name for path in (tmp_path / "cerebras").glob("[!.]*")) == ["a", "c"]


def test_what_cannot_be_made_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_SPARSE_CACHE", str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RunError("no")

    with pytest.raises(RunError):
        cached("a", fail)
    assert not list((tmp_path / "cerebras").glob("[!.]*"))


def test_a_model_is_converted_once_with_the_names_that_the_converter_knows(llama: Path, site: Path) -> None:
    first = to_cerebras(llama, "f" * 64, find_environment())
    (site / "fault").write_text("converter")
    assert to_cerebras(llama, "f" * 64, find_environment()) == first
    with pytest.raises(RunError, match="the converter cannot"):
        to_cerebras(llama, "g" * 64, find_environment())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "trains llama and mistral models.* does not reach the experts.*--backend torch"),
        ({"head_dim": 16}, r"needs head_dim = hidden_size / num_attention_heads = 8, .* has 16"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "needs no rope .* but llama3, .* yarn",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "needs no rope .* has linear"),
        ({"attention_bias": True}, "needs no bias"),
    ],
)
def test_a_model_that_would_compute_something_else_there_is_refused(
    llama: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    check_convertible(llama)
    config = json.loads((llama / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        check_convertible(tmp_path)


def test_an_environment_is_asked_what_it_holds(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_environment()
    assert (found.release, found.checkpoint_format) == ("2.10.0", "cs-2.9")
    monkeypatch.setenv("RAY_ADDRESS", "somewhere")
    variables = found.variables()
    assert not [name for name in variables if name.startswith("RAY_")]
    assert variables["PATH"].split(os.pathsep)[0] == str(site / "venv" / "bin")
    assert variables["PYTHONPATH"] == str(site / "modelzoo")
    older = replace(found, packages={**found.packages, "cerebras_pytorch": "2.6.0"})
    assert older.checkpoint_format == "cs-2.5"


@pytest.mark.parametrize("variable", ["CEREBRAS_VENV", "MODELZOO"])
def test_an_environment_that_is_not_there_is_asked_for(
    site: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "/nowhere")
    with pytest.raises(NotReadyError, match=f"{variable} must name a folder, /nowhere does not exist"):
        find_environment()
    monkeypatch.delenv(variable)
    with pytest.raises(NotReadyError, match=f"needs {variable}, which is not set"):
        find_environment()


def test_doctor_shows_what_is_missing_and_its_fix(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tune_sparse.doctor.cerebras.CLUSTER_CONFIG", site / "no_config")
    found = {finding.what: finding for finding in examine()}
    assert found["environment"].is_well
    assert not found["cluster"].is_well
    assert "user node" in found["cluster"].fix
    assert main(["doctor", "--cerebras"]) == 1
    assert "FAIL cluster: none" in capsys.readouterr().out
    monkeypatch.delenv("MODELZOO")
    assert not next(iter(examine())).is_well


def test_doctor_reads_the_queue_and_never_calls_an_unknown_release_well(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_csctl(site / "bin", jobs_with("tune_sparse=abc"))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    found = {finding.what: finding for finding in examine()}
    assert found["csctl"].is_well
    assert found["csctl"].found == "csctl version 3.0.1, answers; 1 unfinished jobs of this program"
    assert not found["cluster's release"].is_well
    assert found["cluster's release"].found.startswith("not known: ")
    (folder / "jobs").write_text("what is this\n")
    assert not {finding.what: finding for finding in examine()}["csctl"].is_well


@pytest.mark.parametrize(
    ("client", "server", "fits"),
    [
        ("1.1.0", "1.1.2", True),
        ("1.14.0", "1.9.3", True),
        ("1.14.0", "1.8.0", False),
        ("1.1.0", "1.11.0", True),
        ("1.1.0", "1.12.0", False),
        ("1.14.0", "2.14.0", False),
    ],
)
def test_client_and_cluster_go_together_by_the_client_s_own_rule(client: str, server: str, fits: bool) -> None:
    assert ClusterVersions(client, server).go_together is fits


def test_a_version_that_is_no_number_is_named(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("2.x", "", "R_2.9.0"):
        with pytest.raises(InputError, match=r"a semantic version must begin as 1\.14, got "):
            ClusterVersions("1.14.0", version)
    monkeypatch.setattr(environment, "CLUSTER_CONFIG", site)
    (site / "fault").write_text("version")
    assert "must begin as 1.14, got 'R_2.9.0'" in str(cluster_versions(find_environment()))


def test_the_cluster_s_version_is_asked_through_the_client(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = find_environment()
    monkeypatch.setattr(environment, "CLUSTER_CONFIG", site)
    assert cluster_versions(there) == ClusterVersions("1.14.0", "1.9.3")
    (site / "fault").write_text("converter")
    assert cluster_versions(there) == "ClusterConfigError: unreachable"


def test_an_environment_of_release_2_5_is_taken(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = dict.fromkeys(environment.NEEDED, "2.5.0")
    monkeypatch.setattr(environment, "probed", lambda venv: ("3.11.0", packages))
    assert find_environment().checkpoint_format == "cs-2.5"
    packages["cerebras_pytorch"] = "2.4.3"
    with pytest.raises(InputError, match=r"must be one of 2\.5, .* has 2\.4\.3"):
        find_environment()


@pytest.mark.parametrize(
    ("no_proxy", "missing"),
    [
        ("10.125.8.2,.cerebras.internal,localhost", None),
        ("*", None),
        ("localhost", ".cerebras.internal"),
        (".cerebras.internal", "10.125.8.2"),
    ],
)
def test_a_proxy_before_the_appliance_is_refused(
    site: Path, monkeypatch: pytest.MonkeyPatch, no_proxy: str, missing: str | None
) -> None:
    config = site / "config_v2"
    config.write_text('{"clusters": [{"name": "c", "server": "10.125.8.2:443"}]}')
    monkeypatch.setattr(environment, "CLUSTER_CONFIG", config)
    environment.check_cluster(Cerebras())
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    if missing is None:
        environment.check_cluster(Cerebras())
    else:
        with pytest.raises(InputError, match=f"does not cover {re.escape(missing)}. Write `export no_proxy="):
            environment.check_cluster(Cerebras())


def test_a_cluster_is_known_by_its_configuration(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "CLUSTER_CONFIG", site / "config_v2")
    with pytest.raises(InputError, match="this machine knows none"):
        environment.check_cluster(Cerebras())
    (site / "config_v2").touch()
    environment.check_cluster(Cerebras(mount_dirs=(str(site),), python_paths=(str(site),)))


@pytest.mark.parametrize("name", ["mount_dirs", "python_paths"])
def test_a_folder_for_the_appliance_that_is_not_there_is_refused(
    site: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(environment, "CLUSTER_CONFIG", site)
    with pytest.raises(InputError, match=f"{name} must name folders that exist, /nowhere does not"):
        environment.check_cluster(Cerebras(**{name: (str(site), "/nowhere")}))


@pytest.mark.parametrize(
    ("mode", "method", "recover", "steps", "bytes_a_weight"),
    [
        ("sparse-to-dense", "random", "none", None, 4),
        ("sparse-to-dense", "sparsegpt", "none", None, 8),
        ("sparse-to-dense", "random", "reconstruct", None, 8),
        ("sparse-to-dense", "random", "none", 10, 8),
        ("masked-finetuning", "random", "none", None, 20),
        ("masked-finetuning", "random", "none", 10, 60),
    ],
)
def test_the_disk_of_trainings_holds_what_may_stand_there_at_once(
    mode: str, method: str, recover: str, steps: int | None, bytes_a_weight: int
) -> None:
    """Start, updated weights, checkpoint, what was trained; with checkpoints the one before, and where it goes on."""
    dims = ModelDims(8, 1, 4, 4, 2, 16, 32, None, 64)
    config = SweepConfig(
        models=("m",),
        modes=(mode,),
        methods=(method,),
        protocol=Protocol(recover=recover),
        cerebras=Cerebras(cs3=2, checkpoint_steps=steps),
    )
    assert working_bytes(config, [dims]) == 2 * bytes_a_weight * (pruned_weights(dims) + 2 * 32 * 8)
