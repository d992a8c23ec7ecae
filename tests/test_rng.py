"""Dropout: shared outside of the layers, each rank's own inside, and the same again when a layer is recomputed."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
import transformers
from helpers import Selected, gradients_of, relative_error, run_once, spy, too_large
from models import Tiny, batch_of
from torch import Tensor, nn
from transformers import PreTrainedModel

import sp_attention
from sp_attention.distributed.rng import Forked, are_equal, derived, states
from sp_attention.errors import UnsupportedError
from sp_attention.launch import run_ranks
from sp_attention.region.versions import checkpoint_activations, keep_activations

# Its last layer looks one token back, so that a part with dropout in it is gathered.
GPT2 = Tiny("GPT2LMHeadModel", {"resid_pdrop": 0.3, "attn_pdrop": 0.3, "embd_pdrop": 0.3})
LLAMA = Tiny("LlamaForCausalLM", {"attention_dropout": 0.3})


class LooksBack(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden + hidden.roll(1, 1))


def gpt2() -> PreTrainedModel:
    model = GPT2.build()
    model.transformer.h[1].mlp = LooksBack(model.transformer.h[1].mlp)
    return model


def step(model: PreTrainedModel, kind: str = "plain") -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch_of(kind, 33)).loss
    loss.backward()
    sp_attention.average_gradients(model)
    return loss.detach(), {name: grad.clone() for name, grad in gradients_of(model).items()}


def dropped_by_part() -> dict[str, Any]:
    """Which numbers three kinds of dropout set to zero on this rank, in two forwards; and this rank's losses."""
    model = gpt2()
    handle = sp_attention.enable(model, backend="sdpa")
    assert "random numbers in training: shared outside of the layers" in handle.report()
    assert "mlp: gathered: mixes tokens" in handle.report()
    blocks = model.transformer.h
    modules = {
        "outside": model.transformer.drop,
        "inside": blocks[0].mlp.dropout,
        "gathered": blocks[1].mlp.mlp.dropout,
    }
    found: dict[str, Any] = {name: [] for name in modules}
    for name, module in modules.items():
        module.register_forward_hook(spy(lambda module, args, output, name=name: found[name].append(output == 0)))
    # Generators that differ between ranks.
    torch.manual_seed(dist.get_rank())
    found["losses"] = [step(model)[0].item() for _ in range(2)]
    masks = {name: list(found[name]) for name in modules}
    model.eval()
    reference = gpt2().eval()
    logits = [each(batch_of("plain", 33)["input_ids"]).logits for each in (model, reference)]
    return found | masks | {"evaluation": relative_error(*logits)}


def test_masks_are_shared_outside_of_the_layers_and_differ_inside() -> None:
    first, second = run_ranks(2, dropped_by_part)
    assert first["losses"] == second["losses"]
    assert first["losses"][0] != first["losses"][1]
    for one, other in zip(first["outside"] + first["gathered"], second["outside"] + second["gathered"], strict=True):
        assert one.shape == (2, 33, 48)
        assert torch.equal(one, other)
    for one, other in zip(first["inside"], second["inside"], strict=True):
        assert (one.shape[1], other.shape[1]) == (17, 16)
        # Of one row: numbers that are drawn alike part at the first row's end, since the spans are not of one length.
        assert not torch.equal(one[0, :8], other[0, :8])
    for name in ("outside", "inside", "gathered"):
        assert not torch.equal(*first[name])  # each forward has its own
        assert all(0.2 < one.double().mean() < 0.4 for one in first[name])
    assert max(first["evaluation"], second["evaluation"]) < 1e-5


CHECKPOINTED: dict[str, Callable[[], PreTrainedModel]] = {"gpt2": gpt2, "llama": LLAMA.build}


def checkpointed(name: str) -> dict[str, float]:
    """The largest relative error of loss and gradients with checkpointing, against those without, for one seed."""
    model = CHECKPOINTED[name]()
    sp_attention.enable(model, backend="sdpa")

    def seeded() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(5)
        return step(model, "left-padded")

    loss, gradients = seeded()
    assert torch.equal(seeded()[0], loss)
    errors = {}
    for reentrant in (True, False):
        checkpoint_activations(model, {"use_reentrant": reentrant})
        again, others = seeded()
        keep_activations(model)
        pairs = [(again, loss), *((others[one], gradients[one]) for one in gradients)]
        errors["reentrant" if reentrant else "not reentrant"] = max(relative_error(*pair) for pair in pairs)
    return errors


