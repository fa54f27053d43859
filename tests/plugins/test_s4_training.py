"""S4 and S4D learn to recall a symbol over 1,000 distractors, with the rates that their hints ask for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

SHOWN, DELAY, SYMBOLS, WIDTH, BATCH = 100, 1000, 4, 16, 16


class Recall(nn.Module):
    """Tokens -> the symbol that they began with, read off the output at the last one."""

    def __init__(self, name: str, **options: object) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2 * SYMBOLS, WIDTH)
        self.mixer = zoo.create(name, d_model=WIDTH, d_state=16, **options)
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.mixer(self.embedding(ids))[:, -1])
        return logits


def examples() -> tuple[Tensor, Tensor]:
    """A symbol, SHOWN times, then DELAY distractors of another alphabet."""
    symbol = torch.randint(SYMBOLS, (BATCH, 1))
    return torch.cat(
        [symbol.expand(-1, SHOWN), torch.randint(SYMBOLS, 2 * SYMBOLS, (BATCH, DELAY))], 1
    ), symbol.squeeze(1)


def trained(model: Recall, steps: int) -> float:
    """Share of right answers after `steps` of AdamW."""
    hints = model.mixer.parameter_groups()
    slow = [p for name, p in model.mixer.named_parameters() if name in hints]
    others = [p for p in model.parameters() if all(p is not each for each in slow)]
    (scale,) = {hint["lr_scale"] for hint in hints.values()}
    groups = [{"params": slow, "lr": 0.01 * scale, "weight_decay": 0.0}, {"params": others}]
    optimiser = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.01)
    for _ in range(steps):
        ids, symbol = examples()
        loss = F.cross_entropy(model(ids), symbol)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        right = [
            float((model(ids).argmax(1) == symbol).float().mean()) for ids, symbol in (examples() for _ in range(8))
        ]
    return sum(right) / len(right)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s4d", "s4"])
def test_a_symbol_is_recalled_over_a_thousand_distractors(name: str) -> None:
    torch.manual_seed(0)
    options = {"kernel_length": SHOWN + DELAY} if name == "s4" else {}
    model = Recall(name, **options)
    assert trained(model, 0) < 0.6
    assert trained(model, 120) > 0.95


@pytest.mark.slow
def test_a_short_memory_recalls_nothing() -> None:
    """The same layer with time steps of 0.5 forgets within tokens: what the test above shows is memory."""
    torch.manual_seed(0)
    assert trained(Recall("s4d", dt_min=0.5, dt_max=0.5), 60) < 0.5
