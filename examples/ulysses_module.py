"""A model that is not of transformers: torchrun --nproc-per-node 2 examples/ulysses_module.py"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import Bytes
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sp_attention.ulysses.module import UlyssesAttention

VOCABULARY, WIDTH, HEADS, LENGTH = 256, 64, 4, 257


class Block(nn.Module):
    """Attention and an MLP, on this rank's span [B, s, E] of a sequence."""

    def __init__(self, attention: UlyssesAttention) -> None:
        super().__init__()
        self.attention, self.norm = attention, nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, hidden: Tensor, length: int) -> Tensor:
        query, key, value = self.qkv(self.norm(hidden)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        hidden = hidden + self.out(self.attention(query, key, value, length).flatten(2))
        return hidden + self.mlp(hidden)


torch.manual_seed(0)
attention = UlyssesAttention("sdpa")
embedding, positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
blocks, head = nn.ModuleList(Block(attention) for _ in range(2)), nn.Linear(WIDTH, VOCABULARY)
model = nn.ModuleList([embedding, positions, blocks, head])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

span = attention.span(LENGTH)
mine = slice(span.start, span.stop)
for step, batch in enumerate(DataLoader(Bytes(32, LENGTH), batch_size=2)):  # the same whole batch on every rank
    ids = batch["input_ids"]
    hidden = embedding(ids[:, mine]) + positions(torch.arange(LENGTH)[mine])
    for block in blocks:
        hidden = block(hidden, LENGTH)
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)[:, mine]
    # A share of the mean over all tokens: the shares of all ranks make the loss, and their gradients its gradient.
    loss = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="sum") / ids[:, 1:].numel()
    loss.backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach()
    dist.all_reduce(total)
    print(f"batch {step}: loss {total.item():.4f}")
