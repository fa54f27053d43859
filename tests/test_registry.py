"""The registry: lazy, isolated, and clear about what is wrong with a plugin."""

import sys
from pathlib import Path

import pytest
from zoo.registry import Registry, contract_problem

from sequence_mixer.errors import RegistryError, UnknownMixer
from sequence_mixer.hookspecs import CONTRACT

GOOD = """
from typing import Literal
from sequence_mixer import Capabilities, MixerConfig, MixerDef, hookimpl
class Config(MixerConfig):
    name: Literal["{name}"] = "{name}"
@hookimpl
def zoo_register_mixers():
    return [MixerDef("{name}", config=Config, build=lambda config: None, capabilities=Capabilities(),
                     examples={{"default": {{"d_model": 64}}}})]
"""


class Site:
    """A folder on sys.path in which tests install little distributions by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(
        self, distribution: str, package: str, code: str, names: tuple[str, ...],
        contract: str | None = f"v{CONTRACT[0]}_{CONTRACT[1]}",
    ) -> None:  # fmt: skip
        (self.root / f"{package}.py").write_text(code)
        info = self.root / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        entries = "[zoo.mixers]\n" + "".join(f"{name} = {package}\n" for name in names)
        if contract is not None:
            entries += f"[zoo.contract]\n{distribution} = sequence_mixer:{contract}\n"
        (info / "entry_points.txt").write_text(entries)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield Site(tmp_path)
    for module in set(sys.modules) - before:
        if module.startswith("plug_"):
            del sys.modules[module]


def test_reading_the_names_imports_no_plugin(site: Site) -> None:
    site.add("plug-one", "plug_one", GOOD.format(name="one"), ("one",))
    registry = Registry()
    assert "one" in registry.names()
    assert "plug_one" not in sys.modules
    assert registry.definition("one").name == "one"
    assert "plug_one" in sys.modules


def test_a_plugin_that_breaks_on_import_takes_nobody_down_and_keeps_its_traceback(site: Site) -> None:
    site.add("plug-bad", "plug_bad", "import a_module_that_is_not_there", ("bad",))
    site.add("plug-one", "plug_one", GOOD.format(name="one"), ("one",))
    registry = Registry()
    assert registry.definition("one").name == "one"
    with pytest.raises(RegistryError, match=r"plug_bad.*plug-bad.*did not load: ModuleNotFoundError"):
        registry.definition("bad")
    (row,) = [row for row in registry.plugins() if row.package == "plug_bad"]
    assert row.status == "failed"
    assert "a_module_that_is_not_there" in row.trace
    with pytest.raises(UnknownMixer, match="plugin 'plug_bad' did not load"):
        registry.definition("nothing_like_it")


def test_a_plugin_that_exits_on_import_is_a_failure_like_any_other(site: Site) -> None:
    site.add("plug-exit", "plug_exit", "raise SystemExit(3)", ("exits",))
    with pytest.raises(RegistryError, match="SystemExit"):
        Registry().definition("exits")


def test_a_name_claimed_twice_is_an_error_that_names_both_distributions(site: Site) -> None:
    site.add("plug-one", "plug_one", GOOD.format(name="one"), ("one",))
    site.add("plug-two", "plug_two", GOOD.format(name="one"), ("one",))
    registry = Registry()
    with pytest.raises(RegistryError, match=r"'one' is claimed by plug-one \(plug_one\) and plug-two \(plug_two\)"):
        registry.definition("one")
    assert {row.status for row in registry.plugins() if row.package.startswith("plug_")} == {"failed"}


def test_switching_one_claimant_off_settles_a_duplicate(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.add("plug-one", "plug_one", GOOD.format(name="one"), ("one",))
    site.add("plug-two", "plug_two", GOOD.format(name="one"), ("one",))
    monkeypatch.setenv("ZOO_DISABLE_PLUGINS", "plug_two")
    registry = Registry()
    assert registry.definition("one").name == "one"
    assert [row.status for row in registry.plugins() if row.package == "plug_two"] == ["off"]


@pytest.mark.parametrize("word", ["plug-one", "plug_one", "one"])
def test_a_user_switches_a_plugin_off_by_distribution_package_or_name(
    site: Site, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    site.add("plug-one", "plug_one", GOOD.format(name="one"), ("one",))
    monkeypatch.setenv("ZOO_DISABLE_PLUGINS", word)
    registry = Registry()
    assert "one" not in registry.names()
    with pytest.raises(UnknownMixer, match="switched off by ZOO_DISABLE_PLUGINS"):
        registry.definition("one")


def test_an_unsupported_contract_is_refused_before_the_plugin_is_imported(site: Site) -> None:
    site.add("plug-new", "plug_new", "raise AssertionError('imported')", ("new",), contract="v9_0")
    with pytest.raises(RegistryError, match=r"contract v9\.0, this is v1\.0; upgrade mixer-zoo"):
        Registry().definition("new")
    assert "plug_new" not in sys.modules


def test_a_distribution_without_a_contract_is_told_what_to_add(site: Site) -> None:
    site.add("plug-old", "plug_old", GOOD.format(name="old"), ("old",), contract=None)
    with pytest.raises(RegistryError, match=r"declares no contract; add an entry point in the group 'zoo\.contract'"):
        Registry().definition("old")


def test_a_misspelt_hook_is_found(site: Site) -> None:
    code = GOOD.format(name="one").replace("def zoo_register_mixers", "def zoo_register_mixer")
    site.add("plug-one", "plug_one", code, ("one",))
    with pytest.raises(RegistryError, match="zoo_register_mixer"):
        Registry().definition("one")


def test_a_missing_hook_is_found(site: Site) -> None:
    site.add("plug-one", "plug_one", "x = 1", ("one",))
    with pytest.raises(RegistryError, match="no function zoo_register_mixers"):
        Registry().definition("one")


def test_the_hook_must_return_exactly_the_names_of_the_entry_points(site: Site) -> None:
    site.add("plug-one", "plug_one", GOOD.format(name="one"), ("one", "two"))
    with pytest.raises(RegistryError, match="the entry points name one, two, the hook returned one"):
        Registry().definition("two")


def test_a_misspelt_mixer_gets_a_suggestion() -> None:
    with pytest.raises(UnknownMixer, match="no mixer named 'atention'; did you mean attention"):
        Registry().definition("atention")


@pytest.mark.parametrize(
    ("contract", "problem"),
    [
        ("sequence_mixer:v1_0", None),
        ("sequence_mixer:v1_7", "upgrade"),
        ("sequence_mixer:v0_3", "release"),
        ("v1", "form"),
    ],
)
def test_contract_versions_compare_by_major_and_minor(contract: str, problem: str | None) -> None:
    found = contract_problem(contract)
    assert (found is None) if problem is None else (found is not None and problem in found)
