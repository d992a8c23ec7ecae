"""What tests of generate() and of key/value caches use: models, ways to generate, and how far results are apart."""

from typing import Any

import models
import torch
from helpers import relative_error
from models import Tiny
from torch import Tensor
from transformers import PreTrainedModel

import sp_attention

PROMPT, NEW = 17, 7


ENCODERS = {"decoder_start_token_id": 1, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2}


BART = ENCODERS | {"encoder_attention_heads": 6, "decoder_attention_heads": 3, "forced_eos_token_id": None}


# Of the second and third, there are more ranks than key heads, and than heads.
SHARED = ("llama-6q3kv", "llama-5q1kv", "llama-2q1kv", "mistral-window5", "gpt2")
MODELS = {name: models.MODELS[name] for name in SHARED} | {
    "gemma3-window5": Tiny(
        "Gemma3ForCausalLM", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "gpt-oss": Tiny(
        "GptOssForCausalLM", {"num_local_experts": 4, "sliding_window": 5, "experts_implementation": "eager"}, 1e-3
    ),
    "deepseek-v3": Tiny(
        "DeepseekV3ForCausalLM",
        {"num_key_value_heads": 6, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
         "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
         "moe_intermediate_size": 16, "first_k_dense_replace": 1, "experts_implementation": "eager"},
        1e-3,
    ),
    "lfm2": Tiny("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    # A mixer gathers what attends by code of its own, and its cache is whole.
    "bloom": Tiny("BloomForCausalLM", {"n_head": 6, "n_layer": 2}),
    "t5": Tiny(
        "T5ForConditionalGeneration",
        {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_heads": 6, "num_layers": 2, "decoder_start_token_id": 1},
    ),
    "bart": Tiny("BartForConditionalGeneration", BART),
}  # fmt: skip


GREEDY: dict[str, Any] = {"do_sample": False}


MODES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": GREEDY | {"num_beams": 3},
    "static": GREEDY | {"cache_implementation": "static"},
    "left padding": GREEDY,
    "chunks": GREEDY | {"prefill_chunk_size": 4},
}


def prompt(model: PreTrainedModel, length: int = PROMPT, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, model.config.get_text_config().vocab_size, (rows, length), generator=generator)


def pair(name: str, backend: str = "sdpa") -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model on its own, and the same one enabled, in evaluation."""
    reference, model = MODELS[name].build().eval(), MODELS[name].build().eval()
    sp_attention.enable(model, backend)
    return reference, model


def generated(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(5)
    settings = {"max_new_tokens": NEW, "output_scores": True, "return_dict_in_generate": True, "pad_token_id": 0}
    return model.generate(**inputs, **settings | {"eos_token_id": None} | options)


def distance(ours: Any, theirs: Any) -> float:
    """The largest relative error of a score; infinite where a token differs, or what is impossible."""
    if not torch.equal(ours.sequences, theirs.sequences) or len(ours.scores) != len(theirs.scores):
        return float("inf")
    errors = [0.0]
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        finite = other.isfinite()
        if not torch.equal(finite, mine.isfinite()):
            return float("inf")
        errors.append(relative_error(mine[finite], other[finite]))
    return max(errors)


def logits(model: PreTrainedModel, ids: Tensor, past: Any = None, **options: Any) -> tuple[Tensor, Any]:
    output = model(input_ids=ids, past_key_values=past, use_cache=True, **options)
    return output.logits, output.past_key_values
