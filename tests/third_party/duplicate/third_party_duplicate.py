"""A plugin that offers kernels whose names are taken: a third party's, and one of the library's own."""

import sp_attention


def attend(request: sp_attention.Request) -> object:
    raise AssertionError("a duplicate must not be chosen")


@sp_attention.hookimpl
def sp_attention_backends() -> list[sp_attention.Backend]:
    return [
        sp_attention.Backend("cpu", "written-out", attend),
        sp_attention.Backend("any", "sdpa", attend),
        sp_attention.Backend("cpu", "transformers:eager", attend),
    ]
