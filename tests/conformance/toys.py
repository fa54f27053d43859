"""Two correct mixers in plain PyTorch: a gated linear recurrence that can do all, and one that can do little."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sequence_mixer import (
    BackendSpec,
    Capabilities,
    Cost,
    Masked,
    MatrixForm,
    MixerConfig,
    MixerDef,
    OneSemiseparable,
    RowStochastic,
    Semiseparable,
    SequenceMixer,
    State,
)
from sequence_mixer.config import Count
from sequence_mixer.errors import BackendError
from sequence_mixer.mixer import Factors
from sequence_mixer.shapes import accumulation_dtype


class ToyConfig(MixerConfig):
    name: Literal["toy"] = "toy"
    n_heads: Count = 4
    n_groups: Count = 2
    d_state: Count = 8
    chunk_size: Count = 16


class ToyState(State):
    sums: Tensor  # [B,H,N,P], accumulation dtype


def toy_capabilities(config: ToyConfig) -> Capabilities:
    return Capabilities(
        causal=True,
        stateful=True,
        varlen=True,
        padding_mask=True,
        matrix_form=True,
        structures=(Semiseparable(config.d_state), Masked(OneSemiseparable(), config.d_state)),
        backends=(BackendSpec("chunked"), BackendSpec("reference")),
    )


class Toy(SequenceMixer):
    """S_t = exp(a_t) S_{t-1} + k_t v_t^T, y_t = out(q_t S_t): one log decay a_t <= 0 per head, keys shared in groups.

    Sizes in the code: [B,T,H] log decays, [B,T,H,N] queries and keys, [B,T,H,P] values.
    """

    config: ToyConfig

    def __init__(self, config: ToyConfig, capabilities: Capabilities | None = None) -> None:
        super().__init__(config, capabilities or toy_capabilities(config))
        keys = config.n_groups * config.d_state
        self.splits = [keys, keys, config.d_model, config.n_heads]
        self.into = nn.Linear(config.d_model, sum(self.splits))
        self.out = nn.Linear(config.d_model, config.d_model)
        self.register_buffer("gain", torch.ones(config.d_model))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and log decays of x, in the accumulation dtype."""
        config = self.config
        q, k, v, a = self.into(x).to(accumulation_dtype(x.dtype)).split(self.splits, dim=-1)
        q, k = (t.unflatten(-1, (config.n_groups, config.d_state)) for t in (q, k))
        return self.repeated(q), self.repeated(k), v.unflatten(-1, (config.n_heads, -1)), -0.3 * F.softplus(a)

    def repeated(self, t: Tensor) -> Tensor:
        return t.repeat_interleave(self.config.n_heads // self.config.n_groups, dim=2)

    def finish(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        return self.out((y.flatten(2) * self.gain.to(y.dtype)).to(dtype))

    def mix(
        self, x: Tensor, state: Any, *, cu_seqlens: Tensor | None, padding_mask: Tensor | None, donate: bool
    ) -> tuple[Tensor, ToyState]:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        start = self.empty_state(rows, None, x.device, x.dtype) if state is None else state
        y, after = self.scan(*self.project(x), start.sums, cu_seqlens)
        return self.finish(y, self.out_dtype(x)), ToyState(after)

    def out_dtype(self, x: Tensor) -> torch.dtype:
        autocast = torch.is_autocast_enabled(x.device.type)
        return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype

    def scan(
        self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, start: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs [B,T,H,P] and last states [B or S,H,N,P]."""
        tokens = torch.arange(q.shape[1], device=q.device)
        segment = torch.zeros_like(tokens)
        if cu_seqlens is not None:
            segment = torch.bucketize(tokens, cu_seqlens[1:].to(torch.int64), right=True)
        sizes = self.sizes(q.shape[1])
        begin = torch.cat([segment.new_full((1,), -1), segment[:-1]]) != segment
        states, entering = [], torch.zeros_like(start[: q.shape[0]])
        for _, k_c, v_c, a_c, segment_c, begin_c in zip(
            *(t.split(sizes, dim=1) for t in (q, k, v, a)), segment.split(sizes), begin.split(sizes), strict=True
        ):
            fresh = start[segment_c].unsqueeze(0) if cu_seqlens is not None else start.unsqueeze(1)
            inside = self.chunk_states(k_c, v_c, a_c, segment_c, begin_c, entering, fresh)
            states.append(inside)
            entering = inside[:, -1]
        every = torch.cat(states, dim=1)  # [B,T,H,N,P]
        y = (q.unsqueeze(-1) * every).sum(-2)
        if cu_seqlens is None:
            return y, every[:, -1]
        lengths = cu_seqlens.diff()
        last = every[0].index_select(0, (cu_seqlens[1:] - 1).clamp(min=0).to(torch.int64))
        return y, torch.where(lengths[:, None, None, None] > 0, last, start)

    def sizes(self, tokens: int) -> list[int]:
        """Lengths of the chunks; the definition takes one token at a time."""
        if self.backend not in ("auto", "chunked", "reference"):
            raise BackendError(f"toy has no backend {self.backend!r}; it has: chunked, reference")
        chunk = 1 if self.backend == "reference" else self.config.chunk_size
        whole, rest = divmod(tokens, chunk)
        return [chunk] * whole + [rest] * (rest > 0)

    def chunk_states(
        self, k: Tensor, v: Tensor, a: Tensor, segment: Tensor, begin: Tensor, entering: Tensor, fresh: Tensor
    ) -> Tensor:
        """States after every token of a chunk [B,C,H,N,P]; `fresh` are those a sequence beginning here starts from."""
        same = (segment[:, None] == segment[None, :]).tril()[None, :, :, None]
        steps = torch.where(same & ~_diagonal(same), a.unsqueeze(2), 0)
        between = steps.cumsum(1).masked_fill(~same, -torch.inf).exp()  # [B,C,C,H], from the second to the first
        added = (k.unsqueeze(-1) * v.unsqueeze(-2)).flatten(3)  # [B,C,H,N P]
        sums = torch.matmul(between.permute(0, 3, 1, 2), added.transpose(1, 2)).transpose(1, 2)
        sums = sums.unflatten(-1, (k.shape[-1], v.shape[-1]))
        continued = (begin.cumsum(0) == 0)[None, :, None, None, None]
        since = torch.where(same, a.unsqueeze(1), 0).sum(2)  # [B,C,H], log decay since the sequence or the chunk began
        carried = torch.where(continued, entering.unsqueeze(1), fresh)
        return sums + since[..., None, None].exp() * carried

    def empty_state(self, batch_size: int, capacity: int | None, device: torch.device, dtype: torch.dtype) -> ToyState:
        config = self.config
        sizes = (batch_size, config.n_heads, config.d_state, config.d_model // config.n_heads)
        return ToyState(torch.zeros(sizes, device=device, dtype=accumulation_dtype(dtype)))

    def matrix_form(self, x: Tensor) -> MatrixForm:
        self._check_call(x, None, None)
        q, k, v, a = self.project(x)
        total = a.cumsum(1).transpose(1, 2)

        def mask(heads: slice) -> Tensor:
            chosen = total[:, heads]
            difference = chosen[..., :, None] - chosen[..., None, :]
            upper = torch.ones(difference.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            return difference.masked_fill(upper, -torch.inf).exp()

        def build(heads: slice) -> Tensor:
            return mask(heads) * torch.einsum("bthn,bshn->bhts", q[:, :, heads], k[:, :, heads])

        return MatrixForm(build, self.config.n_heads, v, lambda y: self.finish(y, x.dtype), Factors(mask, q, k))

    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        config = self.config
        parameters = sum(p.numel() for p in self.parameters())
        tokens, width = batch_size * length, config.d_model
        whole, rest = divmod(length, config.chunk_size)
        pairs = batch_size * (whole * config.chunk_size**2 + rest**2)
        flops = 2 * tokens * width * (sum(self.splits) + width) + 2 * pairs * width * config.d_state
        bytes_ = (parameters + 2 * tokens * width) * dtype.itemsize
        return Cost(flops, bytes_, parameters, batch_size * width * config.d_state)

    def parameter_groups(self) -> Mapping[str, dict[str, float]]:
        return {"into.bias": {"weight_decay": 0.0}}


def _diagonal(square: Tensor) -> Tensor:
    """bool [1,C,C,1], True where both places are the same."""
    return torch.eye(square.shape[1], dtype=torch.bool, device=square.device)[None, :, :, None]


class MeanConfig(MixerConfig):
    name: Literal["toy_mean"] = "toy_mean"
    max_length: Count = 48


MEAN = Capabilities(
    causal=False,
    bidirectional=True,
    max_length=True,
    matrix_form=True,
    structures=(RowStochastic(),),
)


class Mean(SequenceMixer):
    """y = out(softmax(scores[:T, :T] + x-dependent row and column terms) in(x)); no state, no packing, no padding."""

    config: MeanConfig

    def __init__(self, config: MeanConfig, capabilities: Capabilities = MEAN) -> None:
        super().__init__(config, capabilities)
        self.into = nn.Linear(config.d_model, config.d_model + 1)
        self.out = nn.Linear(config.d_model, config.d_model)
        self.scores = nn.Parameter(torch.randn(config.max_length, config.max_length))

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B,T,T] weights and [B,T,D] values."""
        if self.backend not in ("auto", "reference"):
            raise BackendError(f"toy_mean has no backend {self.backend!r}; it has: reference")
        values, score = self.into(x).split([x.shape[2], 1], dim=-1)
        tokens = x.shape[1]
        return torch.softmax(self.scores[:tokens, :tokens] + score.transpose(1, 2), dim=-1), values

    def mix(
        self, x: Tensor, state: Any, *, cu_seqlens: Tensor | None, padding_mask: Tensor | None, donate: bool
    ) -> tuple[Tensor, None]:
        weights, values = self.weights(x)
        return self.out(torch.bmm(weights.to(values.dtype), values)), None

    def matrix_form(self, x: Tensor) -> MatrixForm:
        self._check_call(x, None, None)
        weights, values = self.weights(x)
        return MatrixForm(
            lambda heads: weights.unsqueeze(1)[:, heads], 1, values.unsqueeze(2), lambda y: self.out(y.squeeze(2))
        )

    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        parameters = sum(p.numel() for p in self.parameters())
        tokens, width = batch_size * length, self.config.d_model
        flops = 2 * tokens * width * (2 * width + 1) + 2 * tokens * length * width
        return Cost(flops, (parameters + 2 * tokens * width) * dtype.itemsize, parameters, 0)


def define(
    mixer: Callable[..., SequenceMixer] = Toy,
    *,
    config: type[MixerConfig] = ToyConfig,
    capabilities: Capabilities | None = None,
    **more: Any,
) -> MixerDef:
    """The definition of a toy; its capabilities are those of the correct one unless given."""
    declared = capabilities or (MEAN if issubclass(config, MeanConfig) else None)
    options = {} if capabilities is None else {"capabilities": capabilities}
    examples: dict[str, dict[str, Any]] = {"default": {"d_model": 64}}
    if declared is None:
        examples["one_group"] = {"d_model": 64, "n_groups": 1, "d_state": 4, "chunk_size": 5}
        return MixerDef(
            name="toy",
            config=config,
            build=lambda value: mixer(value),
            examples=examples,
            capabilities_of=toy_capabilities,
            **more,
        )
    name = config.model_fields["name"].default
    return MixerDef(
        name=name,
        config=config,
        build=lambda value: mixer(value, **options),
        examples=examples,
        capabilities=declared,
        **more,
    )
