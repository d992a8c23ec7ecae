"""What a device of the stand-in driver computes: torch's operators, on the CPU.

The memory of the stand-in's devices is the host's, so a tensor there is also a tensor of the CPU at the same address.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# What torch-npu does itself, with the driver's memory and copies alone.
ITS_OWN = {
    "empty.memory_format", "empty_strided", "as_strided", "view", "resize_", "set_.source_Storage",
    "set_.source_Storage_storage_offset", "set_.source_Tensor", "set_", "record_stream", "is_pinned", "_pin_memory",
}  # fmt: skip
# Their results are as large as the numbers say, so the host waits for these.
SIZED_BY_NUMBERS = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
# What the host has waited for since the last `reads.clear()`: operators that need a device's numbers there.
reads: list[str] = []
_libraries: list[torch.library.Library] = []


def on_host(tensor: Tensor) -> Tensor:
    """The same numbers, in the same memory, as a tensor of the CPU."""
    if tensor.device.type != "npu":
        return tensor
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    numbers = torch.frombuffer(memory, dtype=tensor.dtype, count=storage.nbytes() // tensor.element_size())
    return numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy in the memory of a device."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    on_host(copy).copy_(tensor)
    return copy


def aliased(operator: Callable[..., Any], schema: torch.FunctionSchema) -> Callable[..., Any]:
    """The operator's function for tensors of a device."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        tensors = [value for value in _leaves(given.values()) if isinstance(value, Tensor)]
        source = next((tensor.device for tensor in tensors if tensor.device.type == "npu"), None)
        device = given.get("device") or source
        results = operator(**tree_map(_moved, given))
        written = [
            given[argument.name]
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if source is not None and (
            any(tensor.device.type == "cpu" for tensor in written)
            or device.type == "cpu"
            or schema.name.removeprefix("aten::") in SIZED_BY_NUMBERS
            or not any(isinstance(result, Tensor) for result in _leaves([results]))
        ):
            reads.append(schema.name)
        if written and len(written) == len(schema.returns):
            for target, result in zip(written, results if isinstance(results, tuple) else (results,), strict=True):
                if target.shape != result.shape:
                    target.resize_(result.shape)
                    on_host(target).copy_(result)
            return written[0] if len(written) == 1 else tuple(written)
        hosts = {host.untyped_storage().data_ptr(): tensor for tensor in tensors if (host := on_host(tensor)).numel()}
        views = any(argument.alias_info is not None for argument in schema.arguments) and not written

        def back(result: Any) -> Any:
            if not isinstance(result, Tensor):
                return result
            viewed = hosts.get(result.untyped_storage().data_ptr()) if views else None
            if viewed is not None:
                return viewed.as_strided(result.shape, result.stride(), result.storage_offset())
            return on_device(result, device) if device.type == "npu" else result

        return tree_map(back, results)

    return call


def _leaves(values: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(list(values))


def _moved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return on_host(value)
    if isinstance(value, torch.device) and value.type == "npu":
        return torch.device("cpu")
    return None if isinstance(value, torch.Generator) and value.device.type == "npu" else value


def install() -> None:
    """Let every operator of torch that works on the CPU do so for the stand-in's devices too."""
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    for name in torch._C._dispatch_get_all_op_names():
        short = name.removeprefix("aten::")
        if name == short or short in ITS_OWN or short in BACKWARD:
            continue
        # Torch's composite operators are made of others, unless torch-npu has a kernel of its own for them.
        kernels = [torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in ("CPU", "PrivateUse1")]
        if any(kernels) and torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CPU"):
            base, _, overload = short.partition(".")
            operator = getattr(getattr(torch.ops.aten, base), overload or "default")
            library.impl(short, aliased(operator, operator._schema), "PrivateUse1", allow_override=True)
    # torch-npu's own has no gradient either.
    one_hot = torch.ops.aten.one_hot.default
    library.impl("one_hot", aliased(one_hot, one_hot._schema), "AutogradPrivateUse1", allow_override=True)
    for name, function in BACKWARD.items():
        schema = getattr(torch.ops.aten, name).default._schema
        library.impl(name, aliased(function, schema), "PrivateUse1", allow_override=True)
    casts = torch.library.Library("npu", "IMPL")
    _libraries.append(casts)
    schema = torch.ops.npu._npu_dtype_cast.default._schema
    casts.impl(
        "_npu_dtype_cast", aliased(lambda input, dtype: input.to(dtype), schema), "PrivateUse1", allow_override=True
    )


def matmul_backward(grad: Tensor, self: Tensor, other: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
    left = self if self.dim() > 1 else self[None]
    right = other if other.dim() > 1 else other[:, None]
    grad = grad if self.dim() > 1 else grad.unsqueeze(-1 if other.dim() == 1 else -2)
    grad = grad if other.dim() > 1 else grad.unsqueeze(-1)
    found = (grad @ right.mT).sum_to_size(left.shape), (left.mT @ grad).sum_to_size(right.shape)
    parts = zip(found, (self, other), mask, strict=True)
    return tuple(gradient.reshape(tensor.shape) if wanted else None for gradient, tensor, wanted in parts)


def linear_backward(
    self: Tensor, grad_output: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor | None, ...]:
    rows = grad_output.reshape(-1, grad_output.shape[-1])
    found = grad_output @ weight, rows.mT @ self.reshape(-1, self.shape[-1]), rows.sum(0)
    return tuple(gradient if wanted else None for gradient, wanted in zip(found, output_mask, strict=True))


# torch-npu differentiates these as a whole, which torch does not on the CPU.
BACKWARD = {"matmul_backward": matmul_backward, "linear_backward": linear_backward}
