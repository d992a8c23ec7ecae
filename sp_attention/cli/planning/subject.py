"""What a plan is of: a configuration of transformers, from a type, a folder, or sizes; and numbers with units."""

import re
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from sp_attention.cli.planning.meta_model import NotPlannableError

# Words of the command line, and fields of a configuration.
_SIZES = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
}
_OF_EXPERTS = {
    "experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "moe_intermediate": "moe_intermediate_size",
}
_NEEDED = ("hidden", "layers", "heads", "intermediate", "vocab")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_BYTES = {"GB": 10**9, "GIB": 2**30, "TB": 10**12, "MB": 10**6, "MIB": 2**20}


def configuration(words: str) -> PreTrainedConfig:
    """Raises NotPlannableError with the reason, and what to do, for what is none of the three."""
    if "=" in words:
        return _of_sizes(words)
    folder = Path(words)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise NotPlannableError(f"the folder {words} has no config.json: give the folder that a model was saved in")
        found: PreTrainedConfig = AutoConfig.from_pretrained(folder)
        return found
    try:
        found = AutoConfig.for_model(words)
    except ValueError as error:
        raise NotPlannableError(
            f"'{words}' is no folder, and no type of models of transformers {transformers.__version__}; or give sizes, "
            "as in hidden=4096,layers=32,heads=32,kv_heads=8,intermediate=14336,vocab=128256"
        ) from error
    return found


def _of_sizes(words: str) -> PreTrainedConfig:
    """A Llama of these sizes, or with `experts` a Qwen3-MoE."""
    given: dict[str, int] = {}
    known = _SIZES | _OF_EXPERTS
    for word in words.split(","):
        name, _, number = word.partition("=")
        if name not in known:
            raise NotPlannableError(f"'{name}' is no size; these are: {', '.join(known)}")
        if not number.isdigit() or int(number) < 1:
            raise NotPlannableError(f"{name}='{number}' is no number")
        given[name] = int(number)
    has_experts = not _OF_EXPERTS.keys().isdisjoint(given)
    missing = [name for name in (*_NEEDED, *(_OF_EXPERTS if has_experts else ())) if name not in given]
    if missing:
        raise NotPlannableError(f"these sizes are missing: {', '.join(missing)}")
    given.setdefault("kv_heads", given["heads"])
    settings: dict[str, Any] = {known[name]: number for name, number in given.items()}
    kind = transformers.Qwen3MoeConfig if has_experts else transformers.LlamaConfig
    return kind(**settings)


def tokens(words: str) -> int:
    """1M is 1,048,576, as 1K is 1,024. Raises ValueError."""
    found = re.fullmatch(r"(\d+)([KMG]?)", words.upper())
    if found is None or not int(found[1]):
        raise ValueError(f"{words!r} is no number of tokens: give such as 131072, 128K or 1M")
    return int(found[1]) * _UNITS[found[2]]


def size(words: str) -> int:
    """80GB is 80,000,000,000 bytes, and 80GiB 2**30 times 80. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Z]+)", words.upper())
    if found is None or found[2] not in _BYTES or not float(found[1]):
        raise ValueError(f"{words!r} is no size of memory: give such as 80GB or 40GiB")
    return int(float(found[1]) * _BYTES[found[2]])
