"""TRL's SFTTrainer: torchrun --nproc-per-node 2 examples/sft.py"""

from pydoc_data.topics import topics

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

import sp_attention
from sp_attention.integrations.transformers import sequence_parallel

set_seed(0)
args = SFTConfig(
    "sft-output",
    max_steps=8,
    per_device_train_batch_size=2,
    learning_rate=1e-3,
    logging_steps=2,
    save_strategy="no",
    report_to=[],
    bf16=torch.accelerator.is_available(),
    use_cpu=not torch.accelerator.is_available(),
)
# A tokenizer of bytes, and a model without training; yours come from `from_pretrained`.
vocabulary = {token: number for number, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"])}
bytes_of = Tokenizer(models.BPE(vocabulary, []))
bytes_of.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_of, eos_token="<end>", pad_token="<end>")
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes)).to(args.device)
data = Dataset.from_list([{"text": text[:500]} for text in topics.values()])

sp_attention.enable(model)  # all processes share each sequence; sp_size=2 makes groups of 2
trainer = sequence_parallel(SFTTrainer)(model=model, args=args, train_dataset=data, processing_class=tokenizer)
trainer.train()
