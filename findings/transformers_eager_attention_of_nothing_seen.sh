#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0, CPU): what eager attention gives a query that may see nothing depends on the dtype.
#
# With padding on the right and a sliding window, the last positions see no real token within their window. The mask adds
# the smallest number of the dtype to every score. In float32 and bfloat16 the scores drown in it, so that softmax gives
# every key the same weight: padding, the future and what is beyond the window among them. In float64 the softmax is
# computed in float32, where that number is -inf, and all weights are NaN.
#
# Seen: weights of the last of 12 positions, 4 of them real, window 4
#   torch.float32: 0.0833 to 0.0833 (1/12 each)    torch.bfloat16: 0.0835 to 0.0835    torch.float64: nan to nan
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers

transformers.logging.set_verbosity_error()
config = transformers.Gemma2Config(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"], attn_implementation="eager",
)
torch.manual_seed(0)
model = transformers.Gemma2ForCausalLM(config).eval()
ids = torch.randint(3, 100, (1, 12))
mask = torch.ones_like(ids)
mask[:, 4:] = 0  # 4 tokens, and 8 of padding on the right: the last of those see no token within their window
seen = {}
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    model = model.to(dtype)
    weights = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions[0]
    last = weights[0, 0, -1]
    seen[dtype] = last
    print(f"{dtype}: {last.min().item():.4f} to {last.max().item():.4f}")
even = torch.full((12,), 1 / 12)
torch.testing.assert_close(seen[torch.float32], even, rtol=1e-5, atol=0)
torch.testing.assert_close(seen[torch.bfloat16].float(), even, rtol=1e-2, atol=0)
assert seen[torch.float64].isnan().all()
PYTHON
