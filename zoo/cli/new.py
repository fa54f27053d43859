"""`zoo new`: a distribution of its own with one working mixer, to start from."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template
from typing import Annotated

import typer
from rich.console import Console

from sequence_mixer.errors import ConfigError
from sequence_mixer.hookspecs import CONTRACT
from zoo.registry import registry

TEMPLATES = Path(__file__).parent / "templates"


def new(
    name: Annotated[str, typer.Argument(help="Name of the mixer, as configs will write it: letters, digits, _.")],
    into: Annotated[Path, typer.Option(help="Folder in which the distribution is made.")] = Path(),
) -> None:
    """Make a distribution with one working mixer (an exponential moving average) under a new name."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(f"{name!r} is no name for a mixer: small letters, digits and _, starting with a letter")
    if name in registry.names():
        raise ConfigError(f"a mixer named {name!r} is registered already; choose another name")
    package = f"zoo_{name}"
    root = into / package.replace("_", "-")
    if root.exists():
        raise ConfigError(f"{root} exists already; nothing was written")
    words = {
        "name": name,
        "package": package,
        "distribution": package.replace("_", "-"),
        "camel": "".join(part.capitalize() for part in name.split("_")),
        "contract": f"v{CONTRACT[0]}_{CONTRACT[1]}",
    }
    files = {
        "pyproject.toml": "pyproject.toml.txt",
        "README.md": "readme.md.txt",
        f"{package}/__init__.py": "init.py.txt",
        f"{package}/config.py": "config.py.txt",
        f"{package}/mixer.py": "mixer.py.txt",
        "tests/test_conformance.py": "test_conformance.py.txt",
    }
    for target, source in files.items():
        path = root / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template((TEMPLATES / source).read_text()).substitute(words))
    (root / package / "py.typed").touch()
    console = Console(highlight=False)
    console.print(f"made {root}; next:")
    console.print(f"  pip install -e {root}\n  zoo check {name}", markup=False)
