"""generate(), and key/value caches of which each rank keeps its heads, against one process in float64."""

import copy
import os
import signal
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Tiny
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

import sp_attention
from sp_attention.api import handle_of
from sp_attention.errors import BatchError, UnsupportedError
from sp_attention.launch import RanksError, run_ranks
from sp_attention.region.kv_cache import layers_of

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT, NEW = 17, 7
ENCODERS = {"decoder_start_token_id": 1, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2}
BART = ENCODERS | {"encoder_attention_heads": 6, "decoder_attention_heads": 3, "forced_eos_token_id": None}
MODELS = {
    "llama-6q3kv": Tiny("LlamaForCausalLM"),
    # More ranks than key heads, and than heads.
    "llama-5q1kv": Tiny("LlamaForCausalLM", {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1}),
    "llama-2q1kv": Tiny("LlamaForCausalLM", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "mistral-window5": Tiny("MistralForCausalLM", {"sliding_window": 5}),
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
    "gpt2": Tiny("GPT2LMHeadModel", {"n_embd": 48, "n_head": 6, "n_layer": 2, "n_positions": 64}),
    "lfm2": Tiny("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    # A mixer gathers what attends by code of its own, and its cache is whole.
    "bloom": Tiny("BloomForCausalLM", {"n_head": 6, "n_layer": 2}),
    "t5": Tiny(
        "T5ForConditionalGeneration",
        {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_heads": 6, "num_layers": 2, "decoder_start_token_id": 1},
    ),
    "bart": Tiny("BartForConditionalGeneration", BART),
}  # fmt: skip
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
    """A model on its own, and the same one enabled."""
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
        errors.append(((mine - other)[finite].abs().max() / other[finite].abs().max()).item())
    return max(errors)


def compare_all() -> dict[tuple[str, str], float]:
    found = {}
    for name in MODELS:
        reference, model = pair(name)
        # What is wrong with that would not show in the numbers: enable() finds it, and falls back to whole caches.
        assert ("caches hold this rank's heads" in handle_of(model).report()) == (name not in ("bloom", "deepseek-v3"))
        for mode, options in MODES.items():
            if mode == "chunks" and model.config.is_encoder_decoder:
                continue  # transformers would take chunks of the decoder's one token.
            ids = prompt(model)
            inputs = {"input_ids": ids}
            if mode == "left padding":
                inputs["attention_mask"] = torch.ones_like(ids)
                inputs["attention_mask"][0, :6] = 0
            found[name, mode] = distance(generated(model, inputs, **options), generated(reference, inputs, **options))
    return found


@cache
def comparisons() -> list[dict[tuple[str, str], float]]:
    # On two ranks, and for every type of transformers, it is a sweep: sweep/generation.py.
    return run_ranks(3, compare_all, timeout=300)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_scores_are_those_of_one_process(name: str) -> None:
    for comparison in comparisons():
        errors = {mode: error for (model, mode), error in comparison.items() if model == name}
        assert len(errors) >= len(MODES) - 1
        assert not {mode: error for mode, error in errors.items() if not error < MODELS[name].tolerance}


class Captions(PreTrainedModel):
    """A model that takes no cache, with one inside that generates with one, as for images."""

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__(copy.deepcopy(language_model.config))
        self.language_model = language_model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        return self.language_model(inputs_embeds=embeddings, attention_mask=attention_mask, **options)

    def generate(self, input_ids: Tensor, **options: Any) -> Any:
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        return self.language_model.generate(inputs_embeds=embeddings, **options)


class Forgetful(LlamaForCausalLM):
    """It does not return its cache."""

    def forward(self, *args: Any, use_cache: bool = True, **kwargs: Any) -> Any:
        output = super().forward(*args, use_cache=use_cache, **kwargs)
        return CausalLMOutputWithPast(loss=output.loss, logits=output.logits)


class Bypassing(Captions):
    """It calls a part of the model that generates."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        hidden = self.language_model.model(input_ids, attention_mask=attention_mask, **options).last_hidden_state
        return CausalLMOutputWithPast(logits=self.language_model.lm_head(hidden))


def caches_of_models_inside() -> dict[str, tuple[str, float | str]]:
    """What the report says of them, and how far generation is from that of one process, or why it is refused."""
    found: dict[str, tuple[str, float | str]] = {}
    llama = MODELS["llama-6q3kv"].build()
    references = {
        "llama": Captions(llama),
        "bloom": Captions(MODELS["bloom"].build()),
        "forgetful": Captions(Forgetful(llama.config).double()),
        "bypassed": Bypassing(copy.deepcopy(llama)),
    }
    for name, reference in references.items():
        reference.eval()
        model = copy.deepcopy(reference)
        handle = sp_attention.enable(model, "sdpa")
        told = next(line for line in handle.report().splitlines() if "key/value caches" in line)
        inputs = {"input_ids": prompt(model)}
        # Whatever becomes of caches, the model itself is shared.
        torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits)
        try:
            ours = generated(model, inputs, **GREEDY)
            found[name] = told, distance(ours, generated(reference, inputs, **GREEDY))
        except UnsupportedError as refusal:
            found[name] = told, str(refusal)
    return found


def test_caches_of_a_model_inside_one_that_takes_none_are_proven() -> None:
    for found in run_ranks(3, caches_of_models_inside, timeout=120):
        for name, told in (("llama", "hold this rank's heads"), ("bloom", "are whole on every rank")):
            assert found[name] == (f"  key/value caches {told}", pytest.approx(0, abs=1e-5))
        for name, why in (
            ("forgetful", "Forgetful does not go on from a cache: it returns no cache of transformers' kind"),
            (
                "bypassed",
                "LlamaForCausalLM does not go on from a cache: the rehearsal of enable() does not show what tokens it "
                "is given",
            ),
        ):
            told, refusal = found[name]
            assert told == f"  key/value caches are refused: {why}"
            assert why in str(refusal)
            assert "within handle.suspended()" in str(refusal)


def of_a_kind_of_its_own() -> dict[str, float]:
    """How far models are from one process that go on from caches in ways of their own."""
    found = {}
    for name, tiny in OF_A_KIND.items():
        reference, model = tiny.build().eval(), tiny.build().eval()
        assert "caches hold this rank's heads" in sp_attention.enable(model, "sdpa").report()
        for mode in ("greedy",) if model.config.is_encoder_decoder else ("greedy", "chunks"):
            both = [generated(each, {"input_ids": prompt(model)}, **MODES[mode]) for each in (model, reference)]
            found[f"{name} {mode}"] = distance(*both)
    return found


def test_models_that_go_on_in_ways_of_their_own() -> None:
    for found in run_ranks(2, of_a_kind_of_its_own, timeout=120):
        assert len(found) == 3
        assert not {name: error for name, error in found.items() if not error < 1e-5}


def bytes_of(cache: Any) -> int:
    pairs = ((layer.keys, layer.values) for layer in layers_of(cache))
    return sum(tensor.nbytes for pair in pairs for tensor in pair if tensor is not None)


def cache_sizes() -> dict[str, tuple[float, float]]:
    """What this rank's cache is of one process', and what it may be: its share, and a head."""
    found = {}
    for name in ("llama-6q3kv", "llama-5q1kv", "mistral-window5", "gemma3-window5", "gpt2", "t5", "bart"):
        for options in (GREEDY, MODES["static"]):
            reference, model = pair(name)
            inputs = {"input_ids": prompt(model)}
            mine, whole = (bytes_of(generated(each, inputs, **options).past_key_values) for each in (model, reference))
            heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
            allowed = 1 / dist.get_world_size() + 1 / heads
            found[f"{name} {options.get('cache_implementation')}"] = (mine / whole, allowed)
    return found


def test_a_rank_caches_its_share_and_no_more_than_a_head_beyond() -> None:
    for found in run_ranks(3, cache_sizes, timeout=120):
        assert len(found) == 14
        assert not {name: sizes for name, sizes in found.items() if not sizes[0] <= sizes[1] + 1e-9}
        assert found["gpt2 None"][0] == pytest.approx(1 / 3)


def logits(model: PreTrainedModel, ids: Tensor, past: Any = None, **options: Any) -> tuple[Tensor, Any]:
    output = model(input_ids=ids, past_key_values=past, use_cache=True, **options)
    return output.logits, output.past_key_values


CUTS = {"one": (9, 10, 11), "few": (9, 11, 13), "many": (9, 17), "less than the ranks": (2, 4, 5, 17)}


@torch.no_grad()
def continued() -> dict[str, float]:
    """The largest error of the logits of calls of the model that go on from a cache, as the name says."""
    found = {}

    def note(name: str, ours: Tensor, theirs: Tensor) -> None:
        found[name] = max(found.get(name, 0.0), ((ours - theirs).abs().max() / theirs.abs().max()).item())

    for name in ("llama-5q1kv", "mistral-window5", "gpt2", "deepseek-v3"):
        reference, model = pair(name)
        ids = prompt(model)
        for cuts, stops in CUTS.items():
            ours = theirs = None
            for start, stop in zip((0, *stops), stops, strict=False):
                mine, ours = logits(model, ids[:, start:stop], ours)
                whole, theirs = logits(reference, ids[:, start:stop], theirs)
                note(f"{name}: {cuts}", mine, whole)
        # Both models may go on from what the other has not seen, as long as it is whole.
        _, filled = logits(reference, ids[:, :9])
        expected = logits(reference, ids[:, 9:], copy.deepcopy(filled))[0]
        note(f"{name}: a cache of a model on its own", logits(model, ids[:, 9:], filled)[0], expected)
        if name != "deepseek-v3":  # It ends up in a layer of another kind in a static cache.
            static = StaticCache(config=model.config, max_cache_len=32)
            logits(reference, ids[:, :9], static)
            note(f"{name}: a static one", logits(model, ids[:, 9:], static)[0], expected)
        # A prompt that several conversations begin with.
        _, begun = logits(model, ids[:, :9])
        for _ in range(2):
            note(f"{name}: copied", logits(model, ids[:, 9:], copy.deepcopy(begun))[0], expected)
        # In evaluation a cache is filled without being asked for, as in one process.
        begun = model(input_ids=ids[:, :9]).past_key_values
        note(f"{name}: unasked", logits(model, ids[:, 9:], begun)[0], expected)
        if name == "mistral-window5":
            continue  # It cannot take back what has left its window.
        begun.crop(-8)
        note(f"{name}: cropped", logits(model, ids[:, 9:], begun)[0], expected)
        begun.crop(-8)
        begun.reorder_cache(torch.tensor([1, 0]))
        note(f"{name}: reordered", logits(model, ids[:, 9:].flip(0), begun)[0], expected.flip(0))
        begun.crop(-8)
        begun.batch_repeat_interleave(2)
        again = ids[:, 9:].flip(0).repeat_interleave(2, 0)
        note(f"{name}: repeated", logits(model, again, begun)[0], expected.flip(0).repeat_interleave(2, 0))
        begun.crop(-8)
        begun.batch_select_indices(torch.tensor([3]))
        note(f"{name}: selected", logits(model, ids[:1, 9:], begun)[0], expected[:1])
        assert begun.get_seq_length() == PROMPT
    return found


def test_calls_of_the_model_go_on_from_caches() -> None:
    for found in run_ranks(3, continued, timeout=120):
        assert len(found) == 4 * len(CUTS) + 4 * 3 + 3 + 3 * 4
        assert not {name: error for name, error in found.items() if not error < 1e-5}


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
        assert not {name: error for name, error in found.items() if not error < 1e-5}


def images() -> float:
    from sp_attention.cli.reduced import prepare

    reference, batches = prepare("qwen2_vl", "image-text-to-text", PROMPT)
    batch = {name: value for name, value in batches["pixels"].items() if name != "labels"}
    assert "pixel_values" in batch
    reference.eval()
    model = copy.deepcopy(reference)
    sp_attention.enable(model)
    return distance(generated(model, batch, **GREEDY), generated(reference, batch, **GREEDY))


def sounds() -> float:
    from sp_attention.cli.reduced import prepare

    reference, batches = prepare("whisper", "speech-seq2seq", PROMPT)
    batch = {"input_features": batches["plain"]["input_features"]}
    reference.eval()
    reference.generation_config = GenerationConfig(decoder_start_token_id=1, pad_token_id=0)
    model = copy.deepcopy(reference)
    sp_attention.enable(model)
    return distance(generated(model, batch, **GREEDY), generated(reference, batch, **GREEDY))


@pytest.mark.parametrize("what", [images, sounds])
def test_prompts_of_images_and_sound(what: Callable[[], float]) -> None:
    assert max(run_ranks(3, what, timeout=120)) < 1e-5


def gradients_through_a_cache(name: str) -> float:
    """The largest relative error of a gradient of the loss of what follows a cache, with respect to all parameters."""
    reference, model = pair(name)
    ids, errors = prompt(model), []
    for each in (model, reference):
        _, filled = logits(each, ids[:, :9])
        each(input_ids=ids[:, 9:], past_key_values=filled, labels=ids[:, 9:]).loss.backward()
    sp_attention.average_gradients(model)
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        errors.append(((mine.grad - other.grad).abs().max() / other.grad.abs().max()).item())
    return max(errors)


# Of the second, a rank has no heads.
@pytest.mark.parametrize(("name", "ranks"), [("llama-5q1kv", 2), ("llama-2q1kv", 3)])
def test_gradients_go_through_a_cache(name: str, ranks: int) -> None:
    assert max(run_ranks(ranks, gradients_through_a_cache, name, timeout=120)) < 1e-5


def collectives() -> dict[str, dict[str, int]]:
    model = Tiny("LlamaForCausalLM", {"num_hidden_layers": 3}).build().eval()
    sp_attention.enable(model, "sdpa")
    ids, found, past = prompt(model), {}, None
    with torch.no_grad():
        for name, some in (("prompt", ids), ("token", ids[:, :1])):
            with CommDebugMode() as mode:
                _, past = logits(model, some, past)
            found[name] = {str(op): count for op, count in mode.get_comm_counts().items() if count}
    return found


def test_a_decoded_token_takes_one_collective_in_each_layer() -> None:
    for found in run_ranks(2, collectives):
        # Three layers; one more is the agreement on the batch, and one gathers the hidden states of a prompt.
        assert found["prompt"] == {"c10d.alltoall_base_": 9, "c10d.allgather_": 2}
        assert found["token"] == {"c10d.allgather_": 3 + 1}


@torch.no_grad()
def refusals() -> dict[str, str]:
    reference, model = MODELS["llama-6q3kv"].build().eval(), MODELS["llama-6q3kv"].build().eval()
    handle = sp_attention.enable(model, "sdpa")
    ids, texts = prompt(model), {}
    _, filled = logits(model, ids)
    quantised = QuantizedCache("fp8", model.config)
    logits(reference, ids, quantised)

    def suspended() -> None:
        with handle.suspended():
            logits(model, ids[:, :1], copy.deepcopy(filled))

    def of_another_group() -> None:
        other = MODELS["llama-6q3kv"].build().eval()
        sp_attention.enable(other, "sdpa", sp_size=2)
        logits(other, ids[:, :1], copy.deepcopy(filled))

    attempts: dict[str, Callable[[], object]] = {
        "suspended": suspended,
        "by a model on its own": lambda: logits(reference, ids[:, :1], copy.deepcopy(filled)),
        "of another group": of_another_group,
        "disabled": lambda: (handle.disable(), logits(model, ids[:, :1], filled)),
    }
    for name, attempt in attempts.items():
        with pytest.raises(UnsupportedError) as refusal:
            attempt()
        texts[name] = str(refusal.value)
    # Quantised numbers are of all heads, so this one goes on anywhere.
    logits(reference, ids[:, :1], quantised)
    # What was begun on its own may go on with others.
    _, begun = logits(model, ids[:, :9])
    sp_attention.enable(model, "sdpa")
    torch.testing.assert_close(logits(model, ids[:, 9:], begun)[0], logits(reference, ids)[0][:, 9:])
    return texts


def test_caches_of_other_heads_are_refused_and_say_what_to_do() -> None:
    for texts in run_ranks(4, refusals, timeout=120):
        for name in ("suspended", "by a model on its own", "disabled"):
            assert texts[name].startswith(
                "this cache was filled under sequence parallelism and holds this rank's heads"
            )
            assert "run the prompt again with a new cache, or keep the model enabled" in texts[name]
        assert "the cache holds the heads of rank" in texts["of another group"]


@torch.no_grad()
def not_causal_by_its_own_words() -> tuple[float, str]:
    tiny = Tiny("GemmaForCausalLM", {"use_bidirectional_attention": True})
    reference, model = tiny.build().eval(), tiny.build().eval()
    sp_attention.enable(model, "sdpa")
    ids, steps = prompt(model), []
    padding = torch.ones_like(ids)
    padding[0, :6] = 0
    for each in (model, reference):
        _, filled = logits(each, ids, attention_mask=padding)
        steps.append(logits(each, ids[:, :1], filled)[0])
    with pytest.raises(UnsupportedError) as refusal:
        logits(model, ids)
    return ((steps[0] - steps[1]).abs().max() / steps[1].abs().max()).item(), str(refusal.value)


def test_attention_that_says_it_is_not_causal_takes_a_causal_mask_for_one_token_only() -> None:
    for error, text in run_ranks(2, not_causal_by_its_own_words):
        assert error < 1e-5
        assert "model.layers.0.self_attn says that it is not causal, and is given a causal mask" in text
        assert "Give an attention_mask [B, 1, S, S] of your own" in text


def encoder_by_itself() -> str:
    from sp_attention.cli.reduced import prepare

    # Its encoder is no model of transformers.
    model, batches = prepare("fsmt", "seq2seq-lm", PROMPT)
    inputs = {"input_ids": batches["plain"]["input_ids"]}
    expected = generated(model.eval(), inputs, **GREEDY)
    handle = sp_attention.enable(model, "sdpa")
    with pytest.raises(UnsupportedError) as refusal:
        generated(model, inputs, **GREEDY)
    with handle.suspended():
        assert distance(generated(model, inputs, **GREEDY), expected) < 1e-5
    return str(refusal.value)


def test_an_encoder_that_is_called_by_itself_is_refused_and_says_what_to_do() -> None:
    for text in run_ranks(2, encoder_by_itself):
        assert text == (
            "model.encoder.layers.0 is called outside of a forward of its model, as generate() calls an encoder, and "
            "nothing tells what sequence it is of: do this within handle.suspended(), by the whole model on every rank"
        )


def unlike_each_other() -> dict[str, str]:
    model, rank = MODELS["llama-6q3kv"].build().eval(), dist.get_rank()
    torch.manual_seed(rank)
    handle = sp_attention.enable(model, "sdpa")
    # What is sampled comes later.
    assert handle.refuses_caches is None
    torch.manual_seed(0)
    ids, texts = prompt(model), {}

    def sampled() -> None:
        torch.manual_seed(rank)
        try:
            model.generate(ids, do_sample=True, max_new_tokens=1)
        finally:
            torch.manual_seed(0)

    def chosen() -> None:
        # No token that ends the text.
        other = LogitsProcessorList([lambda ids, scores: scores.index_fill(1, torch.tensor([3 + rank]), 1e9)])
        model.generate(ids, do_sample=False, max_new_tokens=4, logits_processor=other)

    def ended() -> None:
        early = StoppingCriteriaList([lambda ids, _: torch.full((len(ids),), rank == 1 and ids.shape[1] > PROMPT + 1)])
        model.generate(ids, do_sample=False, max_new_tokens=4, stopping_criteria=early, synced_gpus=True)

    def cached() -> None:
        past = DynamicCache(config=model.config)
        logits(model, ids, past)
        if rank == 1:
            past.crop(-1)
        logits(model, ids[:, :1], past)

    def masked() -> None:
        mask = torch.ones_like(ids)
        mask[0, : rank + 1] = 0
        positions = torch.arange(PROMPT).expand(2, -1)
        static = {"cache_implementation": "static", "position_ids": positions}
        model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, **static)

    attempts: dict[str, Callable[[], object]] = {
        "seeds": sampled,
        "tokens": chosen,
        "ends": ended,
        "prompts": lambda: model.generate(ids + rank, max_new_tokens=2, do_sample=False),
        "lengths": lambda: model.generate(ids[:, rank:], max_new_tokens=2, do_sample=False),
        "caches": cached,
        "masks": masked,
    }
    for name, attempt in attempts.items():
        with pytest.raises(BatchError) as error:
            attempt()
        texts[name] = str(error.value)
    return texts


def test_ranks_that_sample_or_are_given_something_else_all_end_with_an_error() -> None:
    first, *others = run_ranks(3, unlike_each_other, timeout=120)
    assert others == [first] * 2
    assert "(random state) differs on rank 1, rank 2 from rank 0" in first["seeds"]
    assert "seed them alike before generate()" in first["seeds"]
    assert "input_ids differs on rank 1, rank 2 from rank 0" in first["tokens"]
    assert "input_ids differs on rank 1 from rank 0" in first["ends"]
    for name in ("prompts", "lengths"):
        assert "input_ids differs" in first[name]
    assert "(tokens in the cache) differs on rank 1 from rank 0" in first["caches"]
    assert "attention_mask, padding differs" in first["masks"]


def generate_until_dead() -> None:
    model = MODELS["llama-6q3kv"].build().eval()
    sp_attention.enable(model, "sdpa")

    def die(ids: Tensor, scores: Tensor) -> Tensor:
        if dist.get_rank() == 1 and ids.shape[1] == PROMPT + 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return scores

    model.generate(prompt(model), max_new_tokens=6, do_sample=False, logits_processor=LogitsProcessorList([die]))


def test_when_a_rank_dies_while_it_generates_the_others_end_with_an_error() -> None:
    with pytest.raises(RanksError) as error:
        run_ranks(3, generate_until_dead, timeout=100)
    sections = str(error.value).split("--- rank ")[1:]
    assert "exited with code -9" in sections[1]
    for rank in (0, 2):
        assert "RuntimeError" in sections[rank] or "DistBackendError" in sections[rank]
