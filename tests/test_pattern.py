"""Layer patterns and the configs they become."""

import re
from pathlib import Path
from typing import Any

import pytest
from zoo.config_file import read_config_file
from zoo.models.model_config import ModelConfig
from zoo.models.pattern import MAX_LAYERS, parse_pattern

from installed_mixers import small  # noqa: F401
from sequence_mixer.errors import ConfigError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("ssd", "ssd"),
        (" ssd * 3 , wide,attention ", "ssd ssd ssd wide attention"),
        ("(ssd*2, attention)*2", "ssd ssd attention ssd ssd attention"),
        ("((a, b)*2, c)", "a b a b c"),
        ("my-mixer_2.1*2", "my-mixer_2.1 my-mixer_2.1"),
        ("a*" + str(MAX_LAYERS), " ".join(["a"] * MAX_LAYERS)),
    ],
)
def test_pattern_stands_for_its_layers_in_order(pattern: str, names: str) -> None:
    assert parse_pattern(pattern) == names.split()


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("", "wanted the name of a mixer, at position 1 came the end"),
        ("ssd,", "wanted the name of a mixer, at position 5 came the end"),
        ("ssd,,attention", "wanted the name of a mixer, at position 5 came ','"),
        ("ssd attention", "wanted a comma or the end, at position 5 came 'attention'"),
        ("ssd*0", "wanted a count of 1 or more after '*', at position 5 came '0'"),
        ("ssd*x", "wanted a count of 1 or more"),
        ("ssd*-1", "has no meaning here, at position 5 came '-'"),
        ("3*ssd", "wanted the name of a mixer, at position 1 came '3'"),
        ("(ssd", "wanted a comma or a closing parenthesis"),
        ("ssd)", "wanted a comma or the end, at position 4 came ')'"),
        ("(" * 40 + "ssd" + ")" * 40, "nested deeper"),
        ("ssd*99999999999999999999999", "wanted a count"),
        (f"ssd*{MAX_LAYERS + 1}", "more than"),
        ("((((ssd*1000)*1000)*1000)*1000)", "more than"),
    ],
)
def test_mistake_in_a_pattern_is_marked(pattern: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        parse_pattern(pattern)


@pytest.mark.usefixtures("small")
class TestModelConfig:
    def test_pattern_with_aliases_is_stored_expanded(self) -> None:
        config = ModelConfig.of(
            d_model=32,
            layers="small_decay*2, slow, small_mean",
            mixers={"small_decay": {"decay": 0.5}, "slow": {"name": "small_decay", "decay": 0.99}},
        )
        told = [(layer.name, layer.d_model, layer.decay) for layer in config.layers]  # type: ignore[attr-defined]
        assert told == [
            ("small_decay", 32, 0.5), ("small_decay", 32, 0.5), ("small_decay", 32, 0.99), ("small_mean", 32, 0.9),
        ]  # fmt: skip
        assert "mixers" not in config.model_dump()

    @pytest.mark.parametrize("mode", ["python", "json"])
    def test_dump_of_a_config_is_the_same_config(self, mode: Any) -> None:
        config = ModelConfig.of(d_model=32, layers="small_decay*2, small_mean", mixers={"small_mean": {"decay": 0.1}})
        assert ModelConfig.of(**config.model_dump(mode=mode)) == config

    def test_list_of_names_aliases_mappings_and_configs(self) -> None:
        first = ModelConfig.of(d_model=32, layers="small_mean").layers[0]
        config = ModelConfig.of(
            d_model=32,
            layers=[
                "small_decay",
                "slow",
                {"name": "small_mean", "decay": 0.3},
                {"name": "slow", "share": True},
                first,
            ],
            mixers={"slow": {"name": "small_decay", "decay": 0.99}},
        )
        told = [(layer.name, layer.decay, layer.share) for layer in config.layers]  # type: ignore[attr-defined]
        assert told == [
            ("small_decay", 0.9, False), ("small_decay", 0.99, False), ("small_mean", 0.3, False),
            ("small_decay", 0.99, True), ("small_mean", 0.9, False),
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("fields", "told"),
        [
            ({"layers": "small_deacy"}, "layer 0: no mixer or alias named 'small_deacy'; did you mean small_decay?"),
            ({"layers": "small_mean, slwo", "mixers": {"slow": {"name": "small_mean"}}}, "did you mean slow?"),
            ({"layers": "small_mean", "mixers": {"slow": {"decay": 0.1}}}, "an alias needs a 'name'"),
            ({"layers": "small_mean", "mixers": {"slow": {"name": "small_men"}}}, "did you mean small_mean?"),
            ({"layers": "small_mean", "mixers": {"small_mean": {"name": "small_decay"}}}, "rename the alias"),
            (
                {"layers": "small_mean", "mixers": {"small_mean": {"decya": 1}}},
                "key 'decya'; did you mean decay?",
            ),
            ({"layers": "small_mean", "mixers": {"small_mean": 3}}, "mixers.small_mean is a int"),
            ({"layers": "small_mean", "mixers": ["x"]}, "mixers is a list"),
            ({"layers": [{"name": "small_mean", "d_model": 64}]}, "has d_model=64, the model has 32"),
            ({"layers": [{"decay": 0.1}]}, "layer 0 has no 'name'"),
            ({"layers": [{"name": ["small_mean"]}]}, "layer 0: no mixer or alias named ['small_mean']"),
            ({"layers": [3]}, "layer 0 is a int"),
            ({"layers": []}, "layers is empty"),
            ({"layers": 3}, "layers is a int"),
            ({}, "'layers' is missing"),
            ({"layers": "small_mean", "d_modle": 3}, "unknown key 'd_modle'; did you mean d_model?"),
            ({"layers": "small_mean", "mixer": {}}, "did you mean mixers?"),
            ({"layers": "small_mean", "d_model": "32"}, "d_model='32'"),
            ({"layers": "small_mean", "d_model": 0}, "d_model=0"),
            ({"layers": "small_mean", "dropout": 1.0}, "dropout=1.0"),
        ],
    )
    def test_mistake_in_a_config_is_told_in_words(self, fields: dict[str, Any], told: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(told)):
            ModelConfig.of(**{"d_model": 32, **fields})


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.yaml", "model:\n  d_model: [1,\n", "a.yaml, line 3, column 1:"),
        ("a.yaml", "a: 1\nb: 2\na: 3\n", "a.yaml, line 3, column 1: the key 'a' is given twice"),
        ("a.yaml", "a: !!python/object:os.system {}\n", "a.yaml, line 1, column 4: could not determine a constructor"),
        ("a.yaml", "- 1\n", "a.yaml holds a list"),
        ("a.yaml", "", "is empty"),
        ("a.yaml", "1: 2\n", "the key 1 is a int"),
        ("a.yaml", "a: \x07\n", "not allowed in YAML"),
        ("a.json", '{"a": 1,\n "b" 2}', "a.json, line 2, column 6:"),
        ("a.json", '{"a": 1, "a": 2}', "given twice"),
        ("a.json", "", "is empty"),
    ],
)
def test_mistake_in_a_config_file_is_told_with_its_place(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(told)):
        read_config_file(tmp_path / name)


def test_config_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file"):
        read_config_file(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot read the config file"):
        read_config_file(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_config_file(tmp_path / "latin.yaml")


def test_yaml_reads_exponents_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1e-3\nb: 2.5E4\nc: 1e5x\nd: on\n")
    assert read_config_file(tmp_path / "a.yaml") == {"a": 1e-3, "b": 2.5e4, "c": "1e5x", "d": True}
