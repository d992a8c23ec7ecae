"""`UlyssesAttention` on threads: what it passes on, its defaults, and what every rank is told where one differs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from thread_ranks import OnADevice, ThreadPeers, random, run
from torch import Tensor

from sp_attention import testing
from sp_attention.kernels.request import Backend, Mask, Request
from sp_attention.ulysses import attention, module
from sp_attention.ulysses.module import UlyssesAttention

LENGTH, SIZE, VALUE_SIZE = 7, 4, 3
CPU = torch.device("cpu")


def capless(request: Request) -> str | None:
    return "it has no softcap" if request.softcap else None


def small(request: Request) -> str | None:
    return "it does two heads at most" if request.query.shape[2] > 2 else None


# In the order in which they are tried.
BACKENDS = (
    Backend("cpu", "capless", testing.attend, refuses=capless),
    Backend("cpu", "small", testing.attend, refuses=small),
)


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are peers themselves; backends are ours, each of which notes that it is asked."""

    def resolve(group: Any, sp_size: int | None, device: torch.device) -> Any:
        assert device == CPU
        return group if sp_size is None else sp_size

    def candidates(device: str, backend: str) -> tuple[Backend, ...]:
        assert device == "cpu"
        return tuple(one for one in BACKENDS if backend in ("auto", one.kernel))

    monkeypatch.setattr(module, "resolve", resolve)
    monkeypatch.setattr(module, "candidates", candidates)
    monkeypatch.setattr(attention, "usable", lambda device: BACKENDS)