def all_checkpointed(names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    return {name: checkpointed(name) for name in names}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_recomputed_layers_draw_what_they_drew(name: str, selected: Selected) -> None:
    for found in run_once(2, all_checkpointed, selected("name")):
        assert not too_large(found[name], 1e-9)


def losses_of_one_seed() -> list[list[float]]:
    """Of two steps each: from generators that differ, from a seed, and from that seed again."""
    losses = []
    model = LLAMA.build()
    sp_attention.enable(model, backend="sdpa")
    for seed in (100 + dist.get_rank(), 5, 5):
        torch.manual_seed(seed)
        losses.append([step(model)[0].item() for _ in range(2)])
    return losses


def test_a_seed_of_torch_tells_all_masks_and_every_forward_has_its_own() -> None:
    # All of its dropout is inside of the layers. Python's own generator has no seed here, and differs between ranks.
    first, second = run_ranks(2, losses_of_one_seed)
    assert first == second
    assert first[1] == first[2]
    assert len({loss for losses in first[:2] for loss in losses}) == 4


def generators() -> list[str]:
    """Texts of refusals of dropout that was switched on after enable()."""
    tiny = Tiny("LlamaForCausalLM")
    model = tiny.build()
    sp_attention.enable(model, backend="sdpa")
    before = torch.get_rng_state()
    step(model)
    assert torch.equal(torch.get_rng_state(), before)
    texts = []
    model.model.layers[1].mlp.act_fn = nn.Sequential(model.model.layers[1].mlp.act_fn, nn.Dropout(0.1))
    with pytest.raises(UnsupportedError) as refusal:
        model(**batch_of("plain", 33))
    texts.append(str(refusal.value))
    model.eval()
    assert model(**batch_of("plain", 33)).loss.isfinite()
    model = tiny.build()
    sp_attention.enable(model, backend="sdpa")
    model.model.layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(UnsupportedError) as refusal:
        model(**batch_of("plain", 33))
    texts.append(str(refusal.value))
    return texts


def test_a_model_without_dropout_draws_nothing_and_dropout_that_comes_later_is_refused() -> None:
    for texts in run_ranks(2, generators):
        assert (
            texts
            == [
                "random numbers were drawn in training, unlike in the rehearsal of enable(): switch dropout on before "
                "enable()"
            ]
            * 2
        )


def add_noise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """As NEFTune does, by a hook on the embeddings that Trainer puts there in train()."""
    return output + 0.3 * torch.rand_like(output) if module.training else output


def noisy_llama(*, enabled: bool) -> PreTrainedModel:
    """Without dropout; noise comes after enable()."""
    model = Tiny("LlamaForCausalLM").build()
    if enabled:
        sp_attention.enable(model, backend="sdpa")
    model.get_input_embeddings().register_forward_hook(add_noise)
    return model


def masked_sound(*, enabled: bool) -> PreTrainedModel:
    """Spans of time are masked, which numpy draws."""
    dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
    settings = {
        "vocab_size": 32,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "num_feat_extract_layers": 2,
        "conv_dim": [16, 16],
        "conv_stride": [5, 4],
        "conv_kernel": [10, 8],
        "mask_time_length": 4,
        "layerdrop": 0.0,
    }
    off = dict.fromkeys(dropouts, 0.0)
    torch.manual_seed(0)
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**settings, **off, mask_time_prob=0.3))
    model = model.double().train()
    if enabled:
        sp_attention.enable(model, backend="sdpa")
    return model


def noise_of_one_process(differ: bool) -> dict[str, Any]:
    """By model, the largest relative error of losses and gradients of two steps, with generators seeded alike or by
    rank, and the losses.
    """
    found: dict[str, Any] = {}
    for make in (noisy_llama, masked_sound):
        one, model = make(enabled=False), make(enabled=True)
        sound = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).double()
        batches = {
            noisy_llama: batch_of("plain", 33),
            masked_sound: {"input_values": sound, "labels": torch.tensor([[5, 6, 7], [8, 9, 4]])},
        }
        results = []
        for each in (one, model):
            seed = 3 + (dist.get_rank() if differ and each is model else 0)
            torch.manual_seed(seed), numpy.random.seed(seed), random.seed(seed)
            losses = [each(**batches[make]).loss for _ in range(2)]
            sum(losses).backward()
            results.append([loss.detach() for loss in losses])
        sp_attention.average_gradients(model)
        expected, gradients = gradients_of(one), gradients_of(model)
        pairs = [*zip(*results, strict=True), *((gradients[name], expected[name]) for name in expected)]
        scale = max(float(gradient.abs().max()) for gradient in expected.values())
        errors = [float((ours - theirs).abs().max()) / scale for ours, theirs in pairs]
        found[make.__name__] = (max(errors), [loss.item() for loss in results[1]])
    return found


def test_noise_outside_of_the_layers_is_that_of_one_process_where_ranks_are_seeded_alike() -> None:
    for found in run_ranks(3, noise_of_one_process, False):
        for error, losses in found.values():
            assert error < 1e-6
            assert losses[0] != losses[1]


def test_noise_outside_of_the_layers_is_alike_where_ranks_are_not() -> None:
    first, second = run_ranks(2, noise_of_one_process, True)
    for name, (_, losses) in first.items():
        assert losses == second[name][1]


def test_seeds_are_made_of_numbers_and_names() -> None:
    seeds = {derived(1, "model.layers.0"), derived(1, "model.layers.1"), derived(2, "model.layers.0"), derived(1, 0)}
    assert len(seeds) == 4
    # In every process, and every version of Python.
    assert derived(1, "model.layers.0") == 1_779_183_235_841_561_334


def test_generators_draw_what_a_seed_tells_until_they_are_what_they_were() -> None:
    device = torch.device("cpu")
    before, drawn = states(device), []
    for _ in range(2):
        with Forked(7, device):
            drawn.append((random.random(), numpy.random.rand(), torch.rand(()).item()))
        assert are_equal(states(device), before)
    assert drawn[0] == drawn[1]


def test_generators_are_left_alone_where_an_interrupt_has_left_a_seed_behind() -> None:
    def interrupted() -> Iterator[None]:
        with Forked(7, torch.device("cpu")):
            yield

    running = interrupted()
    next(running)
    torch.manual_seed(3)  # what somebody does after the interrupt
    expected = torch.get_rng_state()
    running.close()
    assert torch.equal(torch.get_rng_state(), expected)
