"""A model that generates on several ranks, against itself in one process: tokens, scores, and what a rank caches."""

import copy
import re
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

import sp_attention
from sp_attention.cli.comparison import ROUNDING, Batch, merged, parts_of, shake, tolerance
from sp_attention.cli.differences import error_of
from sp_attention.cli.outcomes import (
    DIFFERS,
    EXACT,
    FAILED,
    NOT_COMPARABLE,
    REFUSED,
    Comparison,
    Verdict,
)
from sp_attention.region.kv_cache import layers_of
from sp_attention.region.pytree import tensors
from sweep.running import Record

# No number of ranks divides the prompt, with padding or an image or neither.
LENGTH, NEW, PADDING = 19, 7, 6
NAMED: dict[str, tuple[str, ...]] = {
    "causal-lm": (
        "llama",
        "mistral",
        "gemma3_text",
        "qwen3_moe",
        "gpt_oss",
        "deepseek_v3",
        "gpt2",
        "lfm2",
        "qwen3_next",
    ),
    "seq2seq-lm": ("t5", "bart"),
    "speech-seq2seq": ("whisper",),
    "image-text-to-text": ("qwen2_vl",),
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "left padding": {},
    "chunked prefill": {"prefill_chunk_size": 7},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
}
# In which every type is compared, and those that take one row at a time.
OF_EVERY_TYPE = ("greedy", "left padding")
OF_ONE_ROW = ("prompt lookup", "assisted")


def compare(model: PreTrainedModel, batches: dict[str, Batch], modes: tuple[str, ...]) -> Record:
    """Generate in every mode by a copy of the model alone and by the model on all ranks; the same on every rank.

    model: whole on every rank, with equal weights. batches: by kind; one with images is taken if there is one. The
    record is that of a `Comparison` and says too what caches hold, `caches`, how much of one process' bytes this rank's
    are after greedy generation, `share`, and may be, `allowed`; None where nothing is cached.
    """
    prompt = {
        name: value
        for name, value in batches.get("pixels", batches.get("plain", {})).items()
        if name not in ("labels", "use_cache")
    }
    model.eval()
    # Nothing ends early, and caches are used where a configuration says otherwise; of all models inside too, since some
    # generate by one of those.
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.can_generate():
            settings = module.generation_config
            settings.eos_token_id, settings.pad_token_id, settings.use_cache = None, 0, True
    alone, draft = copy.deepcopy(model), copy.deepcopy(model)
    shake(draft, 0.1)
    # Few candidates, however unsure the draft is of them, so that some are taken and some taken back.
    draft.generation_config.num_assistant_tokens = 3
    draft.generation_config.assistant_confidence_threshold = 0.0
    try:
        handle = sp_attention.enable(model)
    except sp_attention.UnsupportedError as error:
        return asdict(Comparison((), refused=str(error)))
    verdicts, shares = [], None
    with handle:
        found = re.search(r"^ *key/value caches (.*)$", handle.report(), re.MULTILINE)
        caches = found[1] if found else ""
        for mode in modes:
            inputs = _inputs(prompt, mode)
            if inputs is None:
                continue
            options = MODES[mode] | ({"assistant_model": draft} if mode == "assisted" else {})
            verdict, both = _compared(alone, model, inputs, options)
            verdicts.append(replace(merged(verdict), kind=mode))
            if mode == "greedy" and both is not None:
                shares = _shares(*both, caches)
        everyone: list[tuple[float, float] | None] = [shares] * dist.get_world_size()
        dist.all_gather_object(everyone, shares)
        share, allowed = max((shares for shares in everyone if shares), default=(None, None), key=lambda pair: pair[0])
        comparison = Comparison(tuple(verdicts), handle.backend.kernel, parts=parts_of(handle))
        return asdict(comparison) | {"caches": caches, "share": share, "allowed": allowed}


