"""Every mistake is found before the first trial: exit status 2 and a message with the rule, the value and the fix."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import boolq_examples, write_boolq, write_jsonl
from safetensors.torch import load_file, save_file

from tune_sparse.cli import main
from tune_sparse.cli.command import BAD_INPUT, FAULT, OK
from tune_sparse.config import SweepConfig
from tune_sparse.ledger.lease import FolderLease
from tune_sparse.models.checkpoints import find_folder
from tune_sparse.sweep import driver
from tune_sparse.sweep.plan import make_plan

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any) -> None:
        pytest.fail("a trial was about to start")

    monkeypatch.setattr(driver, "_tune", started)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return write_boolq(tmp_path / "data")


@pytest.fixture
def sound(llama: Path, data_dir: Path, tmp_path: Path) -> list[str]:
    """A sweep without a mistake."""
    places = ["--models", str(llama), "--data-dir", str(data_dir), "--results-dir", str(tmp_path / "results")]
    return ["sweep", *places, "--tasks", "boolq", "--set", "n_selection=4"]


@pytest.fixture
def refused(sound: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a sound sweep with one mistake added, and returns the message."""

    def run(*mistake: str) -> str:
        assert main([*sound, *mistake]) == BAD_INPUT
        captured = capsys.readouterr()
        assert captured.err.startswith("tune-sparse: ")
        assert "Traceback" not in captured.err
        assert captured.out == ""
        assert not (tmp_path / "results" / "sweeps").exists()
        return captured.err.removeprefix("tune-sparse: ").rstrip("\n")

    return run


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of a sound checkpoint, to be broken."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


FLAGS = [
    (["--tasks", "bolq"], r"unknown task 'bolq'\. Did you mean 'boolq'\? Known: arc_challenge, "),
    (["--methods", "structurd"], r"unknown method 'structurd'\. Did you mean 'structured' or 'unstructured' or "),
    (["--methods", "wanda-global"], r"a method must make sense, got 'wanda-global': Wanda's scores compare within an"),
    (["--methods", "magnitude"], r"a method has one name, got 'magnitude', which is called 'unstructured'\."),
    (
        ["--methods", "random-2:4", "--sparsities", "0", "0.5", "0.6"],
        r".+: the sparsity of random-2:4 is 0\.5, got 0\.6",
    ),
    (
        ["--methods", "wanda", "--set", "calibration=wikitext"],
        r"unknown calibration 'wikitext'\. Did you mean 'wikitext2'",
    ),
    (
        ["--methods", "wanda", "--set", "calibration=wikitext2"],
        r"wikitext2 needs the file .*/data/wikitext2/train\.txt, which is missing\. Add it, or fix --data-dir\.",
    ),
    (["--methods", "wanda", "--set", "calibration=published"], r"wikitext2 needs the file .*, which is missing"),
    (["--methods", "taylor", "--set", "calibration_order=sequential"], r"taylor needs gradients of the whole dense"),
    (["--set", "calibration_tokens=1"], r"calibration_tokens must be at least 2, got 1\."),
    (["--modes", "sparse-to-dence"], r"unknown mode 'sparse-to-dence'\. Did you mean 'sparse-to-dense'"),
    (
        ["--modes", "masked-finetuning", "--schedules", "set", "--set", "update_every=5", "--methods", "structured"],
        r"a method must suit its schedule, got 'structured' with 'set': its updates change single weights",
    ),
    (["--schedules", "rigl"], r"the mode sparse-to-dense trains LoRA on fixed masks, so its only schedule is one-shot"),
    (
        ["--backend", "pytorch"],
        r"unknown backend 'pytorch'\. Did you mean 'torch'\? Known: both, cerebras, split, torch\.",
    ),
    (["--models", "tiny-lama"], r"got 'tiny-lama', which is none of them\. Did you mean 'tiny-llama'\?"),
    (["--models", "/no/such/model"], r"a model is .*got '/no/such/model', which is none of them\. Fix the name or"),
    (["--models", "no such/model"], r"'no such/model'"),
    (["--models", "org/absent@main"], r"'org/absent@main' is not .*Run `tune-sparse prepare --models org/absent@main`"),
    (["--set", "step=5"], r"unknown setting 'step'\. Did you mean 'steps'"),
    (["--set", "steps"], r"--set takes NAME=VALUE, got 'steps'\. Write --set steps=20, say\."),
    (["--set", "steps=few"], r"steps \(.+\) must be int, got 'few'.* Fix the value\."),
    (["--set", "steps=0"], r"steps must be at least 1, got 0\. Give a larger number\."),
    (["--set", "warmup_steps=2000", "steps=200"], r"warm-up must be shorter .* 200 steps, got 2000\. Lower warmup_"),
    (["--set", "precision=fp16"], r"unknown precision 'fp16'\. .*Known: bfloat16, float32\."),
    (
        ["--set", "train_on_prompt=answer"],
        r"train_on_prompt \(.*\) must be bool, got 'answer' \(neither true nor false\)\. Fix",
    ),
    (
        ["--set", "n_selection=20"],
        r"n_selection must leave examples to train on: boolq has 20 training examples, got 20\. L",
    ),
    (["--sparsities", "1.0"], r"a sparsity is the fraction of zeros, in \[0, 1\), got 1\.0\. Give a fraction\."),
    (["--sparsities", "-0.1"], r"a sparsity is the fraction of zeros, in \[0, 1\), got -0\.1\. Give a fraction\."),
    (["--sparsities", "50"], r"a sparsity is the fraction of zeros, in \[0, 1\), got 50\.0\. Did you mean 0\.5\?"),
    (["--sparsities", "nan"], r"sparsities .*got .*nan.*finite"),
    (["--sparsities", "0.5", "0.5"], r"sparsities must not repeat a value, got \(0\.5, 0\.5\)\. Remove the repeats\."),
    (["--seeds", "a"], r"seeds \(.+\) must be .+, got \['a'\].* Fix the value\."),
    (["--workers", "0"], r"workers must be at least 1, got 0\. Give 1 or more\."),
    (["--tasks", "piqa"], r"piqa needs the file .*/piqa/train\.jsonl, which is missing\. Add it, or fix --data-dir\."),
    (["--data-dir", "/no/such/data"], r"boolq needs the file /no/such/data/boolq/train\.jsonl, which is missing\."),
    (["--config", "/no/such/file.yaml"], r"--config must be a readable YAML file: .*/no/such/file\.yaml.* Fix it\."),
]


