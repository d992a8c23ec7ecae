"""Trainer: torchrun --nproc-per-node 2 examples/trainer.py"""

import torch
from data import Bytes
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import sp_attention
from sp_attention.integrations.transformers import sequence_parallel

set_seed(0)
args = TrainingArguments(
    "trainer-output",
    max_steps=8,
    per_device_train_batch_size=2,
    eval_strategy="steps",
    eval_steps=4,
    logging_steps=2,
    save_strategy="no",
    report_to=[],
    use_cpu=not torch.accelerator.is_available(),
)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).to(args.device)

sp_attention.enable(model)  # all processes share each sequence; sp_size=2 makes groups of 2
trainer = sequence_parallel(Trainer)(model=model, args=args, train_dataset=Bytes(64, 257), eval_dataset=Bytes(9, 257))
trainer.train()
