"""Mixer functions, in one process: cut as declared they give what they give for all; and forwards that call others."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from mixing import KNOWN, chunk_scan, convolution, delta
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.mamba2 import modeling_mamba2 as mamba2

from sp_attention.mixers import Convolution, Cut, Scan, functions, registry
from sp_attention.mixers.call import Call, positional_names
from sp_attention.mixers.halo import columns_sent
from sp_attention.mixers.rebinding import globals_of, rebound
from sp_attention.mixers.testing import FEATURES, conform


@pytest.mark.parametrize("name", KNOWN)
def test_a_function_cut_as_declared_gives_what_it_gives_for_all(name: str) -> None:
    mixer, function, arguments = KNOWN[name]
    conform(mixer, function, arguments)
    conform(mixer, function, arguments, dtype=torch.bfloat16, skipped=FEATURES.keys() - {"groups that two ranks share"})


def heads_meet(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **_: Any) -> Tensor:
    return value.mean(2, keepdim=True) + value


def groups_are_not_even(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **_: Any) -> Tensor:
    return value + query.sum(-1).repeat(1, 1, value.shape[2] // query.shape[2])[..., None]


def is_wider(hidden_states: Tensor, weight: Tensor, **_: Any) -> Tensor:
    return F.pad(hidden_states, (weight.shape[-1], 0))[:, :, : hidden_states.shape[2]] + hidden_states


# What is not as declared, and what is told of it.
WRONG = {
    "heads meet": (functions.GATED_DELTA_RULE, heads_meet, delta, "the result is off by"),
    "groups": (functions.GATED_DELTA_RULE, groups_are_not_even, delta, "groups that two ranks share: the result"),
    "a wider convolution": (functions.CONVOLUTION, is_wider, convolution, "a length that ranks do not divide: the"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_as_declared_is_told(name: str) -> None:
    mixer, function, arguments, text = WRONG[name]
    with pytest.raises(AssertionError, match=text):
        conform(mixer, function, arguments)


def test_a_weight_that_is_not_declared_is_told() -> None:
    scan = functions.CHUNK_SCAN
    less: Mapping[str, Cut] = {name: cut for name, cut in scan.arguments.items() if name != "D"}
    with pytest.raises(AssertionError, match="Mamba-2 scan, mamba2_chunk_scan"):
        conform(
            Scan("Mamba-2 scan", scan.functions, less, scan.result, scan.state), mamba2.mamba2_chunk_scan, chunk_scan
        )


def test_columns_come_from_whoever_has_them() -> None:
    for length, columns, ranks in ((33, 3, 2), (4, 3, 3), (7, 5, 4), (2, 3, 4), (9, 1, 4)):
        held = {rank: list(range(length))[slice(*bounds)] for rank, bounds in enumerate(bounds_of(length, ranks))}
        for receiver, (start, _) in enumerate(bounds_of(length, ranks)):
            sent = [columns_sent(length, columns, ranks, sender, receiver) for sender in range(ranks)]
            assert [token for one in sent for token in one] == list(range(max(0, start - columns), start))
            assert all(set(one) <= set(held[sender]) for sender, one in enumerate(sent))


def bounds_of(length: int, ranks: int) -> list[tuple[int, int]]:
    sizes = [length // ranks + (rank < length % ranks) for rank in range(ranks)]
    return [(sum(sizes[:rank]), sum(sizes[: rank + 1])) for rank in range(ranks)]


def scale(tensor: Tensor) -> Tensor:
    return tensor * 2


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


class Base(nn.Module):
    offset = 1

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor + self.offset


class Derived(Base):
    @decorated
    def forward(self, tensor: Tensor, *, times: int = 2) -> Tensor:
        return sum(scale(super(Derived, self).forward(one)) for one in [tensor] * times)  # a cell else


class WithACell(Base):
    def forward(self, tensor: Tensor) -> Tensor:
        return scale(super().forward(tensor))


@pytest.mark.parametrize("kind", [Derived, WithACell])
def test_a_forward_made_anew_calls_others_by_name_and_nothing_else_has_changed(kind: type[Base]) -> None:
    own: Any = kind.forward
    assert globals_of(own)["scale"] is scale
    anew: Any = rebound(own, {"scale": lambda tensor: tensor * 10, "absent": None})
    tensor, module = torch.ones(2), kind()
    times = 2 if kind is Derived else 1
    assert anew(module, tensor).tolist() == [20.0 * times] * 2
    assert module(tensor).tolist() == [4.0 * times] * 2
    assert (anew.__name__, anew.__qualname__) == (own.__name__, own.__qualname__)
    assert kind.forward is own
    assert rebound(own, {"absent": None}) is own


def test_arguments_stay_positional_or_by_name() -> None:
    seen = []

    def function(first: int, second: int = 0, **others: int) -> None:
        seen.append((first, second, others))

    call = Call(function, positional_names(function), (1,), {"third": 3, "second": 2})
    assert call.named == {"first": 1, "second": 2, "third": 3}
    call.with_others({"first": 7, "third": 8, "fourth": 9}).run()
    assert seen == [(7, 2, {"third": 8})]


OFFER = "from sp_attention.mixers import Convolution, hookimpl\n@hookimpl\ndef sp_attention_mixers():\n    return "
MIXER = "Convolution('mine', ('my_convolution',), ('x',), ('w',))"
OURS = "Convolution('theirs', ('causal_conv1d_fn',), ('x',), ('w',)), " + MIXER
FAULTS = {
    "mixers_of_no_code": ("1 +", "SyntaxError: "),
    "mixers_without_hook": ("", "TypeError: mixers_without_hook does not implement the hook sp_attention_mixers"),
    "no_mixers": (OFFER + "None", "TypeError: no_mixers returned None instead of mixers"),
    "a_word": (OFFER + "['scan']", "TypeError: a_word returned 'scan' among its mixers"),
}
WritePlugin = Callable[..., None]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_plugin_is_named_and_disturbs_no_other(fault: str, write_plugin: WritePlugin) -> None:
    source, reason = FAULTS[fault]
    write_plugin(fault, source, group="sp_attention_mixers")
    (broken,) = registry.load().broken
    assert str(broken.plugin) == f"{fault} 1.0 ({fault})"
    assert broken.reason.startswith(reason)
    assert registry.usable("cpu")["causal_conv1d_fn"] is functions.CONVOLUTION


def test_a_plugin_adds_functions_and_takes_none_of_ours(write_plugin: WritePlugin) -> None:
    write_plugin("more_mixers", OFFER + f"[{OURS}]", group="sp_attention_mixers")
    usable = registry.usable("cpu")
    assert usable["my_convolution"] == Convolution("mine", ("my_convolution",), ("x",), ("w",))
    assert usable["causal_conv1d_fn"] is functions.CONVOLUTION
    problems = {entry.mixer.name: entry.problem for entry in registry.load().mixers}
    assert str(problems["theirs"]).startswith("several plugins offer it, sp-attention ")


def test_of_a_device_goes_before_of_any(write_plugin: WritePlugin) -> None:
    of_cuda = "Convolution('of cuda', ('causal_conv1d_fn',), ('x',), ('w',), device='cuda')"
    write_plugin("mixers_of_cuda", OFFER + f"[{of_cuda}]", group="sp_attention_mixers")
    assert registry.usable("cuda")["causal_conv1d_fn"].name == "of cuda"
    assert registry.usable("cpu")["causal_conv1d_fn"] is functions.CONVOLUTION
