"""Kernels `transformers:*`: what the functions of models are given, what is asked of them, and what is not."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, Gemma2Config, GptOssConfig, LlamaConfig
from transformers.models.bart.modeling_bart import BartAttention
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
from transformers.models.llama.modeling_llama import LlamaAttention

from sp_attention import testing
from sp_attention.errors import UnsupportedError
from sp_attention.kernels import transformers as kernels
from sp_attention.kernels.request import Backend, Mask, Request

LENGTH = testing.LENGTH
MASK = Mask(testing.BATCH, LENGTH, LENGTH, torch.device("cpu"))
SIZES = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
SIX = testing.Shape(heads=6)
TWO = testing.Shape(heads=2, kv_heads=1)


def backend(kernel: str) -> Backend:
    return {backend.kernel: backend for backend in kernels.sp_attention_backends()}[kernel]


def gpt_oss() -> GptOssAttention:
    module = GptOssAttention(GptOssConfig(**SIZES), layer_idx=0).double()
    nn.init.normal_(module.sinks)
    return module


def assert_right(request: Request, tolerance: float = 1e-6) -> None:
    """The output of eager, and its weights, are those of attention written out; softmax in float32 is as exact."""
    for given, expected in zip(kernels.eager_with_weights(request), testing.attend_with_weights(request), strict=True):
        torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance)


def test_eager_reads_the_sinks_of_its_heads_from_the_module() -> None:
    module = gpt_oss()
    request = replace(testing.request(MASK, TWO), module=module, heads=range(2, 4), all_heads=6)
    assert kernels.refuses_eager(request) is None
    sinks = module.sinks.detach()[2:4].clone().requires_grad_()
    out = kernels.eager(request)
    expected = testing.attend(replace(request, sinks=sinks))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(out.square().sum(), module.sinks)
    (theirs,) = torch.autograd.grad(expected.square().sum(), sinks)
    torch.testing.assert_close(gradient[2:4], theirs)
    assert gradient[[0, 1, 4, 5]].tolist() == [0.0] * 4


def test_the_sinks_of_a_request_stand_for_those_of_the_module() -> None:
    module = gpt_oss()
    sinks = torch.randn(2, dtype=torch.float64)
    assert_right(replace(testing.request(MASK, TWO, sinks=sinks), module=module, heads=range(4, 6), all_heads=6))
    assert_right(replace(testing.request(MASK, SIX, sinks=module.sinks.detach()), module=module))


def test_sinks_are_passed_by_the_name_the_function_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_name(name: str) -> object:
        given = {}

        def with_s_aux(module: object, *tensors: Tensor, s_aux: Tensor, **options: object) -> tuple[Tensor, Tensor]:
            given["s_aux"] = s_aux
            return tensors[0].transpose(1, 2), tensors[0]

        def with_sinks(module: object, *tensors: Tensor, sinks: Tensor, **options: object) -> tuple[Tensor, Tensor]:
            given["sinks"] = sinks
            return tensors[0].transpose(1, 2), tensors[0]

        function = {"s_aux": with_s_aux, "sinks": with_sinks}[name]
        monkeypatch.setattr(kernels, "eager_functions", lambda module: iter([function]))
        request = replace(testing.request(MASK, sinks=torch.ones(3)), module=nn.Module())
        assert kernels.refuses_eager(request) is None
        kernels.eager(request)
        return given[name] is request.sinks

    assert of_name("s_aux")
    assert of_name("sinks")


def test_eager_refuses_what_its_function_would_drop() -> None:
    module = LlamaAttention(LlamaConfig(**SIZES), layer_idx=0)
    request = replace(testing.request(MASK, SIX), module=module)
    assert kernels.refuses_eager(request) is None
    assert (
        kernels.refuses_eager(replace(request, softcap=2.0)) == "the eager attention of LlamaAttention has no softcap"
    )
    assert kernels.refuses_eager(replace(request, sinks=torch.zeros(6))) == (
        "the eager attention of LlamaAttention has no attention sinks"
    )
    assert kernels.refuses_eager(replace(request, module=nn.Linear(1, 1))) == (
        "Linear has no eager_attention_forward in its module"
    )


def test_sdpa_knows_where_its_queries_stand() -> None:
    rows = testing.request(replace(MASK, query_length=11, offset=17), testing.Shape(query_length=11))
    module = LlamaAttention(LlamaConfig(**SIZES), layer_idx=0)
    torch.testing.assert_close(kernels.sdpa(replace(rows, module=module)), testing.attend(rows))


def test_sdpa_refuses_what_it_would_drop() -> None:
    request = testing.request(MASK)
    assert kernels.refuses_sdpa(replace(request, softcap=2.0)) == "transformers' sdpa attention has no softcap"
    assert kernels.refuses_sdpa(replace(request, sinks=torch.zeros(3))) == (
        "transformers' sdpa attention has no attention sinks"
    )


class Odd(nn.Module):
    """An attention whose function reads something of all heads."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.slopes = nn.Parameter(tensor)
        self.position = nn.Embedding(4, 6)
        self.dropout = nn.Dropout()


