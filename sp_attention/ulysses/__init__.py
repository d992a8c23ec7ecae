"""The whole idea on plain tensors: trade sequence for heads, attend, trade back. Usable without transformers."""
