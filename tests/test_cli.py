"""The `zoo` command as a user meets it: what it prints, and that every mistake ends in one message and exit 2."""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from zoo.cli import main
from zoo.registry import registry

Zoo = Callable[..., tuple[int, str, str]]

MODEL = 'model:\n  d_model: 32\n  layers: "{layers}"\n{more}context: 16\nbatch_size: 2\nsteps: 2\n'


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Zoo:
    """Run the command in an empty folder; exit status, standard output and standard error come back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["zoo", *arguments])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def stateful() -> str:
    """A registered mixer that can decode, small enough to train in a test."""
    return next(name for name in registry.names() if registry.definition(name).capabilities.stateful)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class TestWhatIsRegistered:
    def test_list_names_every_mixer_on_80_columns(self, zoo: Zoo) -> None:
        code, out, _ = zoo("list")
        assert code == 0
        first = [line.split()[0] for line in out.splitlines() if line[:1].isalpha()]
        assert first[1:] == registry.names()
        assert max(len(line) for line in out.splitlines()) <= 80
        assert "…" not in out

    def test_list_as_json(self, zoo: Zoo) -> None:
        code, out, _ = zoo("list", "--json")
        assert code == 0
        listed = json.loads(out)
        assert [row["name"] for row in listed["mixers"]] == registry.names()
        assert listed["failures"] == {}

    def test_show_lists_every_option(self, zoo: Zoo) -> None:
        for name in registry.names():
            code, out, _ = zoo("show", name)
            assert code == 0
            lines = out.splitlines()
            for option in registry.definition(name).config.model_fields:
                assert any(line.split()[:1] == [option] for line in lines), option
            assert any(line.startswith("backends: ") for line in lines)

    def test_plugins_tells_what_is_switched_off(self, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
        name = registry.names()[0]
        assert zoo("plugins")[0] == 0
        monkeypatch.setenv("ZOO_DISABLE_PLUGINS", name)
        code, out, _ = zoo("plugins")
        assert code == 0
        assert "off" in out
        code, _, err = zoo("show", name)
        assert code == 2
        assert f"it is switched off by ZOO_DISABLE_PLUGINS={name}" in err

    def test_matrix_draws_a_picture_and_prints_ranks(self, zoo: Zoo, tmp_path: Path) -> None:
        name = next(name for name in registry.names() if registry.definition(name).capabilities.matrix_form)
        code, out, _ = zoo("matrix", name, "--length", "16")
        assert code == 0
        assert "rank of the block" in out
        assert "rank of the whole matrix: " in out
        assert (tmp_path / f"{name}-matrix.png").read_bytes().startswith(b"\x89PNG")

    def test_explain_tells_which_backend_serves_and_why_not_the_others(self, zoo: Zoo, stateful: str) -> None:
        code, out, _ = zoo("explain", stateful, "--length", "16", "--d-model", "64")
        assert code == 0
        assert "not triton: runs on cuda, the input is on cpu" in out


class TestNew:
    def test_nothing_is_written_over(self, zoo: Zoo, tmp_path: Path) -> None:
        zoo("new", "my_mix")
        before = contents(tmp_path)
        code, _, err = zoo("new", "my_mix")
        assert code == 2
        assert "exists already; nothing was written" in err
        assert contents(tmp_path) == before


class TestMistakes:
    """One message on standard error, exit 2, no traceback, nothing written."""

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["show", "{misspelt}"], "did you mean {name}?"),
            (["check", "{misspelt}"], "did you mean {name}?"),
            (["explain", "{misspelt}"], "did you mean {name}?"),
            (["matrix", "{misspelt}"], "did you mean {name}?"),
            (["check", "{name}", "--dtype", "float12"], "no dtype 'float12'; one of float64"),
            (["check", "{name}", "--device", "tpu"], "no device 'tpu'"),
            (["check", "{name}", "--json", "no/such/folder.json"], "the folder no/such for --json does not exist"),
            (["explain", "{name}", "--dtype", "int8"], "no dtype 'int8'"),
            (["explain", "{name}", "--backend", "triton"], "runs on cuda, the input is on cpu"),
            (["explain", "{name}", "--backend", "tritn"], "did you mean triton?"),
            (["matrix", "{name}", "--example", "none"], "has no example 'none'; it has: default"),
            (["matrix", "{name}", "--head", "999"], "asked for 999"),
            (["matrix", "{name}", "--out", "no/such.png"], "the folder no for --out does not exist"),
            (["new", "{name}"], "is registered already"),
            (["new", "Not-A-Name"], "is no name for a mixer"),
            (["new", "fine", "--into", "file"], "file"),
            (["train", "absent.yaml"], "no config file absent.yaml"),
            (["generate", "absent"], "no run folder absent"),
        ],
    )
    def test_of_arguments(self, zoo: Zoo, tmp_path: Path, stateful: str, arguments: list[str], told: str) -> None:
        (tmp_path / "file").write_text("mine")
        words = {"name": stateful, "misspelt": stateful[:-1] + "x" + stateful[-1]}
        code, _, err = zoo(*(argument.format(**words) for argument in arguments))
        self.expect_one_message(code, err, told.format(**words))
        assert contents(tmp_path) == {"file": b"mine"}

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
    def test_cuda_where_there_is_none(self, zoo: Zoo, stateful: str) -> None:
        for command in ("check", "explain"):
            code, _, err = zoo(command, stateful, "--device", "cuda")
            self.expect_one_message(code, err, "no CUDA device is visible; take --device cpu")

    @pytest.mark.parametrize(
        ("config", "more", "told"),
        [
            (MODEL.format(layers="{misspelt}", more=""), [], "did you mean {name}?"),
            (
                MODEL.format(layers="{name}", more="  mixers: {{{name}: {{d_modell: 3}}}}\n"),
                [],
                "unknown key 'd_modell'",
            ),
            (MODEL.format(layers="{name}", more="contxt: 16\n"), [], "unknown key 'contxt'; did you mean context?"),
            (MODEL.format(layers="{name}", more="").replace("16", "'16'"), [], "context='16'"),
            (MODEL.format(layers="{name}", more="  d_model: 64\n"), [], "'d_model' is given twice"),
            ("model: [1, 2\nsteps: 3\n", [], "a.yaml, line 2"),
            ("", [], "is empty"),
            ("- 1\n- 2\n", [], "holds a list, wanted a mapping"),
            (MODEL.format(layers="{name}", more=""), ["--corpus", "absent"], "no corpus at absent"),
            (MODEL.format(layers="{name}", more=""), ["--dtype", "int8"], "dtype='int8'"),
            (MODEL.format(layers="{name}", more=""), ["--device", "gpu"], "device='gpu' cannot be used here"),
        ],
    )
    def test_of_a_training_config(
        self, zoo: Zoo, tmp_path: Path, stateful: str, config: str, more: list[str], told: str
    ) -> None:
        words = {"name": stateful, "misspelt": stateful[:-1] + "x" + stateful[-1]}
        (tmp_path / "a.yaml").write_text(config.format(**words))
        before = contents(tmp_path)
        code, _, err = zoo("train", "a.yaml", *more)
        self.expect_one_message(code, err, told.format(**words))
        assert contents(tmp_path) == before

    def test_of_a_checkpoint_that_is_corrupt(self, zoo: Zoo, tmp_path: Path, stateful: str) -> None:
        text = tmp_path / "text"
        text.write_text("some text to learn " * 90)
        (tmp_path / "a.yaml").write_text(MODEL.format(layers=stateful, more="").replace("d_model: 32", "d_model: 64"))
        train = ("train", "a.yaml", "--corpus", str(text), "--device", "cpu", "--out", "run")
        code, out, err = zoo(*train)
        assert code == 0, out + err
        assert zoo("generate", "run", "--tokens", "3", "--prompt", "x")[0] == 0
        weights = tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-7])
        before = contents(tmp_path)
        for command in (("generate", "run"), train):
            code, _, err = zoo(*command)
            self.expect_one_message(code, err, "model.safetensors is corrupt")
        assert contents(tmp_path) == before

    def expect_one_message(self, code: int, err: str, told: str) -> None:
        assert code == 2
        assert told in err
        assert err.count("error:") == 1
        assert "Traceback" not in err


def test_the_version_is_that_of_the_distribution(zoo: Zoo) -> None:
    assert zoo("--version")[:2] == (0, f"mixer-zoo {version('mixer-zoo')}\n")


def test_explain_takes_an_example_config(zoo: Zoo) -> None:
    assert "gated_rms_norm" in zoo("explain", "ssd", "--example", "groups")[1]
    assert "gated_rms_norm" not in zoo("explain", "ssd", "--example", "no_norm")[1]
    code, _, err = zoo("explain", "ssd", "--example", "gruops")
    assert code == 2
    assert "has no example 'gruops'" in err
