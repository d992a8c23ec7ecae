"""A mixer function called with this rank's span of the tokens: by heads, or with the columns before the span.

Scans trade sequence for heads as attention does (Jacobs et al. 2023, arXiv 2309.14509, section 3), one collective for
each dtype of what they are given, and back with one. The heads of values are shared out as query heads are; keys, or B
and C of a state space, that groups of these have in common go along as key/value heads do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sp_attention.distributed.collectives import gather
from sp_attention.distributed.peers import Peers
from sp_attention.errors import UnsupportedError
from sp_attention.mixers.call import Call
from sp_attention.mixers.declared import Convolution, Cut, Fused, Mixer, Scan
from sp_attention.mixers.halo import with_columns_before
from sp_attention.ulysses.all_to_all import head_to_seq, to_heads
from sp_attention.ulysses.head_plan import HeadPlan, head_plan

# Of two computations of a token: the largest difference, relative to the largest number.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
_LOW_PRECISION_TOLERANCE = 1e-1


def run_shared(mixer: Mixer, call: Call, length: int, peers: Peers) -> Any:
    """What a call with my span of `length` tokens returns for it: on every rank alike, in the same order of calls."""
    if isinstance(mixer, Scan):
        return scan_by_heads(mixer, call, length, peers)
    if isinstance(mixer, Convolution):
        return convolve_span(mixer, call, length, peers)
    assert isinstance(mixer, Fused)
    return None


def convolve_span(convolution: Convolution, call: Call, length: int, peers: Peers) -> Tensor:
    """[B, C, s] of my span → [B, C, s]: with the columns before it, or on all tokens where documents are told."""
    name, span = tensor_of(call, convolution.given)
    _, weight = tensor_of(call, convolution.weight)
    about_all = [call.named.get(argument) for argument in convolution.whole]
    if any(value is not None and value is not False for value in about_all):
        mine = peers.span(length)
        whole: Tensor = call.with_others({name: gather(span, length, peers, 2)}).run()
        return whole[:, :, mine.start : mine.stop]
    columns = weight.shape[-1] - 1
    with_before = with_columns_before(span, columns, length, peers) if columns else span
    result: Tensor = call.with_others({name: with_before}).run()
    return result[:, :, columns:]


def tensor_of(call: Call, names: tuple[str, ...]) -> tuple[str, Tensor]:
    """The argument of a call that has one of these names. Raises UnsupportedError if there is none."""
    for name in names:
        if isinstance(call.named.get(name), Tensor):
            return name, call.named[name]
    raise UnsupportedError(f"{call.function.__name__} is given none of {', '.join(names)}")


def scan_by_heads(scan: Scan, call: Call, length: int, peers: Peers) -> Any:
    """What a scan over all tokens gives for my span of them, where each rank has its span of them, and does its heads.

    More ranks than heads, and uneven heads and groups, are as in `head_plan`. The last state is of all heads.
    """
    given = ScanArguments.of(scan, call)
    plan = head_plan(given.heads, given.groups, peers.size)
    result = run_my_heads(scan, call, given, _exchanged(given, plan, length, peers), plan, peers.rank)
    out, state = result if isinstance(result, tuple) else (result, None)
    normal, rest = heads_last(out, scan.result)
    out = as_it_was(head_to_seq(normal, plan, peers), scan.result, rest)
    if state is not None:
        assert scan.state is not None
        assert scan.state.heads is not None
        state = gather(state, given.heads, peers, scan.state.heads)
    return (out, state) if isinstance(result, tuple) else out


def run_my_heads(
    scan: Scan, call: Call, given: "ScanArguments", arrived: Mapping[str, Tensor], plan: HeadPlan, rank: int
) -> Any:
    """What the function returns for one rank's heads of all tokens, which have `arrived` as [B, S, h, D]."""
    mine = {**arrived, **of_heads(given.without_tokens, plan, rank)}
    if not len(plan.query[rank]):
        return _of_no_heads(scan, call, given, mine)
    if not plan.grouped[rank]:
        mine |= _with_a_group_each(given, mine, plan, rank)
    return call.with_others({name: given.as_given(name, tensor) for name, tensor in mine.items()}).run()


