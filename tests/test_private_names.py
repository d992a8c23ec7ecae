"""Names of other packages that we rely on and that nobody promises us: docs/private-names.md.

Each name of the table has a check here, or beside this file for packages with an environment of their own. An upgrade
that takes a name away, or changes how it is called, fails in the check that has the name.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from accelerate.data_loader import DataLoaderShard
from packaging.version import Version
from private_names import ROOT, Check, every, is_a, names_of, private_names, reads, table, takes, thing_called
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils.data import DataLoader
from transformers import (
    AttentionInterface,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    MixtralConfig,
    MixtralModel,
    Trainer,
)
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache, LinearAttentionLayer, StaticLayer
from transformers.masking_utils import create_causal_mask

from sp_attention.region.versions import checkpoint_activations

# Where the names of the other packages are checked, which are not in every environment.
ELSEWHERE = {
    "deepspeed": "with_deepspeed/test_private_names_of_deepspeed.py",
    "trl": "with_trl/test_private_names_of_trl.py",
}
SIZES: dict[str, Any] = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
IDS, STATES = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2, 3, 4)


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def with_a_loss() -> Any:
    model = llama()
    model.loss_function = print
    return model


def recorded() -> Any:
    model = llama().model
    model(IDS, output_hidden_states=True)
    return model


def checkpointed() -> Any:
    model = llama()
    checkpoint_activations(model)
    return model.model.layers[0]


def filled(layer: Any) -> Any:
    layer.update(STATES, STATES)
    return layer


def captures(arguments: tuple[Any, ...], *cells: str) -> Check:
    """What it makes of the arguments is a closure with these cells, and always of the same code."""

    def check(function: Any) -> None:
        one, other = function(*arguments), function(*arguments)
        assert set(one.__code__.co_freevars) == set(cells)
        assert one.__code__ is other.__code__

    return check


def is_made_of(configuration: Any) -> Check:
    """It is made of a configuration and the index of a layer, by this name."""
    return lambda kind: kind(configuration(**SIZES), layer_idx=0)


def can_be_copied_and_given_a_class(kind: type) -> None:
    assert not any(vars(one).keys() & {"__slots__", "__copy__", "__reduce_ex__"} for one in kind.__mro__[:-1])


def is_known_within_transforms(are_active: Callable[[], bool]) -> None:
    assert not are_active()
    assert torch.func.vmap(lambda one: one * are_active())(torch.ones(2)).tolist() == [1.0, 1.0]


def indexes_by_tensors(mode: Any) -> None:
    """Within it a tensor can be indexed under vmap."""
    table = torch.arange(4) * 10
    with mode():
        assert torch.vmap(lambda index: table[index])(torch.tensor([2, 1])).tolist() == [20, 10]


def exchanges_by_sizes(operator: Any) -> None:
    names = [argument.name for argument in operator.default._schema.arguments]
    assert names[:5] == ["output", "input", "process_group", "output_split_sizes", "input_split_sizes"]


def is_of_a_device(function: Any) -> None:
    """Within autocast it is True, or the dtype."""
    with torch.autocast("cpu", torch.bfloat16):
        assert function("cpu") in (True, torch.bfloat16)


def gives_the_module_to_its_function(wrapper: Any) -> None:
    given: list[Any] = []
    module = nn.Identity()
    made = wrapper(module)
    made.checkpoint_fn = lambda *args, **kwargs: given.append((args, kwargs))
    made(1, mask=2)
    assert given == [((module, 1), {"mask": 2})]


def is_handed_on_unread(block_mask: Any) -> None:
    """What is derived from it, with four dims, comes out of transformers' mask builder as it is."""

    class Mine(block_mask):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        @property
        def shape(self) -> tuple[int, ...]:
            return 1, 1, 3, 3

    mask = Mine()
    assert create_causal_mask(LlamaConfig(), torch.zeros(1, 3, 8), mask, past_key_values=None) is mask