def _inputs(prompt: Batch, mode: str) -> Batch | None:
    """The prompt as a mode wants it; None where there is nothing to pad."""
    ids = prompt.get("input_ids")
    rows = len(next(iter(prompt.values()))) if ids is None else len(ids)
    if mode == "left padding":
        if ids is None:
            return None
        longer = {
            name: torch.cat([value[:, :1].expand(-1, PADDING, *value.shape[2:]), value], 1)
            for name, value in prompt.items()
            if value.shape[:2] == ids.shape
        }
        mask = torch.ones_like(longer["input_ids"])
        mask[0, :PADDING] = 0
        return prompt | longer | {"attention_mask": mask}
    if mode in OF_ONE_ROW:
        prompt = {name: value[: len(value) // rows] for name, value in prompt.items()}
    if mode == "prompt lookup" and ids is not None:
        # Its last words once more, so that there is something to look up.
        prompt["input_ids"] = torch.cat([prompt["input_ids"][:, :-2], prompt["input_ids"][:, -6:-4]], 1)
    return prompt


def _compared(
    alone: PreTrainedModel, model: PreTrainedModel, inputs: Batch, options: dict[str, Any]
) -> tuple[Verdict, tuple[Any, Any] | None]:
    """This rank's verdict, and what the model on all ranks and the one alone generated."""
    try:
        expected = _generated(alone, inputs, options)
    except Exception as error:  # the model itself does not generate so
        return Verdict("", NOT_COMPARABLE, reason=f"not possible in one process: {_told(error)}"), None
    if any(score.isnan().any() for score in expected.scores):
        return Verdict("", NOT_COMPARABLE, reason="not possible in one process: some scores are no number"), None
    try:
        ours = _generated(model, inputs, options)
    except sp_attention.UnsupportedError as error:
        return Verdict("", REFUSED, reason=str(error)), None
    except Exception as error:
        return Verdict("", FAILED, reason=_told(error)), None
    error, where = _distance(ours, expected)
    exact = error <= tolerance(model)
    if not exact and error <= ROUNDING:
        # By more than the tolerance, and yet the same, where the model itself is no more precise.
        shaken = copy.deepcopy(alone)
        shake(shaken, 1e-8)
        exact = error <= 10 * _distance(_generated(shaken, inputs, options), expected)[0]
    return Verdict("", EXACT if exact else DIFFERS, error, where), (ours, expected)


def _generated(model: PreTrainedModel, inputs: Batch, options: dict[str, Any]) -> Any:
    torch.manual_seed(5)
    return model.generate(
        **{name: value.clone() for name, value in inputs.items()},
        **{"do_sample": False, "max_new_tokens": NEW} | options,
        output_scores=True,
        return_dict_in_generate=True,
    )


def _distance(ours: Any, expected: Any) -> tuple[float, str]:
    """The largest relative error of a score, and where; infinite if a token differs, or what is impossible."""
    if not torch.equal(ours.sequences, expected.sequences):
        return float("inf"), "tokens differ"
    if len(ours.scores) != len(expected.scores):
        return float("inf"), f"{len(ours.scores)} scores in place of {len(expected.scores)}"
    worst, where = 0.0, "scores"
    for step, (score, other) in enumerate(zip(ours.scores, expected.scores, strict=True)):
        if not torch.equal(score.isfinite(), other.isfinite()):
            return float("inf"), f"what is impossible at new token {step}"
        error = error_of(score, other)
        if error is not None and error > worst:
            worst, where = error, f"scores of new token {step}"
    return worst, where


def _shares(ours: Any, expected: Any, caches: str) -> tuple[float, float] | None:
    """What this rank's cache is of one process' cache in bytes, and what it may be; None where nothing is cached."""
    pairs = [*zip(_layers(ours), _layers(expected), strict=True)]
    mine, whole = (sum(map(_bytes, layers)) for layers in zip(*pairs, strict=True)) if pairs else (0, 0)
    if not whole:
        return None
    # Layers that are whole on every rank, by what the handle says.
    said = re.search(r"all but (\d+)", caches)
    uncut = int(said[1]) if said else 0 if caches.startswith("hold") else len(pairs)
    allowed = 0.0
    for layer, other in pairs:
        heads = getattr(other, "keys", None)
        share = 1.0 if heads is None else min(1.0, 1 / dist.get_world_size() + 1 / heads.shape[1])
        if share < 1 and uncut and layer.keys.shape[1] == heads.shape[1]:
            uncut, share = uncut - 1, 1.0
        allowed += share * _bytes(other)
    return mine / whole, allowed / whole


def _layers(output: Any) -> list[Any]:
    cache = output.get("past_key_values")
    return layers_of(cache) if isinstance(cache, Cache) else []


def _bytes(layer: Any) -> int:
    """Memory for keys, values and states, where tensors share it too."""
    stored = [tensor.untyped_storage() for _, tensor in tensors(vars(layer)) if tensor.is_floating_point()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in stored}.values())


def _told(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    # Some errors begin with all of a model, and end with what is wrong.
    return text if len(text) <= 200 else f"{text[:60]} ... {text[-130:]}"