def reads_slopes(module: Odd, query: Tensor, *others: object, **options: object) -> tuple[Tensor, Tensor]:
    return (query * module.slopes.reshape(-1, 1, 1)).transpose(1, 2), query


def reads_position(module: Odd, query: Tensor, *others: object, **options: object) -> tuple[Tensor, Tensor]:
    return (query + module.position.weight.sum()).transpose(1, 2), query


def reads_dropout(module: Odd, query: Tensor, *others: object, **options: object) -> tuple[Tensor, Tensor]:
    return module.dropout(query).transpose(1, 2), query


def test_tensors_of_the_module_are_cut_by_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "eager_functions", lambda module: iter([reads_slopes]))
    for shape in ((6,), (1, 6, 1), (6, 1)):
        module = Odd(torch.arange(6, dtype=torch.float64).reshape(shape))
        request = replace(testing.request(MASK, TWO), module=module, heads=range(3, 5), all_heads=6)
        assert kernels.refuses_eager(request) is None
        out = kernels.eager(request)
        torch.testing.assert_close(out, request.query * torch.tensor([3.0, 4.0], dtype=torch.float64)[:, None])
        out.sum().backward()
        assert module.slopes.grad.flatten().nonzero().flatten().tolist() == [3, 4]


@pytest.mark.parametrize("shape", [(4,), (6, 6), (12,)], ids=str)
def test_tensors_that_cannot_be_cut_are_refused_before(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "eager_functions", lambda module: iter([reads_slopes]))
    request = replace(testing.request(MASK, TWO), module=Odd(torch.zeros(shape)), heads=range(3, 5), all_heads=6)
    reason = kernels.refuses_eager(request)
    assert reason == (
        f"the eager attention of Odd reads the tensor 'slopes' {list(shape)} from the module, which holds all 6 heads, "
        "and which dim is theirs is not known"
    )
    with pytest.raises(UnsupportedError, match="which dim is theirs is not known"):
        kernels.eager(request)
    assert kernels.refuses_eager(replace(request, heads=None, all_heads=None)) is None
    assert kernels.refuses_eager(replace(request, heads=range(0, 6))) is None


def test_submodules_with_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    request = replace(testing.request(MASK, TWO), module=Odd(torch.zeros(6)), heads=range(3, 5), all_heads=6)
    monkeypatch.setattr(kernels, "eager_functions", lambda module: iter([reads_position]))
    assert kernels.refuses_eager(request) == (
        "the eager attention of Odd uses the submodule 'position', whose parameters may be of all heads"
    )
    assert kernels.refuses_eager(replace(request, heads=None)) is None
    monkeypatch.setattr(kernels, "eager_functions", lambda module: iter([reads_dropout]))
    assert kernels.refuses_eager(request) is None


def test_functions_that_know_no_groups_get_a_kv_head_for_each_query_head() -> None:
    module = BartAttention(48, 6, config=BartConfig())
    assert_right(replace(testing.request(MASK, SIX), module=module))


