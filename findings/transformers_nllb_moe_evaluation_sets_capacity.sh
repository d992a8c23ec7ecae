#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0, CPU): one forward in evaluation changes the expert capacity that NLLB-MoE trains with.
#
# NllbMoeTop2Router writes `expert_capacity` in evaluation, from the number of tokens of that batch, and training uses the
# attribute as it stands. So a model that has evaluated a small batch drops tokens in training that it did not drop before,
# until something is evaluated again: loss and gradients of one training batch depend on what was evaluated last.
#
# Seen:
#   expert_capacity: 64 as configured, 8 after evaluating 8 tokens, 8 in training
#   loss of one training batch before and after: different by more than 1e-3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
config = transformers.NllbMoeConfig(
    vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=64, decoder_ffn_dim=64, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2,
    encoder_layerdrop=0.0, decoder_layerdrop=0.0, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    moe_token_dropout=0.0, router_jitter_noise=0.0, max_position_embeddings=128, decoder_start_token_id=2,
    pad_token_id=1, init_std=0.3,
)
model = transformers.NllbMoeForConditionalGeneration(config).train()
routers = [module for module in model.modules() if hasattr(module, "expert_capacity")]
ids = torch.randint(3, 100, (2, 40))
loss = lambda: model(input_ids=ids, labels=ids).loss.item()
configured, first = routers[0].expert_capacity, loss()
with torch.no_grad():
    model.eval()(input_ids=ids[:1, :8], labels=ids[:1, :8])
evaluated = routers[0].expert_capacity
again = [loss() for _ in [model.train()]][0]
trained = routers[0].expert_capacity
print(f"expert_capacity: {configured} as configured, {evaluated} after evaluating 8 tokens, {trained} in training")
print(f"loss of one training batch before and after: {first:.4f}, {again:.4f}")
assert configured == config.expert_capacity == 64 and evaluated == trained < 64
assert abs(first - again) > 1e-3
PYTHON
