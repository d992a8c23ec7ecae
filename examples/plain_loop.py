"""A loop of one's own, without any engine: torchrun --nproc-per-node 2 examples/plain_loop.py"""

import torch
from data import Bytes
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

import sp_attention

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))

handle = sp_attention.enable(model)
data = Bytes(32, 257)
# By group, and not by process: the ranks of a group need the same batches.
sampler = DistributedSampler(data, handle.data_parallel_size, handle.data_parallel_rank)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

for step, batch in enumerate(DataLoader(data, batch_size=2, sampler=sampler)):
    loss = model(**batch).loss
    loss.backward()
    sp_attention.average_gradients(model)  # DDP and FSDP2 do this themselves
    optimizer.step()
    optimizer.zero_grad()
    print(f"batch {step}: loss {loss.item():.4f}")
