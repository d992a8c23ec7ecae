"""Kernel `npu`: Ascend's fused attention, by the package torch-npu."""

from sp_attention import Backend, hookimpl
from sp_attention_npu.availability import unavailable
from sp_attention_npu.kernel import attend, refuses


@hookimpl
def sp_attention_backends() -> list[Backend]:
    return [Backend("npu", "npu", attend, priority=20, unavailable=unavailable(), refuses=refuses)]