@pytest.mark.parametrize("bias", [(1, 6, LENGTH, LENGTH), (2, 1, LENGTH, LENGTH), (1, 6, 1, LENGTH)], ids=str)
def test_bias_by_head_and_softcap_in_one(bias: tuple[int, ...]) -> None:
    module = Gemma2Attention(Gemma2Config(**SIZES), layer_idx=0)
    padding = torch.arange(LENGTH)[None] >= torch.tensor([[9], [0]])
    features = {"softcap": 1.5, "bias": torch.randn(*bias, dtype=torch.float64)}
    assert_right(replace(testing.request(replace(MASK, padding=padding), SIX, **features), module=module))
    assert_right(replace(testing.request(replace(MASK, causal=False), SIX, **features), module=module))


def test_dropout_is_that_of_the_request_not_of_the_module() -> None:
    module = LlamaAttention(LlamaConfig(**SIZES), layer_idx=0)
    request = replace(testing.request(MASK, SIX), module=module.train())
    assert_right(request)
    dropped = kernels.eager(replace(request, module=module.eval(), dropout=0.5))
    assert not torch.allclose(dropped, kernels.eager(request), atol=1e-3)


def test_queries_that_see_nothing_yield_zeros_and_gradients_where_the_mask_overflows() -> None:
    module = LlamaAttention(LlamaConfig(**SIZES), layer_idx=0)
    padding = (torch.arange(LENGTH) >= 9).expand(testing.BATCH, -1)
    request = replace(testing.request(replace(MASK, padding=padding), SIX), module=module)
    # Every score is -200, which together with the lowest number of float16 is -inf.
    query = torch.full_like(request.query, -10.0, dtype=torch.float16).requires_grad_()
    key = torch.full_like(request.key, 6.25, dtype=torch.float16)
    out = kernels.eager(replace(request, query=query, key=key, value=request.value.half()))
    assert not out[:, :9].any()
    assert out[:, 9:].any()
    (gradient,) = torch.autograd.grad(out.sum(), query)
    assert gradient.isfinite().all()


def test_in_float32_queries_that_see_nothing_yield_what_they_do_in_transformers() -> None:
    mask = Mask(
        2, LENGTH, LENGTH, torch.device("cpu"), window=3, padding=torch.arange(LENGTH) < torch.tensor([[9], [4]])
    )
    module = Gemma2Attention(Gemma2Config(**SIZES, query_pre_attn_scalar=8), layer_idx=0)
    request = testing.request(mask, TWO)
    query, key, value = (tensor.float() for tensor in (request.query, request.key, request.value))
    out = kernels.eager(replace(request, query=query, key=key, value=value, module=module, softcap=30.0))
    blind = ~mask.dense().any(-1)[:, 0]
    assert bool(blind.any())
    mean = value.mean(1, keepdim=True).repeat_interleave(2, 2).expand_as(out)
    torch.testing.assert_close(out[blind], mean[blind])


def test_masks_are_made_tensors_once() -> None:
    module = LlamaAttention(LlamaConfig(**SIZES), layer_idx=0)
    request = replace(testing.request(replace(MASK, window=3), SIX), module=module)
    first, _ = kernels._added_to_scores(request)
    second, _ = kernels._added_to_scores(replace(request, query=request.query * 2))
    assert first is second


def test_other_keys_are_listed_with_the_reason() -> None:
    assert backend("transformers:flex_attention").unavailable.startswith("its mask does not travel as a tensor")
    with pytest.raises(UnsupportedError, match="listed as unavailable"):
        backend("transformers:flex_attention").attend(testing.request(MASK))


def test_what_torch_gives_queries_that_see_nothing_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_cudnn(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **options: Any) -> Tensor:
        blind = ~attn_mask.any(-1, keepdim=True)
        return torchs(query, key, value, attn_mask=attn_mask, **options).masked_fill(blind, 7.0)

    torchs = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", as_cudnn)
    request = testing.FEATURES["padding and nothing else in a row"]()
    torch.testing.assert_close(kernels.sdpa(request), testing.attend(request))
