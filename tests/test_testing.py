"""The checks of kernels: every cell of the page of masks, and kernels that are wrong in one way each."""

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sp_attention import testing
from sp_attention.kernels import sdpa
from sp_attention.kernels.request import Backend, Mask, Request

ROOT = Path(__file__).parent.parent
PAGE = runpy.run_path(str(ROOT / "ci" / "masks_page.py"))
KERNELS = PAGE["KERNELS"]


@pytest.mark.parametrize("feature", testing.FEATURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_right_or_refuse_and_the_page_says_which(kernel: str, feature: str) -> None:
    # Most models compute the softmax of their eager attention in float32.
    tolerance = 1e-6 if kernel == "transformers:eager" else None
    backend = PAGE["backends"]()[kernel]
    answer = testing.check(backend, feature, module=PAGE["module_for"](feature), tolerance=tolerance)
    row = next(
        line for line in (ROOT / "docs" / "masks.md").read_text().splitlines() if line.startswith(f"| {feature} |")
    )
    assert row.split(" | ")[1 + KERNELS.index(kernel)].removesuffix(" |") == (answer or "yes")


def test_the_page_is_as_written_by_its_script() -> None:
    assert (ROOT / "docs" / "masks.md").read_text() == PAGE["page"]()


@pytest.mark.parametrize("feature", testing.FEATURES)
def test_sdpa_is_right_in_many_tiles(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "BAND", 5)
    (backend,) = sdpa.sp_attention_backends()
    assert (testing.check(backend, feature) is None) == (feature != "softcap")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("feature", ["causal", "attention sinks", "additive bias by head", "dropout"])
def test_low_precision_is_allowed_twice_its_error(feature: str, dtype: torch.dtype) -> None:
    (backend,) = sdpa.sp_attention_backends()
    assert testing.check(backend, feature, dtype=dtype) is None
    if feature != "dropout":
        with pytest.raises(AssertionError, match="is off by"):
            testing.check(backend, feature, dtype=dtype, tolerance=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bias_may_be_of_another_dtype_than_the_queries(kernel: str, causal: bool) -> None:
    request = testing.request(Mask(2, testing.LENGTH, testing.LENGTH, torch.device("cpu"), causal=causal))
    bias = torch.randn(1, 3, testing.LENGTH, testing.LENGTH)
    request = replace(request, bias=bias, module=PAGE["module_for"]("additive bias"))
    out = PAGE["backends"]()[kernel].attend(request)
    torch.testing.assert_close(out, testing.attend(request), rtol=1e-6, atol=1e-6)


def test_refusals_are_handed_back() -> None:
    backend = Backend("cpu", "unwilling", testing.attend, refuses=lambda request: "not today")
    assert testing.check(backend, "causal") == "not today"


def test_modules_reach_the_kernel() -> None:
    module = torch.nn.Module()
    backend = Backend("cpu", "curious", testing.attend, refuses=lambda request: f"{request.module is module}")
    assert testing.check(backend, "causal", module=module) == "True"


def dropped(name: str, value: object = None) -> Callable[[Request], Tensor]:
    return lambda request: testing.attend(replace(request, **{name: value}))


def unmasked(**conditions: object) -> Callable[[Request], Tensor]:
    def attend(request: Request) -> Tensor:
        mask = request.mask
        everything = Mask(mask.batch, mask.query_length, mask.key_length, mask.device, causal=False)
        return testing.attend(replace(request, mask=replace(mask, **conditions) if conditions else everything))

    return attend


def uniform_where_nothing_is_seen(request: Request) -> Tensor:
    blind = ~request.mask.dense().any(-1, keepdim=True).transpose(1, 2)
    return testing.attend(request) + blind * request.value.mean(1, keepdim=True)


def without_gradient_of_sinks(request: Request) -> Tensor:
    return testing.attend(replace(request, sinks=request.sinks.detach()))


def writing(request: Request) -> Tensor:
    out = testing.attend(request)
    request.key.data[0, 0] = 0
    return out


def writing_on_the_mask(request: Request) -> Tensor:
    out = testing.attend(request)
    request.mask.dense().data[..., 0] = True
    return out


def dropping(request: Request, draw: Callable[[Tensor], Tensor]) -> Tensor:
    weights = draw(testing.attend_with_weights(replace(request, dropout=0.0))[1])
    return torch.einsum("bhqk,bkhd->bqhd", weights, request.value)


def dropping_right(request: Request) -> Tensor:
    return dropping(request, lambda weights: F.dropout(weights, request.dropout))


def right(request: Request) -> Tensor:
    return dropping_right(request) if request.dropout else testing.attend(request)


def dropping_without_growth(request: Request) -> Tensor:
    return dropping(request, lambda weights: weights * (torch.rand_like(weights) > request.dropout))


def dropping_outputs(request: Request) -> Tensor:
    return F.dropout(testing.attend(request), request.dropout)


class Forgets(torch.autograd.Function):
    """Forward with dropout, backward with other draws."""

    @staticmethod
    def forward(ctx: object, value: Tensor, weights: Tensor, p: float) -> Tensor:
        ctx.weights, ctx.p = weights, p
        return torch.einsum("bhqk,bkhd->bqhd", F.dropout(weights, p), value)

    @staticmethod
    def backward(ctx: object, down: Tensor) -> tuple[Tensor, None, None]:
        return torch.einsum("bhqk,bqhd->bkhd", F.dropout(ctx.weights, ctx.p), down), None, None


def forgetful(request: Request) -> Tensor:
    weights = testing.attend_with_weights(replace(request, dropout=0.0))[1]
    return Forgets.apply(request.value, weights, request.dropout)


# One way to be wrong each: the kernel, the feature that shows it, and what is said.
WRONG = {
    "no-mask": (unmasked(), "causal", "output is off by"),
    "causal-always": (unmasked(causal=True), "bidirectional", "output is off by"),
    "no-window": (unmasked(window=None), "sliding window", "output is off by"),
    "narrow-window": (unmasked(window=6), "sliding window", "output is off by"),
    "wide-window-on-both-sides": (unmasked(window=8), "sliding window on both sides", "output is off by"),
    "no-chunks": (unmasked(documents=None), "chunks", "output is off by"),
    "no-documents": (unmasked(documents=None), "packed documents", "output is off by"),
    "no-left-padding": (unmasked(padding=None), "left padding", "output is off by"),
    "no-right-padding": (unmasked(padding=None), "right padding", "output is off by"),
    "no-holes": (unmasked(padding=None), "padding between real tokens", "output is off by"),
    "no-padding": (unmasked(padding=None), "padding, bidirectional", "output is off by"),
    "no-function": (unmasked(function=None), "any mask function (prefix-LM)", "output is off by"),
    "no-tensor": (unmasked(explicit=None), "mask tensor", "output is off by"),
    "no-tensor-by-head": (unmasked(explicit=None), "mask tensor by head", "output is off by"),
    "no-tensor-of-keys": (unmasked(explicit=None), "mask tensor of keys", "output is off by"),
    "no-bias": (dropped("bias"), "additive bias", "output is off by"),
    "no-bias-by-head": (dropped("bias"), "additive bias by head", "output is off by"),
    "no-softcap": (dropped("softcap"), "softcap", "output is off by"),
    "no-sinks": (dropped("sinks"), "attention sinks", "output is off by"),
    "no-sinks-in-a-window": (dropped("sinks"), "attention sinks, sliding window", "output is off by"),
    "own-scale": (dropped("scale", 8**-0.5), "scale", "output is off by"),
    "no-offset": (unmasked(offset=0), "later queries of a sequence", "output is off by"),
    "cross-unpadded": (unmasked(padding=None), "cross-attention", "output is off by"),
    "no-padding-in-a-row": (unmasked(padding=None), "padding and nothing else in a row", "output is off by"),
    "padding-without-window": (unmasked(window=None), "padding, sliding window", "output is off by"),
    "right-padding-without-window": (unmasked(window=None), "right padding, sliding window", "output is off by"),
    "holes-without-window": (unmasked(window=None), "padding between real tokens, sliding window", "off by"),
    "window-on-one-side": (unmasked(causal=True), "packed documents, window on both sides", "output is off by"),
    "last-queries-first": (unmasked(offset=0), "last queries of a sequence", "output is off by"),
    "window-without-documents": (unmasked(documents=None), "packed documents, sliding window", "output is off by"),
    "documents-without-padding": (unmasked(padding=None), "packed documents, padding", "output is off by"),
    "documents-causal": (unmasked(causal=True), "packed documents, bidirectional", "output is off by"),
    "no-sinks-in-documents": (dropped("sinks"), "attention sinks, packed documents", "output is off by"),
    "scale-of-8": (dropped("scale", 8**-0.5), "head size 20", "output is off by"),
    "scale-of-512": (dropped("scale", 512**-0.5 * 2), "head size 512", "output is off by"),
    "some-values": (lambda request: testing.attend(request)[..., :8], "values larger than keys", "has shape"),
    "more-values": (lambda request: F.pad(testing.attend(request), (0, 4)), "values smaller than keys", "has shape"),
    "one-head": (lambda request: testing.attend(request)[:, :, :1].expand(-1, -1, 6, -1), "one KV head", "off by"),
    "other-groups": (
        lambda request: testing.attend(replace(request, key=request.key.flip(2))),
        "grouped KV heads",
        "output is off by",
    ),
    "uniform": (uniform_where_nothing_is_seen, "left padding", "output is off by"),
    "no-gradient": (without_gradient_of_sinks, "attention sinks", "gradient of sinks is off by"),
    "not-a-number": (lambda request: testing.attend(request) * float("nan"), "causal", "output is off by nan"),
    "writes": (writing, "causal", "the kernel has changed its request's key"),
    "writes-on-the-mask": (writing_on_the_mask, "sliding window", "the kernel has changed its request's mask"),
    "no-dropout": (testing.attend, "dropout", "their variance by 100%"),
    "no-growth": (dropping_without_growth, "dropout", "the mean of 400 draws is off by"),
    "drops-outputs": (dropping_outputs, "dropout", "their variance by"),
    "forgets": (forgetful, "dropout", "backward does not have the draws of forward"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_kernels_are_told(wrong: str) -> None:
    attend, feature, text = WRONG[wrong]
    with pytest.raises(AssertionError, match=f"^wrong, {feature.replace('(', '.').replace(')', '.')}: .*{text}"):
        testing.check(Backend("cpu", "wrong", attend), feature)


def test_every_feature_has_a_kernel_that_is_wrong_in_it() -> None:
    assert {feature for _, feature, _ in WRONG.values()} == set(testing.FEATURES)


def test_written_out_attention_is_right_and_so_is_its_dropout() -> None:
    assert testing.check(Backend("cpu", "right", dropping_right), "dropout") is None
    for feature in testing.FEATURES.keys() - {"dropout"}:
        backend = Backend("cpu", "right", testing.attend, attend_with_weights=testing.attend_with_weights)
        assert testing.check(backend, feature) is None


def test_a_kernel_conforms_if_it_does_and_refuses_what_it_should() -> None:
    def refuses(request: Request) -> str | None:
        return "no softcap" if request.softcap else "no sinks" if request.sinks is not None else None

    sinks = [feature for feature in testing.FEATURES if "sinks" in feature]
    backend = Backend("cpu", "some", right, refuses=refuses)
    testing.conform(backend, ["softcap", *sinks])
    testing.conform(backend, ["softcap", *sinks], dtype=torch.float32)
    with pytest.raises(ValueError, match="no features: soft cap"):
        testing.conform(backend, ["soft cap"])


def test_what_does_not_conform_is_told_in_a_table() -> None:
    def attend(request: Request) -> Tensor:
        if request.mask.padding is not None:
            raise RuntimeError("no such thing as padding")
        return right(request if request.scale == 0.05 else replace(request, scale=0.3))

    def refuses(request: Request) -> str | None:
        return "no softcap" if request.softcap else None

    with pytest.raises(AssertionError) as error:
        testing.conform(Backend("cpu", "poor", attend, refuses=refuses), ["scale"])
    first, *lines = str(error.value).splitlines()
    told = dict(line.strip().split("  ", 1) for line in lines)
    told = {feature: text.strip() for feature, text in told.items()}
    features = len(testing.FEATURES)
    assert first == f"poor on cpu, torch.float64: {features - 1} of {features} features are not as said."
    assert told.keys() == testing.FEATURES.keys() - {"head size 512"}
    assert told["scale"] == "done, though it should be refused"
    assert told["softcap"] == "refused, which it should not be: no softcap"
    assert told["left padding"] == "RuntimeError: no such thing as padding"
    assert told["causal"].startswith("output is off by ")


def test_wrong_weights_are_told() -> None:
    def transposed(request: Request) -> tuple[Tensor, Tensor]:
        out, weights = testing.attend_with_weights(request)
        return out, weights.transpose(2, 3)

    backend = Backend("cpu", "wrong", testing.attend, attend_with_weights=transposed)
    with pytest.raises(AssertionError, match="weights is off by"):
        testing.check(backend, "causal")


def test_an_error_is_relative_to_the_largest_number_that_is_expected() -> None:
    expected = torch.tensor([4.0, -8.0], dtype=torch.float64)
    assert testing.relative_error(torch.tensor([3.0, -8.0], dtype=torch.bfloat16), expected) == 0.125
    assert testing.relative_error(torch.tensor([3.0, -8.0]), expected, scale=2.0) == 0.5
    assert not testing.relative_error(torch.tensor([float("nan"), -8.0]), expected) <= 1.0
    assert testing.relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert testing.relative_error(expected, torch.zeros(2)) > 1.0


def test_the_reference_agrees_with_torch() -> None:
    """Where torch has it all: the reference is not only compared with what is compared with it."""
    request = testing.FEATURES["additive bias"]()
    parts = (tensor.transpose(1, 2) for tensor in (request.query, request.key, request.value))
    expected = F.scaled_dot_product_attention(*parts, request.bias, scale=request.scale).transpose(1, 2)
    torch.testing.assert_close(testing.attend(request), expected)
    request = testing.FEATURES["attention sinks"]()
    # A sink is a key of value zero.
    scores = torch.einsum("bqhd,bkhd->bhqk", request.query, request.key) * request.scale
    scores = scores.masked_fill(~request.mask.dense(), float("-inf"))
    sinks = request.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(testing.attend_with_weights(request)[1], weights)


def test_the_third_party_kernel_is_right() -> None:
    good = runpy.run_path(str(ROOT / "tests" / "third_party" / "good" / "third_party_good.py"))
    backend = good["sp_attention_backends"]()[0]
    refused = {feature for feature in testing.FEATURES if testing.check(backend, feature) is not None}
    asks_more = {"softcap", "dropout", *(feature for feature in testing.FEATURES if "sinks" in feature)}
    assert refused == asks_more | {"additive bias", "additive bias by head"}
