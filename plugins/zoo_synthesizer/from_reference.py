"""The layer of the paper's equations, as our config and weights; no reference module exists in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sequence_mixer.errors import ReferenceMismatch, unknown_name
from sequence_mixer.peer_options import PeerOptions, config_of, expect_weights
from zoo_synthesizer.config import SynthesizerConfig

PEER = "Synthesizer (Tay et al. 2020, arXiv 2005.00743)"
PART_OF = {
    "dense": "dense",
    "random": "random",
    "fac_dense": "factorised_dense",
    "fac_random": "factorised_random",
    "vanilla": "vanilla",
}
WEIGHTS_OF = {  # of each variant: their name -> ours, below `logits`
    "dense": {"W1": "dense.w1", "W2": "dense.w2"},
    "random": {"R": "random.table"},
    "fac_dense": {
        "A_U1": "factorised_dense.left.w1",
        "A_U2": "factorised_dense.left.w2",
        "B_U1": "factorised_dense.right.w1",
        "B_U2": "factorised_dense.right.w2",
    },
    "fac_random": {"R1": "factorised_random.r1", "R2": "factorised_random.r2"},
    "vanilla": {"Wq": "vanilla.q_proj.weight", "Wk": "vanilla.k_proj.weight"},
}


def convert(
    peer: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> tuple[SynthesizerConfig, dict[str, Tensor]]:
    """Config and state dict of our mixer for the layer of the equations.

    peer: "Synthesizer (Tay et al. 2020, arXiv 2005.00743)".
    config: `variant` (dense, random, fac_dense, fac_random, or mixture of the `parts`, vanilla among them), `causal`,
        `D`, `H`, `Lmax`, and as the variant needs them `F` (hidden), `a`, `b`, `kf` (rank). `B` and `T`, the sizes of
        a recorded call, are not looked at.
    state_dict: Wv and Wo [D,D] as [out,in], and W1, W2 | R | A_U1, A_U2, B_U1, B_U2 | R1, R2 | Wq, Wk per part;
        alpha_logits [n] of a mixture.
    Raises ReferenceMismatch.
    """
    if peer != PEER:
        raise ReferenceMismatch(unknown_name("reference module of synthesizer", peer, (PEER,)))
    options = PeerOptions(peer, config)
    options.ignore("B", "T")
    variants = _variants(options)
    fields: dict[str, Any] = {
        "d_model": options.take("D"),
        "n_heads": options.take("H"),
        "max_length": options.take("Lmax"),
        "causal": options.take("causal", False),
        "parts": tuple(PART_OF[variant] for variant in variants),
    }
    if {"dense", "fac_dense"} & set(variants):
        fields["d_hidden"] = options.take("F")
    if "fac_dense" in variants:
        fields["factors"] = (options.take("a"), options.take("b"))
    if "fac_random" in variants:
        fields["rank"] = options.take("kf")
    options.done()
    ours = {"v_proj.weight": "Wv", "out_proj.weight": "Wo"}
    for variant in variants:
        ours |= {f"logits.{mine}": theirs for theirs, mine in WEIGHTS_OF[variant].items()}
    if len(variants) > 1:
        ours["logits.alpha_logits"] = "alpha_logits"
    weights = expect_weights(peer, state_dict, list(ours.values()))
    return config_of(peer, SynthesizerConfig, **fields), dict(zip(ours, weights, strict=True))


def _variants(options: PeerOptions) -> list[str]:
    variant = options.take("variant")
    variants = list(options.take("parts")) if variant == "mixture" else [variant]
    for each in variants:
        if each not in PART_OF or (each == "vanilla" and variant != "mixture"):
            known = [*PART_OF, "mixture"] if variant != "mixture" else list(PART_OF)
            raise ReferenceMismatch(unknown_name(f"variant of {options.peer}", str(each), known))
    if variant == "mixture" and len(variants) < 2:
        raise ReferenceMismatch(f"{options.peer}: a mixture of {variants} is none; name two parts or more")
    return variants
