"""The text of the demo as tokens."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch

if TYPE_CHECKING:
    from sp_attention.cli.training import Training


def write_tokens(training: "Training", text: Path | None) -> None:
    """Write the first `steps * seq` tokens of a text file, or of Python's own documentation, to `training.tokens`.

    A pretrained model brings its tokenizer; for the one made here a byte-level BPE is trained on the text itself.
    """
    words = text.read_text(encoding="utf-8") if text is not None else _python_documentation()
    tokens = _encode_as(training.model, words) if training.model is not None else _encode(words)
    needed = training.steps * training.seq
    if len(tokens) < needed:
        raise click.UsageError(
            f"the text has {len(tokens)} tokens, and {training.steps} steps of {training.seq} need {needed}: give "
            "fewer --steps, a smaller --seq or a longer --text"
        )
    torch.save(torch.tensor(tokens[:needed], dtype=torch.int64), training.tokens)


def _python_documentation() -> str:
    from pydoc_data.topics import topics

    return "\n".join(text for _, text in sorted(topics.items()))


def _encode_as(model: Path, words: str) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(model)(words, verbose=False)["input_ids"]
    return ids


def _encode(words: str) -> list[int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from sp_attention.cli.training import VOCABULARY

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(words.splitlines(keepends=True), trainer)
    ids: list[int] = tokenizer.encode(words).ids
    return ids
