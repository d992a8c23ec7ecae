"""A loop of one's own with DeepSpeed: torchrun --nproc-per-node 2 examples/deepspeed_loop.py"""

import os

import deepspeed
import torch
from data import Bytes
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

import sp_attention

torch.manual_seed(0)
device = deepspeed.get_accelerator().device_name(int(os.environ["LOCAL_RANK"]))
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).to(device)

handle = sp_attention.enable(model)
data = Bytes(64, 257)
# By group, and not by process, as DeepSpeed's own loader does: the ranks of a group need the same batches.
sampler = DistributedSampler(data, handle.data_parallel_size, handle.data_parallel_rank)
config = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3},
}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

for step, batch in enumerate(DataLoader(data, batch_size=2, sampler=sampler)):
    loss = engine(**{name: tensor.to(engine.device) for name, tensor in batch.items()}).loss
    engine.backward(loss)
    engine.step()
    if engine.global_rank == 0:
        print(f"batch {step}: loss {loss.item():.4f}")
