"""The stand-in extension: held against flash-attn's own fakes, its argument checks, and a kernel that is not ours."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cpu
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def edges(*places: int) -> Tensor:
    return torch.tensor(places, dtype=torch.int32)


PATTERNS: dict[str, tuple[Any, ...]] = {
    # dropout, scale, causal, window left and right, softcap
    "full": (0.0, 0.4, False, -1, -1, 0.0),
    "causal": (0.0, 0.4, True, -1, -1, 0.0),
    "window": (0.0, 0.4, True, 3, 0, 0.0),
    "softcap": (0.0, 0.4, True, -1, -1, 1.5),
    "dropout": (0.3, 0.4, False, -1, -1, 0.0),
}


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_operators_agree_with_the_fakes_that_flash_attn_registers(pattern: str, kv_heads: int) -> None:
    interface: Any = cpu.import_flash2()
    options = PATTERNS[pattern]
    # Backward writes into dq, dk and dv, which its schema says.
    tests = ("test_schema", "test_faketensor")
    q, k, v, dout = tensors((2, 9, 4, 8), (2, 13, kv_heads, 8), (2, 13, kv_heads, 8), (2, 9, 4, 8))
    arguments = (q, k, v, *options, None, False)
    torch.library.opcheck(interface._flash_attn_forward, arguments, test_utils=tests)
    out, lse, _, state = interface._flash_attn_forward(*arguments)
    into = [torch.empty_like(t) for t in (q, k, v)]
    torch.library.opcheck(
        interface._flash_attn_backward, (dout, q, k, v, out, lse, *into, *options, None, False, state), test_utils=tests
    )

    q, k, v, dout = tensors((14, 4, 8), (20, kv_heads, 8), (20, kv_heads, 8), (14, 4, 8))
    cut = (edges(0, 9, 14), edges(0, 13, 20), 9, 13)
    arguments = (q, k, v, *cut, *options, None, False)
    torch.library.opcheck(interface._flash_attn_varlen_forward, arguments, test_utils=tests)
    out, lse, _, state = interface._flash_attn_varlen_forward(*arguments)
    into = [torch.empty_like(t) for t in (q, k, v)]
    torch.library.opcheck(
        interface._flash_attn_varlen_backward,
        (dout, q, k, v, out, lse, *into, *cut, *options, None, False, state),
        test_utils=tests,
    )


def test_the_stand_in_rejects_what_the_kernel_rejects() -> None:
    cpu.import_flash2()
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    def dense(
        size: int = 8, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.bfloat16, **options: Any
    ) -> Any:
        q, k, v = tensors((2, 9, heads, size), (2, 9, kv_heads, size), (2, 9, kv_heads, size), dtype=dtype)
        return flash_attn_func(q, k, v, **options)

    assert dense().shape == (2, 9, 4, 8)
    assert dense(size=20).shape == (2, 9, 4, 20)  # the package fills it up to 24
    with pytest.raises(RuntimeError, match="only support fp16 and bf16"):
        dense(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="at most 256"):
        dense(size=512)
    with pytest.raises(RuntimeError, match="must divide number of heads"):
        dense(heads=3)
    with pytest.raises(RuntimeError, match="does not support dropout"):
        dense(softcap=2.0, dropout_p=0.1)
    q, k, v = tensors((2, 9, 4, 8), (2, 9, 4, 8), (2, 9, 4, 16))
    with pytest.raises(RuntimeError, match="v must have shape"):
        flash_attn_func(q, k, v)
    q, k, v = tensors((14, 4, 8), (14, 4, 8), (14, 4, 8))
    with pytest.raises(RuntimeError, match="must have dtype int32"):
        flash_attn_varlen_func(q, k, v, edges(0, 9, 14).long(), edges(0, 9, 14).long(), 9, 9)
    with pytest.raises(RuntimeError, match="before the first token"):
        flash_attn_varlen_func(q, k, v, edges(9, 14), edges(9, 14), 9, 9)
    with pytest.raises(RuntimeError, match="longer than was said"):
        flash_attn_varlen_func(q, k, v, edges(0, 9, 14), edges(0, 9, 14), 8, 9)


# What flash-attn's Triton kernels for AMD, interpreted on the CPU, compute right: no windows, softcaps or bfloat16.
INTERPRETED = (
    "causal",
    "bidirectional",
    "chunks",
    "packed documents",
    "left padding",
    "padding between real tokens",
    "scale",
    "grouped KV heads",
    "head size 20",
    "values larger than keys",
    "cross-attention",
)


def test_the_triton_interpreter_gives_a_second_opinion() -> None:
    """flash-attn's own kernels in float32, forward and backward, called by us as we call the stand-in."""
    environment = os.environ | {"FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE", "TRITON_INTERPRET": "1"}
    found = subprocess.run(
        [sys.executable, str(HERE / "interpreted.py"), *INTERPRETED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1]) == dict.fromkeys(INTERPRETED)
