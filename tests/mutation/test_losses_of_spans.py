"""The causal loss of spans, sharded logits and their gradients on threads, against cross entropy of one process."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from thread_ranks import OnADevice, ThreadPeers, random, run
from torch import Tensor

from sp_attention.errors import ShardedLogitsError
from sp_attention.loss.causal_lm import LogitsInProgress, sharded_causal_loss
from sp_attention.loss.sharded_logits import ShardedLogits

VOCABULARY, LENGTH = 11, 9


def tokens(ignored: int = -100) -> Tensor:
    labels = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    labels[0, :3] = labels[1, 5] = ignored
    labels[1, 7], labels[1, 8] = 0, VOCABULARY - 1
    return labels


def shifted(labels: Tensor, ignored: int = -100) -> Tensor:
    return torch.cat([labels[:, 1:], torch.full((2, 1), ignored)], 1)


def unused(*_: Any) -> Any:
    raise AssertionError("not to be called")


# What the loss is asked, and the targets and the divisor that it comes to.
ASKED: dict[str, tuple[dict[str, Any], Tensor, int]] = {
    "labels": ({"labels": tokens()}, shifted(tokens()), 13),
    "another ignore_index": ({"labels": tokens(-7), "ignore_index": -7}, shifted(tokens(-7), -7), 13),
    "shift_labels": ({"labels": unused, "shift_labels": tokens()}, tokens(), 14),
    "num_items_in_batch": ({"labels": tokens(), "num_items_in_batch": 5}, shifted(tokens()), 5),
    "num_items_in_batch, a tensor": (
        {"labels": tokens(), "num_items_in_batch": torch.tensor(5)},
        shifted(tokens()),
        5,
    ),
    "a rank without targets": (
        {"labels": tokens().index_fill(1, torch.arange(5), -100)},
        shifted(tokens().index_fill(1, torch.arange(5), -100)),
        7,
    ),
    "no targets": ({"labels": torch.full((2, LENGTH), -100)}, torch.full((2, LENGTH), -100), 0),
}


class Given:
    """In place of what an LM head was given: it makes the same loss out of logits of its span."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def loss(self, targets: Tensor, ignore_index: int) -> Tensor:
        return F.cross_entropy(
            self.logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction="sum"
        ).float()


def a_span(given: Any = None) -> LogitsInProgress:
    """What a forward with sharded logits says of them."""
    return LogitsInProgress(True, given)