def names_the_steps(mode: Any) -> None:
    """What models do to logits has these names in it."""
    seen: list[str] = []

    class Noting(mode):  # type: ignore[misc]
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function.__name__)
            return function(*args, **(kwargs or {}))

    logits = torch.ones(2)
    with Noting():
        _ = logits + 1, logits - 1, logits * 2, logits / 2, torch.tanh(logits), logits.float(), logits[..., :1]
        logits *= 2
        logits /= 2
    assert seen == ["add", "sub", "mul", "div", "tanh", "float", "__getitem__", "mul_", "div_"]


def noted_calls(interface: Any, returns: Callable[..., Any]) -> list[tuple[Any, Any]]:
    """What a model calls that is registered for its attention, or its masks."""
    seen: list[tuple[Any, Any]] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return returns(*args)

    registered = {AttentionInterface: returns_queries} | {interface: noted}
    for one, function in registered.items():
        one.register("noted", function)
    try:
        model = llama()
        model.set_attn_implementation("noted")
        model(input_ids=IDS)
    finally:
        for one in registered:
            del one._global_mapping["noted"]
    return seen


def returns_queries(module: nn.Module, query: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
    return query.transpose(1, 2), None


def attends_as_it_is_called(interface: Any) -> None:
    """By [B, H, S, D], in this order, the rest by name; [B, S, H, D] and the weights come back."""
    seen = noted_calls(interface, returns_queries)
    (module, query, key, value, _), options = seen[0]
    assert module.is_causal is True
    assert [tensor.shape for tensor in (query, key, value)] == [(1, 2, 3, 4), (1, 1, 3, 4), (1, 1, 3, 4)]
    assert {"dropout", "scaling"} <= options.keys()


def builds_masks_as_it_is_called(interface: Any) -> None:
    """By name, once in a forward of one kind of layers."""
    ((args, options),) = noted_calls(interface, lambda: None)
    assert args == ()
    # `describe` reads these, and passes over those that are about tensors of another kernel.
    assert options.keys() == {
        "batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask", "use_vmap",
        "device",
    } | {"allow_is_causal_skip", "config", "dtype"}  # fmt: skip


def holds_what_is_registered(mapping: Any) -> None:
    assert isinstance(mapping, dict)
    assert callable(mapping["sdpa"])


def sets_those_inside_too(value: Any) -> None:
    config = LlavaConfig()
    config._attn_implementation = "eager"
    assert config._attn_implementation == config.text_config._attn_implementation == "eager"


def is_what_is_read(value: Any) -> None:
    """And those inside keep theirs."""
    config = LlavaConfig()
    config._attn_implementation = "eager"
    config._attn_implementation_internal = "sdpa"
    assert config._attn_implementation == "sdpa"
    assert config.text_config._attn_implementation == "eager"


def names_those_inside(value: Any) -> None:
    assert LlavaConfig().sub_configs.keys() == {"text_config", "vision_config"}


def is_the_loss_until_it_is_deleted(value: Any) -> None:
    model = with_a_loss()
    assert vars(model)["_loss_function"] is print
    del model._loss_function
    assert model.loss_function is llama().loss_function


def names_what_is_recorded(value: Any) -> None:
    """A class, a name, or an object that has them, or several of these, by the name of an output."""
    model = MixtralModel(MixtralConfig(**SIZES, num_local_experts=2))
    recorded = list(model.can_record_outputs.values())
    assert all(
        isinstance(one, (type, str, list)) or {"target_class", "class_name"} <= vars(one).keys() for one in recorded
    )
    assert any(hasattr(one, "target_class") for one in recorded)


def hooks_embeddings_by_name(method: Any) -> None:
    """Our hook tells its hook by the module that it is of, and knows that it does nothing else."""
    model = llama()
    model.enable_input_require_grads()
    (hook,) = model.model.embed_tokens._forward_hooks.values()
    assert hook.__module__ == "transformers.modeling_utils"
    assert hook.__code__.co_names == ("requires_grad_",)


def is_that_of_causal_models(loss: Any) -> None:
    assert llama().loss_function is loss
    takes("logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels")(loss)
    assert loss(torch.zeros(1, 3, 8, dtype=torch.float64), IDS, 8).dtype == torch.float32


def checkpoints_its_forward(layer: Any) -> None:
    """By the function that it has when it is called, with arguments by position left to that."""
    given: list[Any] = []

    class Layer(layer):  # type: ignore[misc]
        def forward(self, hidden: int, mask: int) -> int:
            return hidden + mask

    made = Layer()
    assert made.gradient_checkpointing is False
    made.gradient_checkpointing = True
    made._gradient_checkpointing_func = lambda function, *args: given.append((args, function(*args)))
    made(1, mask=2)
    assert given == [((1,), 3)]


def grows_layers(update: Any) -> None:
    cache = DynamicCache()
    takes("self", "key_states", "value_states", "layer_idx")(update)
    update(cache, STATES, STATES, 0)
    assert [layer.keys.shape for layer in cache.layers] == [STATES.shape]
    cache.update = print  # what stands there once a rank keeps its heads
    assert type(cache).update is update


def begins_with_columns(update: Any) -> None:
    cache = DynamicCache()
    cache.layers = [LinearAttentionLayer()]
    columns = torch.arange(6.0).view(1, 2, 3)
    assert update(cache, columns, 0, conv_kernel_size=2).shape == columns.shape
    assert torch.equal(cache.get_conv_state(0), columns[:, :, 1:])


def raises_value_error_without_attention(length: Any) -> None:
    cache = DynamicCache()
    cache.layers = [LinearAttentionLayer()]
    with pytest.raises(ValueError, match="Attention layers"):
        length(cache)


def has_the_shape_of_keys(tensor: Any) -> None:
    assert tensor.shape == STATES.shape


def is_the_number_of_heads(number: Any) -> None:
    assert number == STATES.shape[1]


def writes_its_state_last(save: Any) -> None:
    parts = ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "TRAINER_STATE_NAME")
    places = [inspect.getsource(save).index(part) for part in parts]
    assert places == sorted(places)


