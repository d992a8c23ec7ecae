"""What the names of fields do not tell: settings that a type needs so that a small model of it can be built.

They only serve to build models for `sp-attention verify` and the sweep. The library itself knows no names of models.
A key with a dot is a field of a configuration inside, set after it is made.
"""

from typing import Any

OVERRIDES: dict[str, dict[str, Any]] = {
    "diffllama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "codegen": {"n_head": 4, "n_embd": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "xglm": {"scale_embedding": False},
}
