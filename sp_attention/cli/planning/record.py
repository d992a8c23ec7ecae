"""A plan as plain numbers, for JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sp_attention.cli.planning.choosing import LEFT, Option
from sp_attention.cli.planning.lines import lines
from sp_attention.cli.planning.peaks import PARTS

# Lengths that the plot is of, as parts of the one that is asked for.
_STEPS = (1 / 8, 1 / 4, 1 / 2, 1, 2)


def record(found: Mapping[int, Option], chosen: Option) -> dict[str, Any]:
    """What is wanted, what is planned, and what each number of ranks would need."""
    wanted, model = chosen.wanted, chosen.model
    exchange, engine = chosen.exchange(), chosen.of_engine()
    return {
        "model": {
            "name": model.name,
            "parameters": model.parameters,
            "layers": len(model.layers),
            "heads": model.heads,
        },
        "wanted": {**asdict(wanted), "engine": wanted.engine.name, "usable": wanted.usable, "left": LEFT},
        "fits": chosen.fits,
        "sp_size": chosen.sp_size,
        "groups": wanted.devices // chosen.sp_size,
        "grid": {"head_groups": chosen.grid[0], "query_blocks": chosen.grid[1]},
        "savers": {**asdict(chosen.savers), "loss_tile": model.loss_tile if chosen.sp_size > 1 else None},
        "peak": {"bytes": chosen.moment.total, "in": chosen.moment.name, "parts": parts_of(chosen)},
        "sent": {"exchange": asdict(exchange), "engine": asdict(engine)},
        "longest": chosen.longest,
        "sp_sizes": [
            {
                "sp_size": size,
                "grid": {"head_groups": one.grid[0], "query_blocks": one.grid[1]},
                "savers": asdict(one.savers),
                "peak": one.moment.total,
                "fits": one.fits,
                "longest": one.longest,
            }
            for size, one in found.items()
        ],
        "lines": list(lines(chosen)),
    }


def parts_of(option: Option) -> dict[str, int]:
    """Those of the peak, in the order of the parts, without those that are nothing."""
    return {part: size for part in PARTS if (size := option.moment.parts.get(part, 0))}


def by_length(option: Option) -> dict[int, dict[str, int]]:
    """The parts of the peak for lengths around the one that is asked for."""
    lengths = [max(1, round(option.wanted.length * step)) for step in _STEPS]
    return {
        length: {part: option.peak(length).parts.get(part, 0) for part in PARTS}
        for length in lengths
        if length >= 2 * option.sp_size
    }
