"""Tiny models with random weights, one for each way in which models differ for sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from sp_attention.cli.reduced import enlarge

if TYPE_CHECKING:
    from sweep.fuzzing.case import Case

VOCABULARY, HEAD, POSITIONS, CLASSES = 97, 8, 320, 3
# What an encoder of sounds is given: [rows, SOUND_BINS, 2 · SOUNDS].
SOUNDS, SOUND_BINS = 20, 8

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT_MASKS = ("none", "left", "right", "packed", "4-D float")
_PADDED = ("none", "left", "right")
_CAUSAL_LABELS = ("all", "some", "all ignored", "none", "num_items_in_batch", "shift_labels")
_OF_TOKENS = ("all", "some", "all ignored", "none")
# For everybody: more of what most do.
_TRAINING = (
    "step", "step", "update", "update", "two-forwards", "accumulate", "evaluate", "hidden-states", "late-logits",
    "suspended", "interrupted", "disable",
)  # fmt: skip
_LM = (*_TRAINING, "too-long")
_BACKENDS = ("auto", "auto", "sdpa", "transformers:eager", "transformers:sdpa")


@dataclass(frozen=True)
class Kind:
    """A model class of transformers, and what it can be given.

    settings: of its configuration, by heads, KV heads and layers. family: whose batches it takes. dropout: the settings
    that switch dropout on. groups_heads: KV heads may be fewer. tiles_mlp: `mlp_tile` is not refused. given: further
    arguments of every forward.
    """

    cls: str
    settings: Callable[[int, int, int], dict[str, Any]]
    family: str = "causal"
    masks: tuple[str, ...] = (*_TEXT_MASKS, "4-D bool")
    labels: tuple[str, ...] = _CAUSAL_LABELS
    calls: tuple[str, ...] = (*_LM, "cache", "generate", "only-loss")
    backends: tuple[str, ...] = _BACKENDS
    dropout: tuple[str, ...] = ("attention_dropout",)
    groups_heads: bool = True
    tiles_mlp: bool = False
    given: tuple[tuple[str, Any], ...] = ()


def _decoder(**more: Any) -> Callable[[int, int, int], dict[str, Any]]:
    def settings(heads: int, kv_heads: int, layers: int) -> dict[str, Any]:
        return {
            **_TOKENS,
            "hidden_size": heads * HEAD,
            "intermediate_size": 40,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": HEAD,
            "max_position_embeddings": POSITIONS,
            "experts_implementation": "eager",
            **more,
        }

    return settings


def _kinds_of_layers(first: str, second: str, **more: Any) -> Callable[[int, int, int], dict[str, Any]]:
    def settings(heads: int, kv_heads: int, layers: int) -> dict[str, Any]:
        # A model of nothing but linear attention does not make its own cache.
        kinds = [(first, second)[layer % 2] for layer in range(layers)] if layers > 1 else [second]
        return _decoder(**more)(heads, kv_heads, layers) | {"layer_types": kinds}

    return settings


def _bert(heads: int, kv_heads: int, layers: int) -> dict[str, Any]:
    return _decoder(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=CLASSES)(heads, heads, layers)


def _gpt2(heads: int, kv_heads: int, layers: int) -> dict[str, Any]:
    size = {"n_embd": heads * HEAD, "n_head": heads, "n_layer": layers, "n_positions": POSITIONS}
    return {**_TOKENS, **size, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _t5(heads: int, kv_heads: int, layers: int) -> dict[str, Any]:
    size = {"d_model": heads * HEAD, "num_heads": heads, "d_kv": HEAD, "d_ff": 40, "num_layers": layers}
    return {**_TOKENS, **size, "decoder_start_token_id": 0, "dropout_rate": 0.0}


def _bart(heads: int, kv_heads: int, layers: int) -> dict[str, Any]:
    size: dict[str, Any] = {"d_model": heads * HEAD, "max_position_embeddings": POSITIONS}
    for side in ("encoder", "decoder"):
        size |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": 40}
    return {**_TOKENS, **size, "decoder_start_token_id": 2, "dropout": 0.0, "forced_eos_token_id": None}


def _whisper(heads: int, kv_heads: int, layers: int) -> dict[str, Any]:
    lengths = {"max_source_positions": SOUNDS, "max_target_positions": POSITIONS, "num_mel_bins": SOUND_BINS}
    return _bart(heads, kv_heads, layers) | lengths | {"begin_suppress_tokens": None, "suppress_tokens": None}


def _mamba2(heads: int, kv_heads: int, layers: int) -> dict[str, Any]:
    size = {"hidden_size": heads * HEAD, "num_hidden_layers": layers, "num_heads": 2 * heads, "head_dim": HEAD}
    return {**_TOKENS, **size, "state_size": 8, "n_groups": 1, "chunk_size": 16, "expand": 2}


_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SEQ2SEQ = (*_TRAINING, "generate")
KINDS = {
    "llama": Kind("LlamaForCausalLM", _decoder(), tiles_mlp=True),
    "llama, tied": Kind("LlamaForCausalLM", _decoder(tie_word_embeddings=True, attention_bias=True), tiles_mlp=True),
    "qwen2": Kind(
        "Qwen2ForCausalLM",
        _kinds_of_layers("full_attention", "sliding_attention", use_sliding_window=True, sliding_window=5),
        tiles_mlp=True,
    ),
    "mistral": Kind("MistralForCausalLM", _decoder(sliding_window=6), tiles_mlp=True),
    # Softcap: `sdpa` refuses it.
    "gemma2": Kind(
        "Gemma2ForCausalLM",
        _kinds_of_layers("sliding_attention", "full_attention", sliding_window=5, query_pre_attn_scalar=HEAD),
        masks=_TEXT_MASKS,
        backends=("auto", "auto", "transformers:eager", "sdpa"),
        tiles_mlp=True,
    ),
    "gpt_oss": Kind(
        "GptOssForCausalLM",
        _kinds_of_layers("sliding_attention", "full_attention", sliding_window=5, **_EXPERTS),
        masks=_TEXT_MASKS,
        backends=("auto", "auto", "sdpa", "transformers:eager"),
    ),
    "mixtral": Kind("MixtralForCausalLM", _decoder(**_EXPERTS), given=(("output_router_logits", True),)),
    "qwen3_moe": Kind("Qwen3MoeForCausalLM", _decoder(**_EXPERTS, output_router_logits=True)),
    "gpt2": Kind(
        "GPT2LMHeadModel",
        _gpt2,
        masks=(*_PADDED, "4-D float"),
        dropout=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        groups_heads=False,
    ),
    "qwen3_next": Kind(
        "Qwen3NextForCausalLM",
        _kinds_of_layers(
            "linear_attention",
            "full_attention",
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=HEAD,
            linear_value_head_dim=HEAD,
            shared_expert_intermediate_size=24,
            **_EXPERTS,
        ),
        masks=_PADDED,
    ),
    "mamba2": Kind(
        "Mamba2ForCausalLM",
        _mamba2,
        masks=_PADDED,
        calls=(*_LM, "generate", "only-loss"),
        backends=("auto",),
        dropout=(),
        groups_heads=False,
    ),
    "bert, masked": Kind(
        "BertForMaskedLM",
        _bert,
        "encoder",
        masks=_PADDED,
        labels=_OF_TOKENS,
        calls=_LM,
        dropout=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        groups_heads=False,
    ),
    "bert, classes": Kind(
        "BertForSequenceClassification",
        _bert,
        "classes",
        masks=_PADDED,
        labels=("all", "none"),
        calls=_TRAINING,
        dropout=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        groups_heads=False,
    ),
    "t5": Kind(
        "T5ForConditionalGeneration",
        _t5,
        "seq2seq",
        masks=_PADDED,
        labels=_OF_TOKENS,
        calls=_SEQ2SEQ,
        dropout=("dropout_rate",),
        groups_heads=False,
    ),
    "bart": Kind(
        "BartForConditionalGeneration",
        _bart,
        "seq2seq",
        masks=_PADDED,
        labels=_OF_TOKENS,
        calls=_SEQ2SEQ,
        dropout=("dropout", "attention_dropout"),
        groups_heads=False,
    ),
    "whisper": Kind(
        "WhisperForConditionalGeneration",
        _whisper,
        "speech",
        masks=("none",),
        labels=_OF_TOKENS,
        calls=_TRAINING,
        dropout=("dropout", "attention_dropout"),
        groups_heads=False,
    ),
}


def build(case: Case) -> PreTrainedModel | nn.Module:
    """The model of a case as a user has it before `enable`; the same weights on every rank."""
    kind = case.kind
    cls = getattr(transformers, kind.cls)
    settings = kind.settings(case.heads, case.kv_heads, case.layers)
    torch.manual_seed(0)
    model = cls(cls.config_class(**settings | dict.fromkeys(kind.dropout, case.dropout)))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = case.dropout  # A head may have one that no setting tells of.
    nn.Module.to(model, dtype=getattr(torch, case.dtype))
    enlarge(model)
    if case.frozen:
        for parameter in [*model.parameters()][::2]:
            parameter.requires_grad_(False)
    if case.checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
    return _adapted(model) if case.lora else model


def _adapted(model: PreTrainedModel) -> nn.Module:
    """With LoRA of rank 2 in every linear layer, its weights as random as the others."""
    from peft import LoraConfig, get_peft_model

    dtype = model.dtype
    if model.is_gradient_checkpointing:
        model.enable_input_require_grads()
    # PEFT refuses Mamba's output projection, whose weight its kernels read without calling the module.
    left_out = ["out_proj"] if "mamba" in model.config.model_type else None
    lora = LoraConfig(r=2, target_modules="all-linear", exclude_modules=left_out, init_lora_weights=False)
    return get_peft_model(model, lora).to(dtype)
