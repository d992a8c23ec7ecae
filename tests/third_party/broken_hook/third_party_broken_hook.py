"""A plugin that misspells the hook."""

import sp_attention


@sp_attention.hookimpl
def sp_attention_backend() -> list[sp_attention.Backend]:
    return []
