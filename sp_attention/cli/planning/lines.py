"""The lines of code that a plan is for: what is to be pasted into a training script that has a model and a batch."""

from sp_attention.cli.planning.choosing import Option
from sp_attention.region.versions import CHECKPOINTING_ENABLE

Lines = tuple[str, ...]


def lines(option: Option) -> Lines:
    """Of a script that has imported torch and sp_attention; `model` is in float32, and `batch` has labels.

    For zero3 there is an `optimizer` too.
    """
    imported, model, after = _ENGINES[option.wanted.engine.name](option)
    savers = option.savers
    given = {"sp_size": option.sp_size, "mlp_tile": savers.mlp_tile, "offload": savers.offload or None}
    arguments = "".join(f", {name}={value}" for name, value in given.items() if value is not None)
    again = (f"model.{CHECKPOINTING_ENABLE}()",) if savers.checkpointing else ()
    return (imported, f"sp_attention.enable({model}{arguments})", *again, *after)


# By engine: what is imported, the model that is enabled, and what follows.
def _ddp(option: Option) -> tuple[str, str, Lines]:
    return (
        "from torch.nn.parallel import DistributedDataParallel",
        "model.bfloat16()",
        (
            "model = DistributedDataParallel(model, gradient_as_bucket_view=True)",
            "model(**batch).loss.backward()",
        ),
    )


def _fsdp2(option: Option) -> tuple[str, str, Lines]:
    return (
        "from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard",
        "model",
        (
            "policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)",
            f"for module in (*model.{option.model.stack}, model):",
            "    fully_shard(module, mp_policy=policy)",
            "model(**batch).loss.backward()",
        ),
    )


def _zero3(option: Option) -> tuple[str, str, Lines]:
    return (
        "import deepspeed",
        "model",
        (
            f'zero = {{"train_micro_batch_size_per_gpu": {option.wanted.batch}, "bf16": {{"enabled": True}}}}',
            'zero["zero_optimization"] = {"stage": 3}',
            "engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero)",
            "engine.backward(engine(**batch).loss)",
        ),
    )


_ENGINES = {"ddp": _ddp, "fsdp2": _fsdp2, "zero3": _zero3}
