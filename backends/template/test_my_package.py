"""The kernel is exact in everything that it does not refuse, gradients included; and it refuses no more than this."""

from my_package import sp_attention_backends

from sp_attention import testing

REFUSED = ("softcap", "attention sinks", "attention sinks, sliding window", "dropout")
REFUSED += ("additive bias", "additive bias by head")


def test_exact_or_refused() -> None:
    (backend,) = sp_attention_backends()
    testing.conform(backend, refused=REFUSED)
