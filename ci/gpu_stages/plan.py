"""The stages in the order that matters, and what stands in for what where a CPU stands in for the device."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """module: has `run(results, device)`. shows: in one line. stand_in: what a rehearsal on a CPU has in its place."""

    name: str
    shows: str
    stand_in: str

    @property
    def module(self) -> str:
        return f"gpu_stages.{self.name}"


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "masks",
            "torch's attention with every kind of mask in half precision, each of its backends alone and as chosen",
            "torch's attention is that of the CPU, which has flash and math; lengths are up to 137",
        ),
        Stage(
            "models",
            "whole models on ranks that share the device, talking through gloo, against one process",
            "models run on the CPU, Qwen3-Next with torch's functions in the place of fla's kernels",
        ),
        Stage(
            "flash",
            "every kernel that is installed, and trials of torch's flex and varlen attention, through the kit",
            "packages of flash-attn, varlen and flex are attention written out; features are a few",
        ),
        Stage(
            "long",
            "the longest sequence that one device trains on, with what spares memory, beside transformers alone",
            "a Llama of 0.2 million parameters; memory is that of the process, as Linux tells it",
        ),
        Stage(
            "exchange",
            "packing and unpacking at 8 ranks' shapes, fused losses, CUDA graphs and compiling, FSDP2 on one device",
            "shapes are small; a CUDA graph is a second call, and compiling is by aot_eager, without code for a device",
        ),
        Stage(
            "nccl",
            "every collective that is called, on a group of one rank: that it starts, and nothing more",
            "the group is gloo's",
        ),
    )
}
# Seconds that a stage has on a device, and in a rehearsal.
DEADLINE, REHEARSAL = 240.0, 600.0
