"""Text from a language model, byte by byte, through `initial_state` and `extend`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sequence_mixer.errors import ConfigError
from zoo.models.language_model import LanguageModel
from zoo.models.model_config import refuse_longer_than_limits, refuse_masked


def generate_bytes(
    model: LanguageModel, prompt: bytes, tokens: int, *, temperature: float = 1.0, seed: int = 0
) -> Iterator[int]:
    """The bytes that follow `prompt`, one at a time; the model is left in the mode it came in.

    prompt: an empty one stands for a newline. tokens: how many bytes to generate, >= 0.
    temperature: >= 0; 0 takes the likeliest byte. seed: of the sampling, on the CPU whatever the model's device.
    Raises UnsupportedCapability if a layer is not stateful, ConfigError for a model that predicts masked bytes, a
    wrong number, or a max_length passed.
    """
    refuse_masked(model.config)
    if tokens < 0:
        raise ConfigError(f"tokens={tokens}: wanted 0 or more")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature={temperature}: wanted a number of 0 or more")
    start = prompt or b"\n"
    refuse_longer_than_limits(model.config, len(start) + tokens, "the prompt with what is generated")
    state = model.initial_state(1, capacity=len(start) + tokens)
    return _generate(model, start, state, tokens, temperature, seed)


@torch.no_grad()
def _generate(
    model: LanguageModel, start: bytes, state: object, tokens: int, temperature: float, seed: int
) -> Iterator[int]:
    from zoo.models.model_state import ModelState

    assert isinstance(state, ModelState)
    generator = torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device
    piece = torch.tensor([list(start)], device=device)
    was_training = model.training
    model.eval()
    try:
        for _ in range(tokens):
            logits, state = model.extend(piece, state)
            chosen = _choose(logits[0, -1, :256], temperature, generator)
            yield chosen
            piece = torch.tensor([[chosen]], device=device)
    finally:
        model.train(was_training)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """One of the bytes by its logit, [256] -> 0..255."""
    scores = logits.double().cpu()
    if temperature == 0:
        return int(scores.argmax())
    odds = torch.softmax((scores - scores.max()) / temperature, dim=0)
    return int(torch.multinomial(odds, 1, generator=generator))
