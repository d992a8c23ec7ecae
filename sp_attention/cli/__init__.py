"""The command line: `sp-attention`, or `python -m sp_attention`."""

import sys

import click

from sp_attention.cli.backends import backends
from sp_attention.cli.bench import bench
from sp_attention.cli.demo import demo
from sp_attention.cli.doctor import doctor
from sp_attention.cli.generate import generate
from sp_attention.cli.plan import plan
from sp_attention.cli.verify import verify


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sp-attention", message="%(package)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Sequence parallelism for the transformers model you already have: exact, or it refuses."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


cli.add_command(backends)
cli.add_command(bench)
cli.add_command(demo)
cli.add_command(doctor)
cli.add_command(generate)
cli.add_command(plan)
cli.add_command(verify)


def main() -> None:
    """Run the command line; a wrong option is one line on standard error and exit status 2."""
    try:
        status = cli.main(prog_name="sp-attention", standalone_mode=False)
    except click.ClickException as error:
        print(f"sp-attention: {error.format_message()}", file=sys.stderr)
        status = error.exit_code
    except click.Abort:
        status = 130
    sys.exit(status)
