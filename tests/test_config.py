from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from factories import make_cell

from tune_sparse.config import BudgetOptions, Cell, Cerebras, Protocol, ScheduleSettings, SweepConfig
from tune_sparse.errors import InputError
from tune_sparse.modes import MODES


def test_as_published_stands_for_what_the_papers_did() -> None:
    names = {"models": "my-llama", "calibration": "published", "calibration_tokens": 8, "steps": 20}
    found = SweepConfig.from_names(names).protocol
    assert found == Protocol(steps=20, calibration="wikitext2", calibration_order="sequential")
    assert (found.calibration_tokens, found.calibration_window) == (128 * 2048, 2048)


AT_LEAST_ONE = (
    "steps",
    "global_batch_size",
    "lora_rank",
    "max_new_tokens",
    "eval_every",
    "threads",
)
AT_LEAST_TWO = ("max_tokens", "calibration_tokens", "calibration_window")

BROKEN_PROTOCOLS: list[tuple[dict[str, Any], str]] = [
    *(({name: 0}, rf"{name} must be at least 1, got 0\.") for name in AT_LEAST_ONE),
    *(
        ({name: 1}, rf"{name} must be at least 2, got 1\.")
        for name in ("max_tokens", "calibration_tokens", "calibration_window")
    ),
    *(
        (
            {"max_tokens": limit},
            rf"max_new_tokens must leave room for a prompt in max_tokens = {limit}, got 256\. Lower",
        )
        for limit in (256, 2)
    ),
    ({"num_fewshot": -1}, r"num_fewshot must be at least 0, got -1\."),
    *(({name: 0}, rf"{name} must be at least 1 or none, got 0\.") for name in ("n_train", "n_selection", "n_test")),
    *(({name: 0.0}, rf"{name} must be above 0, got 0\.0\.") for name in ("lora_alpha", "max_grad_norm")),
    ({"learning_rate": -1e-4}, r"learning_rate must be above 0, got -0\.0001\."),
    ({"learning_rate": float("nan")}, r"learning_rate must be above 0, got nan\."),
    ({"final_learning_rate": 1e-3}, r"final_learning_rate must be between 0 and learning_rate, got 0\.001\."),
    ({"final_learning_rate": -1.0}, r"final_learning_rate must be between 0 and learning_rate, got -1\.0\."),
    ({"weight_decay": -0.1}, r"weight_decay must be at least 0, got -0\.1\."),
    *(
        ({name: value}, rf"{name} must be in \[0, 1\), got {value}\.")
        for name in ("beta1", "beta2", "lora_dropout", "warmup_fraction")
        for value in (1.0, -0.5)
    ),
    ({"warmup_steps": 200}, r"the warm-up must be shorter than the training of 200 steps, got 200\."),
    ({"warmup_steps": -1}, r"the warm-up must be shorter than the training of 200 steps, got -1\."),
    ({"steps": 2, "warmup_fraction": 0.9}, r"the warm-up must be shorter than the training of 2 steps, got 2\."),
    ({"masked_lora_impl": "effective"}, r"unknown masked_lora_impl 'effective'\. Did you mean 'effective-weight'"),
    ({"precision": "bfloat"}, r"unknown precision 'bfloat'\. Did you mean 'bfloat16'"),
]

BROKEN_SWEEPS: list[tuple[dict[str, Any], str]] = [
    *(
        ({axis: ()}, rf"{axis} must name at least one, got \(\)\. Name one\.")
        for axis in ("models", "tasks", "methods", "sparsities", "modes", "seeds")
    ),
    ({"seeds": (1, 2, 1)}, r"seeds must not repeat a value, got \(1, 2, 1\)\. Remove"),
    ({"tasks": ("boolq", "boolq")}, r"tasks must not repeat a value"),
    ({"sparsities": (1.0,)}, r"a sparsity is the fraction of zeros, in \[0, 1\), got 1\.0\. Give a fraction\."),
    ({"sparsities": (0.5, -0.1)}, r"in \[0, 1\), got -0\.1\."),
    ({"sparsities": (50.0,)}, r"in \[0, 1\), got 50\.0\. Did you mean 0\.5\?"),
    ({"sparsities": (float("nan"),)}, r"in \[0, 1\), got nan\."),
    ({"modes": ("sparse-to-dence",)}, r"unknown mode 'sparse-to-dence'\. Did you mean 'sparse-to-dense'"),
    ({"modes": ("dense",), "sparsities": (0.0, 0.5)}, r"dense prunes nothing, so all sparsities must be 0 with it"),
    ({"backend": ("pytorch",)}, r"unknown backend 'pytorch'\. Did you mean 'torch'"),
    ({"backend": ("torch", "torch")}, r"backend must not repeat a value"),
    ({"backend": ("torch", "split")}, r"both and split name every backend, so nothing goes with them, got"),
    (
        {"backend": ("torch", "cerebras"), "protocol": Protocol(packing=True)},
        r"the backend cerebras needs packing = False, got True\. Leave it alone\.",
    ),
    (
        {"backend": ("torch", "cerebras"), "cerebras": Cerebras("validate")},
        r"validate trains nothing, so the only backend must be cerebras",
    ),
    *(
        (
            {"modes": ("sparse-to-sparse", "masked-finetuning"), "protocol": Protocol(**{name: value})},
            rf"masked-finetuning trains the weights themselves, so {name} must not be set with it, got {value!r}\.",
        )
        for name, value in (
            ("lora_rank", 8),
            ("lora_alpha", 8.0),
            ("lora_dropout", 0.1),
            ("masked_lora_impl", "effective-weight"),
        )
    ),
    ({"workers": 0}, r"workers must be at least 1, got 0\."),
    ({"gpus_per_trial": -0.5}, r"gpus_per_trial must be in \[0, 1\] or none, got -0\.5\."),
    ({"gpus_per_trial": 2.0}, r"gpus_per_trial must be in \[0, 1\] or none, got 2\.0\."),
    ({"max_retries": -1}, r"max_retries must be at least 0, got -1\."),
    ({"hang_seconds": 0.0}, r"hang_seconds must be above 0 or none, got 0\.0\."),
]


