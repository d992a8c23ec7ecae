"""The kernel is exact in all that it does not refuse, gradients included, and it refuses no more than is said here."""

from my_package import sp_attention_backends

from sp_attention import testing

WITHOUT = ("softcap", "attention sinks", "additive bias", "dropout")


def test_exact_or_refused() -> None:
    (backend,) = sp_attention_backends()
    testing.conform(backend, refused=[feature for feature in testing.FEATURES if feature.startswith(WITHOUT)])
