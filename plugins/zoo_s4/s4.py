"""The S4 layer: kernels from Cauchy sums and FFT, decoding in O(N), pieces through dense chunks.

Source: Gu, Goel & Re 2022, arXiv 2111.00396; parameters as in state-spaces/s4, models/s4/s4.py, S4Block(mode='dplr').
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.ops.cauchy import flops as cauchy_flops
from zoo.ops.in_place import may_overwrite
from zoo.ops.long_convolution import flops as convolution_flops
from zoo.ops.long_convolution.crossover import LONGEST
from zoo.ops.state_space import state_space_scan

from sequence_mixer import Cost, State
from sequence_mixer.errors import BackendError, StateError, suggest
from sequence_mixer.shapes import accumulation_dtype, checks_values
from zoo_s4.config import S4Config
from zoo_s4.dplr import Dplr, Step, dense, discretise, dplr_kernel, lengthened, readout, scaled, unscaled
from zoo_s4.layer import StateSpaceLayer, complex_normal
from zoo_s4.parameters import complex_of, initial_systems, pairs, parameter_of, shared

BACKENDS = ("auto", "triton", "fft", "chunked", "reference")
SUMS = {"auto": "auto", "triton": "triton", "reference": "reference"}  # backend of the Cauchy sums; else "chunked"
SCAN = {"chunked": "chunked", "reference": "reference"}  # of the scan, and those that scan in `forward`; else "auto"


class S4State(State):
    """What the layer carries: the states, and the readout that C stands for, which depends on the parameters alone.

    ssm: [B,D,N/2,2], accumulation dtype.
    readout: [B,channels,D,N/2,2], the same for every row but rows of zeros, which take that of the others. Finding it
        takes O(N^3) a channel, so `initial_state` does it once. It is read where gradients are off; where they are on,
        C and its readout are taken from the parameters.
    """

    ssm: Tensor
    readout: Tensor


class S4Mixer(StateSpaceLayer):
    """S4: h' = A h + B x with A = diag(a) - P P^*, bilinear transform, y = 2 Re C h + D x.

    Parameters beside those of StateSpaceLayer: P [R,S,N/2,2], B [1,S,N/2,2]. C is scaled: it stands for C (I - A'^L),
    with L = kernel_length, which makes kernels cheap; gradients are those of the scaled C.
    """

    config: S4Config
    state_type = S4State

    def __init__(self, config: S4Config) -> None:
        super().__init__(config)
        initial = initial_systems(config, config.d_state, config.rank)
        self.A_real = nn.Parameter(parameter_of(-initial.a.real, config.real_transform).float())
        self.A_imag = nn.Parameter(parameter_of(-initial.a.imag, config.imag_transform).float())
        self.B = nn.Parameter(pairs(initial.B).unsqueeze(0))
        self.P = nn.Parameter(pairs(initial.P))
        self.C = nn.Parameter(complex_normal(config.kernels, config.d_model, config.pairs))
        with torch.no_grad():
            self.C.copy_(self.scaled_readout())

    def mix(
        self,
        x: Tensor,
        state: S4State | None,
        *,
        cu_seqlens: Tensor | None,
        padding_mask: Tensor | None,
        donate: bool,
    ) -> tuple[Tensor, S4State | None]:
        """See `SequenceMixer.mix`. Raises BackendError for an unknown backend and, where values may be
        looked at, StateError for a state without a readout."""
        if self.backend not in BACKENDS:
            hint = suggest(self.backend, BACKENDS)
            raise BackendError(f"s4 has no backend {self.backend!r}{hint}; it has: {', '.join(BACKENDS)}")
        if state is None:
            if self.backend in SCAN:
                y = self._scan_both_ways(x, cu_seqlens)
            else:
                y = self._convolve(x, cu_seqlens, "fft" if self.backend == "fft" else "auto")
            return self._finish(y), None
        grad = torch.is_grad_enabled()
        one_token = x.shape[1] == 1 and cu_seqlens is None and self.backend != "reference"
        step = discretise(self._dplr())
        matrices = None if one_token and not grad else dense(step)
        if grad:
            assert matrices is not None
            C = unscaled(complex_of(self.C), matrices[0], self.config.kernel_length)
        else:
            C = self._readout_of(state)
        if one_token:
            y, ssm = self._one_token(x, state.ssm, step, C)
        else:
            assert matrices is not None
            y, ssm = self._scan(x, matrices, C, state.ssm, cu_seqlens)
        if donate and may_overwrite(state.ssm):
            ssm = state.ssm.copy_(ssm)
        return self._finish(y), S4State(ssm, state.readout)

    def empty_state(self, batch_size: int, capacity: int | None, device: torch.device, dtype: torch.dtype) -> S4State:
        """Zeros and the readout. The state does not grow, so `capacity` needs no room."""
        config, inner = self.config, accumulation_dtype(dtype)
        with torch.no_grad():
            transition, _ = dense(discretise(self._dplr()))
            C = torch.view_as_real(unscaled(complex_of(self.C), transition, config.kernel_length).resolve_conj())
        readouts = C.to(device=device, dtype=inner).unsqueeze(0).expand(batch_size, -1, -1, -1, -1)
        return S4State(torch.zeros(batch_size, config.d_model, config.pairs, 2, device=device, dtype=inner), readouts)

    def scaled_readout(self) -> Tensor:
        """C (I - A'^kernel_length) where C is the parameter itself: what a plain readout turns into, in float64."""
        transition, _ = dense(discretise(self._dplr()))
        return torch.view_as_real(scaled(complex_of(self.C), transition, self.config.kernel_length).resolve_conj())

    def kernel(self, length: int) -> Tensor:
        """Taps of every kernel, float64 [kernels,D,length]; longer ones than kernel_length from a C scaled further."""
        system, C, scale = self._dplr(), complex_of(self.C), self.config.kernel_length
        if length > scale:
            transition, _ = dense(discretise(system))
            C, scale = lengthened(C, transition, scale, length)
        return dplr_kernel(system, C, scale, SUMS.get(self.backend, "chunked"))[..., :length]

    def cost(self, batch_size: int, length: int, dtype: torch.dtype) -> Cost:
        """FLOPs of the output map and of the Cauchy sums, 8 D (1 + R) (kernels + R) N/2 (L/2 + 1), which do not depend
        on the batch; beyond kernel_length those of the powers of A as well. Transforms count no FLOPs; where the
        parameters are on a GPU, short convolutions are products."""
        config = self.config
        scale = config.kernel_length
        while scale < length:
            scale *= 2
        sums = (1 + config.rank) * (config.kernels + config.rank)
        mixing = cauchy_flops(config.d_model, sums, config.pairs, scale // 2 + 1)
        if length > config.kernel_length:
            squarings = config.kernel_length.bit_length() + config.kernel_length.bit_count() - 2
            doublings = (scale // config.kernel_length).bit_length() - 1
            cube, square = config.d_state**3, config.kernels * config.d_state**2
            mixing += 2 * config.d_model * (cube * (squarings + doublings - 1) + square * doublings)
        taps = length if config.causal else 2 * length - 1
        if self.D.is_cuda and taps <= LONGEST.get(dtype, 0):  # a product instead of transforms
            channels = config.channels * config.d_model
            mixing += convolution_flops(batch_size, length, channels, taps, direct=True)
        state = config.d_model * config.d_state * (1 + config.channels)
        return self._cost(batch_size, length, dtype, mixing, state)

    def _dplr(self) -> Dplr:
        """The system of every channel, in float64."""
        dt, a = self._systems()
        P, B = shared(complex_of(self.P), self.config.d_model, 1), shared(complex_of(self.B)[0], self.config.d_model, 0)
        return Dplr(dt, a, P, B)

    def _readout_of(self, state: S4State) -> Tensor:
        """C [channels,D,N/2] that a state carries, complex. Rows of zeros, as padding and pools of states make, have
        none of their own and read with that of the others."""
        rows = state.readout
        if len(rows) < 2 or rows.stride(0) == 0:
            C = rows[:1].sum(0)
        else:
            low, high = rows.aminmax(dim=0)
            C = torch.where(high > -low, high, low)  # the number that is not 0, exactly
        if checks_values(C) and len(rows) > 0 and not C.any() and self.C.any():
            raise StateError("state.readout holds zeros, and so no C; begin from this mixer's initial_state")
        return complex_of(C)

    def _scan(
        self, x: Tensor, matrices: tuple[Tensor, Tensor], C: Tensor, ssm: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs [B,T,channels D] with the skip, and states [B,D,N/2,2], by chunks or token by token.

        matrices: A' and B'. C: complex [channels,D,N/2]. ssm: states before, or None.
        """
        y, final = state_space_scan(
            x,
            *matrices,
            2.0 * readout(C).transpose(0, 1),
            D=self.D,
            initial_state=None if ssm is None else ssm.flatten(2),
            cu_seqlens=cu_seqlens,
            backend=SCAN.get(self.backend, "auto"),
        )
        return y.flatten(2), final.unflatten(2, (-1, 2))

    def _scan_both_ways(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Outputs from empty states, [B,T,channels D]; what looks ahead is a scan of the reversed tokens, one later."""
        matrices = dense(discretise(self._dplr()))
        C = unscaled(complex_of(self.C), matrices[0], self.config.kernel_length)
        y, _ = self._scan(x, matrices, C[: self.config.channels], None, cu_seqlens)
        if self.config.causal:
            return y
        turned = None if cu_seqlens is None else x.shape[1] - cu_seqlens.flip(0)
        ahead, _ = state_space_scan(
            x.flip(1),
            *matrices,
            2.0 * readout(C[self.config.channels :]).transpose(0, 1),
            cu_seqlens=turned,
            backend=SCAN.get(self.backend, "auto"),
        )
        return y + next_token(ahead.flatten(2).flip(1), cu_seqlens)

    def _one_token(self, x: Tensor, ssm: Tensor, step: Step, C: Tensor) -> tuple[Tensor, Tensor]:
        """Output [B,1,channels D] with the skip and state [B,D,N/2,2] after one token, O(N) for each channel."""
        inner = ssm.dtype
        narrow = torch.complex128 if inner == torch.float64 else torch.complex64
        u = x[:, 0].to(inner)
        h = torch.view_as_complex(ssm.contiguous())  # [B,D,N/2]
        into, out = step.into.to(narrow), step.out.to(narrow)
        seen = (into * h.unsqueeze(1)).real.sum(-1, keepdim=True)  # [B,R,D,1]
        change = (step.turn - 1.0).to(narrow) * h - (out * seen).sum(1) + step.feed.to(narrow) * u.unsqueeze(-1)
        h = h + change  # a factor near 1 would round the rate of a slow mode away
        y = 2.0 * (C.to(narrow) * h.unsqueeze(1)).real.sum(-1) + self.D.to(inner) * u.unsqueeze(1)
        return y.flatten(1).unsqueeze(1).to(x.dtype), torch.view_as_real(h)


def next_token(y: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """y [B,T,...] one token later: the last token of every sequence gets 0."""
    later = F.pad(y[:, 1:], (0, 0, 0, 1))
    if cu_seqlens is None:
        return later
    time = torch.arange(y.shape[1] + 1, device=y.device)
    owner = torch.searchsorted(cu_seqlens[1:].long().contiguous(), time, right=True)
    return torch.where((owner[1:] == owner[:-1]).unsqueeze(-1), later, 0.0)