@pytest.mark.parametrize(("values", "message"), BROKEN_PROTOCOLS, ids=lambda case: str(case)[:60])
def test_a_broken_protocol_is_refused_with_rule_and_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Protocol(**values)


@pytest.mark.parametrize(("values", "message"), BROKEN_SWEEPS, ids=lambda case: str(case)[:60])
def test_a_broken_sweep_is_refused_with_rule_and_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SweepConfig(**{"models": ("tiny-llama",)} | values)


def test_the_defaults_are_the_protocol_of_the_matrix() -> None:
    p = Protocol()
    assert (p.steps, p.global_batch_size, p.max_tokens) == (200, 256, 2048)
    assert (p.learning_rate, p.final_learning_rate, p.warmup_fraction) == (3e-4, 3e-5, 0.03)
    assert (p.beta1, p.beta2, p.weight_decay) == (0.9, 0.95, 0.1)
    assert (p.lora_rank, p.lora_alpha, p.lora_dropout, p.train_on_prompt) == (16, 32.0, 0.0, False)
    assert p.warmup == 6
    assert (p.num_fewshot, p.max_new_tokens) == (0, 256)


def test_one_token_of_a_prompt_is_room_enough() -> None:
    assert Protocol(max_tokens=257).max_new_tokens == 256


def test_a_protocol_shrinks_to_the_context_of_a_model() -> None:
    p = Protocol(max_tokens=2048)
    assert p.within(512) == replace(p, max_tokens=512)
    assert p.within(2048) == p.within(8192) == p
    with pytest.raises(InputError, match="max_new_tokens must leave room for a prompt in max_tokens = 128, got 256"):
        p.within(128)


def test_the_original_warm_up_of_2000_steps_is_refused() -> None:
    message = r"the warm-up must be shorter than the training of 200 steps, got 2000\. Lower warmup_steps or raise"
    with pytest.raises(InputError, match=message):
        Protocol(steps=200, warmup_steps=2000)


def test_warm_up_steps_win_over_the_fraction() -> None:
    assert Protocol(steps=100, warmup_fraction=0.5, warmup_steps=3).warmup == 3
    assert Protocol(steps=100, warmup_fraction=0.5, warmup_steps=0).warmup == 0


def test_text_yaml_and_python_give_the_same_sweep(tmp_path: Path) -> None:
    python = SweepConfig(
        models=("a", "b"),
        sparsities=(0.0, 0.5),
        seeds=(1, 2),
        data_dir=tmp_path,
        workers=2,
        protocol=Protocol(steps=20, learning_rate=3e-3, n_test=None, precision="float32"),
    )
    text = {
        "models": "a,b",
        "sparsities": ["0", "0.5"],
        "seeds": "1 2",
        "data_dir": str(tmp_path),
        "workers": "2",
        "steps": "20",
        "learning_rate": "3e-3",
        "n_test": "none",
        "precision": "float32",
    }
    written = yaml.safe_load(
        f"models: [a, b]\nsparsities: [0, 0.5]\nseeds: [1, 2]\ndata_dir: {tmp_path}\nworkers: 2\n"
        "steps: 20\nlearning_rate: 3e-3\nn_test: none\nprecision: float32\n"
    )
    assert SweepConfig.from_names(text) == SweepConfig.from_names(written) == python


def test_a_single_value_is_an_axis_of_one() -> None:
    config = SweepConfig.from_names({"models": "tiny-llama", "sparsities": 0.5, "seeds": 3})
    assert (config.models, config.sparsities, config.seeds) == (("tiny-llama",), (0.5,), (3,))


@pytest.mark.parametrize("value", ["none", None])
def test_none_unsets_an_optional_value(value: Any) -> None:
    config = SweepConfig.from_names({"models": "m", "n_selection": value, "data_dir": value})
    assert config.protocol.n_selection is None
    assert config.data_dir is None


