"""A loop of one's own with accelerate: torchrun --nproc-per-node 2 examples/accelerate_loop.py"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from data import Bytes
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import sp_attention
from sp_attention.integrations.accelerate import data_loader

set_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.accelerator.is_available())
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).to(accelerator.device)

handle = sp_attention.enable(model)
loader = data_loader(accelerator, DataLoader(Bytes(32, 257), batch_size=2, shuffle=True), handle)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

for step, batch in enumerate(loader):
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"batch {step}: loss {loss.item():.4f}")
accelerator.end_training()
