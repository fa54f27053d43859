"""A language model over any mixers: embedding, blocks, norm, logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sequence_mixer.errors import ConfigError, DtypeError, ShapeError, StateError
from sequence_mixer.mixer import SequenceMixer
from sequence_mixer.shapes import checks_values
from zoo.models.block import Block
from zoo.models.model_config import ModelConfig, refuse_future_readers, refuse_stateless
from zoo.models.model_state import ModelState

INIT_STD = 0.02  # of embeddings and MLP weights; mixers initialise themselves


class LanguageModel(nn.Module):
    """Logits of next or masked tokens from the mixers that `config.layers` names, [B,T] -> [B,T,V].

    backend: "auto", or a backend that every layer has and then uses.
    Raises ConfigError if `objective` is next and a layer is not causal, UnknownMixer, RegistryError, BackendError.
    """

    def __init__(self, config: ModelConfig, *, backend: str = "auto") -> None:
        from zoo.build import create

        super().__init__()
        refuse_future_readers(config)
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        shared: dict[str, Any] = {}  # one mapping for the whole net: mixers may share modules between layers
        self.layers = nn.ModuleList(
            Block(
                create(layer, backend=backend, shared=shared),
                mlp_width=config.mlp_width,
                norm_eps=config.norm_eps,
                dropout=config.dropout,
            )
            for layer in config.layers
        )
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.mask_embedding = nn.Parameter(torch.empty(config.d_model)) if config.masked else None
        self._initialise()
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _initialise(self) -> None:
        nn.init.normal_(self.embedding.weight, std=INIT_STD)
        nn.init.normal_(self.head.weight, std=INIT_STD)
        for block in self.blocks:
            if block.mlp is not None:
                nn.init.normal_(block.mlp.gate_value.weight, std=INIT_STD)
                nn.init.normal_(block.mlp.out.weight, std=INIT_STD / (2 * len(self.layers)) ** 0.5)
        if self.mask_embedding is not None:
            nn.init.normal_(self.mask_embedding, std=INIT_STD)

    @property
    def blocks(self) -> list[Block]:
        """The layers, typed."""
        return [block for block in self.layers if isinstance(block, Block)]

    @property
    def mixers(self) -> list[SequenceMixer]:
        """The mixer of each layer."""
        return [block.mixer for block in self.blocks]

    @property
    def mask_token(self) -> int | None:
        """The token that hides another one, V; None in a model of next tokens, which has none."""
        return None if self.mask_embedding is None else self.config.vocab_size

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """Logits of the token after each one; in a masked model, of the token at each place.

        tokens: integers in [0, V), or `mask_token`, [B,T], or packed [1,T] with `cu_seqlens`.
        cu_seqlens: int32 or int64 [S+1]; nothing crosses these boundaries. padding_mask: bool [B,T], True = real;
            what stands in padded slots (of tokens in [0, V)) does not matter, and their logits mean nothing.
        Returns [B,T,V]. Raises ShapeError, DtypeError, and what the mixers raise.
        """
        x = self._embed(tokens)
        for block in self.layers:
            x = block(x, cu_seqlens=cu_seqlens, padding_mask=padding_mask)
        return self._logits(x)

    def initial_state(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelState:
        """The state before the first token of `batch_size` sequences; arguments as `SequenceMixer.initial_state`.

        Raises UnsupportedCapability that names the layer if one is not stateful.
        """
        refuse_stateless(self.config)
        return ModelState(
            tuple(
                mixer.initial_state(batch_size, capacity=capacity, device=device, dtype=dtype) for mixer in self.mixers
            )
        )

    def extend(
        self,
        tokens: Tensor,
        state: ModelState,
        *,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
        donate: bool = False,
    ) -> tuple[Tensor, ModelState]:
        """The next tokens of sequences whose past is `state`.

        tokens: [B,T] (T may be 0). Returns logits [B,T,V] and the state after them; the old one stays valid unless
        `donate`. Raises StateError if the state is not of this model, and what the mixers raise.
        """
        refuse_stateless(self.config)
        if not isinstance(state, ModelState) or len(state) != len(self.layers):
            came = f"{len(state)} layers" if isinstance(state, ModelState) else type(state).__name__
            raise StateError(f"the state is {came}, wanted a ModelState of {len(self.layers)} layers (initial_state)")
        x = self._embed(tokens)
        after = []
        for block, layer_state in zip(self.blocks, state, strict=True):
            x, new = block.extend(x, layer_state, cu_seqlens=cu_seqlens, padding_mask=padding_mask, donate=donate)
            after.append(new)
        return self._logits(x), ModelState(tuple(after))

    def parameter_groups(self) -> dict[str, dict[str, float]]:
        """Optimiser hints of all mixers, by the model's parameter names.

        Raises ConfigError if a mixer gives a hint for a parameter that it does not have.
        """
        hints: dict[str, dict[str, float]] = {}
        for index, mixer in enumerate(self.mixers):
            known = {name for name, _ in mixer.named_parameters(remove_duplicate=False)}
            for name, hint in mixer.parameter_groups().items():
                if name not in known:
                    raise ConfigError(
                        f"layer {index} ({mixer.name}) gives an optimiser hint for {name!r}, "
                        f"which is no parameter of it; it has: {', '.join(sorted(known))}"
                    )
                hints[f"layers.{index}.mixer.{name}"] = dict(hint)
        return hints

    def after_step(self, step: int, generator: torch.Generator | None = None) -> None:
        """Pass the end of optimiser step `step` on to every mixer (each once, if layers share one)."""
        for mixer in dict.fromkeys(self.mixers):
            mixer.after_step(step, generator)

    def _embed(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2:
            raise ShapeError(f"tokens has shape {list(tokens.shape)}, wanted [B, T]")
        if tokens.dtype == torch.uint8:
            tokens = tokens.long()
        if tokens.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"tokens is {tokens.dtype}, wanted uint8, int32 or int64")
        last, mask = self.config.vocab_size - 1, self.mask_token
        if checks_values(tokens) and tokens.numel():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high > (last if mask is None else mask):
                more = "" if mask is None else f", or mask_token = {mask}"
                raise ShapeError(f"tokens range from {low} to {high}, wanted 0 to vocab_size - 1 = {last}{more}")
        if self.mask_embedding is None:
            embedded: Tensor = self.embedding(tokens)
            return embedded
        masked = tokens.eq(last + 1)
        return torch.where(masked.unsqueeze(-1), self.mask_embedding, self.embedding(tokens.masked_fill(masked, 0)))

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x))
        return logits
