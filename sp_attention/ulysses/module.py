"""The door for models that are not of transformers: attention over a sequence of which each rank holds a span."""

import torch
from torch import Tensor, nn

from sp_attention.distributed.consistency import share_problem
from sp_attention.distributed.fingerprint import fingerprint
from sp_attention.distributed.peers import Peers
from sp_attention.distributed.process_groups import Group, resolve
from sp_attention.kernels.registry import candidates
from sp_attention.kernels.request import Backend, Mask, Request
from sp_attention.ulysses.attention import Kernel, attend, plan_of, requests_of_all_ranks, require_done
from sp_attention.ulysses.head_plan import head_plan


class UlyssesAttention(nn.Module):
    """Attention of my span's queries to the keys of all spans, in two collectives; a module without parameters.

    backend: the kernel, such as "sdpa"; "auto" takes the one of highest priority that does what a call asks.
    group, sp_size: the ranks that share a sequence, as in `sp_attention.enable`; by default all processes. Every rank
        must make the module: under torchrun it starts the process group if there is none.
    device: the device type of the tensors that will be given.

    Raises BackendError for a backend that is unknown or cannot be used, ValueError for a group that does not fit.
    """

    def __init__(
        self,
        backend: str = "auto",
        *,
        group: Group | None = None,
        sp_size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.peers = resolve(group, sp_size, torch.device(device))
        self.backends = candidates(torch.device(device).type, backend)

    def span(self, length: int) -> range:
        """The tokens of a sequence of `length` that this rank holds."""
        return range(length) if self.peers is None else self.peers.span(length)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        length: int,
        mask: Mask | None = None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """query [B, s, H, D], key [B, s, Hkv, D], value [B, s, Hkv, Dv] → [B, s, H, Dv], one float dtype, kept.

        s are the tokens of `span(length)`; H is a multiple of Hkv, and neither they nor `length` need be divisible by
        the number of ranks. All else is of the whole sequence and of all heads, and equal on every rank: `mask`, by
        default causal; `sinks` [H]; `bias` [1|B, 1|H, 1|S, S], added to the scores; `scale`, by default D ** -0.5.

        Gradients are those of the sum of all ranks' losses, so that each rank computes the loss of its span and
        gradients of weights are added up over ranks.

        One small collective before the exchange compares what ranks were given, so that all raise where some differ:
        ValueError for shapes that do not fit the length or each other, BackendError for what the kernel does not do.
        """
        _require_alike(query, key, value, length, self.peers)
        mask = mask if mask is not None else Mask(query.shape[0], length, length, query.device)
        scale = query.shape[3] ** -0.5 if scale is None else scale
        request = Request(query, key, value, mask, scale, softcap, sinks, bias, dropout)
        if self.peers is None:
            return _chosen(self.backends, [request])(request)[0]
        by_heads = head_plan(query.shape[2], key.shape[2], self.peers.size)
        kernel = _chosen(self.backends, requests_of_all_ranks(request, by_heads))
        return attend(request, length, plan_of(request, self.peers.size, kernel), self.peers, kernel)[0]


def _chosen(backends: tuple[Backend, ...], requests: list[Request]) -> Kernel:
    """The first that does all requests; else the first, which says why it does not."""
    kernels = [Kernel(backend) for backend in backends]
    chosen = next((kernel for kernel in kernels if not any(map(kernel.why_not, requests))), kernels[0])
    require_done(requests, chosen, "UlyssesAttention")
    return chosen


def _require_alike(query: Tensor, key: Tensor, value: Tensor, length: int, peers: Peers | None) -> None:
    """Raise ValueError, on every rank, unless all ranks have their spans, of tensors that fit each other."""
    problem = _problem(query, key, value, length, length if peers is None else len(peers.span(length)))
    if peers is None:
        if problem is not None:
            raise ValueError(problem)
        return
    given = f"S {length}, q, k, v [{query.shape[0]}, s, …] {[*query.shape[2:], *key.shape[2:], *value.shape[2:]]}"
    mine = torch.tensor([problem is not None, fingerprint(f"{given} {query.dtype}".encode())], device=query.device)
    has_problem, fingerprints = torch.stack(peers.all_gather(mine)).T.tolist()
    if any(has_problem):
        share_problem(None if problem is None else ValueError(f"rank {peers.rank}: {problem}"), peers)
    elif len(set(fingerprints)) > 1:
        text = f"not all ranks are given the same length, heads, sizes and dtype; rank {peers.rank} has {given}"
        share_problem(ValueError(f"{text}, {query.dtype}"), peers)


def _problem(query: Tensor, key: Tensor, value: Tensor, length: int, tokens: int) -> str | None:
    """What does not fit of what this rank is given, None if all does."""
    shapes = [list(tensor.shape) for tensor in (query, key, value)]
    given = f"queries {shapes[0]}, keys {shapes[1]} and values {shapes[2]}"
    if {query.dim(), key.dim(), value.dim()} != {4}:
        return f"{given} are not of four dims [B, s, H, D]"
    if not query.shape[:2] == key.shape[:2] == value.shape[:2] or query.shape[1] != tokens:
        return f"{given} are not of one batch and of {tokens} tokens, which module.span({length}) has on this rank"
    if query.shape[3] != key.shape[3] or key.shape[2] != value.shape[2] or query.shape[2] % key.shape[2]:
        return f"{given} do not fit each other: query and key heads have one size, and KV heads divide query heads"
    if not query.dtype == key.dtype == value.dtype:
        return f"queries, keys and values are of several dtypes: {query.dtype}, {key.dtype}, {value.dtype}"
    return None