def seeds_workers_by_rank(function: Any) -> None:
    takes("worker_id", "num_workers", "rank")(function)
    assert re.search(r"partial\(\s*seed_worker,[^()]*rank=", inspect.getsource(Trainer))


def can_be_made_for_groups(sampler: Any) -> None:
    takes("lengths", "effective_batch_size", "dp_size", "grad_accum", "shuffle", "seed", "rank", "drop_last")(sampler)
    made = sampler([3, 1, 2, 4], 4, 2, 1)
    assert {"lengths", "effective_batch_size", "grad_accum", "shuffle", "seed", "drop_last"} <= vars(made).keys()


def has_llama(mapping: Any) -> None:
    assert mapping["llama"] == "LlamaForCausalLM"


def names_arguments(kwargs: Any) -> None:
    """Those of every model, and those about packed documents; `seq_idx` since 5.9.0: before, layers cut one by one."""
    assert {"output_hidden_states", "cu_seq_lens_q", "max_length_q"} <= kwargs.__annotations__.keys()


def is_callable(thing: Any) -> None:
    assert callable(thing)


EAGER = every(
    takes("module", "query", "key", "value", "attention_mask", also=("scaling", "dropout")),
    reads("num_key_value_groups", "training"),
)
MASK_FUNCTION = takes("batch_idx", "head_idx", "q_idx", "kv_idx")
PROPERTY = is_a(property)

# Beyond these classes, names are those of instances.
MADE: dict[str, Callable[[], Any]] = {
    "accelerate.data_loader.DataLoaderShard": lambda: DataLoaderShard([1]),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": lambda: CheckpointWrapper(
        nn.Identity()
    ),
    "torch._ops.OpOverload": lambda: torch.ops.aten.bernoulli_.float,
    "torch.nn.Module": nn.Module,
    "transformers.LlamaModel": recorded,
    "transformers.PreTrainedModel": with_a_loss,
    "transformers.cache_utils.CacheLayerMixin": lambda: filled(DynamicLayer()),
    "transformers.cache_utils.EncoderDecoderCache": lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    "transformers.cache_utils.LinearAttentionLayer": LinearAttentionLayer,
    "transformers.cache_utils.StaticLayer": lambda: filled(StaticLayer(8)),
    "transformers.configuration_utils.PreTrainedConfig": LlamaConfig,
    "transformers.modeling_layers.GradientCheckpointingLayer": checkpointed,
}

