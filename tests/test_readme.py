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


def test_every_command_and_make_target_it_names_exists() -> None:
    from zoo.cli import app

    text = (ROOT / "README.md").read_text()
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    named = set(re.findall(r"\bzoo ([a-z]+)\b", re.sub(r"import torch, zoo", "", text)))
    assert named
    assert named <= commands
    assert commands <= named, "a command is missing in the README"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets
