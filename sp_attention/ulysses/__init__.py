"""The whole idea on plain tensors: trade sequence for heads, attend, trade back. Usable without transformers.

`sp_attention.ulysses.module.UlyssesAttention` is the door: a module that a model of any kind calls as its attention.
"""