# Names that are younger than the oldest transformers that we support, with the version that they came with.
SINCE = {
    "transformers.masking_utils.remap_positions_for_packed_sequence": "5.23.0",
    "transformers.trainer_pt_utils.BatchRebalanceSampler": "5.17.0",
}

SOME = torch.zeros(1, 1, dtype=torch.int64)


def is_by_identity(kind: Any) -> None:
    """Keys are compared by identity and not kept alive."""
    key = torch.zeros(2)
    held = kind({key: 1})
    assert key in held
    assert torch.zeros(2) not in held
    del key
    assert len(held) == 0


def counts_what_is_written(version: Any) -> None:
    """Of a parameter that an optimizer writes to, as of one in a list of them."""
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    versions = [weight._version]
    for optimizer in (torch.optim.SGD([weight], 0.1), torch.optim.AdamW([weight], foreach=True)):
        optimizer.step()
        versions.append(weight._version)
    assert len(set(versions)) == 3


def gives_the_log_sum_exp(operation: Any) -> None:
    states = torch.randn(1, 2, 3, 4)
    _, sums = operation(states, states, states, 0.0, False, scale=0.5)
    torch.testing.assert_close(sums, (0.5 * states @ states.transpose(2, 3)).logsumexp(-1))


def multiplies_groups(operation: Any) -> None:
    names = [argument.name for argument in operation.default._schema.arguments]
    assert names[:3] == ["self", "mat2", "offs"]


def takes_one_tensor(operation: Any) -> None:
    assert [argument.name for argument in operation.default._schema.arguments] == ["self"]


def takes_the_log_sum_exp(operation: Any) -> None:
    names = [argument.name for argument in operation.default._schema.arguments]
    assert names[:8] == ["grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal"]


def names_the_chance(schema: Any) -> None:
    assert [argument.name for argument in schema.arguments][:2] == ["self", "p"]


