"""The public surface, as a list: a change of it is a change here."""

import inspect

import click

import sp_attention
from sp_attention import testing
from sp_attention.cli import cli
from sp_attention.cli.bench import bench


def test_public_names() -> None:
    assert sorted(sp_attention.__all__) == [
        "Backend",
        "BackendError",
        "BatchError",
        "Handle",
        "Mask",
        "Request",
        "ShardedLogits",
        "ShardedLogitsError",
        "UnsupportedError",
        "average_gradients",
        "enable",
        "hookimpl",
    ]
    assert all(hasattr(sp_attention, name) for name in sp_attention.__all__)
    assert not hasattr(sp_attention, "disable")
    assert issubclass(sp_attention.UnsupportedError, NotImplementedError)
    assert sp_attention.__version__.count(".") == 2


def test_arguments() -> None:
    def arguments(function: object) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert arguments(sp_attention.enable) == [
        "model", "backend", "group", "sp_size", "rehearse", "whole_logits", "loss_tile", "mlp_tile",
        "offload", "longest", "head_groups",
    ]  # fmt: skip
    assert arguments(sp_attention.average_gradients) == ["model", "group"]
    assert arguments(sp_attention.Backend) == [
        "device", "kernel", "attend", "priority", "unavailable", "refuses", "attend_with_weights",
        "own_where_blind",
    ]  # fmt: skip
    assert arguments(sp_attention.Request) == [
        "query", "key", "value", "mask", "scale", "softcap", "sinks", "bias", "dropout", "module", "heads",
        "all_heads",
    ]  # fmt: skip
    assert arguments(sp_attention.Mask) == [
        "batch", "query_length", "key_length", "device", "causal", "window", "documents", "padding", "explicit",
        "function", "offset",
    ]  # fmt: skip
    assert arguments(testing.request_for) == ["feature", "module", "device", "dtype"]
    assert arguments(testing.check) == ["backend", "feature", "module", "device", "dtype", "tolerance"]
    assert arguments(testing.conform) == ["backend", "refused", "module", "device", "dtype", "tolerance"]


def test_commands_and_options() -> None:
    commands = cli.commands | {f"bench {name}": command for name, command in bench.commands.items()}
    options = {
        name: [parameter.opts[0] for parameter in command.params if isinstance(parameter, click.Option)]
        for name, command in commands.items()
    }
    assert options == {
        "backends": ["--json"],
        "bench": [],
        "bench exchange": ["--ranks", "--rounds", "--quick", "--out", "--json"],
        "bench layer": ["--ranks", "--rounds", "--quick", "--out", "--json"],
        "bench memory": [
            "--ranks", "--length", "--model", "--limit", "--no-attention", "--predicted", "--out", "--json",
        ],
        "bench model": ["--ranks", "--length", "--rounds", "--out", "--json"],
        "bench scale": ["--ranks", "--rounds", "--out", "--json"],
        "demo": ["--ranks", "--steps", "--seq", "--layers", "--backend", "--model", "--text", "--out"],
        "doctor": ["--run", "--json"],
        "generate": [
            "--prompt", "--ranks", "--max-new-tokens", "--backend", "--dtype", "--sample", "--temperature", "--seed",
            "--json",
        ],
        "plan": [
            "--length", "--devices", "--memory", "--per-machine", "--engine", "--batch", "--json", "--plot",
        ],
        "verify": ["--ranks", "--backend", "--task", "--length", "--kinds", "--with", "--full", "--json"],
    }  # fmt: skip
