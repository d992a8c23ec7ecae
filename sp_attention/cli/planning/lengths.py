"""What a step takes at any length, from dry runs of few tokens: beyond some, bytes grow with tokens along a line."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

from sp_attention.cli.planning.choosing import Model, PartsOf
from sp_attention.cli.planning.dry_run import Share, parts_of_step
from sp_attention.cli.planning.meta_model import MetaModel, NotPlannableError
from sp_attention.loss.tiled_loss import tile_for
from sp_attention.rehearsal.position_wise import matrices_in

# Tokens of a rank up to which a dry run is made; and of a sequence, where scans loop over it.
_SPAN, _SCANNED = 8192, 16_384


def parts_by_length(meta: MetaModel, batch: int) -> PartsOf:
    """What the parts of a step take; dry runs are made as they are needed, and once."""

    @cache
    def run(length: int, ranks: int, mlp_tile: int | None) -> Any:
        try:
            return parts_of_step(meta, Share(batch, length, ranks, mlp_tile))
        except RuntimeError as error:  # of transformers' code, such as for more tokens than it has positions for
            name = type(meta.model).__name__
            raise NotPlannableError(f"{name} does not run on {length} tokens: {error}") from error

    scans = any(kind.calls for kind in meta.kinds.values())

    def parts_of(length: int, ranks: int, mlp_tile: int | None) -> Any:
        limit = max(_SCANNED, 128 * ranks) if scans else _SPAN * ranks
        if length <= limit:
            return run(length, ranks, mlp_tile)
        low, high = run(limit // 2, ranks, mlp_tile), run(limit, ranks, mlp_tile)
        return _beyond(low, high, (length - limit) / (limit - limit // 2))

    return parts_of


def _beyond(low: Any, high: Any, steps: float) -> Any:
    """What follows `high` after so many times the step from `low` to it, number by number."""
    if is_dataclass(high) and not isinstance(high, type):
        names = [field.name for field in fields(high)]
        return replace(high, **{name: _beyond(getattr(low, name), getattr(high, name), steps) for name in names})
    if isinstance(high, Mapping):
        return {name: _beyond(low.get(name, 0), one, steps) for name, one in high.items()}
    return max(0, round(high + (high - low) * steps))


def model_of(meta: MetaModel) -> Model:
    """Its integers."""
    by_kind = {kind: layer.parameters for kind, layer in meta.kinds.items()}
    heads = [layer.heads for layer in meta.kinds.values() if layer.heads is not None]
    return Model(
        type(meta.model).__name__,
        meta.stack,
        meta.parameters,
        meta.layers,
        tuple(by_kind[kind] for kind in meta.layers),
        heads[0] if heads else None,
        tile_for(meta.vocabulary),
        any(matrices_in(part) > 1 for layer in meta.kinds.values() for part in layer.tileable),
    )