CHECKS: dict[str, Check] = {
    "accelerate.Accelerator": can_be_copied_and_given_a_class,
    "accelerate.Accelerator.dispatch_batches": PROPERTY,
    "accelerate.Accelerator.gather_for_metrics": reads("gather", "gradient_state", "end_of_dataloader", "remainder"),
    "accelerate.Accelerator.num_processes": PROPERTY,
    "accelerate.Accelerator.prepare_data_loader": reads("num_processes", "process_index", "dispatch_batches"),
    "accelerate.Accelerator.process_index": PROPERTY,
    "accelerate.Accelerator.torch_device_mesh": PROPERTY,
    "accelerate.data_loader.DataLoaderShard.base_dataloader": is_a(DataLoader),
    "accelerate.utils.recursively_apply": takes("func", "data", also=("error_on_other_type",)),
    "torch.Tensor._version": counts_what_is_written,
    "torch._C._are_functorch_transforms_active": is_known_within_transforms,
    "torch._dynamo._trace_wrapped_higher_order_op.TransformGetItemToIndex": indexes_by_tensors,
    "torch._ops.OpOverload._schema": names_the_chance,
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": gives_the_log_sum_exp,
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": takes_the_log_sum_exp,
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": gives_the_module_to_its_function,
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper.checkpoint_fn": is_callable,
    "torch.get_autocast_dtype": is_of_a_device,
    "torch.is_autocast_enabled": is_of_a_device,
    "torch.nn.Module._backward_hooks": is_a(dict),
    "torch.nn.Module._backward_pre_hooks": is_a(dict),
    "torch.nn.Module._buffers": is_a(dict),
    "torch.nn.Module._forward_hooks": is_a(dict),
    "torch.nn.Module._forward_hooks_always_called": is_a(dict),
    "torch.nn.Module._forward_hooks_with_kwargs": is_a(dict),
    "torch.nn.Module._forward_pre_hooks": is_a(dict),
    "torch.nn.Module._forward_pre_hooks_with_kwargs": is_a(dict),
    "torch.nn.Module._modules": is_a(dict),
    "torch.nn.Module._non_persistent_buffers_set": is_a(set),
    "torch.nn.Module._parameters": is_a(dict),
    "torch.nn.attention.flex_attention.BlockMask": is_handed_on_unread,
    "torch.nn.modules.module._global_backward_hooks": is_a(dict),
    "torch.nn.modules.module._global_backward_pre_hooks": is_a(dict),
    "torch.nn.modules.module._global_forward_hooks": is_a(dict),
    "torch.nn.modules.module._global_forward_pre_hooks": is_a(dict),
    "torch.ops.aten._grouped_mm": multiplies_groups,
    "torch.ops.aten._local_scalar_dense": takes_one_tensor,
    "torch.ops.c10d.alltoall_base_": exchanges_by_sizes,
    "torch.overrides.TorchFunctionMode": names_the_steps,
    "torch.testing._internal.distributed.fake_pg.FakeStore": is_a(type),
    "torch.utils._python_dispatch.TorchDispatchMode": is_a(type),
    "torch.utils.weak.WeakTensorKeyDictionary": is_by_identity,
    "transformers.LlamaModel._output_capturing_hooks_installed": is_a(bool),
    "transformers.PreTrainedModel._loss_function": is_the_loss_until_it_is_deleted,
    "transformers.PreTrainedModel.can_record_outputs": names_what_is_recorded,
    "transformers.PreTrainedModel.enable_input_require_grads": hooks_embeddings_by_name,
    "transformers.Trainer._get_train_sampler": takes("self", "train_dataset"),
    "transformers.Trainer._save_checkpoint": writes_its_state_last,
    "transformers.Trainer._save_optimizer_and_scheduler": takes("self", "output_dir"),
    "transformers.Trainer._save_rng_state": takes("self", "output_dir"),
    "transformers.Trainer.save_model": takes("self", "output_dir", "_internal_call"),
    "transformers.cache_utils.Cache.get_seq_length": raises_value_error_without_attention,
    "transformers.cache_utils.Cache.update": grows_layers,
    "transformers.cache_utils.Cache.update_conv_state": begins_with_columns,
    "transformers.cache_utils.CacheLayerMixin.is_initialized": is_a(bool),
    "transformers.cache_utils.CacheLayerMixin.keys": has_the_shape_of_keys,
    "transformers.cache_utils.CacheLayerMixin.values": has_the_shape_of_keys,
    "transformers.cache_utils.EncoderDecoderCache.cross_attention_cache": is_a(DynamicCache),
    "transformers.cache_utils.EncoderDecoderCache.self_attention_cache": is_a(DynamicCache),
    "transformers.cache_utils.LinearAttentionLayer.has_previous_state": is_a(dict),
    "transformers.cache_utils.LinearAttentionLayer.record_past": is_a(bool),
    "transformers.cache_utils.QuantizedCache": is_a(type),
    "transformers.cache_utils.StaticLayer.num_heads": is_the_number_of_heads,
    "transformers.configuration_utils.PreTrainedConfig._attn_implementation": sets_those_inside_too,
    "transformers.configuration_utils.PreTrainedConfig._attn_implementation_internal": is_what_is_read,
    "transformers.configuration_utils.PreTrainedConfig._name_or_path": is_a(str),
    "transformers.configuration_utils.PreTrainedConfig.sub_configs": names_those_inside,
    "transformers.integrations.sdpa_attention.sdpa_attention_forward": every(
        takes("module", "query", "key", "value", "attention_mask", also=("dropout", "scaling", "is_causal")),
        reads("num_key_value_groups"),
    ),
    "transformers.loss.loss_utils.ForCausalLMLoss": is_that_of_causal_models,
    "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS": is_a(Mapping),
    "transformers.masking_utils.AttentionMaskInterface": builds_masks_as_it_is_called,
    "transformers.masking_utils.AttentionMaskInterface._global_mapping": holds_what_is_registered,
    "transformers.masking_utils.and_masks": captures((len,), "mask_functions"),
    "transformers.masking_utils.bidirectional_mask_function": MASK_FUNCTION,
    "transformers.masking_utils.causal_mask_function": MASK_FUNCTION,
    "transformers.masking_utils.chunked_overlay": captures((1, SOME), "chunk_size", "left_padding"),
    "transformers.masking_utils.packed_sequence_mask_function": captures((SOME,), "packed_sequence_mask"),
    "transformers.masking_utils.remap_positions_for_packed_sequence": captures(
        (len, SOME), "mask_function", "position_ids"
    ),
    "transformers.masking_utils.sdpa_mask": takes(
        "batch_size",
        "q_length",
        "kv_length",
        "q_offset",
        "kv_offset",
        "mask_function",
        "attention_mask",
        also=("use_vmap", "device"),
    ),
    "transformers.masking_utils.sliding_window_bidirectional_overlay": captures((1,), "sliding_window"),
    "transformers.masking_utils.sliding_window_overlay": captures((1,), "sliding_window"),
    "transformers.modeling_layers.GradientCheckpointingLayer": checkpoints_its_forward,
    "transformers.modeling_layers.GradientCheckpointingLayer._gradient_checkpointing_func": is_callable,
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": is_a(Mapping),
    "transformers.modeling_utils.AttentionInterface": attends_as_it_is_called,
    "transformers.modeling_utils.AttentionInterface._global_mapping": holds_what_is_registered,
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": has_llama,
    "transformers.models.gemma2.modeling_gemma2.Gemma2Attention": is_made_of(Gemma2Config),
    "transformers.models.gemma2.modeling_gemma2.eager_attention_forward": every(EAGER, takes(also=("softcap",))),
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssAttention": is_made_of(GptOssConfig),
    "transformers.models.gpt_oss.modeling_gpt_oss.eager_attention_forward": every(EAGER, reads("sinks")),
    "transformers.models.llama.modeling_llama.LlamaAttention": is_made_of(LlamaConfig),
    "transformers.models.llama.modeling_llama.eager_attention_forward": EAGER,
    "transformers.trainer.TRAINER_STATE_NAME": is_a(str),
    "transformers.trainer_pt_utils.BatchRebalanceSampler": can_be_made_for_groups,
    "transformers.trainer_utils.PREFIX_CHECKPOINT_DIR": is_a(str),
    "transformers.trainer_utils.seed_worker": seeds_workers_by_rank,
    "transformers.trainer_utils.sort_checkpoints": takes("output_dir"),
    "transformers.utils.generic.TransformersKwargs": names_arguments,
}


