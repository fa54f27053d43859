"""Config files (YAML or JSON) as mappings, and validation errors of configs in words."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sequence_mixer.errors import ConfigError, suggest


def read_config_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file, or in a JSON file if the name ends in `.json`.

    Raises ConfigError with file, line and column for a syntax error or a key given twice, and with the file for one
    that is missing, unreadable, empty, not UTF-8, or holds something other than a mapping with text keys.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}; looked in {path.absolute().parent}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start} does not decode") from None
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None
    content = _parse_json(path, text) if path.suffix.lower() == ".json" else _parse_yaml(path, text)
    if content is None:
        raise ConfigError(f"the config file {path} is empty")
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, wanted a mapping of keys to values")
    odd = [key for key in content if not isinstance(key, str)]
    if odd:
        raise ConfigError(f"{path}: the key {odd[0]!r} is a {type(odd[0]).__name__}, wanted text; put it in quotes")
    return content


def in_words(title: str, model: type[BaseModel], error: ValidationError) -> str:
    """A validation error as one clause per wrong field, with the closest known key for a misspelt one.

    title: what was validated (a file, "train config"). model: its class; nested models are followed.
    """
    told = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        where = ".".join(location)
        if problem["type"] == "extra_forbidden":
            keys = _keys_at(model, location[:-1])
            known = f"{suggest(location[-1], keys)}; keys: {', '.join(keys)}" if keys else ""
            told.append(f"unknown key {where!r}{known}")
        elif problem["type"] == "missing":
            told.append(f"{where!r} is missing")
        elif problem["type"] == "value_error" and (not where or isinstance(problem["input"], dict)):
            told.append(problem["msg"].removeprefix("Value error, "))
        else:
            told.append(f"{where}={_short(problem['input'])}: {problem['msg'].removeprefix('Value error, ')}")
    return f"{title}: " + "; ".join(told)


def _keys_at(model: type[BaseModel], location: Iterable[str]) -> list[str]:
    """Keys of the model that `location` leads to, or nothing if it leads elsewhere."""
    for part in location:
        field = model.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    extra = getattr(model, "extra_keys", ())
    return [*model.model_fields, *extra]


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e-3 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(path: Path, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{path}: character {error.position} is not allowed in YAML: {error.reason}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply, or an alias holds itself") from None
    except ValueError as error:  # a date such as 2024-13-45
        raise ConfigError(f"{path}: {error}") from None


def _parse_json(path: Path, text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise ConfigError(f"{path}: the key {twice[0]!r} is given twice")
        return dict(pairs)

    if not text.strip():
        return None
    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply") from None
