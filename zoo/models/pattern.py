"""Layer patterns: "ssd*3, (wide, attention)*2" and explicit lists become one mixer config per layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sequence_mixer.config import MixerConfig
from sequence_mixer.errors import ConfigError, suggest

MAX_LAYERS = 1024
_TOKEN = re.compile(r"\s*(?:(?P<word>[A-Za-z_][\w.-]*)|(?P<count>\d+)|(?P<sign>[*,()]))")


def parse_pattern(pattern: str) -> list[str]:
    """Names of the layers that a pattern stands for, in order.

    pattern: terms with commas between them; a term is a name or a group in parentheses, with `*count` (>= 1) to
        repeat it: "ssd*3, attention" is ssd, ssd, ssd, attention.
    Raises ConfigError that marks the place of a mistake, or if there are more than MAX_LAYERS layers.
    """
    parser = _Parser(pattern)
    names = parser.terms()
    if parser.kind != "end":
        raise parser.wrong("wanted a comma or the end")
    return names


def expand_layers(
    layers: str | Sequence[str | Mapping[str, Any] | MixerConfig], mixers: Mapping[str, Mapping[str, Any]], d_model: int
) -> list[MixerConfig]:
    """One validated mixer config per layer, `d_model` filled in.

    layers: a pattern, or a list of names, mappings with a `name`, and configs.
    mixers: alias -> fields of its config; an alias without `name` is itself the name of a registered mixer.
    Raises ConfigError that names the layer or the alias: unknown name, wrong field, another d_model.
    """
    entries: Sequence[Any] = parse_pattern(layers) if isinstance(layers, str) else layers
    if not entries:
        raise ConfigError('layers is empty; write for example layers: "ssd*3, attention"')
    if len(entries) > MAX_LAYERS:
        raise ConfigError(f"layers has {len(entries)} entries, the most is {MAX_LAYERS}")
    aliases = {alias: _resolve_alias(alias, fields, d_model) for alias, fields in mixers.items()}
    return [_resolve_layer(index, entry, aliases, d_model) for index, entry in enumerate(entries)]


def _resolve_alias(alias: str, fields: Any, d_model: int) -> MixerConfig:
    known = _registered()
    if fields is None:
        fields = {}
    if not isinstance(fields, Mapping):
        raise ConfigError(f"mixers.{alias} is a {type(fields).__name__}, wanted a mapping of config fields")
    name = fields.get("name", alias)
    if name not in known:
        what = f"mixers.{alias} has the name {name!r}, which" if "name" in fields else f"mixers.{alias}: {alias!r}"
        advice = "" if "name" in fields else "; an alias needs a 'name'"
        raise ConfigError(f"{what} is no registered mixer{suggest(str(name), known)}{advice}; {_list(known)}")
    if alias in known and name != alias:
        raise ConfigError(f"mixers.{alias} is a {name}, but {alias!r} is itself a registered mixer; rename the alias")
    return _resolve(f"mixers.{alias}", {**fields, "name": name}, d_model)


def _resolve_layer(index: int, entry: Any, aliases: Mapping[str, MixerConfig], d_model: int) -> MixerConfig:
    where = f"layer {index}"
    if isinstance(entry, MixerConfig):
        return _resolve(f"{where} ({entry.name})", entry.model_dump(), d_model)
    if isinstance(entry, str):
        if entry in aliases:
            return aliases[entry]
        entry = {"name": entry}
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} is a {type(entry).__name__}, wanted a name or a mapping with a 'name'")
    if "name" not in entry:
        raise ConfigError(f"{where} has no 'name', only {', '.join(map(str, entry)) or 'nothing'}")
    name = entry["name"]
    known = _registered()
    if isinstance(name, str) and name in aliases:
        base = aliases[name].model_dump()
        return _resolve(f"{where} ({name})", {**base, **entry, "name": base["name"]}, d_model)
    if name not in known:
        words = [*aliases, *known]
        raise ConfigError(
            f"{where}: no mixer or alias named {name!r}{suggest(str(name), words)}; {_list(known, aliases)}"
        )
    return _resolve(f"{where} ({name})", dict(entry), d_model)


def _resolve(where: str, fields: dict[str, Any], d_model: int) -> MixerConfig:
    from zoo.build import resolve

    given = fields.setdefault("d_model", d_model)
    if given != d_model:
        raise ConfigError(
            f"{where} has d_model={given!r}, the model has {d_model}; leave it out, the model fills it in"
        )
    try:
        return resolve(fields)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _registered() -> list[str]:
    from sequence_mixer.host import host

    return host().names()


def _list(known: Sequence[str], aliases: Mapping[str, Any] | None = None) -> str:
    told = f"registered: {', '.join(known) or 'none'}"
    return told + (f"; aliases: {', '.join(aliases)}" if aliases else "")


class _Parser:
    """Recursive descent over one pattern; `kind` and `text` are the token at hand."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.start = self.end = 0
        self.kind = self.text = ""
        self.depth = 0
        self.advance()

    def advance(self) -> None:
        rest = self.pattern[self.end :]
        if not rest.strip():
            self.start, self.kind, self.text = len(self.pattern), "end", ""
            return
        found = _TOKEN.match(self.pattern, self.end)
        if found is None:
            self.start = self.end + len(rest) - len(rest.lstrip())
            self.kind, self.text = "odd", self.pattern[self.start]
            raise self.wrong("that character has no meaning here")
        self.kind = found.lastgroup or ""
        self.text = found[self.kind]
        self.start, self.end = found.start(self.kind), found.end()

    def wrong(self, what: str) -> ConfigError:
        came = repr(self.text) if self.text else "the end"
        return ConfigError(f"layers {self.pattern!r}: {what}, at position {self.start + 1} came {came}")

    def terms(self) -> list[str]:
        names = self.term()
        while self.text == ",":
            self.advance()
            names += self.term()
            if len(names) > MAX_LAYERS:
                raise ConfigError(f"layers {self.pattern!r} are more than {MAX_LAYERS}")
        return names

    def term(self) -> list[str]:
        if self.text == "(":
            self.depth += 1
            if self.depth > 16:
                raise self.wrong("groups are nested deeper than 16")
            self.advance()
            names = self.terms()
            if self.text != ")":
                raise self.wrong("wanted a comma or a closing parenthesis")
            self.depth -= 1
        elif self.kind == "word":
            names = [self.text]
        else:
            raise self.wrong("wanted the name of a mixer")
        self.advance()
        return self.repeated(names) if self.text == "*" else names

    def repeated(self, names: list[str]) -> list[str]:
        self.advance()
        if self.kind != "count" or len(self.text) > 9 or int(self.text) == 0:
            raise self.wrong("wanted a count of 1 or more after '*'")
        count = int(self.text)
        if count * len(names) > MAX_LAYERS:
            raise ConfigError(f"layers {self.pattern!r} are more than {MAX_LAYERS}")
        self.advance()
        return names * count
