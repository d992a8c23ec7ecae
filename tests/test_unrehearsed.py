"""enable(rehearse=False) of models that do not attend through transformers' interface; and small vocabularies."""

import torch
from helpers import errors_of, loss_step, too_large
from models import Tiny
from torch import Tensor, nn

import sp_attention
from sp_attention.launch import run_ranks

OWN_MIXERS = {
    "mpt": Tiny(
        "MptForCausalLM", {"d_model": 48, "n_heads": 6, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64}
    ),
    "bloom": Tiny("BloomForCausalLM", {"n_head": 6, "n_layer": 2}),
    "mamba": Tiny("MambaForCausalLM", {"state_size": 4, "conv_kernel": 3, "expand": 2}, 1e-3),
}
# As Chronos-Bolt's, all of whose tokens mean something.
TWO_TOKENS = {
    "t5": Tiny(
        "T5ForConditionalGeneration",
        {"vocab_size": 2, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 6, "dropout_rate": 0.0}
        | {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    ),
    "llama": Tiny("LlamaForCausalLM", {"vocab_size": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}),
}


def unrehearsed() -> dict[str, dict[str, float]]:
    found = {}
    for name, tiny in OWN_MIXERS.items():
        reference, model = tiny.build(), tiny.build()
        handle = sp_attention.enable(model, backend="sdpa", rehearse=False)
        assert "gathered: mixes tokens" in handle.report()
        found[name] = too_large(errors_of(reference, model, lambda each: loss_step(each, "plain")), tiny.tolerance)
    return found


def test_what_mixes_tokens_is_found_without_a_rehearsal_where_nothing_attends_through_us() -> None:
    for found in run_ranks(2, unrehearsed):
        assert found == {name: {} for name in OWN_MIXERS}


def embedded_step(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 33, 48, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (2, 33), generator=generator)
    loss = model(inputs_embeds=states, labels=labels).loss
    loss.backward()
    return [loss.detach()]


def two_tokens() -> dict[str, dict[str, float]]:
    found = {}
    for name, tiny in TWO_TOKENS.items():
        reference, model = tiny.build(), tiny.build()
        sp_attention.enable(model, backend="sdpa")
        found[name] = too_large(errors_of(reference, model, embedded_step))
    return found


def test_a_vocabulary_may_be_of_nothing_but_tokens_with_a_meaning() -> None:
    for found in run_ranks(2, two_tokens):
        assert found == {name: {} for name in TWO_TOKENS}
