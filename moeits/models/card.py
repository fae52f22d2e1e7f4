"""The model card that is written into every pruned folder."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from moeits.kept import Kept
from moeits.models.families import Sizes

_LICENCE_KEYS = ("license", "license_name", "license_link")

_LOADING = {
    True: """\
Every layer keeps the same number of experts: this is a plain checkpoint of its family.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder)
```
""",
    False: """\
Layers keep different numbers of experts, which the family's own class does not know.
`modeling_moeits.py` in this folder does: it is short, and needs nothing but torch and transformers.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
```

Without remote code: `moeits.load_model(folder)`. vLLM, SGLang and llama.cpp read one number of experts
for all layers: for them, prune with `--uniform` or, where the router has a bias, `--pad`.
""",
}

_SHRUNK = (
    "In some layers fewer experts remain than a token used before, so their top-k is smaller "
    "(`top_k` in `kept.json`)."
)

_CITATION = """\
```bibtex
@misc{balderas2026moeits,
  title         = {{MoEITS}: A Green {AI} approach for simplifying {MoE-LLMs}},
  author        = {Balderas, Luis and Lastra, Miguel and Ben{\\'\\i}tez, Jos{\\'e} M.},
  year          = {2026},
  eprint        = {2604.10603},
  archiveprefix = {arXiv},
  primaryclass  = {cs.LG},
  doi           = {10.48550/arXiv.2604.10603}
}
```
"""


def model_card(
    kept: Kept,
    before: Mapping[str, int],
    after: Sizes,
    *,
    plain: bool,
    scores: Iterable[Mapping[str, object]] = (),
    base_card: str = "",
    notes: Iterable[str] = (),
) -> str:
    """Write the model card of a pruned model.

    Parameters
    ----------
    kept : Kept
        What was kept, and how it was chosen.
    before : mapping of str to int
        Sizes of the unpruned model: ``total``, ``routed``, ``active``, ``bytes``.
    after : Sizes
        Sizes of the pruned model.
    plain : bool
        Whether the folder is a plain checkpoint of its family.
    scores : iterable of mapping
        Rows with ``task``, ``metric``, ``value`` and, where known, ``stderr`` and ``n``.
    base_card : str
        The whole model's card, whose licence is carried over.
    notes : iterable of str
        What else a reader should know of the recipe, a sentence each.

    Returns
    -------
    str
        Markdown with a YAML head.
    """
    licence = licence_of(base_card)
    head = {"library_name": "transformers", "tags": ["moe", "expert-pruning", "moeits"], **licence}
    name = kept.model or "a Mixture-of-Experts model"
    licence_text = (
        f"That of the base model, left as it was: {licence.get('license_name') or licence['license']}."
        if "license" in licence
        else "That of the base model, left as it was."
    )
    budget = ", ".join(f"{key} {value}" for key, value in kept.budget.items()) or "by hand"
    layers = [
        [
            layer,
            f"{len(ids)} of {kept.num_experts[layer]}",
            after.top_k[layer],
            _number(kept.threshold.get(layer)),
            " ".join(map(str, ids)),
        ]
        for layer, ids in sorted(kept.layers.items())
    ]
    measured = [
        [row["task"], row["metric"], _number(row["value"]), _number(row.get("stderr")), row.get("n") or "–"]
        for row in scores
    ]
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {name} with {kept.share:.0%} of its experts",
        "Redundant routed experts were removed with MoEITS: their weights and their rows of the router are "
        "gone. `kept.json` names every expert that stays.",
        f"## Recipe\n\nCriterion: {kept.criterion}. Budget: {budget}.\n\n"
        + _table(["layer", "experts", "top-k", "threshold", "kept"], layers)
        + "".join(f"\n\n{note}" for note in ([_SHRUNK] if kept.top_k else []) + [*notes])
        + f"\n\nMade with {' and '.join(f'{name} {number}' for name, number in kept.versions.items())}.",
        "## Sizes\n\n" + _table(["", "before", "after", "share"], size_rows(before, after)),
        *(
            ["## Scores\n\n" + _table(["task", "metric", "value", "standard error", "n"], measured)]
            if measured
            else []
        ),
        f"## Loading\n\n{_LOADING[plain]}",
        f"## Licence\n\n{licence_text}",
        f"## Citation\n\n{_CITATION}",
    ]
    return "\n\n".join(section.rstrip("\n") for section in sections) + "\n"


def size_rows(before: Mapping[str, int], after: Sizes) -> list[list[str]]:
    """List the sizes of a model before and after pruning, and the share that is left, as rows of a table."""
    labels = {
        "total": "parameters",
        "routed": "of routed experts",
        "active": "active per token",
        "bytes": "bytes",
    }
    return [
        [label, f"{before[key]:,}", f"{getattr(after, key):,}", f"{getattr(after, key) / before[key]:.1%}"]
        for key, label in labels.items()
    ]


def licence_of(card: str) -> dict[str, str]:
    """Read the licence keys in the YAML head of a model card; none where there is no such head."""
    lines = card.splitlines()
    if "---" not in lines[1:] or lines[0] != "---":
        return {}
    try:
        head = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except yaml.YAMLError:
        return {}
    return {key: head[key] for key in _LICENCE_KEYS if key in head} if isinstance(head, dict) else {}


def read_card(folder: Path) -> str:
    """Read the model card in a folder; empty where there is none."""
    card = folder / "README.md"
    return card.read_text(encoding="utf-8") if card.is_file() else ""


def _number(value: object) -> str:
    return "–" if value is None else f"{value:.4g}"


def _table(head: list[str], rows: list[list[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))
