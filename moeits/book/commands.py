"""The book's command: run notebooks, or everything, and render the book."""

import os

import click

from moeits.options import Command, profile_option, values


@click.command(
    cls=Command,
    repository=True,
    examples=(
        "moeits run --profile smoke",
        "moeits run prune -p model=mini-qwen -p tau=0.75 --target prune-qwen",
    ),
)
@click.argument("notebook", required=False)
@profile_option
@click.option("--target", help="Page of the book that the notebook makes.  [default: its name]")
@click.option(
    "-p",
    "--parameter",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    help="Override a notebook parameter; may be repeated.",
)
@click.option("--render", is_flag=True, help="Render the book with the page of NOTEBOOK.")
@click.option("--student", is_flag=True, help="Render the book without the solutions of its exercises.")
@click.option("--preview", is_flag=True, help="Measure nothing: render the book from the committed records.")
@click.option("--dry-run", is_flag=True, help="Only estimate what every step takes, and whether it fits.")
@click.option("--on", "gpu", help="GPU to estimate for, such as h100.  [default: this machine]")
def run(
    notebook: str | None,
    profile: str,
    target: str | None,
    parameters: tuple[str, ...],
    render: bool,
    student: bool,
    preview: bool,
    dry_run: bool,
    gpu: str | None,
) -> None:
    """Run one notebook, or all measurements and notebooks of a profile and build the book."""
    if dry_run:
        _show_plan(profile, gpu)
        return
    if gpu:
        raise click.UsageError("--on belongs to --dry-run")
    from moeits.book.run import Page, build_book, run_profile
    from moeits.study import profiles, records

    if notebook is None:
        if parameters or target or render:
            raise click.UsageError("--parameter, --target and --render belong to a NOTEBOOK")
        if preview:
            os.environ[records.PREVIEW] = "1"  # for the notebooks' processes, too
        click.echo(f"the book is at {run_profile(profiles.load(profile), student=student, say=click.echo)}")
    elif student or preview:
        raise click.UsageError("--student and --preview belong to the book, not to a NOTEBOOK")
    else:
        given = {"profile": profile} | values("-p", parameters)
        click.echo(Page(notebook, target or notebook, given).run())
        if render:
            click.echo(f"the book is at {build_book()}")


def _show_plan(name: str, gpu: str | None) -> None:
    """Print what a profile takes; what does not fit is an error."""
    from moeits.book import plan
    from moeits.study import profiles

    profile = profiles.load(name)
    machine = plan.find_machine(gpu)
    click.echo(
        f"{machine.name}: {machine.memory / 1e9:.0f} GB, {machine.flops / 1e12:.3g} TFLOP/s in "
        f"{machine.dtype}, {machine.watts:.0f} W; {machine.cores} processor cores; "
        f"{machine.disk / 1e9:.0f} GB of disk free"
    )
    demands = plan.demands(profile, machine)
    click.echo(plan.table(demands, machine).to_string(index=False, float_format="{:.2f}".format))
    if short := plan.shortages(demands, machine, offload=profile.device_map == "auto"):
        raise click.ClickException("\n".join(["it does not fit:", *short]))


COMMANDS = (run,)
