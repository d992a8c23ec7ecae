"""What the rehearsal finds: parts that are not what they seem, and what the report says of every kind of layer."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from helpers import relative_error, spy
from models import LLAMA, Tiny, batch_of
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import sp_attention
from sp_attention.cli.reduced import build
from sp_attention.errors import UnsupportedError
from sp_attention.launch import run_ranks


def before(hidden: Tensor) -> Tensor:
    """The states of each token's predecessor."""
    return nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]


class LooksBack(nn.Module):
    """An MLP that secretly adds a little of the token before."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden + 1e-2 * before(hidden))


class KnowsTheLength(LooksBack):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden) * hidden.shape[1] / 20


class LayerLooksBack(LlamaDecoderLayer):
    """All its children are what they were."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states + 0.1 * before(hidden_states), *args, **kwargs)


class LayerKnowsTheLength(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states * hidden_states.shape[1] / 20, *args, **kwargs)


def child(kind: type[nn.Module]) -> Callable[[PreTrainedModel], None]:
    def change(model: PreTrainedModel) -> None:
        model.model.layers[1].mlp = kind(model.model.layers[1].mlp)

    return change


def layer(kind: type[nn.Module]) -> Callable[[PreTrainedModel], None]:
    def change(model: PreTrainedModel) -> None:
        model.model.layers[0].__class__ = kind

    return change


def add_between_the_layers(model: PreTrainedModel) -> None:
    """On all tokens, one number for each: of no layer, and of the length of the whole sequence."""
    constant = torch.randn(64, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def add(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] + constant[: args[0].shape[1]], *args[1:])

    model.model.layers[1].register_forward_pre_hook(add)


class Passed(torch.autograd.Function):
    """A tensor as another one, as engines that shard parameters put around every layer."""

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def pass_through_an_engine(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.register_forward_pre_hook(spy(lambda module, args: (Passed.apply(args[0]), *args[1:])))
        layer.register_forward_hook(spy(lambda module, args, output: Passed.apply(output)))


def fail_on_a_part_on_one_rank(model: PreTrainedModel) -> None:
    def fail(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if dist.get_rank() == 1 and args[0].shape[1] < 7:
            raise ValueError("too few tokens for rank 1")

    model.model.layers[1].mlp.register_forward_pre_hook(spy(fail))


SABOTAGES: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "a child looks back": (child(LooksBack), "mlp: gathered: mixes tokens"),
    "a child knows the length": (child(KnowsTheLength), "mlp: gathered: mixes tokens"),
    "a layer looks back": (layer(LayerLooksBack), "all of it: gathered: only as a whole does it give the same "),
    "a layer knows the length": (layer(LayerKnowsTheLength), "all of it: gathered: only as a whole does it give "),
    "added between": (add_between_the_layers, "; each layer cuts and gathers on its own"),
    "passed through an engine": (pass_through_an_engine, "  logits stay sharded in training with labels"),
    "fails on one rank": (fail_on_a_part_on_one_rank, "all of it: gathered: only as a whole does "),
}


def sabotaged() -> dict[str, tuple[float, str]]:
    found = {}
    for name, (change, _) in SABOTAGES.items():
        reference, model = LLAMA.build(), LLAMA.build()
        change(reference)
        change(model)
        handle = sp_attention.enable(model, backend="sdpa")
        losses = []
        # Longer than the length at which one rank fails.
        for each in (reference, model):
            loss = each(**batch_of("left-padded", 33)).loss
            loss.backward()
            losses.append(loss.detach())
        sp_attention.average_gradients(model)
        theirs = dict(reference.named_parameters())
        pairs = [(losses[1], losses[0]), *((ours.grad, theirs[key].grad) for key, ours in model.named_parameters())]
        found[name] = max(relative_error(*pair) for pair in pairs), handle.report()
    return found


def test_what_looks_beyond_its_token_is_found_and_stays_exact() -> None:
    for found in run_ranks(3, sabotaged, timeout=120):
        for name, (error, report) in found.items():
            assert error < 1e-5, (name, report)
            assert SABOTAGES[name][1] in report, (name, report)


REPORTED = {
    "mamba2": (
        "causal-lm",
        ["  backbone.layers, layers 0 to 1: mixer: head-parallel (Mamba-2 scan, convolution by halo); all else"],
    ),
    "lfm2": (
        "causal-lm",
        [
            ": conv: on this rank's tokens (convolution by halo); all else",
            ": self_attn: head-parallel; all else: position-wise",
        ],
    ),
    # One layer that is called twice.
    "albert": ("masked-lm", ["albert_layers.0.attention: head-parallel; all else: position-wise"]),
    "bart": (
        "seq2seq-lm",
        [
            "  model.encoder.layers, layers 0 to 1: self_attn: head-parallel",
            "  model.decoder.layers, layers 0 to 1: ",
            "encoder_attn: attends from this rank's tokens to all of another sequence",
        ],
    ),
    "qwen2_vl": ("image-text-to-text", ["  model.visual.blocks: left alone: not called in the rehearsal"]),
}


def reports() -> dict[str, str]:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    return {
        name: sp_attention.enable(build(name, task), backend="sdpa").report() for name, (task, _) in REPORTED.items()
    }


def test_the_report_names_what_is_gathered_and_what_is_left_alone() -> None:
    first, second = run_ranks(2, reports)
    assert first == second
    for name, (_, lines) in REPORTED.items():
        assert all(line in first[name] for line in lines), first[name]


def fail_always() -> str:
    """Only rank 1 fails, in the first forward of the rehearsal; both must raise."""
    model = LLAMA.build()

    def fail(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if dist.get_rank() == 1:
            raise ValueError("it is ill")

    model.model.layers[1].mlp.register_forward_pre_hook(spy(fail))
    with pytest.raises(UnsupportedError) as refusal:
        sp_attention.enable(model, backend="sdpa")
    return str(refusal.value)


def test_a_model_that_fails_on_one_rank_is_refused_on_every_rank() -> None:
    text = "rank 1: enable() found no small batch that LlamaForCausalLM takes: ValueError: it is ill"
    assert run_ranks(2, fail_always, timeout=30) == [text] * 2


def cost() -> tuple[float, float, int]:
    """Seconds that enable() takes, by how much of the weights' size the peak of memory grows, and how many forwards."""
    import resource
    from time import monotonic

    settings = {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24, "num_attention_heads": 8,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 16000, "initializer_range": 0.02,
    }  # fmt: skip
    model = Tiny("LlamaForCausalLM", settings).build(torch.float32)
    size = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    assert 80e6 < size / 4 < 120e6
    forwards = []
    model.model.register_forward_pre_hook(spy(lambda *_: forwards.append(1)))
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, monotonic()
    sp_attention.enable(model, backend="sdpa")
    seconds = monotonic() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    assert all(parameter.grad is None for parameter in model.parameters())
    return seconds, grown / size, len(forwards)


def test_the_rehearsal_of_a_hundred_million_parameters_is_small(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_ranks(2, cost, timeout=120)
    with capsys.disabled():
        for rank, (seconds, grown, forwards) in enumerate(found):
            print(f"\nrank {rank}: enable() took {seconds:.1f} s, {grown:.0%} of the weights, {forwards} forwards")
    for _, grown, forwards in found:
        assert grown < 0.5
        assert forwards <= 24
