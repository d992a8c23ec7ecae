"""generate() in all its ways, against one process in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from generating import GREEDY, MODELS, MODES, NEW, PROMPT, distance, generated, pair, prompt
from helpers import Selected, run_once, slow_but, too_large
from models import Tiny
from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    QuantizedCache,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

import sp_attention
from sp_attention.api import handle_of
from sp_attention.cli.reduced import prepare
from sp_attention.launch import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")


def compare(name: str) -> dict[str, float]:
    """How far each mode is from that of one process."""
    reference, model = pair(name)
    # What is wrong with that would not show in the numbers: enable() finds it, and falls back to whole caches.
    assert ("caches hold this rank's heads" in handle_of(model).report()) == (name not in ("bloom", "deepseek-v3"))
    found = {}
    for mode, options in MODES.items():
        if mode == "chunks" and model.config.is_encoder_decoder:
            continue  # transformers would take chunks of the decoder's one token.
        ids = prompt(model)
        inputs = {"input_ids": ids}
        if mode == "left padding":
            inputs["attention_mask"] = torch.ones_like(ids)
            inputs["attention_mask"][0, :6] = 0
        found[mode] = distance(generated(model, inputs, **options), generated(reference, inputs, **options))
    return found


def compare_all(names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    return {name: compare(name) for name in names}


@pytest.mark.parametrize("name", slow_but(MODELS, "llama-5q1kv", "gemma3-window5", "lfm2", "t5"))
def test_tokens_and_scores_are_those_of_one_process(name: str, selected: Selected) -> None:
    # On two ranks, and for every type of transformers, it is a sweep: sweep/generation.py.
    for found in run_once(3, compare_all, selected("name"), timeout=300):
        assert len(found[name]) >= len(MODES) - 1
        assert not too_large(found[name], MODELS[name].tolerance)


OF_A_KIND = {
    # Its attention is given rotary tables of the tokens in the cache too, and takes the last of them.
    "qwen4-exp": Tiny(
        "Qwen4ExpForCausalLM",
        {"layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 3, "indexer_kv_heads": 1,
         "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4, "num_experts": 4,
         "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
         "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "ple_layer_ids": [], "experts_implementation": "eager"},
    ),
    # Its encoder refuses to be asked for a cache.
    "switch": Tiny(
        "SwitchTransformersForConditionalGeneration",
        {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_heads": 6, "num_layers": 2, "num_decoder_layers": 2,
         "num_experts": 4, "decoder_start_token_id": 1, "dropout_rate": 0.0, "router_jitter_noise": 0.0},
    ),
}  # fmt: skip
# Qwen4-Exp came with transformers 5.16.
OF_A_KIND = {name: tiny for name, tiny in OF_A_KIND.items() if tiny.is_here}


def of_a_kind_of_its_own(name: str) -> dict[str, float]:
    """How far a model is from one process that goes on from caches in a way of its own."""
    reference, model = OF_A_KIND[name].build().eval(), OF_A_KIND[name].build().eval()
    assert "caches hold this rank's heads" in sp_attention.enable(model, "sdpa").report()
    found = {}
    for mode in ("greedy",) if model.config.is_encoder_decoder else ("greedy", "chunks"):
        both = [generated(each, {"input_ids": prompt(model)}, **MODES[mode]) for each in (model, reference)]
        found[mode] = distance(*both)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_A_KIND)
def test_models_that_go_on_in_ways_of_their_own(name: str) -> None:
    for found in run_ranks(2, of_a_kind_of_its_own, name, timeout=120):
        assert not too_large(found)


class Words(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


def ways() -> dict[str, float]:
    """How far generation is from that of one process, in ways that take more than an option."""
    reference, model = pair("llama-6q3kv", "transformers:eager")
    # The model on its own attends the same way, and has weights to show.
    reference.set_attn_implementation("eager")
    ids, one = prompt(model), prompt(model, rows=1)
    found = {}

    def compare(name: str, inputs: dict[str, Any] | Callable[[PreTrainedModel], dict[str, Any]], **options: Any) -> Any:
        both = [
            generated(each, inputs(each) if callable(inputs) else inputs, **GREEDY | options)
            for each in (model, reference)
        ]
        found[name] = distance(*both)
        return both

    compare("sampled beams", {"input_ids": ids}, num_beams=3, do_sample=True)
    compare("embeddings", lambda each: {"inputs_embeds": each.get_input_embeddings()(ids)})
    compare("no cache", {"input_ids": ids}, use_cache=False)
    compare("looked up", {"input_ids": one.repeat(1, 2)}, prompt_lookup_num_tokens=3)
    draft = Tiny("LlamaForCausalLM", {"num_hidden_layers": 1}).build().eval()
    compare("assisted", {"input_ids": one}, assistant_model=draft)
    compare("assisted, sampling", {"input_ids": one}, assistant_model=draft, do_sample=True)
    short = LogitsProcessorList([lambda ids, scores: scores.index_fill(1, ids[0, -3:], float("-inf"))])
    compare("processed", {"input_ids": ids}, logits_processor=short)
    stop = StoppingCriteriaList([lambda ids, scores: torch.full((len(ids),), ids.shape[1] > PROMPT + 3)])
    both = compare("stopped", {"input_ids": ids}, stopping_criteria=stop)
    assert both[0].sequences.shape == (2, PROMPT + 4)
    compare("several answers", {"input_ids": ids}, do_sample=True, num_return_sequences=3)
    compare("compiled", {"input_ids": ids}, cache_implementation="static", compile_config=_compiling())

    words = Words() if dist.get_rank() == 0 else None  # One rank shows the text.
    ours = generated(model, {"input_ids": one}, **GREEDY, streamer=words)
    assert words is None or words.tokens == ours.sequences[0].tolist()

    both = compare("with hidden states", {"input_ids": ids}, output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        steps = zip(*(getattr(output, name) for output in both), strict=True)
        pairs = [one for step in steps for one in zip(*step, strict=True)]
        assert len(pairs) == NEW * (3 if name == "hidden_states" else 2)
        found[name] = max((mine - other).abs().max().item() for mine, other in pairs)

    chats = []
    for each in (model, reference):
        first = generated(each, {"input_ids": one}, **GREEDY)
        question = torch.cat([first.sequences, prompt(model, 6, rows=1)], 1)
        chats.append(generated(each, {"input_ids": question}, **GREEDY, past_key_values=first.past_key_values))
    found["a chat"] = distance(*chats)

    quantised = []
    for each in (model, reference):
        options = {"past_key_values": QuantizedCache("fp8", each.config)}
        quantised.append(generated(each, {"input_ids": ids}, **GREEDY | options))
    found["quantised"] = distance(*quantised)
    return found


def _compiling() -> CompileConfig:
    config = CompileConfig(mode="default", backend="eager")
    config._compile_all_devices = True
    return config


def test_ways_to_generate() -> None:
    for found in run_ranks(2, ways, timeout=200):
        assert len(found) == 15
        assert not too_large(found)


def images() -> float:
    reference, batches = prepare("qwen2_vl", "image-text-to-text", PROMPT)
    batch = {name: value for name, value in batches["pixels"].items() if name != "labels"}
    assert "pixel_values" in batch
    reference.eval()
    model = copy.deepcopy(reference)
    sp_attention.enable(model)
    return distance(generated(model, batch, **GREEDY), generated(reference, batch, **GREEDY))


def sounds() -> float:
    reference, batches = prepare("whisper", "speech-seq2seq", PROMPT)
    batch = {"input_features": batches["plain"]["input_features"]}
    reference.eval()
    reference.generation_config = GenerationConfig(decoder_start_token_id=1, pad_token_id=0)
    model = copy.deepcopy(reference)
    sp_attention.enable(model)
    return distance(generated(model, batch, **GREEDY), generated(reference, batch, **GREEDY))


@pytest.mark.parametrize("what", [images, sounds], ids=["qwen2_vl", "whisper"])
def test_prompts_of_images_and_sound(what: Callable[[], float]) -> None:
    assert max(run_ranks(3, what, timeout=120)) < 1e-5
