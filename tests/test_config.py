"""Configs, AnyMixerConfig and create: strict, clear, and the same after a round trip."""

import json
from pathlib import Path

import pytest
import torch
import zoo
from pydantic import BaseModel, ValidationError

from sequence_mixer import AnyMixerConfig, UnsupportedCapability
from sequence_mixer.errors import BackendError, ConfigError, ShapeError, UnknownMixer


class Layer(BaseModel):
    mixer: AnyMixerConfig


NAMES = zoo.names()


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_key_is_refused_with_a_suggestion(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown key 'd_modell'; did you mean d_model"):
        zoo.create(name, d_modell=64)


@pytest.mark.parametrize("name", NAMES)
def test_whole_numbers_are_strict(name: str) -> None:
    for wrong in ("64", 64.0, True, 0, -64):
        with pytest.raises(ConfigError, match="d_model"):
            zoo.create(name, d_model=wrong)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("d_model", [64, 128, 192, 320])
def test_the_defaults_serve_every_multiple_of_64(name: str, d_model: int) -> None:
    mixer = zoo.create(name, d_model=d_model)
    assert mixer(torch.randn(1, 3, d_model)).shape == (1, 3, d_model)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_survives_dump_json_and_the_nested_form(name: str) -> None:
    definition = zoo.describe(name)
    for key in definition.examples:
        config = definition.example(key)
        assert zoo.create(config.model_dump()).config == config
        assert Layer.model_validate({"mixer": json.loads(config.model_dump_json())}).mixer == config
        assert Layer.model_validate_json(Layer(mixer=config).model_dump_json()).mixer == config


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_create_reads_yaml_and_json_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mixer{suffix}"
    path.write_text("name: ssd\nd_model: 64\n" if suffix == ".yaml" else '{"name": "ssd", "d_model": 64}')
    assert zoo.create(path).config == zoo.create("ssd", d_model=64).config


def test_a_copy_is_validated() -> None:
    config = zoo.create("ssd", d_model=64).config
    assert config.model_copy(update={"d_state": 32}).d_state == 32  # type: ignore[attr-defined]
    with pytest.raises(ValidationError):
        config.model_copy(update={"d_stat": 32})


def test_the_schema_offers_every_registered_mixer() -> None:
    options = Layer.model_json_schema()["properties"]["mixer"]["oneOf"]
    assert {option["properties"]["name"]["const"] for option in options} == set(NAMES)


def test_an_unknown_name_in_a_nested_config_is_told_with_a_suggestion() -> None:
    with pytest.raises(ValidationError, match="did you mean ssd"):
        Layer.model_validate({"mixer": {"name": "sds", "d_model": 64}})
    with pytest.raises(UnknownMixer, match="did you mean attention"):
        zoo.create("atention", d_model=64)


def test_an_unknown_backend_is_refused_and_triton_on_a_cpu_says_why() -> None:
    with pytest.raises(BackendError, match="did you mean triton"):
        zoo.create("ssd", d_model=64, backend="tritn")
    mixer = zoo.create("ssd", d_model=64, backend="triton")
    with pytest.raises(BackendError, match=r"triton: runs on cuda, the input is on cpu"):
        mixer(torch.randn(1, 4, 64))


def test_a_wrong_shape_and_an_undeclared_capability_are_told_in_words() -> None:
    mixer = zoo.create("attention", d_model=64, causal=False)
    with pytest.raises(ShapeError, match=r"x has shape \[1, 4, 65\], wanted \[B, T, D=64\]"):
        mixer(torch.randn(1, 4, 65))
    with pytest.raises(UnsupportedCapability, match=r"attention.*'stateful'.*mixers that do: .*ssd"):
        mixer.initial_state(1)
