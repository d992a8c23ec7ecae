"""Who computes which heads: integers only."""

from dataclasses import dataclass
from functools import cache, cached_property

from sp_attention.distributed.partition import spans


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """Which heads each rank computes.

    `query[rank]` are the query heads of a rank; together they are all heads, once each. `kv[rank]` are the key/value
    heads those query heads attend to; a KV head whose group of query heads spans two ranks appears on both. Plans are
    made once, by `head_plan`, and so is all that follows from them.
    """

    query: tuple[range, ...]
    kv: tuple[range, ...]
    queries_per_kv: int

    @cached_property
    def stored(self) -> tuple[range, ...]:
        """The KV heads that each rank keeps in a cache: its own, or else the last, since a cache tells its length."""
        return _stored(self.kv)

    def kv_of_query(self, rank: int) -> tuple[int, ...]:
        """For each of this rank's query heads, the place of its KV head among this rank's KV heads."""
        return tuple(head // self.queries_per_kv - self.kv[rank].start for head in self.query[rank])

    @cached_property
    def grouped(self) -> tuple[bool, ...]:
        """For each rank, whether its query head i uses KV head i // (h // hkv), as grouped-query kernels assume."""
        return tuple(self._is_grouped(rank) for rank in range(len(self.query)))

    @cached_property
    def kinds(self) -> tuple[tuple[int, int, int], ...]:
        """The numbers of query and of KV heads that kernels are given, each pair once, with the first rank that has it.

        Where they are not grouped, each query head is given its KV head.
        """
        return _kinds(self)

    def _is_grouped(self, rank: int) -> bool:
        if not len(self.query[rank]):
            return True
        size, rest = divmod(len(self.query[rank]), len(self.kv[rank]))
        return not rest and all(kv == i // size for i, kv in enumerate(self.kv_of_query(rank)))


@cache
def head_plan(query_heads: int, kv_heads: int, ranks: int) -> HeadPlan:
    """Share out `query_heads` over `ranks` so that sizes differ by at most one, each with the KV heads it needs.

    No divisibility is asked of `ranks`; with more ranks than heads the last ranks compute none.
    Raises ValueError when `kv_heads` does not divide `query_heads`, as grouped-query attention demands.
    """
    return _shared_out(query_heads, kv_heads, ranks)


# Apart from caches and properties, which mutation testing does not look behind.
def _shared_out(query_heads: int, kv_heads: int, ranks: int) -> HeadPlan:
    if kv_heads < 1 or query_heads % kv_heads:
        raise ValueError(f"{query_heads} query heads cannot share {kv_heads} key/value heads evenly")
    group = query_heads // kv_heads
    query = spans(query_heads, ranks)
    kv = tuple(
        range(heads.start // group, (heads.stop - 1) // group + 1) if len(heads) else range(kv_heads, kv_heads)
        for heads in query
    )
    return HeadPlan(query, kv, group)


def _stored(kv: tuple[range, ...]) -> tuple[range, ...]:
    last = kv[-1].stop
    return tuple(heads if len(heads) else range(last - 1, last) for heads in kv)


def _kinds(plan: HeadPlan) -> tuple[tuple[int, int, int], ...]:
    found: dict[tuple[int, int], int] = {}
    for rank, (query, kv) in enumerate(zip(plan.query, plan.kv, strict=True)):
        if len(query):
            found.setdefault((len(query), len(kv) if plan.grouped[rank] else len(query)), rank)
    return tuple((queries, keys, rank) for (queries, keys), rank in found.items())
