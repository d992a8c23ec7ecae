"""`sp-attention backends`: what is registered, and why something cannot be used."""

import click


@click.command()
def backends() -> None:
    """List the kernels of every installed plugin: device, availability or the reason against it, and origin."""
    from rich.console import Console
    from rich.table import Column, Table

    from sp_attention.registry import load

    registry = load()
    table = Table("device", Column("kernel", no_wrap=True), "priority", "available", "from")
    for entry in registry.backends:
        backend = entry.backend
        table.add_row(backend.device, backend.kernel, str(backend.priority), entry.problem or "yes", str(entry.plugin))
    for plugin in registry.broken:
        table.add_row("-", "-", "-", f"broken plugin: {plugin.reason}", str(plugin.plugin))
    Console().print(table)