def qkv(heads: int = 4, kv_heads: int = 2, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    return (
        random(2, length, heads, SIZE, seed=1),
        random(2, length, kv_heads, SIZE, seed=2),
        random(2, length, kv_heads, VALUE_SIZE, seed=3),
    )


def of_span(peers: ThreadPeers, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    span = peers.span(tensors[0].shape[1])
    return tuple(tensor[:, span.start : span.stop] for tensor in tensors)


def asked() -> dict[str, dict[str, Any]]:
    return {
        "nothing": {},
        "scale": {"scale": 0.1},
        "mask": {"mask": Mask(2, LENGTH, LENGTH, CPU, causal=False, window=2)},
        "sinks": {"sinks": random(4, seed=5)},
        "bias": {"bias": random(1, 4, LENGTH, LENGTH, seed=6)},
    }


def as_one(request: str) -> Tensor:
    """Attention of one process, with the defaults that the module has."""
    given = {"mask": Mask(2, LENGTH, LENGTH, CPU), "scale": SIZE**-0.5} | asked()[request]
    return testing.attend(Request(*qkv(), given.pop("mask"), given.pop("scale"), **given))


def as_ranks(peers: ThreadPeers, request: str) -> None:
    door = UlyssesAttention("capless", group=peers)
    assert door.peers is peers
    span = door.span(LENGTH)
    assert span == peers.span(LENGTH)
    given, asks = of_span(peers, qkv()), asked()[request]
    with OnADevice():
        out = door(*given, LENGTH, **asks)
    torch.testing.assert_close(out, as_one(request)[:, span.start : span.stop], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 3], ids="P{}".format)
@pytest.mark.parametrize("request_", asked())
def test_it_is_attention_of_one_process(request_: str, ranks: int) -> None:
    if ranks > 1:
        run(ranks, as_ranks, request_)
    else:
        door = UlyssesAttention("capless")
        assert door.span(LENGTH) == range(LENGTH)
        torch.testing.assert_close(door(*qkv(), LENGTH, **asked()[request_]), as_one(request_))


def dropped(peers: ThreadPeers) -> None:
    """What it has no reference for, and its own mask, it hands to the kernel."""
    seen = []

    def attend(request: Request) -> Tensor:
        seen.append((request.softcap, request.dropout))
        mask = request.mask
        assert mask.is_plainly_causal
        assert (mask.batch, mask.query_length, mask.key_length, mask.device) == (2, LENGTH, LENGTH, CPU)
        return testing.attend(request)

    door = UlyssesAttention("auto", group=peers)
    door.backends = (Backend("cpu", "noting", attend),)
    door(*of_span(peers, qkv()), LENGTH, softcap=3.0, dropout=0.5)
    door(*of_span(peers, qkv()), LENGTH)
    assert seen == [(3.0, 0.5), (None, 0.0)]


def test_softcap_dropout_and_a_causal_mask_reach_the_kernel() -> None:
    run(2, dropped)


def test_sp_size_and_device_say_who_the_peers_are() -> None:
    assert UlyssesAttention(sp_size=5, device="cpu").peers == 5
    assert UlyssesAttention("small", device=CPU).backends == BACKENDS[1:]
    assert UlyssesAttention().backends == BACKENDS


def chosen(peers: ThreadPeers | None, tensors: tuple[Tensor, ...], **asked: Any) -> str:
    """The kernel that it takes, or why it takes none."""
    door, taken = UlyssesAttention(group=peers), []

    def noting(backend: Backend) -> Callable[[Request], Tensor]:
        return lambda request: taken.append(backend.kernel) or testing.attend(request)

    door.backends = tuple(Backend("cpu", one.kernel, noting(one), refuses=one.refuses) for one in BACKENDS)
    try:
        door(*tensors, tensors[0].shape[1] if peers is None else LENGTH, **asked)
    except NotImplementedError as error:
        return f"{type(error).__name__}: {error}"
    return ", ".join(taken)


def chosen_among_ranks(peers: ThreadPeers, heads: int, **asked: Any) -> str:
    return chosen(peers, of_span(peers, qkv(heads, 1)), **asked)


def test_the_first_kernel_that_does_it_for_all_ranks_is_taken() -> None:
    cannot = (
        "BackendError: UlyssesAttention: kernel 'capless' on cpu cannot do this: it has no softcap. "
        "Installed kernels that can: none."
    )
    assert chosen(None, qkv(3, 1)) == "capless"
    assert chosen(None, qkv(2, 1), softcap=1.0) == "small"
    assert chosen(None, qkv(3, 1), softcap=1.0) == cannot
    assert run(2, chosen_among_ranks, 3) == ["capless"] * 2
    # One of three heads has two of them, and one of five three.
    assert run(2, lambda peers: chosen_among_ranks(peers, 3, softcap=1.0)) == ["small"] * 2
    assert run(2, lambda peers: chosen_among_ranks(peers, 5, softcap=1.0)) == [cannot] * 2


def told(peers: ThreadPeers, odd: int, given: tuple[Any, ...]) -> str:
    """What a rank is told where the rank `odd` is given something else."""
    mine = (*of_span(peers, qkv()), LENGTH)
    arguments = given if peers.rank == odd else mine
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the texts are compared below
        UlyssesAttention(group=peers)(*arguments)
    return str(error.value)


def spanned(odd: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    span = range(0, 4) if odd == 0 else range(4, 7)
    return tuple(tensor[:, span.start : span.stop] for tensor in tensors)


@pytest.mark.parametrize("odd", [0, 1])
def test_what_differs_on_one_rank_is_told_to_all(odd: int) -> None:
    query, key, value = spanned(odd, qkv())
    tokens = 4 - odd
    given = f"rank {odd}: queries [2, {{}}, {{}}, 4], keys [2, {{}}, {{}}, {{}}] and values [2, {{}}, {{}}, 3]"
    cases: dict[str, tuple[tuple[Any, ...], str]] = {
        "a dim less": (
            (query[0], key, value, LENGTH),
            f"rank {odd}: queries [{tokens}, 4, 4], keys [2, {tokens}, 2, 4] and values [2, {tokens}, 2, 3] "
            "are not of four dims [B, s, H, D]",
        ),
        "a dim less of keys": (
            (query, key[0], value, LENGTH),
            f"rank {odd}: queries [2, {tokens}, 4, 4], keys [{tokens}, 2, 4] and values [2, {tokens}, 2, 3] "
            "are not of four dims [B, s, H, D]",
        ),
        "a dim less of values": (
            (query, key, value[0], LENGTH),
            f"rank {odd}: queries [2, {tokens}, 4, 4], keys [2, {tokens}, 2, 4] and values [{tokens}, 2, 3] "
            "are not of four dims [B, s, H, D]",
        ),
        "tokens of keys": (
            (query, key[:, 1:], value, LENGTH),
            given.format(tokens, 4, tokens - 1, 2, 4, tokens, 2)
            + f" are not of one batch and of {tokens} tokens, which module.span(7) has on this rank",
        ),
        "tokens of values": (
            (query, key, value[:, 1:], LENGTH),
            given.format(tokens, 4, tokens, 2, 4, tokens - 1, 2)
            + f" are not of one batch and of {tokens} tokens, which module.span(7) has on this rank",
        ),
        "a token less": (
            (query[:, 1:], key[:, 1:], value[:, 1:], LENGTH),
            given.format(tokens - 1, 4, tokens - 1, 2, 4, tokens - 1, 2)
            + f" are not of one batch and of {tokens} tokens, which module.span(7) has on this rank",
        ),
        "sizes of keys": (
            (query, key[..., :2], value, LENGTH),
            given.format(tokens, 4, tokens, 2, 2, tokens, 2)
            + " do not fit each other: query and key heads have one size, and KV heads divide query heads",
        ),
        "heads of values": (
            (query, key, value[:, :, :1], LENGTH),
            given.format(tokens, 4, tokens, 2, 4, tokens, 1)
            + " do not fit each other: query and key heads have one size, and KV heads divide query heads",
        ),
        "heads that do not divide": (
            (query[:, :, :3], key, value, LENGTH),
            given.format(tokens, 3, tokens, 2, 4, tokens, 2)
            + " do not fit each other: query and key heads have one size, and KV heads divide query heads",
        ),
        "dtype of keys": (
            (query, key.float(), value, LENGTH),
            f"rank {odd}: queries, keys and values are of several dtypes: torch.float64, torch.float32, torch.float64",
        ),
        "dtype of values": (
            (query, key, value.float(), LENGTH),
            f"rank {odd}: queries, keys and values are of several dtypes: torch.float64, torch.float64, torch.float32",
        ),
    }
    for name, (arguments, text) in cases.items():
        assert run(2, told, odd, arguments) == [text] * 2, name


def test_ranks_that_are_given_other_things_are_told_what_the_first_has() -> None:
    query, key, value = spanned(1, qkv())
    alike = "not all ranks are given the same length, heads, sizes and dtype; rank 0 has "
    for given in (
        (query.float(), key.float(), value.float(), LENGTH),
        (query[:1], key[:1], value[:1], LENGTH),
        (query[:, :, :2], key, value, LENGTH),
        (query, key[:, :, :1], value[:, :, :1], LENGTH),
        (query[..., :2], key[..., :2], value, LENGTH),
        (query, key, value[..., :2], LENGTH),
        (query, key, value, LENGTH - 1),
    ):
        expected = f"{alike}S 7, q, k, v [2, s, …] [4, 4, 2, 4, 2, 3], torch.float64"
        assert run(2, told, 1, given) == [expected] * 2
    short = tuple(tensor[:, :3] for tensor in qkv())
    expected = f"{alike}S 6, q, k, v [2, s, …] [4, 4, 2, 4, 2, 3], torch.float64"
    assert run(2, told, 0, (*short, 6)) == [expected] * 2


def test_alone_it_is_told_too() -> None:
    door = UlyssesAttention("capless")
    with pytest.raises(
        ValueError,
        match=r"^queries \[2, 7, 4, 4\], keys \[2, 7, 2, 4\] and values \[2, 7, 2, 3\] are not of one batch and of 8 "
        r"tokens, which module.span\(8\) has on this rank$",
    ):
        door(*qkv(), 8)
