"""Tiny models with weights large enough that a wrong mask shows in the loss."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class Tiny:
    """A model class of transformers, what its configuration has beyond `COMMON`, and the error it may show.

    tolerance: 1e-5 for models that compute in the dtype of their weights, 1e-3 for those that compute parts that
    matter in float32.
    """

    cls: str
    settings: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5

    @property
    def name(self) -> str:
        """What ids of tests call it, so that `-k llama` runs its cases only."""
        return re.split("For|LMHead", self.cls)[0].lower()

    @property
    def is_here(self) -> bool:
        """Whether this transformers has it."""
        return hasattr(transformers, self.cls)

    def build(self, dtype: torch.dtype = torch.float64) -> transformers.PreTrainedModel:
        """The same weights every time, in training mode."""
        model_class = getattr(transformers, self.cls)
        torch.manual_seed(0)
        return model_class(model_class.config_class(**COMMON | self.settings)).to(dtype).train()


MODELS = {
    "llama-6q3kv": Tiny("LlamaForCausalLM"),
    "llama-5q1kv": Tiny("LlamaForCausalLM", {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1}),
    # With three and four ranks, some compute no heads.
    "llama-2q1kv": Tiny("LlamaForCausalLM", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "llama-tied": Tiny("LlamaForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "qwen2": Tiny("Qwen2ForCausalLM"),
    "qwen2-window5": Tiny(
        "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "mistral-window5": Tiny("MistralForCausalLM", {"sliding_window": 5}),
    "qwen3": Tiny("Qwen3ForCausalLM"),
    "gemma": Tiny("GemmaForCausalLM", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "olmo2": Tiny("Olmo2ForCausalLM"),
    "phi3": Tiny("Phi3ForCausalLM"),
    "glm": Tiny("GlmForCausalLM"),
    "glm4": Tiny("Glm4ForCausalLM"),
    # Its hidden states get their shape from the tokens, so they are whole before its head.
    "gpt2": Tiny("GPT2LMHeadModel", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "mixtral": Tiny("MixtralForCausalLM", {"num_local_experts": 4, "experts_implementation": "eager"}, tolerance=1e-3),
}
LLAMA = MODELS["llama-6q3kv"]


def batch_of(kind: str, length: int, rows: int = 2) -> dict[str, Tensor]:
    """A whole batch [rows, length] of one of `KINDS`, the same on every rank."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if kind in ("left-padded", "right-padded"):
        mask = torch.ones_like(ids)
        padding = slice(0, length // 3) if kind == "left-padded" else slice(length - length // 3, length)
        mask[0, padding] = 0
        batch |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        # A first real token has no context on the left but padding, so what predicts it is nothing real.
        batch["labels"][:, : length // 3 + 1] = -100
    if kind == "packed":
        first, second = length // 4, length // 2 + 1
        positions = torch.cat([torch.arange(first), torch.arange(second - first), torch.arange(length - second)])
        batch |= {"position_ids": positions.expand(rows, -1).clone(), "use_cache": False}
        if rows > 1:
            batch["position_ids"][1] = torch.arange(length)
    if kind == "prompt-masked":
        # More than the first rank's span: a rank has no target at all.
        batch["labels"][:, : length - length // 4] = -100
    return batch


KINDS = ("plain", "left-padded", "right-padded", "packed", "prompt-masked")
