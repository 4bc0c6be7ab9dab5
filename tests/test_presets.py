"""Where a preset applies: the same on the command line, in YAML and in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from search_spaces import subadapters
from search_spaces.matrix import PRESETS, TOY
from tune_sparse.cli import parser
from tune_sparse.cli.search import search_config
from tune_sparse.cli.sweep_options import sweep_config
from tune_sparse.config import SYNTHETIC, Protocol, SweepConfig
from tune_sparse.errors import InputError

REAL = "./my-llama"


def protocol_of(settings: dict[str, Any]) -> Protocol:
    names = Protocol.__dataclass_fields__
    return Protocol(**{name: value for name, value in settings.items() if name in names})


def by_command(*arguments: str) -> SweepConfig:
    return sweep_config(parser().parse_args(["sweep", *arguments]))


@pytest.mark.parametrize("models", [REAL, f"tiny-llama {REAL}", "org/name@abc"])
def test_a_model_of_ones_own_has_the_defaults_of_the_help(models: str, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(f"models: {models}\nsteps: 20\n")
    expected = SweepConfig(models=tuple(models.split()), protocol=Protocol(steps=20))
    assert SweepConfig.from_names({"models": models.split(), "steps": 20}) == expected
    assert by_command("--models", *models.split(), "--set", "steps=20") == expected
    assert by_command("--config", str(path)) == expected
    assert expected.data_dir is None


@pytest.mark.parametrize("names", [{}, {"models": "tiny-llama"}, {"models": ["tiny-mistral", "tiny-llama"]}])
def test_toy_models_alone_have_the_settings_of_toy(names: dict[str, Any]) -> None:
    config = SweepConfig.from_names(names)
    assert (config.preset, config.data_dir, config.protocol) == ("toy", SYNTHETIC, protocol_of(TOY))
    assert by_command(*(["--models", *config.models] if names else [])) == config


def test_a_named_preset_applies_wherever_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("preset: smoke\nsteps: 20\n")
    config = SweepConfig.from_names({"preset": "smoke", "steps": 20})
    assert config == by_command("--config", str(path)) == by_command("smoke", "--set", "steps=20")
    assert config.protocol == protocol_of(TOY | {"steps": 20})
    assert SweepConfig.from_names({"preset": "matrix", "models": "tiny-llama"}).protocol == Protocol()
    with pytest.raises(InputError, match=r"unknown preset 'smok'. Did you mean 'smoke'"):
        SweepConfig.from_names({"preset": "smok"})


def test_only_who_asks_for_generated_examples_gives_them_to_a_real_model() -> None:
    named = {"preset": "smoke", "models": REAL}
    assert SweepConfig.from_names(named).data_dir is None
    assert SweepConfig.from_names(named).protocol == protocol_of(TOY)
    assert SweepConfig.from_names({"models": REAL, "data_dir": "synthetic"}).data_dir == SYNTHETIC
    assert by_command("smoke", "--models", REAL, "--data-dir", "synthetic").data_dir == SYNTHETIC


def test_an_error_of_a_setting_does_not_speak_of_options() -> None:
    broken: list[dict[str, Any]] = [{"models": []}, {"preset": "x"}, {"steps": 0}, {"workers": 0}, {"backend": []}]
    for names in broken:
        with pytest.raises(InputError, match=r"^(?!.*--)"):
            SweepConfig.from_names({"models": REAL} | names)


def by_search(*arguments: str) -> Any:
    return search_config(parser().parse_args(["search", *arguments]))


def test_a_search_of_ones_own_model_has_the_defaults_but_for_its_super_adapter() -> None:
    own = by_search("--model", REAL, "--data-dir", "./data")
    assert (own.sweep.protocol, own.space_name, own.sweep.tasks) == (
        Protocol(**subadapters.PROTOCOL),
        "shears",
        ("boolq",),
    )
    assert by_search("--model", REAL).sweep.data_dir is None


def test_a_search_of_toy_models_has_the_settings_of_toy_and_its_own() -> None:
    toy = protocol_of(TOY | subadapters.PROTOCOL | subadapters.TOY_PROTOCOL)
    for arguments in ([], ["--model", "tiny-mistral"], ["smoke"]):
        found = by_search(*arguments)
        assert (found.sweep.protocol, found.space_name, found.sweep.data_dir) == (toy, "toy", SYNTHETIC)
    assert by_search("matrix", "--model", REAL, "--set", "lora_rank=64").sweep.protocol.lora_rank == 64
    assert by_search("phoenix").sweep.models == PRESETS["phoenix"]["models"][:1]
