"""A plugin that returns something else than backends."""

import sp_attention


@sp_attention.hookimpl
def sp_attention_backends() -> list[str]:
    return ["cuda"]
