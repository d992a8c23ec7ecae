"""Short texts, and a tokenizer of letters for the vocabulary of the tiny models."""

import string

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards brew vexing potions at dawn"
# 23 parts of it, of 12 to 36 letters.
TEXTS = [TEXT[7 * number % 41 :][: 12 + 11 * number % 25] for number in range(23)]


def tokenizer() -> PreTrainedTokenizerFast:
    letters = ["<pad>", "<bos>", "<eos>", "<unk>", " ", *string.ascii_letters]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)