@pytest.mark.parametrize(
    ("mistake", "message"), FLAGS, ids=lambda case: " ".join(case) if isinstance(case, list) else ""
)
def test_a_wrong_flag_is_refused(refused: Refused, mistake: list[str], message: str) -> None:
    assert re.search(message, refused(*mistake))


def test_an_unknown_preset_offers_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "smok"]) == BAD_INPUT
    assert "unknown preset 'smok'. Did you mean 'smoke'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["swep"], ["sweep", "--no-such-flag"], ["discard", "run"]])
def test_a_command_line_that_cannot_be_read_ends_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == BAD_INPUT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps: [", r"--config must be a readable YAML file: .+ Fix it\."),
        ("- steps\n- 20\n", r"sweep\.yaml must map names to values, got \['steps', 20\]\. Write `steps: 20`, say\."),
        ("", r"sweep\.yaml must map names to values, got None\."),
        ("5: 6\n", r"unknown setting 5\. Known: "),
        ("step: 20\n", r"unknown setting 'step'\. Did you mean 'steps'"),
        ("protocol:\n  steps: 20\n", r"unknown setting 'protocol'"),
        ("steps: yes\n", r"steps \(.+\) must be int, got True.* Fix the value\."),
    ],
)
def test_a_wrong_yaml_file_is_refused(refused: Refused, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(content)
    assert re.search(message, refused("--config", str(path)), re.DOTALL)


def test_a_yaml_file_that_is_not_utf8_is_refused(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_bytes(b"steps: \xff\xfe\n")
    assert "--config must be a readable YAML file" in refused("--config", str(path))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            {"question": "q", "passage": "p"},
            r"an example of boolq needs the field 'answer', got question, passage\. Fix",
        ),
        ({"question": "q", "passage": "p", "answer": 2}, r"the field 'answer' of boolq must be bool, got 2\. Fix"),
        (
            ["q"],
            r"an example of boolq must be an object with question, passage, answer, got \['q'\]\. Fix the example\.",
        ),
    ],
)
def test_a_malformed_example_is_named_by_file_and_line(
    refused: Refused, data_dir: Path, example: Any, message: str
) -> None:
    path = write_jsonl(data_dir / "boolq" / "validation.jsonl", [*boolq_examples(2, "v"), example])
    assert re.match(rf"{path}:3: {message}", refused())


