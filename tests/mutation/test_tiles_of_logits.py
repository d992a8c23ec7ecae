"""The loss of some logits at a time, in one process, against cross entropy of all, in float64, with every gradient."""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from thread_ranks import random
from torch import Tensor, nn

from sp_attention.kernels.autocast import autocast_of_now
from sp_attention.loss import tiled_loss
from sp_attention.loss.chunked_grad import ChunkedGrad, in_tiles
from sp_attention.loss.tiled_loss import LMHead, LMHeadInput, liger_does, tile_for

ROWS, TOKENS, HIDDEN, VOCABULARY = 2, 7, 5, 11


def head_of(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=torch.float64)
    for number, parameter in enumerate(head.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=number))
    return head.to(dtype)


def targets(ignored: int = -100) -> Tensor:
    found = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    found[0, 2] = found[1, 0] = ignored
    return found


def capped(logits: Tensor) -> Tensor:
    return 2.0 * (logits / 2.0).tanh()


def doubled(logits: Tensor) -> Tensor:
    return 2 * logits


class Noting(nn.Module):
    """A head that notes what it is given."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.given: list[tuple[int, ...]] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.given.append(tuple(hidden.shape))
        return self.head(hidden)


def given_to(
    module: nn.Module,
    hidden: Tensor,
    tiles: int = 3,
    steps: tuple[Callable[[Tensor], Tensor], ...] = (),
    **options: Any,
) -> LMHeadInput:
    head = LMHead(module, "lm_head", steps, VOCABULARY, 5, **options)
    return LMHeadInput(head, module, hidden, tiles, nullcontext)


def expected_of(
    module: nn.Module, hidden: Tensor, steps: tuple[Callable[[Tensor], Tensor], ...] = (), ignored: int = -100
) -> Tensor:
    logits = module(hidden)
    for step in steps:
        logits = step(logits)
    return F.cross_entropy(logits.flatten(0, 1), targets(ignored).flatten(), ignore_index=ignored, reduction="sum")


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def frozen_bias(module: nn.Module) -> nn.Module:
    module.bias.requires_grad_(False)
    return module


HEADS: dict[str, Callable[[], nn.Module]] = {
    "a bias": head_of,
    "no bias": partial(head_of, bias=False),
    "two layers": lambda: nn.Sequential(nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64), head_of()),
    "frozen": lambda: frozen(head_of()),
    "frozen bias": lambda: frozen_bias(head_of()),
}


@pytest.fixture(params=["whole weights", "weights of an engine"])
def of_engine(request: pytest.FixtureRequest) -> bool:
    return request.param == "weights of an engine"


@pytest.mark.parametrize("asks", [True, False], ids=["hidden states learn", "hidden states do not"])
@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients_are_those_of_all_logits(name: str, asks: bool, of_engine: bool) -> None:
    torch.manual_seed(0)
    module, steps = HEADS[name](), (doubled, capped) if name == "a bias" else ()
    hidden = random(ROWS, TOKENS, HIDDEN, seed=7).requires_grad_(asks)
    learned = [one for one in (hidden, *module.parameters()) if one.requires_grad]
    for ignored in (-100, 4):
        expected = 3 * expected_of(module, hidden, steps, ignored)
        if of_engine:
            for parameter in module.parameters():
                parameter.ds_numel = parameter.numel()
        noting = Noting(module)
        loss = 3 * given_to(noting, hidden, steps=steps).loss(targets(ignored), ignored)
        assert loss.dtype == torch.float32
        assert loss.shape == ()
        torch.testing.assert_close(loss.double(), expected.detach().double(), rtol=1e-5, atol=1e-6)
        assert noting.given == [(1, 5, HIDDEN), (1, 5, HIDDEN), (1, 4, HIDDEN)]
        assert loss.requires_grad == bool(learned)
        if not learned:
            continue
        for ours, theirs in zip(
            torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned), strict=True
        ):
            assert ours.dtype == torch.float64
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        # An engine's head is called again in backward, anybody else's is not.
        assert len(noting.given) == (6 if of_engine else 3)
        with torch.no_grad():
            assert not given_to(noting, hidden, steps=steps).loss(targets(ignored), ignored).requires_grad


def test_a_weight_that_no_logit_needs_has_no_gradient() -> None:
    module = head_of()
    module.unused = nn.Parameter(torch.ones(3))
    loss = given_to(module, random(ROWS, TOKENS, HIDDEN, seed=7)).loss(targets(), -100)
    loss.backward()
    assert module.unused.grad is None
    assert module.bias.grad.any()


def test_tiles_may_be_empty_and_logits_are_made_when_asked() -> None:
    module = Noting(head_of())
    hidden = random(ROWS, TOKENS, HIDDEN, seed=7).requires_grad_()
    given = given_to(module, hidden, tiles=ROWS * TOKENS + 2, steps=(capped,))
    loss = given.loss(targets(), -100)
    torch.testing.assert_close(loss, expected_of(module.head, hidden, (capped,)).float())
    assert [shape[1] for shape in module.given] == [1] * 14 + [0] * 2
    assert given.shape == (ROWS, TOKENS, VOCABULARY)
    assert isinstance(given.shape, torch.Size)
    logits = given.logits({})
    assert torch.equal(logits, capped(module.head(hidden)))
    (grad,) = torch.autograd.grad(logits.sum(), hidden)
    assert torch.equal(grad, torch.autograd.grad(capped(module.head(hidden)).sum(), hidden)[0])


def test_gradients_of_weights_in_low_precision_are_rounded_once() -> None:
    exact, rough = head_of(), head_of(dtype=torch.bfloat16)
    exact.load_state_dict(rough.state_dict())
    hidden = random(ROWS, TOKENS, HIDDEN, seed=7).bfloat16()
    given_to(exact, hidden.double(), tiles=14).loss(targets(), -100).backward()
    given_to(rough, hidden, tiles=14).loss(targets(), -100).backward()
    for ours, theirs in zip(rough.parameters(), exact.parameters(), strict=True):
        assert ours.grad.dtype == torch.bfloat16
        error = (ours.grad.double() - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert error < 2**-6


def test_the_head_runs_in_the_context_it_was_called_in() -> None:
    module = head_of(dtype=torch.float32)
    hidden = random(ROWS, TOKENS, HIDDEN, seed=7).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        context = autocast_of_now(hidden.device)
        expected = module(hidden)
    given = LMHeadInput(LMHead(module, "", (), VOCABULARY, 5), module, hidden, 3, context)
    assert given.logits({}).dtype == torch.bfloat16
    assert torch.equal(given.logits({}), expected)
    plain = F.cross_entropy(expected.float().flatten(0, 1), targets().flatten(), reduction="sum")
    torch.testing.assert_close(given.loss(targets(), -100), plain)
    outside = autocast_of_now(hidden.device)
    with torch.autocast("cpu", torch.bfloat16), outside():
        assert module(hidden).dtype == torch.float32


def test_autocast_is_that_of_the_device() -> None:
    with torch.autocast("cpu", torch.float16):
        inside, elsewhere = autocast_of_now(torch.device("cpu")), autocast_of_now(torch.device("cuda"))
    assert (inside.args, inside.keywords) == (("cpu", torch.float16), {"enabled": True})
    assert (elsewhere.args, elsewhere.keywords) == (("cuda", None), {"enabled": False})


@pytest.mark.parametrize(("tokens", "count"), [(0, 0), (1, 1), (5, 1), (6, 2), (10, 2), (11, 3)])
def test_tiles_are_counted_up(tokens: int, count: int) -> None:
    assert LMHead(nn.Identity(), "", (), 1, 5).tiles(tokens) == count


def test_a_tile_is_of_so_many_logits_and_of_enough_tokens() -> None:
    assert tile_for(1024) == 2**14
    assert tile_for(1000) == 16777
    assert tile_for(2**15) == 512
    assert tile_for(2**20) == 512


class Fused:
    """In place of Liger's kernel: it notes what it is given, and does it plainly."""

    calls: list[tuple[Any, ...]]

    def __init__(self, ignore_index: int, reduction: str, accum_dtype: torch.dtype) -> None:
        self.ignored = ignore_index
        Fused.calls.append((ignore_index, reduction, accum_dtype))

    def __call__(self, weight: Tensor, hidden: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        Fused.calls.append((tuple(hidden.shape), bias is None, torch.is_autocast_enabled("cpu")))
        logits = F.linear(hidden, weight, bias)
        return F.cross_entropy(logits, targets, ignore_index=self.ignored, reduction="sum")


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    Fused.calls = []
    module = ModuleType("fused_linear_cross_entropy")
    module.LigerFusedLinearCrossEntropyLoss = Fused
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.fused_linear_cross_entropy", module)
    return Fused.calls


@pytest.mark.parametrize("name", ["a bias", "no bias", "frozen", "frozen bias"])
def test_liger_is_given_all_tokens_at_once(name: str, liger: list[tuple[Any, ...]]) -> None:
    module = HEADS[name]()
    hidden = random(ROWS, TOKENS, HIDDEN, seed=7).requires_grad_()
    learned = [one for one in (hidden, *module.parameters()) if one.requires_grad]
    expected = expected_of(module, hidden)
    head = LMHead(module, "", (), VOCABULARY, 5, liger=True)
    given = LMHeadInput(head, module, hidden, 3, partial(torch.autocast, "cpu", torch.bfloat16, enabled=False))
    loss = given.loss(targets(), -100)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float())
    assert liger == [(-100, "sum", torch.float32), ((ROWS * TOKENS, HIDDEN), name == "no bias", False)]
    for ours, theirs in zip(torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = autocast_of_now(hidden.device)
    LMHeadInput(head, module, hidden, 3, inside).loss(targets(), -100)
    assert liger[-1][2]


def test_liger_is_not_asked_where_a_hook_has_come_since(liger: list[tuple[Any, ...]]) -> None:
    module = head_of()
    head = LMHead(module, "", (), VOCABULARY, 5, liger=True)
    module.register_forward_hook(lambda module, args, logits: 2 * logits)
    hidden = random(ROWS, TOKENS, HIDDEN, seed=7).requires_grad_()
    loss = LMHeadInput(head, module, hidden, 3, nullcontext).loss(targets(), -100)
    torch.testing.assert_close(loss, expected_of(module, hidden).float())
    assert liger == []


def test_liger_is_not_asked_for_weights_of_an_engine(liger: list[tuple[Any, ...]]) -> None:
    module = head_of()
    module.bias.ds_numel = VOCABULARY
    hidden = random(ROWS, TOKENS, HIDDEN, seed=7).requires_grad_()
    loss = given_to(module, hidden, liger=True).loss(targets(), -100)
    torch.testing.assert_close(loss, expected_of(module, hidden).float())
    assert not liger


class OnDevice(Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def on_device(dtype: torch.dtype = torch.float32) -> nn.Linear:
    module = head_of(dtype=dtype)
    weight = module.weight.data
    del module._parameters["weight"]
    module.weight = weight.as_subclass(OnDevice)
    return module


def asked_of_liger(module: nn.Module, *steps: Callable[[Tensor], Tensor]) -> bool:
    return liger_does(LMHead(module, "", steps, VOCABULARY, 5))


def test_liger_does_one_matrix_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[str] = []
    monkeypatch.setattr(tiled_loss, "find_spec", lambda name: name if name in installed else None)
    assert asked_of_liger(on_device()) is False
    installed.append("liger_kernel")
    assert asked_of_liger(on_device()) is True
    assert asked_of_liger(on_device(), doubled) is False
    assert asked_of_liger(on_device(torch.float64)) is False
    assert asked_of_liger(head_of(dtype=torch.float32)) is False
    assert asked_of_liger(nn.Sequential(on_device())) is False
    hooked, replaced = on_device(), on_device()
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda hidden: hidden
    assert asked_of_liger(hooked) is False
    assert asked_of_liger(replaced) is False


def scores(weights: dict[str, Tensor], tile: Tensor, *others: Tensor) -> Tensor:
    """Of each row by itself, along the dim 1 of tiles."""
    return torch.einsum("bse,ef->bsf", tile, weights["mixing"]).tanh() * (others[0] if others else 1)


@pytest.mark.parametrize("asked", [True, False])
def test_gradients_of_tiles_are_put_together(asked: bool) -> None:
    hidden, factor = random(2, 7, 3), random(2, 7, 1, seed=1)
    weights = {"mixing": random(3, 3, seed=2).requires_grad_(), "unused": random(2, seed=3).requires_grad_()}
    down = random(2, 7, 3, seed=4)
    chunked = ChunkedGrad(hidden, 1, asked, weights)
    outputs = []
    for tile, other, grad in in_tiles(3, 1, hidden, factor, down):
        outputs.append(chunked.add(scores, tile, other, grad=grad))
        assert not outputs[-1].requires_grad
    whole = hidden.clone().requires_grad_()
    expected = scores(weights, whole, factor)
    grads = torch.autograd.grad(expected, [whole, weights["mixing"]], down)
    torch.testing.assert_close(torch.cat(outputs, 1), expected.detach())
    if asked:
        torch.testing.assert_close(chunked.hidden, grads[0])
    else:
        assert chunked.hidden is None
    torch.testing.assert_close(chunked.of_weights[0], grads[1])
    assert chunked.of_weights[1] is None
    assert all(weight.grad is None for weight in weights.values())


def test_weights_may_be_reached_by_some_tiles_only() -> None:
    hidden, weight = random(1, 4, 2), random(2, seed=1).requires_grad_()

    def second(weights: dict[str, Tensor], tile: Tensor, is_used: Tensor) -> Tensor:
        return (tile * weights["one"] if is_used else tile).sum()

    for used in ([True, False], [False, True], [True, True]):
        chunked = ChunkedGrad(hidden, 1, True, {"one": weight})
        for tile, one in zip(hidden.split(2, 1), used, strict=True):
            chunked.add(second, tile, torch.tensor(one))
        expected = torch.stack([tile.sum((0, 1)) for tile, one in zip(hidden.split(2, 1), used, strict=True) if one])
        torch.testing.assert_close(chunked.of_weights[0], expected.sum(0))


def test_gradients_are_found_where_none_are_asked_for_otherwise() -> None:
    with torch.no_grad():
        chunked = ChunkedGrad(random(2, 3), 0, True, {})
        chunked.add(lambda weights, tile: (tile**2).sum(), random(2, 3))
    torch.testing.assert_close(chunked.hidden, 2 * random(2, 3))
    assert chunked.of_weights == []


def test_hooks_on_weights_see_nothing_of_a_tile() -> None:
    weight = random(3, 3).requires_grad_()
    weight.register_hook(lambda grad: pytest.fail("a tile's gradient"))
    ChunkedGrad(random(1, 2, 3), 1, False, {"mixing": weight}).add(
        lambda weights, tile: scores(weights, tile).sum(), random(1, 2, 3)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_are_at_least_in_float32(dtype: torch.dtype) -> None:
    weight = torch.ones(1, dtype=dtype, requires_grad=True)
    chunked = ChunkedGrad(torch.ones(2, 1, dtype=dtype), 0, False, {"one": weight})
    for _ in range(2):
        chunked.add(lambda weights, tile: (weights["one"] * tile).sum(), torch.ones(1, 1, dtype=dtype))
    assert chunked.of_weights[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert chunked.of_weights[0].tolist() == [2.0]


def test_tiles_are_views_as_equal_as_can_be() -> None:
    tensor, other = torch.arange(14).view(7, 2), torch.arange(7)
    tiles = in_tiles(3, 0, tensor, other)
    assert [(len(one), len(two)) for one, two in tiles] == [(3, 3), (2, 2), (2, 2)]
    assert torch.equal(torch.cat([one for one, _ in tiles]), tensor)
    assert torch.equal(torch.cat([two for _, two in tiles]), other)
    assert all(one.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for one, _ in tiles)
    assert [one.shape for (one,) in in_tiles(2, 1, torch.zeros(3, 5))] == [(3, 3), (3, 2)]