@pytest.mark.parametrize("name", CHECKS)
def test_is_as_we_use_it(name: str) -> None:
    if Version(transformers.__version__) < Version(SINCE.get(name, "0")):
        with pytest.raises(ImportError):
            thing_called(name, MADE)
        pytest.skip(f"it came with transformers {SINCE[name]}, and here is {transformers.__version__}")
    CHECKS[name](thing_called(name, MADE))


@pytest.mark.parametrize("name", SINCE)
def test_the_table_says_with_which_version_a_name_came(name: str) -> None:
    page = (ROOT / "docs" / "private-names.md").read_text()
    assert re.search(rf"^\| `{re.escape(name)}` \|.*\| since {SINCE[name]}; before, ", page, re.MULTILINE)


def test_every_name_of_the_table_is_checked() -> None:
    assert sorted(CHECKS) == names_of("accelerate", "torch", "transformers")
    for package, file in ELSEWHERE.items():
        checks = (ROOT / "tests" / file).read_text()
        assert [name for name in names_of(package) if name.rsplit(".", 1)[1] not in checks] == []


def test_the_table_is_sorted_and_names_files_that_there_are() -> None:
    rows = table()
    assert list(rows) == sorted(rows)
    assert {name.split(".")[0] for name in rows} == {"accelerate", "torch", "transformers", *ELSEWHERE}
    assert [file for files in rows.values() for file in files if not (ROOT / "sp_attention" / file).is_file()] == []
    assert all(rows.values())


def test_every_private_name_that_we_use_is_in_the_table_with_the_file() -> None:
    told = {(file, part) for name, files in table().items() for file in files for part in name.split(".")}
    assert sorted(private_names() - told) == []
