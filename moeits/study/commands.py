"""The study's commands: train and build its models, measure, and compare machines."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click

from moeits import options
from moeits.options import output, profile_option

_command: Callable = partial(click.command, cls=options.Command, repository=True)
_seed = click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the random weights.")


@_command(examples=("moeits train", "moeits train upcycled-1 --jobs 1"))
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--jobs", type=click.IntRange(1), default=2, help="Processes to use.")
def train(names: Sequence[str], jobs: int) -> None:
    """Train the small models of data/models, or those NAMEd and what they need.

    A killed run resumes from its last state; a finished model is not trained again.
    """
    from moeits.study import cards, trained

    for folder in trained.train_all(names, jobs=jobs, progress=not options.quiet()):
        click.echo(folder)
    cards.write_cards()


@_command(examples=("moeits study", "moeits study upcycled-1 scratch-1", "moeits study --full"))
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--full", is_flag=True, help="Measure bounds, planted duplicates and healing, too: hours.")
@click.option("--jobs", type=click.IntRange(1), default=2, help="Processes to use.")
def study(names: Sequence[str], full: bool, jobs: int) -> None:
    """Measure the trained models of data/models, or those NAMEd, into data/study/records.

    What has a record is not measured again.
    """
    from moeits.study import anatomy, bounds, duplicates, healed, relatedness, trials

    for part in (anatomy, trials, relatedness, *((bounds, duplicates, healed) if full else ())):
        for record in part.measure_all(names, jobs=jobs):
            click.echo(f"{record.step} {record.inputs['model']}: {record.id}")


@_command(
    examples=(
        "moeits reproduce 01d6707bb05fd025-4735c11d",
        "moeits reproduce data/reference/laptop/nmi-2ff7cebe97c1a7e9-97664852.json",
    )
)
@click.argument("record")
def reproduce(record: str) -> None:
    """Take the measurement of RECORD, an id or a file, again with today's code, and compare.

    Exits with 1 where a result differs by more than 1 %. Times, speeds and memory are shown apart.
    """
    from moeits.study import records, reference
    from moeits.study import reproduce as again

    file = again.find(record)
    committed = records.read(file)
    measurement = again.measurement(committed, file.parent.name)
    click.echo(
        f"{file.name}: taken at commit {committed.provenance.get('commit')}, {committed.seconds:.0f} s"
    )
    table = reference.compare(committed, measurement.take())
    timed = table.unit.isin(reference.SPEEDS)
    wrong = table[~timed & reference.beyond(table)]
    for title, part in (("results", table[~timed]), ("time, memory and energy", table[timed])):
        if len(part):
            shown = part.drop(columns=["step", "model"]).dropna(axis="columns", how="all").fillna("")
            click.echo(f"{title}:\n{shown.to_string(index=False, float_format='{:.6g}'.format)}")
    click.echo(f"{len(wrong)} of {(~timed).sum()} results differ by more than {reference.TOLERANCE:.0%}")
    if len(wrong):
        click.get_current_context().exit(1)


@_command(examples=("moeits miniature smol-qwen -o path/to/smol-qwen",))
@click.argument("name")
@output("Folder to make.", required=True)
def miniature(name: str, output: Path, overwrite: bool) -> None:
    """Build the laptop model NAME: smol-qwen, or dense, which it is split from."""
    from moeits.study.miniature import build

    with options.new_folder(output, overwrite) as target:
        report = json.loads((build(name, target) / "miniature.json").read_text())
    options.print_json(report)


@_command(
    examples=("moeits standin mixtral-8x7b -o path/to/standin --shrink 8",),
    renamed={"--layers": "--num-layers"},
)
@click.argument("name")
@output("Folder to make.", required=True)
@click.option("--num-layers", type=click.IntRange(1), default=2, help="Decoder layers.")
@click.option("--shrink", type=click.IntRange(1), default=1, help="Divisor of the widths.")
@_seed
def standin(name: str, output: Path, overwrite: bool, num_layers: int, shrink: int, seed: int) -> None:
    """Make a stand-in for a model of the paper or the small profile: its shapes, few layers, random weights.

    NAME is mixtral-8x7b, qwen1.5-moe, deepseek-v2-lite, llm-jp-8x152m, granite-3.1-1b-a400m or olmoe-1b-7b.
    """
    from moeits.study.standin import standin as make

    with options.new_folder(output, overwrite) as target:
        make(name, target, layers=num_layers, shrink=shrink, seed=seed)
    click.echo(output)


@_command(
    examples=(
        "moeits ablate mini-deepseek",
        "moeits ablate --profile paper --backend dask --scheduler ADDRESS",
    )
)
@click.argument("name", metavar="[MODEL]", required=False)
@profile_option
@options.spread
def ablate(name: str | None, profile: str, backend: str | None, scheduler: str | None) -> None:
    """Score MODEL of a profile, or all its models, at every tau of the profile, pruned and healed."""
    from moeits.study import pipeline, profiles, records

    settings = profiles.load(profile)
    if name:
        settings.model(name)
    spread = options.backend_options(backend, scheduler)
    for model in [name] if name else settings.models:
        done = pipeline.do(list(pipeline.ablation(settings, model)), say=click.echo, **spread)
        rows = records.frame(record for record in done if getattr(record, "step", "") == "scores")
        rows = rows[(rows.metric == "perplexity") | (rows.task == "mean")]
        table = rows.assign(measure=rows.variant.fillna(rows.metric)).pivot_table(
            index=["tau", "kept_share", "method"], columns="measure", values=["value", "stderr"], dropna=False
        )
        click.echo(table.dropna(how="all").to_string(float_format="%.4g"))


@_command(
    examples=("moeits rivals", "moeits rivals --model mini-qwen --method moeits --method reap --budget 0.5")
)
@profile_option
@click.option(
    "--model", "models", multiple=True, help="Model of the profile; may be repeated.  [default: all]"
)
@click.option(
    "--method", "methods", multiple=True, help="Method to measure; may be repeated.  [default: all]"
)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    help="Share of the experts to keep, or own for each method's own; may be repeated.  "
    "[default: 0.25, 0.5, 0.75 and own]",
)
@click.option(
    "--heal",
    "healings",
    multiple=True,
    help="Healing of the best few: refit, lora or refit + lora; may be repeated.  [default: refit]",
)
@options.spread
def rivals(
    profile: str,
    models: tuple[str, ...],
    methods: tuple[str, ...],
    budgets: tuple[str, ...],
    healings: tuple[str, ...],
    backend: str | None,
    scheduler: str | None,
) -> None:
    """Measure all methods at equal budgets, then score the best few on the benchmarks, pruned and healed.

    Measurements are cached: run again to resume.
    """
    from moeits import evaluation
    from moeits.study import comparison, pipeline, profiles, tables
    from moeits.study.methods import METHODS

    settings = profiles.load(profile)
    everything = list(METHODS)
    models = models or tuple(settings.models)
    steps = list(
        comparison.steps(
            settings,
            models=models,
            methods=methods or everything,
            budgets=[own if own == comparison.OWN else float(own) for own in budgets] or comparison.BUDGETS,
            draws=comparison.DRAWS,
        )
    )
    spread = {"say": click.echo, **options.backend_options(backend, scheduler)}
    cells = [record for record in pipeline.do(steps, **spread) if record.step == "rival"]
    ways = [None, *(healings or (["refit"] if settings.refit_tokens else []))]
    finals = pipeline.do(comparison.final_steps(settings, cells, ways), **spread)
    # Timed one after the other, with nothing beside.
    speeds = [] if methods else pipeline.do(comparison.speed_steps(settings, models), say=click.echo)
    oracles = [record for name in models for record in comparison.Comparison(settings, name).found("oracle")]
    for shown in (
        tables.table(cells),
        tables.finals_table(finals),
        tables.oracle_table(oracles, cells),
        tables.speed_table(speeds, cells),
    ):
        if len(shown):
            plain = evaluation.plain(shown.drop(columns="record", errors="ignore")).fillna("")
            click.echo(plain.to_string(index=False))


@click.command(
    cls=options.Command, examples=("moeits compare data/reference/laptop data/results/laptop --json",)
)
@click.argument("first", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("second", type=click.Path(path_type=Path, exists=True, file_okay=False))
@options.json_option
@output("CSV file for the whole table.")
def compare(first: Path, second: Path, as_json: bool, output: Path | None, overwrite: bool) -> None:
    """Compare the records in folder FIRST with those in SECOND: two machines, or two runs.

    Exits with 1 where results differ by more than their errors.
    """
    from moeits.machine.paths import whole
    from moeits.study.machines import compare_records, provenance_differences

    options.check_output(output, overwrite)
    table = compare_records(first, second)
    provenance = provenance_differences(first, second)
    filled = table.astype(object).where(table.notna(), None)
    if as_json:
        options.print_json({"provenance": provenance, "results": filled.to_dict("records")})
    else:
        for what, values in provenance.items():
            click.echo(f"{what}: {' | '.join(values)}")
        shown = filled.drop(columns=["step"]).fillna("")
        click.echo(shown.to_string(index=False, float_format="{:.4g}".format))
        for verdict, count in table.verdict.value_counts().items():
            click.echo(f"{verdict}: {count}")
    if output is not None:
        with whole(output) as part:
            table.to_csv(part, index=False)
    if (table.verdict == "outside").any():
        click.get_current_context().exit(1)


COMMANDS = (train, study, reproduce, miniature, standin, ablate, rivals, compare)