def test_a_line_that_is_not_json_is_named(refused: Refused, data_dir: Path) -> None:
    path = data_dir / "boolq" / "train.jsonl"
    path.write_text("{'question': 1}\n")
    assert re.match(rf"{path}:1: each line must be a JSON object: .+ Fix the line\.", refused())


def test_a_file_that_is_not_text_is_named(refused: Refused, data_dir: Path) -> None:
    path = data_dir / "boolq" / "train.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    assert str(path) in refused()


def test_a_label_out_of_range_is_named_by_file_and_line(refused: Refused, data_dir: Path) -> None:
    example = {"goal": "g", "sol1": "a", "sol2": "b", "label": 1}
    path = write_jsonl(data_dir / "piqa" / "train.jsonl", [example, example | {"label": 2}])
    error = refused("--tasks", "piqa")
    assert error == f"{path}:2: the label of piqa must be one of its 2 choices, got 2. Fix the example."


def test_an_example_in_two_splits_is_refused(refused: Refused, data_dir: Path) -> None:
    write_jsonl(data_dir / "boolq" / "validation.jsonl", boolq_examples(1, "train"))
    assert "no example of boolq may be in two splits" in refused()


def break_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def without(name: str) -> Callable[[Path], None]:
    def remove(model: Path) -> None:
        (model / name).unlink()

    return remove


def other_class(model: Path) -> None:
    edit_config(model, architectures=["BertForMaskedLM"])


def no_class(model: Path) -> None:
    edit_config(model, architectures=None)


def no_size(model: Path) -> None:
    edit_config(model, num_attention_heads=...)


def config_list(model: Path) -> None:
    (model / "config.json").write_text("[]")


