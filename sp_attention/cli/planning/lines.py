"""The lines of code that a plan is for: what is to be pasted into a training script that has a model and a batch."""

from sp_attention.cli.planning.choosing import Option


def lines(option: Option) -> tuple[str, ...]:
    """Five, or four where nothing is checkpointed; `model` is in float32, `batch` has labels."""
    given = {"sp_size": option.sp_size}
    if option.savers.mlp_tile is not None:
        given["mlp_tile"] = option.savers.mlp_tile
    arguments = "".join(f", {name}={value}" for name, value in given.items())
    arguments += ", offload=True" if option.savers.offload else ""
    enable = f"handle = sp_attention.enable(model{arguments})"
    again = ("model.gradient_checkpointing_enable()",) if option.savers.checkpointing else ()
    before, after = _ENGINES[option.wanted.engine.name](option)
    return (*before, enable, *again, *after)


def _ddp(option: Option) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return ("model.to(torch.bfloat16)",), (
        "model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)",
        "model(**batch).loss.backward()",
    )


def _fsdp2(option: Option) -> tuple[tuple[str, ...], tuple[str, ...]]:
    fsdp = "torch.distributed.fsdp"
    return (), (
        f"policy = {fsdp}.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)",
        f"[{fsdp}.fully_shard(module, mp_policy=policy) for module in (*model.{option.model.stack}, model)]",
        "model(**batch).loss.backward()",
    )


def _zero3(option: Option) -> tuple[tuple[str, ...], tuple[str, ...]]:
    config = '{"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}'
    return (), (
        f"engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={config})",
        "engine.backward(engine(**batch).loss)",
        "engine.step()",
    )


_ENGINES = {"ddp": _ddp, "fsdp2": _fsdp2, "zero3": _zero3}