@dataclass(frozen=True)
class ScanArguments:
    """The tensors that a scan is given, by name.

    with_tokens: as [B, S, H, D], and what D was. without_tokens: states, and weights of heads, as they are. heads,
    groups: how many heads are shared out, and how many of those that groups of them have in common.
    """

    cuts: Mapping[str, Cut]
    with_tokens: Mapping[str, tuple[Tensor, torch.Size]]
    without_tokens: Mapping[str, tuple[Tensor, Cut]]
    heads: int
    groups: int

    @staticmethod
    def of(scan: Scan, call: Call) -> "ScanArguments":
        """Raises UnsupportedError where its tensors are not of one number of heads, and of groups that divide it."""
        found = {name: one for name, one in call.named.items() if isinstance(one, Tensor) and name in scan.arguments}
        cuts = {name: scan.arguments[name] for name in found}
        with_tokens = {
            name: heads_last(one, cuts[name]) for name, one in found.items() if cuts[name].tokens is not None
        }
        counts: dict[str, set[int]] = {"query": set(), "kv": set()}
        for name, (tensor, _) in with_tokens.items():
            if cuts[name].heads is not None:
                counts[cuts[name].of].add(tensor.shape[2])
        if len(counts["query"]) != 1 or len(counts["kv"]) > 1:
            raise UnsupportedError(
                f"{call.function.__name__}: its arguments are of {sorted(counts['query'])} heads and "
                f"{sorted(counts['kv'])} groups, and not of one number of each"
            )
        (heads,) = counts["query"]
        groups = counts["kv"].pop() if counts["kv"] else heads
        if heads % groups:
            raise UnsupportedError(f"{call.function.__name__}: {heads} heads do not share {groups} groups evenly")
        without = {name: (one, cuts[name]) for name, one in found.items() if name not in with_tokens}
        return ScanArguments(cuts, with_tokens, without, heads, groups)

    def as_given(self, name: str, tensor: Tensor) -> Tensor:
        """An argument [B, S, h, D] as the function takes it."""
        return as_it_was(tensor, self.cuts[name], self.with_tokens[name][1]) if name in self.with_tokens else tensor


def heads_last(tensor: Tensor, cut: Cut) -> tuple[Tensor, torch.Size]:
    """A tensor with tokens as [B, S, H, D], with one head where all heads share it; and what D was."""
    assert cut.tokens is not None
    moved = tensor.movedim(cut.tokens, 1) if cut.heads is None else tensor.movedim((cut.tokens, cut.heads), (1, 2))
    moved = moved.unsqueeze(2) if cut.heads is None else moved
    rest = moved.shape[3:]
    return (moved.flatten(3) if rest else moved.unsqueeze(3)), rest


def as_it_was(tensor: Tensor, cut: Cut, rest: torch.Size) -> Tensor:
    """The reverse of `heads_last`, of as many heads and tokens as there are now."""
    assert cut.tokens is not None
    tensor = tensor.unflatten(3, rest) if len(rest) > 1 else tensor if rest else tensor.squeeze(3)
    if cut.heads is None:
        return tensor.squeeze(2).movedim(1, cut.tokens)
    return tensor.movedim((1, 2), (cut.tokens, cut.heads))


def of_heads(tensors: Mapping[str, tuple[Tensor, Cut]], plan: HeadPlan, rank: int) -> dict[str, Tensor]:
    """One rank's heads of states and weights."""
    found = {}
    for name, (tensor, cut) in tensors.items():
        heads = (plan.query if cut.of == "query" else plan.kv)[rank]
        found[name] = tensor if cut.heads is None else tensor.narrow(cut.heads, heads.start, len(heads))
    return found


def _exchanged(given: ScanArguments, plan: HeadPlan, length: int, peers: Peers) -> dict[str, Tensor]:
    """[B, s, H, D] each → [B, S, h, D] each, in one collective for each dtype."""
    # What all heads share goes to all ranks that have any, as the one key head of all query heads would.
    of_all = head_plan(given.heads, 1, peers.size)
    batches: dict[tuple[torch.dtype, HeadPlan], list[str]] = {}
    for name, (tensor, _) in given.with_tokens.items():
        one = of_all if given.cuts[name].heads is None else plan
        batches.setdefault((tensor.dtype, one), []).append(name)
    arrived: dict[str, Tensor] = {}
    for (_, one), names in batches.items():
        kinds = tuple("kv" if given.cuts[name].heads is None else given.cuts[name].of for name in names)
        tensors = tuple(given.with_tokens[name][0] for name in names)
        arrived |= zip(names, to_heads(tensors, one, kinds, length, peers), strict=True)
    return arrived


