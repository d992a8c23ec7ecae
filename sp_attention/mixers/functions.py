"""The mixer functions of transformers' models, and of the packages that these call where they are installed.

`fla`, `mamba_ssm` and `causal_conv1d` take arguments much as transformers' torch functions do, which models call:
github.com/fla-org/flash-linear-attention, github.com/state-spaces/mamba, github.com/Dao-AILab/causal-conv1d.
"""

from sp_attention.mixers.declared import Convolution, Cut, Fused, Mixer, Scan
from sp_attention.mixers.hookspecs import hookimpl

# [B, S, H, ...] of the heads that are shared out, and of what groups of them have in common.
_HEADS, _GROUPS = Cut(1, 2), Cut(1, 2, "kv")
# [B, C, S] of channels, and [B, N, S] of all of them.
_CHANNELS, _OF_ALL_CHANNELS = Cut(2, 1), Cut(2, None)
# [H, ...] and [B, H, ...].
_WEIGHTS, _STATE = Cut(None, 0), Cut(None, 1)

CONVOLUTION = Convolution(
    "convolution by halo",
    ("causal_conv1d_fn",),
    given=("hidden_states", "x"),
    weight=("weight",),
    whole=("seq_idx", "cu_seqlens", "initial_states", "return_final_states"),
)

# Yang et al. 2024, "Gated Delta Networks" (arXiv 2412.06464), section 3: the state of a head is its own.
GATED_DELTA_RULE = Scan(
    "gated delta rule",
    (
        "chunk_gated_delta_rule",
        "torch_chunk_gated_delta_rule",
        "fused_recurrent_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
    ),
    {
        **dict.fromkeys(("query", "q", "key", "k"), _GROUPS),
        **dict.fromkeys(("value", "v", "g", "beta"), _HEADS),
        "initial_state": _STATE,
    },
    result=_HEADS,
    state=_STATE,
)

# Kimi Team 2025, "Kimi Linear" (arXiv 2510.26692), section 3: as the gated delta rule, with a decay for each channel.
KIMI_DELTA_ATTENTION = Scan(
    "Kimi delta attention",
    ("chunk_kda", "chunk_kimi_delta_attention", "fused_recurrent_kda", "recurrent_kimi_delta_attention"),
    {
        **dict.fromkeys(("query", "q", "key", "k", "value", "v", "g", "beta"), _HEADS),
        "initial_state": _STATE,
    },
    result=_HEADS,
    state=_STATE,
)

# Dao and Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), section 6: B and C are of groups of heads.
CHUNK_SCAN = Scan(
    "Mamba-2 scan",
    ("mamba_chunk_scan_combined", "mamba2_chunk_scan"),
    {
        **dict.fromkeys(("hidden_states", "x", "dt", "z"), _HEADS),
        **dict.fromkeys(("B", "C"), _GROUPS),
        **dict.fromkeys(("A", "D", "dt_bias"), _WEIGHTS),
        "initial_states": _STATE,
    },
    result=_HEADS,
    state=_STATE,
)

# Gu and Dao 2023, "Mamba" (arXiv 2312.00752), section 3: every channel is a head, and B and C are of all of them.
SELECTIVE_SCAN = Scan(
    "selective scan",
    ("selective_scan_fn", "mamba_selective_scan"),
    {
        **dict.fromkeys(("hidden_states", "u", "dt", "delta", "z"), _CHANNELS),
        **dict.fromkeys(("B", "C"), _OF_ALL_CHANNELS),
        **dict.fromkeys(("A", "D", "delta_bias"), _WEIGHTS),
    },
    result=_CHANNELS,
    state=_STATE,
)

FUSED = Fused(
    "in steps",
    ("mamba_inner_fn", "mamba_split_conv1d_scan_combined", "mamba2_split_conv1d_scan_combined"),
)


@hookimpl
def sp_attention_mixers() -> list[Mixer]:
    return [CONVOLUTION, GATED_DELTA_RULE, KIMI_DELTA_ATTENTION, CHUNK_SCAN, SELECTIVE_SCAN, FUSED]
