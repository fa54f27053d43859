"""SM-12: configs."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from sequence_mixer.config import MixerConfig
from sequence_mixer.conformance.catalogue import CheckSkipped, check
from sequence_mixer.conformance.probes import Subject


def refused(kind: type[MixerConfig], values: dict[str, Any]) -> bool:
    """True if the config class does not take `values`."""
    try:
        kind.model_validate(values)
    except ValidationError:
        return True
    return False


@check("SM-12")
def check_unknown_keys_are_refused(subject: Subject) -> None:
    """A misspelt key raises ValidationError that names it, in the constructor and in model_copy."""
    kind, values = type(subject.config), subject.config.model_dump()
    subject.require(refused(kind, {**values, "d_modle": 64}), "the unknown key 'd_modle' was accepted")
    try:
        subject.config.model_copy(update={"no_such_option": 1})
    except ValidationError as error:
        subject.require("no_such_option" in str(error), "the error does not name the unknown key")
    else:
        subject.fail("model_copy took the unknown key 'no_such_option'")


@check("SM-12")
def check_whole_numbers_are_strict(subject: Subject) -> None:
    """d_model takes a whole number above 0 and nothing that merely looks like one; the name is the mixer's own."""
    kind, values = type(subject.config), subject.config.model_dump()
    for wrong in ("64", 64.5, 0, -64, True, None):
        subject.require(refused(kind, {**values, "d_model": wrong}), f"d_model={wrong!r} was accepted")
    subject.require(refused(kind, {**values, "name": "no such mixer"}), "a foreign name was accepted")


@check("SM-12")
def check_a_config_is_frozen(subject: Subject) -> None:
    """Fields cannot be set, and equal configs are equal."""
    try:
        subject.config.d_model = 128
    except ValidationError:
        pass
    else:
        subject.fail("config.d_model could be set; configs are frozen")
    again = subject.definition.example(subject.example)
    subject.require(again == subject.config, "the same example gives two configs that are not equal")


@check("SM-12")
def check_config_json_and_yaml_round_trips(subject: Subject) -> None:
    """JSON and YAML give back an equal config, infinities included, and the schema can be exported."""
    kind, config = type(subject.config), subject.config
    text = config.model_dump_json()
    json.loads(text, parse_constant=lambda word: subject.fail(f"{word} in the JSON; infinities are strings"))
    subject.require(kind.model_validate_json(text) == config, f"JSON did not give the config back: {text}")
    subject.require(bool(kind.model_json_schema()["properties"]), "the JSON schema has no properties")
    try:
        import yaml
    except ModuleNotFoundError as missing:
        raise CheckSkipped("PyYAML is not installed") from missing
    plain = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    subject.require(kind.model_validate(plain) == config, f"YAML did not give the config back: {plain}")


@check("SM-12")
def check_defaults_serve_usual_widths(subject: Subject) -> None:
    """With defaults for the rest, d_model of 64, 128, 192 and 512 is a valid config."""
    for width in (64, 128, 192, 512):
        values = {"name": subject.name, "d_model": width}
        try:
            subject.definition.config.model_validate(values)
        except ValidationError as error:
            required = [item for item in error.errors() if item["type"] == "missing"]
            if not required:
                subject.fail(f"the defaults do not serve d_model={width}: {error}")
