#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0, CPU): one short text switches BigBird's block-sparse attention off for good.
#
# BigBirdModel.forward puts full attention in the place of block-sparse attention when a text is shorter than its blocks
# need, and nothing puts it back: the configuration still says block_sparse, and a long text that was given before and is
# given again comes out different, with attention to all of its tokens. Whoever compares a model with itself before and
# after some other batch, or evaluates short texts between long ones, compares two models.
#
# Seen:
#   before: block_sparse, after one short text: original_full, the configuration says: block_sparse
#   largest difference of the same long text, before and after: > 1e-3
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
config = transformers.BigBirdConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=512, block_size=8, num_random_blocks=1, initializer_range=0.3,
)
model = transformers.BigBirdModel(config).eval()
kind = lambda: model.encoder.layer[0].attention.attention_type
ids = torch.randint(3, 100, (1, 256))
with torch.no_grad():
    before, first = kind(), model(input_ids=ids).last_hidden_state
    model(input_ids=ids[:, :16])
    after, again = kind(), model(input_ids=ids).last_hidden_state
difference = (first - again).abs().max().item()
print(f"before: {before}, after one short text: {after}, the configuration says: {config.attention_type}")
print(f"largest difference of the same long text, before and after: {difference:.1e}")
assert (before, after, config.attention_type) == ("block_sparse", "original_full", "block_sparse")
assert difference > 1e-3
PYTHON
