"""Numbers that tell texts and states apart, the same in every process, unlike hash()."""

import hashlib


def fingerprint(data: bytes) -> int:
    """62 bits of BLAKE2b, so that an int64 holds them and one more."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, usedforsecurity=False).digest(), "big") >> 2
