"""A donated state may come from inference mode: decoding goes on without gradients, with the same numbers."""

import pytest
import torch
import zoo
from zoo.registry import registry

STATEFUL = [name for name in registry.names() if registry.definition(name).capabilities.stateful]


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_from_inference_mode_is_decoded_from_without_gradients(name: str) -> None:
    mixer = zoo.create(name, **registry.definition(name).examples["default"])
    x = torch.randn(2, 9, mixer.config.d_model)
    with torch.inference_mode():
        _, state = mixer.extend(x[:, :6], mixer.initial_state(2, capacity=9))
    with torch.no_grad():
        wanted = mixer(x)[:, 6:]
        outputs = []
        for place in range(6, 9):
            y, state = mixer.extend(x[:, place : place + 1], state, donate=True)
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), wanted, rtol=1e-3, atol=1e-4)