def loss_of_span(peers: ThreadPeers, asked: dict[str, Any], in_tiles: bool) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of my logits."""
    span = peers.span(LENGTH)
    mine = random(2, LENGTH, VOCABULARY)[:, span.start : span.stop].clone().requires_grad_()
    loss = sharded_causal_loss(unused, peers, (lambda: a_span(Given(mine))) if in_tiles else a_span)
    with OnADevice():
        out = loss(mine[:, :0] if in_tiles else mine, vocab_size=VOCABULARY, **asked, unknown=1)
    return out.detach(), torch.autograd.grad(out, mine)[0]


@pytest.mark.parametrize("ranks", [2, 3, 4], ids="P{}".format)
@pytest.mark.parametrize("in_tiles", [False, True], ids=["logits", "tiles"])
@pytest.mark.parametrize("asked", ASKED)
def test_the_loss_is_that_of_whole_logits(asked: str, in_tiles: bool, ranks: int) -> None:
    arguments, targets, divisor = ASKED[asked]
    whole = random(2, LENGTH, VOCABULARY).requires_grad_()
    ignored = arguments.get("ignore_index", -100)
    total = F.cross_entropy(whole.flatten(0, 1), targets.flatten(), ignore_index=ignored, reduction="sum")
    (grad,) = torch.autograd.grad(total / divisor, whole)
    results = run(ranks, loss_of_span, arguments, in_tiles)
    # The gradient of a part is so many times the true one, as gradients of all that is sharded are.
    for rank, (loss, of_mine) in enumerate(results):
        assert loss.dtype == torch.float32
        assert loss.shape == ()
        torch.testing.assert_close(loss.double(), (total / divisor).detach(), equal_nan=True, rtol=1e-5, atol=1e-6)
        before = sum(one.shape[1] for _, one in results[:rank])
        expected = ranks * grad[:, before : before + of_mine.shape[1]]
        torch.testing.assert_close(of_mine, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


def whole_loss(peers: ThreadPeers) -> None:
    """What is not of a span, or has no targets, is transformers' own affair."""
    seen = []

    def whole(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return "theirs"

    loss = sharded_causal_loss(whole, peers, lambda: LogitsInProgress(False, None))
    logits, labels, other = random(2, LENGTH, VOCABULARY), tokens(), tokens(-7)
    assert sharded_causal_loss(whole, peers, a_span)(logits, None, VOCABULARY) == "theirs"
    seen.clear()
    assert loss(logits, labels, VOCABULARY) == "theirs"
    assert loss(logits[:, :4], None, VOCABULARY, 3) == "theirs"
    assert loss(logits, labels, VOCABULARY, 3, -7, other, more=1) == "theirs"
    # Of another length than the labels, and not a span for that.
    assert loss(logits[:, :5], labels, VOCABULARY) == "theirs"
    expected = [
        ((logits, labels, VOCABULARY, None, -100, None), {}),
        ((logits[:, :4], None, VOCABULARY, 3, -100, None), {}),
        ((logits, labels, VOCABULARY, 3, -7, other), {"more": 1}),
        ((logits[:, :5], labels, VOCABULARY, None, -100, None), {}),
    ]
    assert str(seen) == str(expected)


def test_whole_logits_are_given_to_the_loss_of_transformers() -> None:
    run(2, whole_loss)


def wrong_token(peers: ThreadPeers, token: int, place: int) -> str:
    labels = tokens()
    labels[1, place] = token
    loss = sharded_causal_loss(unused, peers, a_span)
    with pytest.raises(IndexError) as error:
        loss(random(2, len(peers.span(LENGTH)), VOCABULARY), labels, VOCABULARY)
    return str(error.value)


@pytest.mark.parametrize(("token", "place"), [(VOCABULARY, 8), (-1, 2), (VOCABULARY + 5, 1)])
def test_a_target_that_is_no_token_is_an_error_on_every_rank(token: int, place: int) -> None:
    assert run(3, wrong_token, token, place) == [f"Target {token} is out of bounds."] * 3


def test_a_head_that_was_given_nothing_is_an_error() -> None:
    def without(peers: ThreadPeers) -> None:
        with pytest.raises(AssertionError):
            sharded_causal_loss(unused, peers, a_span)(torch.zeros(2, 0, VOCABULARY), tokens(), VOCABULARY)

    run(2, without)


def test_what_looks_at_values_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    disabled = []
    monkeypatch.setattr(torch.compiler, "disable", lambda function: disabled.append(function.__name__) or function)
    run(1, lambda peers: sharded_causal_loss(unused, peers, unused) and None)
    assert disabled == ["_require_tokens", "sum_in_tiles", "is_sharded"]


def sharded(peers: ThreadPeers) -> tuple[ShardedLogits, Tensor]:
    span = peers.span(LENGTH)
    mine = random(2, LENGTH, VOCABULARY)[:, span.start : span.stop].clone().requires_grad_()
    return ShardedLogits(mine.shape, LENGTH, peers, lambda: mine * 2), mine


REFUSAL = (
    "outputs.logits hold 3 of 9 tokens: in training with labels a causal model's logits stay sharded. Use "
    "outputs.logits.part, or outputs.logits.whole() on every rank of the group, or enable(model, whole_logits=True)."
)


def parts_and_whole(peers: ThreadPeers) -> str:
    logits, mine = sharded(peers)
    assert torch.equal(logits.part, 2 * mine)
    assert logits.span == peers.span(LENGTH)
    whole = logits.whole()
    assert torch.equal(whole, 2 * random(2, LENGTH, VOCABULARY))
    (grad,) = torch.autograd.grad(whole.sum(), mine)
    assert torch.equal(grad, torch.full_like(mine, 2.0 * peers.size))
    assert {logits: 1}[logits] == 1
    return repr(logits)


def test_sharded_logits_have_a_part_and_a_whole() -> None:
    assert run(3, parts_and_whole) == [
        f"ShardedLogits([2, 3, 11], tokens {start} to {start + 3} of 9)" for start in (0, 3, 6)
    ]


# What somebody who takes a span for the whole would do.
USES = {
    "an attribute": lambda logits: logits.argmax,
    "a method": lambda logits: logits.float(),
    "an index": lambda logits: logits[:, -1],
    "a comparison": lambda logits: logits == 1,
    "arithmetic": lambda logits: 2 * logits,
    "negation": lambda logits: -logits,
    "a truth value": lambda logits: bool(logits),
    "a function": lambda logits: torch.softmax(logits, -1),
    "a function, by name": lambda logits: F.cross_entropy(input=logits, target=torch.zeros(2, dtype=torch.int64)),
    "a function, second": lambda logits: torch.add(torch.zeros(2), logits),
    "a list": lambda logits: torch.cat([torch.zeros(2), logits]),
}


def uses(peers: ThreadPeers) -> dict[str, str]:
    logits, _ = sharded(peers)
    texts = {}
    for name, use in USES.items():
        with pytest.raises(ShardedLogitsError) as error:
            use(logits)
        texts[name] = str(error.value)
    assert not hasattr(logits, "argmax")
    for name in ("__cuda_array_interface__", "__getstate_other__"):
        with pytest.raises(AttributeError) as missing:
            getattr(logits, name)
        assert (missing.type, str(missing.value)) == (AttributeError, name)
    assert copy.copy(logits) is copy.deepcopy(logits) is logits
    return texts


def test_sharded_logits_are_no_tensor() -> None:
    for texts in run(3, uses):
        assert texts == dict.fromkeys(USES, REFUSAL)