def test_whole_floats_are_integers_and_numbers_keep_their_declared_type() -> None:
    config = SweepConfig.from_names({"models": "m", "steps": 20.0, "lora_alpha": 8})
    assert type(config.protocol.steps) is int
    assert type(config.protocol.lora_alpha) is float


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("packing", "perhaps"),
        ("packing", 1),
        ("steps", "many"),
        ("steps", 2.5),
        ("steps", "none"),
        ("steps", None),
        ("steps", True),
        ("steps", float("inf")),
        ("learning_rate", "nan"),
        ("learning_rate", float("inf")),
        ("tasks", 5),
        ("tasks", {"boolq": 1}),
        ("precision", 16),
        ("data_dir", 5),
        ("workers", "all"),
        ("sparsities", ["half"]),
        ("models", [["a"]]),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{name} \(.+\) must be .+, got .+\. Fix the value\."):
        SweepConfig.from_names({"models": "m", name: value})


def test_a_number_that_is_not_finite_is_refused_by_that_rule() -> None:
    with pytest.raises(InputError, match="finite"):
        SweepConfig.from_names({"models": "m", "learning_rate": "nan"})


@pytest.mark.parametrize(("value", "expected"), [("true", True), ("False", False), (True, True), (False, False)])
def test_a_yes_or_no_is_read_from_text_and_yaml(value: Any, expected: bool) -> None:
    protocol = SweepConfig.from_names({"models": "m", "packing": value}).protocol
    assert protocol.packing is expected
    assert protocol.pack_to == (protocol.max_tokens if expected else None)


def test_an_unknown_setting_offers_the_closest() -> None:
    with pytest.raises(InputError, match=r"unknown setting 'learning_rte'\. Did you mean 'learning_rate'"):
        SweepConfig.from_names({"models": "m", "learning_rte": 1e-3})


def test_the_protocol_is_not_a_setting_of_its_own() -> None:
    with pytest.raises(InputError, match="unknown setting 'protocol'"):
        SweepConfig.from_names({"models": "m", "protocol": {}})


@pytest.mark.parametrize("models", ["", [], None])
def test_a_sweep_of_no_models_is_refused(models: Any) -> None:
    with pytest.raises(InputError, match=r"models must name at least one, got|must be .+ got None"):
        SweepConfig.from_names({"models": models})


@pytest.mark.parametrize("mode", MODES)
def test_at_sparsity_zero_every_lora_cell_is_served_by_the_dense_baseline(mode: str) -> None:
    cell = make_cell(method="random", sparsity=0.0, mode=mode, seed=3)
    served_by = "masked-finetuning" if mode == "masked-finetuning" else "dense"
    assert cell.trained == Cell("tiny", "boolq", "none", 0.0, served_by, 3, "torch")


def test_a_dense_cell_is_served_by_the_dense_baseline_whatever_its_sparsity() -> None:
    assert make_cell(sparsity=0.5, mode="dense").trained == make_cell(sparsity=0.0).trained


@pytest.mark.parametrize("mode", [mode for mode, facts in MODES.items() if facts.is_pruned])
def test_a_sparse_cell_is_trained_for_itself(mode: str) -> None:
    cell = make_cell(sparsity=0.1, mode=mode)
    assert cell.trained is cell


@pytest.mark.parametrize("value", [Protocol(), SweepConfig(models=("m",)), make_cell()], ids=lambda v: type(v).__name__)
def test_configurations_are_frozen(value: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(value, fields(value)[0].name, 1)
    assert replace(value) == value


def test_every_setting_says_what_it_is() -> None:
    every = [f for kind in (Protocol, SweepConfig, BudgetOptions, Cerebras, ScheduleSettings) for f in fields(kind)]
    described = [f for f in every if f.name not in ("protocol", "budgets", "cerebras", "schedule_settings")]
    assert len(described) == len(every) - 4
    assert all(f.metadata["help"] for f in described)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cerebras_share": 1.0}, r"cerebras_share must be in \(0, 1\), got 1\.0\."),
        ({"scoring_gpus": 2.0}, r"scoring_gpus must be in \[0, 1\], got 2\.0\."),
        ({"cerebras_target": "cs3"}, r"unknown cerebras_target 'cs3'\. Did you mean 'csx'"),
        ({"cs3": 0}, r"cs3 must be at least 1, got 0\."),
        ({"num_csx": 0}, r"num_csx must be at least 1, got 0\."),
        ({"job_priority": "p9"}, r"job_priority"),
        (
            {"csx_micro_batch_size": "half"},
            r"csx_micro_batch_size must be auto, explore, none or a number .* got 'half'",
        ),
        ({"num_workers_per_csx": 0}, r"num_workers_per_csx must be at least 1, got 0"),
        ({"checkpoint_steps": 0}, r"checkpoint_steps must be at least 1 or none, got 0"),
        ({"train_timeout_seconds": 0.0}, r"train_timeout_seconds must be above 0 or none, got 0\.0\."),
    ],
)
def test_broken_settings_of_cerebras_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Cerebras(**changes)


def test_settings_of_cerebras_have_flat_names() -> None:
    config = SweepConfig.from_names({"models": "m", "backend": "torch cerebras", "cerebras_target": "cpu", "cs3": "2"})
    assert config.backend == ("torch", "cerebras")
    assert config.cerebras == Cerebras("cpu", cs3=2)
