"""What the commands of library, study and book share: options, examples in the help, errors in one line."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import cleandoc
from pathlib import Path

import click
import yaml

from moeits.errors import ExistsError, MoeitsError
from moeits.machine.paths import IS_REPOSITORY

MODEL = "MODEL is a checkpoint's folder, or a model of the hub: OWNER/NAME or OWNER/NAME@REVISION."


def _configure(context: click.Context, _: click.Parameter, file: Path | None) -> None:
    """Take the defaults of a command's options from a YAML file; what the command line gives comes first."""
    if file is None:
        return
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise click.BadParameter(f"{file} cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise click.BadParameter(f"{file} must hold NAME: VALUE, the names of options without their dashes")
    settings = {str(name).replace("-", "_"): value for name, value in given.items()}
    known = {
        name.lstrip("-").replace("-", "_"): parameter.name
        for parameter in context.command.params
        for name in parameter.opts
    }
    if unknown := sorted(settings.keys() - known.keys()):
        raise click.BadParameter(f"{file}: {context.info_name} has no option {', '.join(unknown)}")
    context.default_map = {known[name]: value for name, value in settings.items()}


def _common() -> list[click.Option]:
    return [
        click.Option(
            ["--config"],
            type=click.Path(path_type=Path),
            is_eager=True,
            expose_value=False,
            callback=_configure,
            help="Read options from this YAML file.",
        ),
        click.Option(["--quiet"], is_flag=True, help="Print results and errors alone."),
        click.Option(["--verbose"], is_flag=True, help="Print what the libraries report, too."),
        click.Option(["--debug"], is_flag=True, help="Show where an error came from."),
    ]


class Command(click.Command):
    """A command with the options that all have.

    Parameters
    ----------
    examples : sequence of str
        Command lines that end the help.
    renamed : mapping of str to str, optional
        Old names of options, which work with a warning, and their new ones.
    repository : bool, default=False
        Whether it needs the project's repository: its profiles, notebooks and data.
    """

    def __init__(
        self,
        *args: object,
        examples: Sequence[str] = (),
        renamed: Mapping[str, str] | None = None,
        repository: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.params += _common()
        self.examples, self.renamed, self.repository = examples, renamed or {}, repository
        if any(parameter.name == "model" for parameter in self.params):
            self.help = f"{cleandoc(self.help)}\n\n{MODEL}"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line; old names of options become the new ones."""
        for position, argument in enumerate(args):
            name, equals, value = argument.partition("=")
            if name in self.renamed:
                new = self.renamed[name]
                click.echo(f"warning: {name} is now {new}; the next release drops the old name", err=True)
                args[position] = f"{new}{equals}{value}"
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command. A MoeitsError is one line; any other error is a bug, and keeps its traceback."""
        debug, quiet, verbose = (ctx.params.pop(name) for name in ("debug", "quiet", "verbose"))
        ctx.meta["quiet"] = quiet
        if quiet or verbose:
            from transformers.utils import logging

            (logging.set_verbosity_error if quiet else logging.set_verbosity_info)()
            if quiet:
                logging.disable_progress_bar()
        if self.repository and not IS_REPOSITORY:
            raise click.ClickException(
                f"moeits {ctx.info_name} works in the project's repository: clone it, install it with "
                "`make env` and run the command there, or set MOEITS_ROOT to it"
            )
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: note(f"Warning: {message}")
                return super().invoke(ctx)
        except MoeitsError as error:
            if debug:
                raise
            raise click.ClickException(str(error)) from error

    def format_epilog(self, _: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")


def quiet() -> bool:
    """Whether the running command was asked to print results and errors alone."""
    context = click.get_current_context(silent=True)  # none in the threads of joblib, which warn, too
    return bool(context and context.meta["quiet"])


def note(text: str) -> None:
    """Print a line that is no result, to the standard error."""
    if not quiet():
        click.echo(text, err=True)


def output(
    help_: str, *, required: bool = False, default: str | None = None
) -> Callable[[Callable], Callable]:
    """Give a command ``--output`` and ``--overwrite``."""

    def decorate(command: Callable) -> Callable:
        command = click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")(command)
        kind = click.Path(path_type=Path)
        return click.option(
            "-o",
            "--output",
            type=kind,
            required=required,
            default=default,
            help=help_,
        )(command)

    return decorate


def check_output(target: Path | None, overwrite: bool) -> None:
    """Raise an ExistsError where a command would replace what it was not asked to."""
    if target is not None and target.exists() and not overwrite:
        raise ExistsError(f"{target} exists: choose another name, or give --overwrite")


@contextmanager
def new_folder(target: Path, overwrite: bool, *sources: str) -> Iterator[Path]:
    """Yield the folder to make. A folder that it replaces stays until the new one is complete."""
    check_output(target, overwrite)
    if target.exists() and any(Path(source).exists() and target.samefile(source) for source in sources):
        raise ExistsError(f"{target} is read to make the new folder and is not replaced: choose another name")
    if not target.exists():
        yield target
        return
    if not (target / "config.json").is_file():
        raise ExistsError(f"{target} is no model folder, and is not replaced: choose another name")
    made, old = (target.with_name(f"{target.name}.{part}") for part in ("new", "old"))
    yield made
    if os.environ.get("RANK", "0") != "0":  # of several processes, the first one writes
        return
    target.rename(old)
    made.rename(target)
    shutil.rmtree(old)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
device_option = click.option("--device", default="auto", help="Device to compute on: auto, cpu, cuda, ...")
dtype_option = click.option(
    "--dtype",
    default="auto",
    help="Number format to compute in: auto, float32, bfloat16 or float16.",
)


def choose_device(device: str, dtype: str) -> tuple:
    """Resolve a command's device and dtype, and say why they were chosen."""
    from moeits.machine import devices

    chosen, number, reason = devices.choose(device, dtype)
    note(f"{chosen.type}, {str(number).removeprefix('torch.')}: {reason}")
    return chosen, number


profile_option = click.option(
    "--profile", default="laptop", help="Name of the settings, a file of data/profiles."
)


def spread(command: Callable) -> Callable:
    """Give a command the options of what spreads its work."""
    help_ = "Address of the Dask scheduler, for --backend dask."
    command = click.option("--scheduler", help=help_)(command)
    help_ = "Backend of joblib that spreads the work: loky, dask or ray.  [default: none]"
    return click.option("--backend", help=help_)(command)


def backend_options(backend: str | None, scheduler: str | None) -> dict[str, object]:
    """Arguments of :func:`moeits.machine.spread.unordered`."""
    if scheduler and backend != "dask":
        raise click.UsageError("--scheduler belongs to --backend dask")
    return {"backend": backend, **({"scheduler_host": scheduler} if scheduler else {})}


def values(option: str, pairs: Sequence[str]) -> dict[str, object]:
    """Read what was given as NAME=VALUE; a value is written as in YAML."""
    given = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise click.UsageError(f"{option} {pair}: write NAME=VALUE")
        given[name] = yaml.safe_load(value)
    return given


def print_json(content: object) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(content, indent=1))
