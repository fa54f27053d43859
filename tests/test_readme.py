"""What the README says is so."""

import re
from pathlib import Path

from zoo.mixer_table import with_table

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_of_mixers_is_the_one_the_registry_gives() -> None:
    text = (ROOT / "README.md").read_text()
    assert text == with_table(text), "run: python -m zoo.mixer_table --write README.md"


def test_the_python_example_runs() -> None:
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})


def test_every_linked_file_exists() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            assert link.startswith("http") or (ROOT / link).exists(), f"{name}: {link}"
