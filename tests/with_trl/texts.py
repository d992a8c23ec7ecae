"""Short texts, and a tokenizer of letters for the vocabulary of the tiny models."""

import string

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew vexing potions at dawn".split()
TEXTS = [" ".join(WORDS[number % 7 : number % 7 + 2 + number * 5 % 7]) for number in range(23)]


def tokenizer() -> PreTrainedTokenizerFast:
    letters = ["<pad>", "<bos>", "<eos>", "<unk>", " ", *string.ascii_letters]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)