def _with_a_group_each(
    given: ScanArguments, mine: Mapping[str, Tensor], plan: HeadPlan, rank: int
) -> dict[str, Tensor]:
    """What groups have in common, once for each of my heads: these do not share it evenly."""
    places = plan.kv_of_query(rank)
    of_groups = [name for name, cut in given.cuts.items() if cut.of == "kv" and cut.heads is not None]
    return {
        name: mine[name].index_select(2, torch.tensor(places, device=mine[name].device))
        for name in of_groups
        if name in given.with_tokens
    }


def _of_no_heads(scan: Scan, call: Call, given: ScanArguments, mine: Mapping[str, Tensor]) -> Any:
    """What the scan returns where this rank has no heads: nothing, of the right dtype, and part of backward."""
    batch, length = mine[next(iter(given.with_tokens))].shape[:2]
    # What is told of the whole sequence, such as where documents begin, may be refused, and then by every rank.
    is_told_more = any(isinstance(one, Tensor) and name not in given.cuts for name, one in call.named.items())
    tried = on_one_head(scan, call, given, (batch, length) if is_told_more else (1, 1))
    out, state = tried if isinstance(tried, tuple) else (tried, None)
    nothing = sum((tensor.sum().to(out.dtype) for tensor in mine.values()), out.new_zeros(()))
    normal, rest = heads_last(out, scan.result)
    out = as_it_was(normal.new_zeros(batch, length, 0, normal.shape[3]) + nothing, scan.result, rest)
    if state is not None:
        assert scan.state is not None
        assert scan.state.heads is not None
        state = state.new_zeros(batch, *state.shape[1:]).narrow(scan.state.heads, 0, 0)
    return (out, state) if isinstance(tried, tuple) else out


def on_one_head(scan: Scan, call: Call, given: ScanArguments, extent: tuple[int, int] = (1, 1)) -> Any:
    """What the scan returns for one head of so many rows and tokens of zeros: of which dtypes, and how large.

    Of one token it is told nothing of others.
    """
    few: dict[str, Any] = {}
    if extent == (1, 1):
        few = {name: None for name, one in call.named.items() if isinstance(one, Tensor)}
    for name, (tensor, rest) in given.with_tokens.items():
        few[name] = as_it_was(tensor.new_zeros(*extent, 1, tensor.shape[3]), given.cuts[name], rest)
    for name, (tensor, cut) in given.without_tokens.items():
        one = tensor if cut.heads is None else tensor.narrow(cut.heads, 0, 1)
        few[name] = one.detach() if not cut.heads else one.detach()[: extent[0]]
    with torch.no_grad():
        return call.with_others(few).run()


def _require_as_wide_as_its_weight(convolution: Convolution, call: Call) -> None:
    name, span = tensor_of(call, convolution.given)
    columns = tensor_of(call, convolution.weight)[1].shape[-1] - 1
    start = max(columns, span.shape[2] // 2)
    whole = call.run()[:, :, start:]
    later = call.with_others({name: span[:, :, start - columns :]}).run()[:, :, columns:]
    tolerance = _TOLERANCE.get(whole.dtype, _LOW_PRECISION_TOLERANCE)
    if not bool((later - whole).abs().max() <= tolerance * whole.abs().max()):
        raise UnsupportedError(f"{call.function.__name__} looks further back than the {columns} columns of its weight")


def run_alone(mixer: Mixer, call: Call, look: Callable[[Mapping[str, Tensor]], None]) -> Any:
    """In place of a call: a function of each token alone, of what it is given, which `look` sees.

    Raises UnsupportedError for a convolution that is wider than its weight says: a few tokens would not show it.
    """
    if isinstance(mixer, Fused):
        return None
    if isinstance(mixer, Convolution):
        name, span = tensor_of(call, mixer.given)
        look({name: span})
        _require_as_wide_as_its_weight(mixer, call)
        return span
    given = ScanArguments.of(mixer, call)
    look({name: tensor for name, (tensor, _) in given.with_tokens.items()})
    tried = on_one_head(mixer, call, given)
    out, state = tried if isinstance(tried, tuple) else (tried, None)
    normal, rest = heads_last(out, mixer.result)
    of_tokens = [tensor.to(out.dtype).mean(3, keepdim=True) for tensor, _ in given.with_tokens.values()]
    of_heads = [one if one.shape[2] == given.heads else one.mean(2, keepdim=True) for one in of_tokens]
    mixed: Tensor = torch.stack([one.expand(-1, -1, given.heads, -1) for one in of_heads]).sum(0)
    out = as_it_was(mixed.expand(-1, -1, -1, normal.shape[3]).contiguous(), mixer.result, rest)
    return (out, state) if isinstance(tried, tuple) else out