def cut_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def missing_shard(model: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def broken_index(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("{")


def nan_weight(model: Path) -> None:

    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (without("config.json"), r"a model folder needs config\.json, .*/model has none\. Give a Hugging Face"),
        (without("model.safetensors"), r"needs its safetensors weights, .*/model\.safetensors is missing\. Fetch it\."),
        (without("tokenizer.json"), r"needs tokenizer\.json or tokenizer\.model, .*/model has neither\. Add it\."),
        (break_config, r"/model/config\.json must be JSON: .+ Fix or fetch it again\."),
        (config_list, r"/model/config\.json must"),
        (
            other_class,
            r"class .* must be LlamaForCausalLM or .*, .*config\.json says BertForMaskedLM\.",
        ),
        (no_class, r"class .* must be LlamaForCausalLM or .*, .*config\.json says no class at all\."),
        (no_size, r"config\.json.*num_attention_heads"),
        (cut_weights, r"/model/model\.safetensors must be a safetensors file: .+ Fetch it again\."),
        (missing_shard, r"safetensors weights, .*/model-00001-of-00002\.safetensors is missing\. Fetch it\."),
        (broken_index, r"/model/model\.safetensors\.index\.json must"),
        (nan_weight, r"weights must be finite, model\.layers\.1\.mlp\.up_proj\.weight in .+ has NaN or inf\. Fetch"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_a_broken_model_folder_is_refused(
    refused: Refused, model: Path, mistake: Callable[[Path], None], message: str
) -> None:
    mistake(model)
    assert re.search(message, refused("--models", str(model)))


@pytest.mark.parametrize("bad", [("--models", "no-such-folder"), ("--data-dir", "no-such-folder")])
def test_a_dry_run_refuses_bad_input_too(bad: tuple[str, str], sound: list[str]) -> None:
    assert main([*sound, *bad, "--dry-run"]) == BAD_INPUT


def test_two_models_of_one_name_are_refused(refused: Refused, llama: Path, model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other" / "model")
    error = refused("--models", str(model), str(other))
    assert error.startswith(
        f"models of one sweep must differ in the last part of their names, got {model} and {other}."
    )


def test_a_structured_sparsity_out_of_reach_is_refused(refused: Refused, model: Path) -> None:
    edit_config(model, num_key_value_heads=1)
    weights = load_file(model / "model.safetensors")
    one_group = {name: w[:8].clone() if "k_proj" in name or "v_proj" in name else w for name, w in weights.items()}
    save_file(one_group, model / "model.safetensors", metadata={"format": "pt"})
    error = refused("--models", str(model), "--methods", "structured", "--sparsities", "0.9")
    assert re.match(r"model: structured sparsity must come within 0\.01 of the target: with 1 key/value groups", error)
    assert error.endswith("got 0.9. Choose another sparsity or an element-wise method.")


@pytest.mark.parametrize("below", ["", "results"])
def test_a_results_folder_that_is_a_file_or_in_one_is_refused(refused: Refused, tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    error = refused("--results-dir", str(file / below))
    assert re.match(
        rf"the results folder must be writable, {file / below} is not: .+ Give another --results-dir\.", error
    )
    assert file.read_text() == "in the way"


def test_a_results_folder_locked_by_a_live_process_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    with FolderLease(tmp_path / "results"):
        error = refused()
    assert re.match(
        r"one sweep at a time writes to a results folder: .* is locked by process \d+ on .* Wait for it", error
    )


def test_too_little_disk_is_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 10**4))
    error = refused()
    assert re.match(
        r"a sweep needs room for what it writes, about \d+\.\d\d GB, .* has 0\.00 GB\. Free some, or", error
    )


@pytest.mark.parametrize("command", ["status", "report", "track"])
def test_a_results_folder_that_is_missing_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = tmp_path / "absent"
    assert main([command, "--results-dir", str(absent)]) == BAD_INPUT
    error = capsys.readouterr().err
    assert error == f"tune-sparse: a results folder must exist, {absent} does not. Run `tune-sparse sweep` first.\n"


def test_discarding_an_unknown_run_offers_the_closest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs" / "torch_tiny_boolq").mkdir(parents=True)
    assert main(["discard", "torch_tiny_bolq", "--reason", "r", "--results-dir", str(tmp_path)]) == BAD_INPUT
    assert "unknown run 'torch_tiny_bolq'. Did you mean 'torch_tiny_boolq'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "counts"),
    [
        ("matrix", "360 cells, 330 distinct trainings."),
        ("phoenix", "1200 cells, 1100 distinct trainings."),
        ("mixtral", "180 cells, 165 distinct trainings."),
    ],
)
def test_a_preset_without_its_weights_can_still_be_planned(
    preset: str, counts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    command = ["sweep", preset, "--dry-run", "--results-dir", str(tmp_path / "results")]
    assert main(command) == FAULT
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == counts
    assert lines[1].startswith("Not ready to run: examples of the tasks are needed, got no data_dir.")
    assert main([*command, "--tasks", "boolq", "--data-dir", "synthetic"]) == FAULT
    assert re.search(
        r"Not ready to run: the weights of a model must be on this machine before a sweep, '.+' is not",
        capsys.readouterr().out,
    )
    assert not (tmp_path / "results").exists()


def test_a_sound_sweep_can_be_planned_and_writes_nothing(
    sound: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*sound, "--dry-run", "--json"]) == OK
    planned = json.loads(capsys.readouterr().out)
    assert (planned["cells"], planned["trainings"], planned["done"], len(planned["missing"])) == (60, 55, 0, 55)
    assert list(planned["forecast"]["unmeasured"].values()) == [55]
    assert planned["forecast"]["disk_bytes"] > 0
    assert not (tmp_path / "results").exists()


def test_an_unknown_name_is_refused_even_where_the_weights_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "matrix", "--dry-run", "--tasks", "bolq"]) == BAD_INPUT
    assert "Did you mean 'boolq'?" in capsys.readouterr().err


def test_a_folder_named_like_a_toy_model_does_not_stand_in_for_it(
    llama: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_sparse.models.toy_models.toy_model_folder", lambda name: llama)
    (tmp_path / "tiny-llama").mkdir()
    monkeypatch.chdir(tmp_path)
    names = {"models": "tiny-llama", "tasks": "boolq", "data_dir": data_dir, "n_selection": 4}
    planned = make_plan(SweepConfig.from_names(names))
    assert planned.checkpoints["tiny-llama"].path == llama
    assert {find_folder(run.model_path) for run in planned.runs.values()} == {llama}
