"""The folder of a training run: what an interruption may not change, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo.training import train_language_model
from zoo.training.checkpoint import CheckpointError, checkpoint_steps, load_checkpoint, save_checkpoint, step_folder
from zoo.training.run_model import load_run

from installed_mixers import small  # noqa: F401
from training_runs import (
    Stopped,
    assert_equal_runs,
    config_of,
    contents,
    installed,
    metrics_of,
    parameters_of,
    spoil,
    stop_at,
)

pytestmark = pytest.mark.usefixtures("small")


class TestRunFolder:
    def test_a_run_from_before_there_were_objectives_goes_on(self, tmp_path: Path) -> None:
        config = config_of()
        straight = train_language_model(config)
        with pytest.raises(Stopped):
            train_language_model(config, stop_at(6), out=tmp_path)
        run = json.loads((tmp_path / "run.json").read_text())
        assert run["config"]["model"].pop("objective", "none") is None
        (tmp_path / "run.json").write_text(json.dumps(run))
        old = load_checkpoint(step_folder(tmp_path / "checkpoints", 4))
        del old.config["model"]["objective"]
        shutil.rmtree(step_folder(tmp_path / "checkpoints", 4))
        save_checkpoint(tmp_path / "checkpoints", old)
        assert load_run(tmp_path)[2] == 4
        result = train_language_model(config, out=tmp_path)
        assert (result.resumed_from, result.losses) == (4, straight.losses)

    @pytest.mark.parametrize("stop", [1, 4, 6, 12])
    def test_a_run_stopped_anywhere_goes_on_to_the_same_numbers(self, tmp_path: Path, stop: int) -> None:
        mixers = {"small_decay": {"redraw": True, "share": True}}
        config = config_of(model={"d_model": 32, "layers": "small_decay*2", "dropout": 0.2, "mixers": mixers})
        straight = train_language_model(config, out=tmp_path / "straight")
        with pytest.raises(Stopped):
            train_language_model(config, stop_at(stop), out=tmp_path / "stopped")
        with open(tmp_path / "stopped" / "metrics.jsonl", "a") as metrics:
            metrics.write('{"step": 99, "lo')
        result = train_language_model(config, out=tmp_path / "stopped")
        assert result.resumed_from == stop // 4 * 4
        assert result.losses == straight.losses
        assert result.bits_per_byte == straight.bits_per_byte
        assert_equal_runs(tmp_path / "straight", tmp_path / "stopped")
        scales = [mixer.scale for mixer in result.model.mixers]
        assert not torch.equal(scales[0], torch.ones(32))

    def test_a_run_leaves_its_files_and_the_last_two_checkpoints(self, tmp_path: Path) -> None:
        result = train_language_model(config_of(), out=tmp_path)
        assert checkpoint_steps(tmp_path / "checkpoints") == [8, 12]
        written = json.loads((tmp_path / "result.json").read_text())
        assert written["bits_per_byte"] == result.bits_per_byte
        assert written["config"]["model"]["layers"][0]["d_model"] == 32
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
        assert [line["step"] for line in metrics_of(tmp_path) if "held_out_bits_per_byte" in line] == [5, 10, 12]

    def test_a_finished_run_says_its_result_again_without_training(self, tmp_path: Path) -> None:
        first = train_language_model(config_of(), out=tmp_path)
        (tmp_path / "result.json").unlink()
        seen: list[Any] = []
        again = train_language_model(config_of(), seen.append, out=tmp_path)
        assert seen == []
        assert again.bits_per_byte == first.bits_per_byte
        assert (tmp_path / "result.json").exists()

    def test_another_config_or_corpus_in_the_folder_is_refused_and_nothing_changes(self, tmp_path: Path) -> None:
        folder, text = tmp_path / "run", tmp_path / "text"
        text.write_text("some text to learn " * 90)
        train_language_model(config_of(corpus=str(text)), out=folder)
        before = contents(folder)
        with pytest.raises(CheckpointError, match=re.escape("context: 32 there, 16 here")):
            train_language_model(config_of(corpus=str(text), context=16), out=folder)
        layers = {"d_model": 32, "layers": "small_decay, small_mean", "dropout": 0.1}
        with pytest.raises(CheckpointError, match=re.escape("layers[1].name: 'small_decay' there, 'small_mean' here")):
            train_language_model(config_of(corpus=str(text), model=layers), out=folder)
        text.write_text("other text to learn " * 90)
        with pytest.raises(CheckpointError, match="another corpus"):
            train_language_model(config_of(corpus=str(text)), out=folder)
        assert contents(folder) == before

    @pytest.mark.parametrize("name", ["model.safetensors", "optimiser.safetensors", "meta.json"])
    @pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
    def test_a_corrupt_checkpoint_is_named_and_nothing_changes(self, tmp_path: Path, name: str, damage: str) -> None:
        straight = train_language_model(config_of(), out=tmp_path / "straight")
        with pytest.raises(Stopped):
            train_language_model(config_of(), stop_at(9), out=tmp_path / "run")
        newest = tmp_path / "run" / "checkpoints" / "step-00000008"
        spoil(newest / name, damage)
        before = contents(tmp_path / "run")
        with pytest.raises(CheckpointError, match=re.escape(str(newest / name))) as caught:
            train_language_model(config_of(), out=tmp_path / "run")
        assert f"Move the folder {newest} away to go on from step 4" in str(caught.value)
        with pytest.raises(CheckpointError, match=re.escape(str(newest / name))):
            load_run(tmp_path / "run")
        assert contents(tmp_path / "run") == before
        shutil.move(newest, tmp_path / "away")
        result = train_language_model(config_of(), out=tmp_path / "run")
        assert result.resumed_from == 4
        assert result.losses == straight.losses

    def test_fresh_sets_the_older_run_aside(self, tmp_path: Path) -> None:
        train_language_model(config_of(), out=tmp_path)
        before = parameters_of(tmp_path)
        result = train_language_model(config_of(seed=5), out=tmp_path, resume=False)
        assert result.resumed_from == 0
        aside = parameters_of(tmp_path / "previous-1")
        assert all(torch.equal(before[name], aside[name]) for name in before)

    def test_resume_insists_on_a_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="has no checkpoint to go on from"):
            train_language_model(config_of(), out=tmp_path / "run", resume=True)
        assert not (tmp_path / "run").exists()

    def test_files_of_somebody_else_are_not_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "result.json").write_text("mine")
        with pytest.raises(CheckpointError, match=re.escape("result.json would be overwritten")):
            train_language_model(config_of(), out=tmp_path)
        assert contents(tmp_path).keys() == {"result.json", *installed(tmp_path)}
        (tmp_path / "file").write_text("mine")
        with pytest.raises(CheckpointError, match="is a file"):
            train_language_model(config_of(), out=tmp_path / "file")
        with pytest.raises(CheckpointError, match="cannot write"):
            train_language_model(config_of(), out=tmp_path / "file" / "below")

    def test_two_runs_in_one_folder_are_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("fcntl")
        told: list[str] = []

        def second(report: Any) -> None:
            if report.step == 2:
                with pytest.raises(CheckpointError, match="another process is training in") as caught:
                    train_language_model(config_of(), out=tmp_path)
                told.append(str(caught.value))

        train_language_model(config_of(), second, out=tmp_path)
        assert len(told) == 1

    def test_metrics_that_are_damaged_are_named(self, tmp_path: Path) -> None:
        train_language_model(config_of(), out=tmp_path)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "metrics.jsonl").write_text("".join([*lines[:3], "?\n", *lines[4:]]))
        with pytest.raises(CheckpointError, match=re.escape("metrics.jsonl, line 4 is damaged")):
            train_language_model(config_of(), out=tmp_path)
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]))
        with pytest.raises(CheckpointError, match="has 3 steps, the checkpoint has 12"):
            train_language_model(config_of(), out=tmp_path)

    def test_a_model_read_back_gives_the_same_logits(self, tmp_path: Path) -> None:
        result = train_language_model(config_of(), out=tmp_path)
        model, config, step = load_run(tmp_path)
        tokens = torch.randint(256, (1, 20))
        assert torch.equal(model(tokens), result.model(tokens))
        assert (config.context, step) == (32, 12)
