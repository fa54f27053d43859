"""Training on bytes: text, configurations, the optimiser, the loop and the objective of masked bytes."""

import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo.models import LanguageModel
from zoo.models.generation import generate_bytes
from zoo.tasks.text_corpus import Corpus, CorpusError, load_corpus
from zoo.training import TrainConfig, TrainingError, train_language_model
from zoo.training.checkpoint import checkpoint_steps
from zoo.training.objective import NO_TARGET, masked_bytes
from zoo.training.optimiser import grouped_parameters, learning_rate, make_optimiser, set_learning_rate
from zoo.training.run_model import load_run

from installed_mixers import small  # noqa: F401
from sequence_mixer.errors import ConfigError
from training_runs import CONFIG, CONFIGS, TEXT, Stopped, assert_equal_runs, config_of, metrics_of, stop_at

pytestmark = pytest.mark.usefixtures("small")


class TestCorpus:
    def test_the_standard_library_is_there_without_tests_and_packages(self) -> None:
        corpus = load_corpus()
        assert corpus.train.numel() > 2_000_000
        assert 0.03 < corpus.held_out_files / (corpus.train_files + corpus.held_out_files) < 0.2
        assert load_corpus().fingerprint == corpus.fingerprint
        assert b"class JSONDecoder" in bytes(corpus.train.numpy()) + bytes(corpus.held_out.numpy())

    def test_files_keep_their_side_when_others_come(self, tmp_path: Path) -> None:
        for index in range(60):
            (tmp_path / f"{index}.txt").write_text(f"<{index}>" * 9)
        before = load_corpus(tmp_path, held_out=0.3)
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "more.txt").write_text("<more>")
        after = load_corpus(tmp_path, held_out=0.3)
        assert before.fingerprint != after.fingerprint
        assert set(bytes(before.held_out.tolist()).split(b"\0")) <= set(bytes(after.held_out.tolist()).split(b"\0"))
        assert not set(bytes(after.train.tolist()).split(b"\0")) & set(bytes(after.held_out.tolist()).split(b"\0"))
        assert before.held_out_files >= 9

    def test_hidden_files_other_names_and_links_in_circles_are_left_out(self, tmp_path: Path) -> None:
        for name in (".hidden/a.md", "a.md", "b.md", "c.txt", ".d.md", "site-packages/e.md"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name * 3)
        (tmp_path / "again").symlink_to(tmp_path)
        corpus = load_corpus(tmp_path, files="*.md")
        assert (corpus.train_files, corpus.held_out_files) == (1, 1)

    def test_one_file_is_split_by_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(bytes(range(200)))
        corpus = load_corpus(tmp_path / "a", held_out=0.25)
        assert (corpus.train.tolist(), corpus.held_out.tolist()) == (list(range(150)), list(range(150, 200)))

    def test_windows_stay_inside_and_reach_both_ends(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(bytes(range(100)))
        corpus = load_corpus(tmp_path / "a", held_out=0.4)
        batch = corpus.train_batch(2000, 9, torch.Generator().manual_seed(0))
        assert batch.shape == (2000, 10)
        assert (int(batch.min()), int(batch.max())) == (0, 59)
        windows = corpus.held_out_windows(3, 9)
        assert windows[:, 0].tolist() == [60, 75, 90]
        assert corpus.held_out_windows(99, 9).shape == (4, 10)
        assert corpus.held_out_windows(1, 39).shape == (1, 40)

    @pytest.mark.parametrize(
        ("name", "told"),
        [("absent", "no corpus at"), ("none", "is empty: no file matches '*'"), ("blank", "all of them empty"),
         ("blank/a", "is empty"), ("short", "too small: its held-out part has")],
    )  # fmt: skip
    def test_unfit_corpus_is_told_in_words(self, tmp_path: Path, name: str, told: str) -> None:
        (tmp_path / "none").mkdir()
        (tmp_path / "blank").mkdir()
        (tmp_path / "blank" / "a").touch()
        (tmp_path / "short").write_text("word " * 20)
        with pytest.raises(CorpusError, match=re.escape(told)):
            train_language_model(config_of(corpus=str(tmp_path / name)), out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestConfig:
    def test_keys_of_the_model_may_stand_at_the_top(self) -> None:
        nested = TrainConfig.of(model={"d_model": 32, "layers": "slow", "mixers": {"slow": {"name": "small_mean"}}})
        flat = TrainConfig.of(d_model=32, layers="slow", mixers={"slow": {"name": "small_mean"}})
        assert nested == flat

    @pytest.mark.parametrize(
        ("fields", "told"),
        [
            ({"contxt": 3}, "unknown key 'contxt'; did you mean context?"),
            ({"model": {"d_model": 32, "layers": "small_mean", "mpl_ratio": 1}}, "did you mean mlp_ratio?"),
            ({"steps": "many"}, "steps='many'"),
            ({"steps": 0}, "steps=0"),
            ({"dtype": "float16"}, "dtype='float16'"),
            ({"learning_rate": math.inf}, "learning_rate=inf"),
            ({"model": {"d_model": 32, "layers": "small_mean", "vocab_size": 99}}, "vocab_size=99"),
            (
                {"model": {"d_model": 32, "layers": [{"name": "small_mean", "causal": False}]}, "objective": "next"},
                "(small_mean) is not causal",
            ),
            ({"objective": "mask"}, "model.objective='mask'"),
            (
                {"model": {"d_model": 32, "layers": "small_mean", "objective": "next"}, "objective": "masked"},
                "objective is given twice",
            ),
            (
                {"model": {"d_model": 32, "layers": [{"name": "small_mean", "max_length": 31}]}},
                "layer 0 (small_mean) has max_length=31, the context has 32 tokens",
            ),
        ],
    )
    def test_mistake_is_told_in_words(self, fields: dict[str, Any], told: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(told)):
            config_of(**fields)

    @pytest.mark.parametrize("device", ["gpu", "cuda:77", "meta"])
    def test_device_that_cannot_be_used_is_told_in_words(self, device: str) -> None:
        with pytest.raises(ConfigError, match=f"device='{device}'"):
            config_of(device=device).on_device()


class TestOptimiser:
    def test_learning_rate_rises_then_falls_to_its_last_share(self) -> None:
        config = config_of(steps=100, warmup_steps=10, learning_rate=1.0, final_lr_ratio=0.2)
        rates = [learning_rate(config, step) for step in range(1, 101)]
        assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
        assert all(later < earlier for earlier, later in itertools.pairwise(rates[9:]))
        assert rates[54] == pytest.approx(0.6)
        assert rates[-1] == pytest.approx(0.2)

    def test_groups_honour_hints_and_spare_vectors_and_embeddings(self) -> None:
        model = LanguageModel(config_of().model)
        names = {parameter: name for name, parameter in model.named_parameters()}
        of = {
            names[parameter]: (group["weight_decay"], group["lr_scale"])
            for group in grouped_parameters(model, 0.3)
            for parameter in group["params"]  # type: ignore[attr-defined]
        }
        assert of["layers.0.mixer.into.weight"] == (0.0, 0.5)
        assert of["layers.1.mixer.out.weight"] == (0.3, 1.0)
        assert of["layers.0.mixer.into.bias"] == of["embedding.weight"] == of["norm.weight"] == (0.0, 1.0)
        assert of["layers.0.mlp.out.weight"] == (0.3, 1.0)
        assert len(of) == len(names)

    def test_steps_are_as_long_as_the_hints_say(self) -> None:
        config = config_of(weight_decay=0.0)
        model = LanguageModel(config.model)
        optimiser = make_optimiser(model, config)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        set_learning_rate(optimiser, 0.01)
        optimiser.step()
        moved = {name: (before[name] - p).abs().max().item() for name, p in model.named_parameters()}
        assert moved["layers.0.mixer.into.weight"] == pytest.approx(0.005, rel=1e-3)
        assert moved["layers.0.mixer.out.weight"] == pytest.approx(0.01, rel=1e-3)

    def test_hint_that_is_not_known_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = LanguageModel(config_of().model)
        for hint in ({"lr_scael": 1.0}, {"lr_scale": -1.0}, {"weight_decay": math.nan}):
            monkeypatch.setattr(model, "parameter_groups", lambda hint=hint: {"layers.0.mixer.into.bias": hint})
            with pytest.raises(ConfigError, match=re.escape("'layers.0.mixer.into.bias'")):
                grouped_parameters(model, 0.1)


class TestLoop:
    def test_a_pattern_is_learnt(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("the quick brown fox jumps over the lazy dog. " * 200)
        result = train_language_model(config_of(corpus=str(tmp_path / "a"), steps=150, context=64, batch_size=8))
        assert abs(result.losses[0] - math.log(256)) < 0.3
        assert result.bits_per_byte < 2.5
        assert result.evaluated_bytes == 8 * 64

    def test_a_run_without_a_folder_writes_nothing_and_leaves_the_random_state(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        before, listing = torch.get_rng_state(), sorted(tmp_path.rglob("*"))
        first = train_language_model(config_of())
        assert torch.equal(torch.get_rng_state(), before)
        assert sorted(tmp_path.rglob("*")) == listing
        torch.manual_seed(99)
        second = train_language_model(config_of())
        assert first.losses == second.losses
        assert first.bits_per_byte == second.bits_per_byte
        assert train_language_model(config_of(seed=1)).losses != first.losses

    @pytest.mark.parametrize(("dtype", "kept"), [("bfloat16", torch.float32), ("float64", torch.float64)])
    def test_dtypes(self, dtype: str, kept: torch.dtype) -> None:
        result = train_language_model(config_of(dtype=dtype))
        assert {parameter.dtype for parameter in result.model.parameters()} == {kept}
        assert result.losses != train_language_model(config_of()).losses
        assert result.losses[-1] < result.losses[0]

    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
    def test_example_config_trains_and_generates(self, path: Path, tmp_path: Path) -> None:
        config = TrainConfig.from_file(path, steps=3, context=48, batch_size=2, device="cpu", corpus=TEXT)
        result = train_language_model(config, out=tmp_path / "run")
        assert abs(result.losses[0] - math.log(256)) < 0.5
        assert len(list(generate_bytes(load_run(tmp_path / "run")[0], b"def ", 5))) == 5

    def test_every_mixer_hears_of_every_step(self) -> None:
        result = train_language_model(config_of())
        assert [mixer.calls for mixer in result.model.mixers] == [list(range(1, 13))] * 2
        seeds = result.model.mixers[0].seeds
        assert None not in seeds
        assert len(set(seeds)) == 12  # another draw at each step
        assert train_language_model(config_of()).model.mixers[0].seeds == seeds
        assert not set(train_language_model(config_of(seed=1)).model.mixers[0].seeds) & set(seeds)

    def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="lower learning_rate"):
            train_language_model(
                config_of(learning_rate=1e30, warmup_steps=0, checkpoint_every=1, grad_clip=0), out=tmp_path / "run"
            )
        for step in checkpoint_steps(tmp_path / "run" / "checkpoints"):
            assert step < 12

    def test_a_corpus_in_memory_is_taken(self) -> None:
        text = torch.arange(256, dtype=torch.uint8).repeat(20)
        corpus = Corpus("memory", text, text, 1, 1, "x")
        assert train_language_model(config_of(), corpus=corpus).corpus == "x"


LINFORMER: dict[str, Any] = {"name": "linformer", "max_length": 64, "rank": 8}
MASKED: dict[str, list[Any]] = {
    "alone": [LINFORMER, LINFORMER],
    "layerwise": [{**LINFORMER, "share": "layerwise"}] * 2,
    "hybrid": ["small_decay", LINFORMER, "attention"],
    "by option": [{"name": "mlp_mixer", "max_length": 32}] * 2,
    "asked for": ["small_decay", "small_mean"],
}


def masked_config(kind: str, **fields: Any) -> TrainConfig:
    return config_of(model={"d_model": 64, "layers": MASKED[kind], "dropout": 0.1}, objective="masked", **fields)


class TestMaskedBytes:
    @pytest.mark.parametrize(("context", "count"), [(1, 1), (7, 1), (32, 5), (100, 15)])
    def test_a_share_of_each_window_is_masked_and_the_only_target(self, context: int, count: int) -> None:
        windows = torch.randint(256, (50, context + 1), generator=torch.Generator().manual_seed(0))
        inputs, targets = masked_bytes(windows, 256, torch.Generator().manual_seed(1))
        masked = inputs == 256
        assert masked.sum(1).tolist() == [count] * 50
        assert torch.equal(inputs[~masked], windows[:, :-1][~masked])
        assert torch.equal(targets[masked], windows[:, :-1][masked])
        assert (targets[~masked] == NO_TARGET).all()
        assert masked.any(0).all() or context > 32  # every place has its turn
        again, _ = masked_bytes(windows, 256, torch.Generator().manual_seed(2))
        assert context == 1 or not torch.equal(again, inputs)

    def test_what_stands_on_both_sides_of_a_masked_byte_is_learnt(self) -> None:
        """Pairs of a random byte of 16 and that byte + 16. Whoever sees the left alone needs 4 bits for each first one,
        and for the second ones whose first is masked too: (4 + 0.15 * 4) / 2 = 2.3 bits at best."""
        first = torch.randint(16, (4000, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        text = torch.cat([first, first + 16], 1).flatten()
        corpus = Corpus("pairs", text, text[:2000], 1, 1, "pairs")
        bits = {}
        for causal in (False, True):
            layers = [{"name": "small_mean", "causal": causal, "decay": 0.3}]
            config = config_of(
                model={"d_model": 32, "layers": layers}, objective="masked", steps=200, batch_size=16,
                learning_rate=2e-2, eval_every=0, eval_windows=32,
            )  # fmt: skip
            result = train_language_model(config, corpus=corpus)
            assert result.measure == "bits_per_masked_byte"
            bits[causal] = result.bits
        assert bits[False] < 2.0
        assert bits[True] > 2.25  # 2.3 but for the few windows

    @pytest.mark.parametrize("kind", MASKED)
    def test_a_run_goes_on_to_the_same_numbers_and_names_its_measure(self, tmp_path: Path, kind: str) -> None:
        config = masked_config(kind, steps=8, eval_every=3, eval_windows=6)
        straight = train_language_model(config, out=tmp_path / "straight")
        with pytest.raises(Stopped):
            train_language_model(config, stop_at(6), out=tmp_path / "stopped")
        result = train_language_model(config, out=tmp_path / "stopped")
        assert result.resumed_from == 4
        assert (result.losses, result.bits) == (straight.losses, straight.bits)
        assert_equal_runs(tmp_path / "straight", tmp_path / "stopped")
        assert abs(result.losses[0] - math.log(256)) < 0.5
        assert result.evaluated_bytes == 6 * 5
        written = json.loads((tmp_path / "stopped" / "result.json").read_text())
        assert written["bits_per_masked_byte"] == result.bits
        assert result.bits_per_byte is None
        assert not [
            key for record in (written, *metrics_of(tmp_path / "stopped")) for key in record if "_per_byte" in key
        ]
        with pytest.raises(ConfigError, match="predicts masked bytes from both sides"):
            generate_bytes(load_run(tmp_path / "stopped")[0], b"def ", 5)

    @pytest.mark.parametrize("kind", ["alone", "layerwise", "hybrid", "by option"])
    def test_the_objective_follows_from_a_layer_that_sees_both_sides(self, kind: str) -> None:
        config = config_of(model={"d_model": 64, "layers": MASKED[kind], "dropout": 0.1}, steps=2)
        asked = masked_config(kind, steps=2)
        assert config.model.objective is None
        assert train_language_model(config).losses == train_language_model(asked).losses

    def test_masks_change_with_the_step_and_the_seed_but_the_held_out_one_stays(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[bool, torch.Tensor]] = []
        forward = LanguageModel.forward

        def watched(self: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, tokens == 256))
            return forward(self, tokens)

        monkeypatch.setattr(LanguageModel, "forward", watched)
        for seed in (0, 1):
            train_language_model(masked_config("asked for", steps=3, eval_every=1, eval_windows=4, seed=seed))
        training = [mask for is_training, mask in seen if is_training]
        held_out = [mask for is_training, mask in seen if not is_training and mask.shape[0] == 4]
        assert (len(training), len(held_out)) == (6, 6)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(training, 2))
        assert all(torch.equal(held_out[0], mask) for mask in held_out)

    def test_the_commands_say_what_was_measured_and_refuse_to_generate(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from zoo.cli import main

        (tmp_path / "a.yaml").write_text(CONFIG.replace("layers:", "objective: masked\n  layers:"))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["zoo", "train", "a.yaml", "--out", "run", "--steps", "3", "--corpus", TEXT])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        told = capsys.readouterr().out
        assert "which predicts masked bytes from both sides" in told
        assert "bits per masked byte on 40 held-out bytes" in told
        assert "bits per byte" not in told
        monkeypatch.setattr(sys, "argv", ["zoo", "generate", "run"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert "cannot go on from a text" in capsys.readouterr().err
