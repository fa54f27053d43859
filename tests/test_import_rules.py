"""Who may import whom, read from the source, and what importing costs, asked of a fresh interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


PLUGINS = sorted(path.name for path in (ROOT / "plugins").iterdir() if path.is_dir())


def test_the_contract_imports_nothing_of_ours() -> None:
    for path in sources("specs/sequence_mixer"):
        assert not [m for m in imports_of(path) if within(m, "zoo", *PLUGINS)], path


def test_the_host_never_imports_a_plugin() -> None:
    for path in sources("zoo"):
        assert not [m for m in imports_of(path) if within(m, *PLUGINS, "tests", "benchmarks")], path


def test_operators_import_torch_triton_and_the_light_part_of_the_contract() -> None:
    light = ("sequence_mixer.errors", "sequence_mixer.shapes", "zoo.ops", "torch", "triton")
    for path in sources("zoo/ops"):
        strays = [
            m for m in imports_of(path) if not within(m, *light) and m.split(".")[0] not in sys.stdlib_module_names
        ]
        assert not strays, f"{path}: {strays}"


def test_no_fast_path_imports_a_reference() -> None:
    for path in sources("zoo/ops"):
        if path.name not in ("__init__.py", "reference.py"):
            assert not [m for m in imports_of(path) if m.endswith(".reference")], path


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_imports_the_contract_and_the_operators(plugin: str) -> None:
    for path in sources(f"plugins/{plugin}"):
        strays = [m for m in imports_of(path) if within(m, "zoo", *PLUGINS) and not within(m, "zoo.ops", plugin)]
        assert not strays, f"{path}: {strays}"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import zoo.ops.ssd", ("pydantic", "pluggy", "triton")),
        ("import zoo; zoo.names()", ("triton", "zoo_ssd", "zoo_attention")),
        ("import zoo; [zoo.describe(n) for n in zoo.names()]", ("triton",)),
        ("import sequence_mixer", ("torch", "pydantic")),
    ],
)
def test_importing_stays_light(statement: str, absent: tuple[str, ...]) -> None:
    # torch itself may look for triton; it is ours that must not import it
    code = f"import sys; {statement}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_operator_stays_a_function_after_its_module_is_imported() -> None:
    code = "import zoo.ops.ssd, zoo.ops; assert callable(zoo.ops.ssd); from zoo.ops import ssd; assert callable(ssd)"
    subprocess.run([sys.executable, "-c", code], check=True)
