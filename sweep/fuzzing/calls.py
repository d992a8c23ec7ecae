"""What a model can be called for: training steps, evaluation, generation. Each gives tensors, by name, to compare."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sp_attention.cli.differences import Values
from sp_attention.loss.sharded_logits import ShardedLogits
from sweep.fuzzing.batches import Batch, prompt_of, real_tokens
from sweep.fuzzing.case import Case

# The batches of each backward of a training step, by their number in the call; gradients of all are added up.
TRAINING = {
    "step": ((0,),),
    "update": ((0,),),
    "hidden-states": ((0,),),
    "late-logits": ((0,),),
    "two-forwards": ((0, 1),),
    "accumulate": ((0,), (1,)),
}
# After these the weights are others.
UPDATES = ("update", "late-logits")
NEW_TOKENS, TOO_LONG = 4, 3
LARGEST_UPDATE = 1e-3


class InterruptionError(Exception):
    """Raised on purpose within a forward."""


def forward(model: nn.Module, batch: Batch, **more: Any) -> Any:
    """The output for a copy of the batch, since some models write into what they are given."""
    return model(
        **{name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}, **more
    )


def objective(output: Any, batch: Batch) -> Tensor:
    """The loss; without labels one of our own, of the logits of real tokens."""
    if "loss" in output:
        loss: Tensor = output["loss"]
        return loss
    return _of_real_tokens(output["logits"], batch).double().square().mean()


def seen(output: Any, batch: Batch, prefix: str = "") -> Values:
    """What a user sees of an output, whole: loss, logits, hidden states, losses of routers."""
    values = {}
    for name, value in output.items():
        if isinstance(value, ShardedLogits):
            value = value.whole()
        if isinstance(value, Tensor) and value.is_floating_point():
            values[name] = value
        elif "hidden_states" in name:
            values |= {f"{name}.{i}": state for i, state in enumerate(value)}
    return {prefix + name: _of_real_tokens(value.detach(), batch).clone() for name, value in values.items()}


def _of_real_tokens(value: Tensor, batch: Batch) -> Tensor:
    real = real_tokens(batch)
    if real is None or value.shape[:2] != real.shape:
        return value
    return value.masked_fill(~real.view(*real.shape, *[1] * (value.dim() - 2)), 0)


def update(model: nn.Module) -> None:
    """Move every weight against its gradient, as far as its gradient is large."""
    trained = [(weight, weight.grad) for weight in model.parameters() if weight.grad is not None]
    largest = max((float(gradient.abs().max()) for _, gradient in trained), default=0.0)
    if 0 < largest < float("inf"):
        with torch.no_grad():
            for weight, gradient in trained:
                weight.sub_(gradient, alpha=LARGEST_UPDATE / largest)


def evaluate(model: nn.Module, case: Case, batch: Batch) -> Values:
    """Without gradients; the loss too where there are labels."""
    return seen(forward(model, batch), batch)


def decode(model: nn.Module, case: Case, batch: Batch) -> Values:
    """A prompt that fills a cache, then one more token, then three at once."""
    prompt = prompt_of(batch)
    output = forward(model, prompt, use_cache=True)
    values = {"logits of the prompt": _of_real_tokens(output["logits"], prompt)}
    for count in (1, 3):
        prompt["input_ids"] = (prompt["input_ids"][:, :1] + torch.arange(count)) % vocabulary_of(model)
        if "attention_mask" in prompt:
            longer = prompt["attention_mask"].new_ones(case.rows, count)
            prompt["attention_mask"] = torch.cat([prompt["attention_mask"], longer], 1)
        output = forward(model, prompt, past_key_values=output["past_key_values"], use_cache=True)
        values[f"logits of {count} more"] = output["logits"]
    return values


def vocabulary_of(model: nn.Module) -> int:
    """How many tokens a model knows."""
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    return int(inner.config.get_text_config().vocab_size)


def generate(model: nn.Module, case: Case, batch: Batch) -> Values:
    """Greedy tokens, and the scores of all others."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.can_generate():
            # Nothing ends early.
            module.generation_config.eos_token_id, module.generation_config.pad_token_id = None, 0
    output = model.generate(
        **prompt_of(batch),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        output_scores=True,
        return_dict_in_generate=True,
    )
    scores = {f"score {i}": score for i, score in enumerate(output.scores)}
    return {"tokens": output.sequences.double()} | scores


# In evaluation, without gradients. What is within `suspended` or `only_loss` of the handle is named so.
EVALUATIONS: dict[str, Callable[[nn.Module, Case, Batch], Values]] = {
    "evaluate": evaluate,
    "suspended": evaluate,
    "only-loss": evaluate,
    "cache": decode,
    "generate": generate,
}


def way(call: str, handle: Any) -> AbstractContextManager[Any]:
    """In which way of its handle, None for a model that is not enabled, a model does a call."""
    if handle is None:
        return nullcontext()
    return {"suspended": handle.suspended, "only-loss": handle.only_loss}.get(call, nullcontext)()


def too_long(model: nn.Module, batch: Batch) -> None:
    """A forward with labels for more tokens than there are."""
    ids = batch["input_ids"]
    forward(model, {**batch, "labels": torch.cat([ids, ids[:, :1].expand(-1, TOO_LONG)], 1)})


def interrupted(model: nn.Module, batch: Batch) -> None:
    """A forward that ends with an error in its last layer, or rather in the last linear module of it."""
    with _raising(model):
        forward(model, batch)


@contextmanager
def _raising(model: nn.Module) -> Iterator[None]:
    def stop(module: nn.Module, args: Any) -> None:
        raise InterruptionError

    heads = ("lm_head", "classifier", "proj_out", "score", "predictions", "lora")
    inner = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(head in name for head in heads)
    ]
    hook = (inner or [*model.modules()])[-1].register_forward_pre_hook(stop)
    try:
        yield
    finally:
        hook.remove()
