"""Who holds which tokens: integers only."""


def span_of(rank: int, length: int, ranks: int) -> range:
    """The span of one rank in `spans(length, ranks)`."""
    size, extra = divmod(length, ranks)
    start = rank * size + min(rank, extra)
    return range(start, start + size + (rank < extra))


def spans(length: int, ranks: int) -> tuple[range, ...]:
    """Cut `length` tokens (or heads) into `ranks` neighbouring spans whose sizes differ by at most one."""
    return tuple(span_of(rank, length, ranks) for rank in range(ranks))
