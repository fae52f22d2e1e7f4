"""Figures that the reader moves, each one piece of HTML that needs nothing else: no network, no library.

What they look like and do is in ``static``: HTML, CSS and plain JavaScript. Here is what they are given.
"""

import json
from base64 import b64encode
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import display
from matplotlib.figure import Figure

from moeits.book.figures import COLOURS
from moeits.histograms import as_float
from moeits.nmi import nmi_matrix
from moeits.selection import select_experts
from moeits.study import planted
from moeits.study.records import Record

PROJECTIONS = ("gate", "up", "down")
_STATIC = Path(__file__).with_name("static")


def show(html: str, instead: str) -> None:
    """Show a live figure; a printed book says what stands `instead`."""
    display({"text/html": html, "text/plain": instead}, raw=True)


def trained_layer(name: str, layer: int, neurons: int) -> dict[str, Any]:
    """Read a part of a trained model's layer, rounded to 8 bits a weight.

    Parameters
    ----------
    name : str
        A trained model of 16 experts, such as ``"upcycled-1"``.
    layer : int
        Its decoder layer.
    neurons : int
        Hidden neurons of each expert that are taken: the first ones, with all their weights.

    Returns
    -------
    dict
        ``names``, the number of each expert; ``families``, a letter for the slice of the parent that it
        began as, or None from scratch: copies stand side by side; ``codes``, int8 of shape (3, E, neurons,
        width), for gate, up and the transpose of down; ``steps`` of shape (3, E): a weight is its code times
        its matrix's step, of which the largest weight has 127; ``exact``, the weights as they are stored.
    """
    from moeits.models.checkpoint import expert_blocks
    from moeits.study import trained

    ((_, block),) = expert_blocks(trained.find(name).folder, [layer])
    slices = 1 if name.startswith("scratch") else trained.SLICES  # expert e is a copy of slice e % slices
    names = sorted(range(block.num_experts), key=lambda expert: expert % slices)
    weights = np.stack(
        [
            [as_float(block[part][e].T if part == "down" else block[part][e])[:neurons] for e in names]
            for part in PROJECTIONS
        ]
    ).astype(np.float64)
    steps = np.abs(weights).max(axis=(2, 3)) / 127
    return {
        "names": names,
        "families": None if slices == 1 else ["ABCDEFGH"[expert % slices] for expert in names],
        "codes": np.round(weights / steps[..., None, None]).astype(np.int8),
        "steps": steps,
        "exact": weights,
    }


def as_block(layer: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Weights of :func:`trained_layer` as :func:`moeits.nmi.nmi_matrix` takes them, in float64."""
    gate, up, down = _weights(layer)
    return {"gate": gate, "up": up, "down": down.swapaxes(1, 2)}


def matrices(layers: Mapping[str, Mapping[str, Any]], *, tau: float, seed: int) -> pd.DataFrame:
    """Measure R of each layer, and of the first one again with every expert's neurons in a random order.

    Returns
    -------
    DataFrame
        A row for each pair of experts: layer, first, second, copies (whether both began as the same slice),
        nmi, and kept (whether both are kept at `tau`).
    """
    title, layer = next(iter(layers.items()))
    rng, disguised = np.random.default_rng(seed), as_block(layer)
    for expert in range(len(layer["names"])):
        disguised = planted.permute(disguised, expert, rng.permutation(layer["codes"].shape[2]))
    shown = {name: (as_block(one), one) for name, one in layers.items()}
    shown[f"{title}, neurons reordered"] = (disguised, layer)
    rows = []
    for name, (block, one) in shown.items():
        R = nmi_matrix(block, n_jobs=1)
        kept, families = select_experts(R, tau).kept, one["families"]
        rows += [
            {
                "layer": name,
                "first": one["names"][i],
                "second": one["names"][j],
                "copies": families is not None and families[i] == families[j],
                "nmi": R[i, j],
                "kept": i in kept and j in kept,
            }
            for i, j in np.ndindex(R.shape)
            if i != j
        ]
    return pd.DataFrame(rows)


def matrices_figure(pairs: pd.DataFrame) -> Figure:
    """Draw :func:`matrices` as heat maps on one scale; the numbers of kept experts stand at their rows."""
    names = pairs.layer.unique()
    fig, axes = plt.subplots(1, len(names), figsize=(5.6, 2.5))
    for axis, name in zip(axes, names, strict=True):
        part = pairs[pairs.layer == name]
        order = part["first"].unique()
        R = part.pivot_table(index="first", columns="second", values="nmi").loc[order, order]
        bar = {"cbar": axis is axes[-1], "cbar_kws": {"label": "NMI", "shrink": 0.6}}
        sns.heatmap(R, vmin=0, vmax=0.5, cmap="cividis", square=True, ax=axis, **bar)
        kept = [int(place) for place in np.flatnonzero(np.isin(order, part[part.kept]["first"]))]
        axis.set_yticks([place + 0.5 for place in kept], order[kept], fontsize=7, rotation=0)
        axis.set(xlabel="", ylabel="", xticks=[])
        axis.set_title(name.replace(", ", "\n"), fontsize=8)
        axis.grid(visible=False)
    return fig


def finding(pairs: pd.DataFrame) -> str:
    """Say in one sentence what :func:`matrices` shows."""
    mean = pairs.groupby(["layer", "copies"]).nmi.mean()
    first, *_, disguised = pairs.layer.unique()
    copies, others, hidden = (
        f"{mean[key]:.2f}" for key in ((first, True), (first, False), (disguised, True))
    )
    return (
        f"Experts of {first} that began as copies of one slice have a mean NMI of {copies}, other pairs "
        f"{others}; with their neurons in another order, in which they compute the same, the copies have "
        f"{hidden}: NMI compares positions, not functions."
    )


def rounding(layer: Mapping[str, Any]) -> float:
    """Measure by how much rounding to 8 bits changes R at most."""
    R = [
        nmi_matrix(dict(zip(PROJECTIONS, w, strict=True)), n_jobs=1)
        for w in (layer["exact"], _weights(layer))
    ]
    return float(np.abs(R[0] - R[1]).max())


def levels(layer: Mapping[str, Any], bins: int | str) -> tuple[float, float]:
    """Mean NMI of copies, and of all other pairs."""
    R, families = nmi_matrix(as_block(layer), bins=bins, n_jobs=1), np.array(layer["families"])
    copies = families[:, None] == families
    return float(R[copies & ~np.eye(len(R), dtype=bool)].mean()), float(R[~copies].mean())


def laboratory(
    layers: Mapping[str, Mapping[str, Any]], *, tau: float = 1.25, name: str = "laboratory"
) -> str:
    """Write the NMI laboratory: the page measures R anew as the reader changes weights and settings.

    Parameters
    ----------
    layers : mapping of str to mapping
        Title -> :func:`trained_layer`; all of equal shape.
    tau : float, default=1.25
        Where its slider starts, from 0 to 5.
    name : str
        Id of the element, unique on its page.

    Returns
    -------
    str
        HTML.
    """
    shown = [
        {
            "title": title,
            "names": layer["names"],
            "families": layer["families"],
            "codes": b64encode(layer["codes"].tobytes()).decode(),
            "steps": layer["steps"].tolist(),
        }
        for title, layer in layers.items()
    ]
    first = next(iter(layers.values()))
    colours = mpl.colormaps["cividis"].resampled(64)
    data = {
        "layers": shown,
        "neurons": first["codes"].shape[2],
        "width": first["codes"].shape[3],
        "families": max(len(set(layer["families"] or "-")) for layer in layers.values()),
        "colours": [mpl.colors.to_hex(colours(k)) for k in range(64)],
    }
    return _element(name, "laboratory", data, ("nmi", "laboratory"), TAU=f"{tau:g}")


def budgets(records: Iterable[Record], domains: Iterable[str], *, name: str = "budget") -> str:
    """Write the slider over the number of kept experts, with what each budget was measured to cost.

    Parameters
    ----------
    records : iterable of Record
        Of the steps ``"selection"`` and ``"budgets"``; all their budgets are drawn.
    domains : iterable of str
        Names of the domains, in the order of their numbers.
    name : str
        Id of the element, unique on its page.

    Returns
    -------
    str
        HTML.
    """
    domains = list(domains)
    models: dict[str, dict[str, Any]] = {}
    for record in records:
        found = _measured(record, len(domains))
        model = models.setdefault(record.inputs["model"], found | {"budgets": []})
        model["budgets"] += found["budgets"]
    for model in models.values():
        model["budgets"].sort(key=lambda budget: float(budget["kept"]))
    return _element(
        name,
        "budget",
        {"rows": ["all text", *domains], "models": [models[name] for name in sorted(models)]},
        ("budget",),
    )


def _weights(layer: Mapping[str, Any]) -> np.ndarray:
    return layer["codes"] * layer["steps"][..., None, None]


def _measured(record: Record, domains: int) -> dict[str, Any]:
    """Bits per byte of one training: of all text, then of each domain."""
    details = record.details
    size, domain = np.array(details["bytes"]), np.array(details["domain"])
    masks = [np.ones(len(size), dtype=bool), *(domain == d for d in range(domains))]

    def per_byte(bits: list[float]) -> list[float]:
        bits = np.array(bits)
        return [round(float(bits[mask].sum() / size[mask].sum()), 5) for mask in masks]

    share = {row["method"]: row["kept_share"] for row in record.rows}
    budgets = details["budgets"]
    experts = {round(np.mean(told["counts"]) / share[f"moeits, {title}"]) for title, told in budgets.items()}
    found = [
        {
            "kept": f"{np.mean(told['counts']):g}",
            "note": title.partition(", ")[2],
            "moeits": per_byte(told["methods"]["moeits"]["bits"]),
            "random": per_byte(told["mean of subsets"]),
            "slices": per_byte(told["mean of stratified"]) if "mean of stratified" in told else None,
            "cloud": [round(bits / size.sum(), 5) for bits in told["subsets"]],
        }
        for title, told in budgets.items()
    ]
    return {
        "title": record.inputs["model"],
        "experts": experts.pop(),
        "unpruned": per_byte(details["unpruned"]),
        "budgets": found,
    }


def _element(name: str, kind: str, data: Mapping[str, Any], scripts: Iterable[str], **words: str) -> str:
    style = (_STATIC / "live.css").read_text(encoding="utf-8").replace("COLOUR", COLOURS[1])
    body = (_STATIC / f"{kind}.html").read_text(encoding="utf-8")
    for placeholder, word in {"NAME": name, **words}.items():
        body = body.replace(placeholder, word)
    script = "\n".join((_STATIC / f"{part}.js").read_text(encoding="utf-8") for part in scripts)
    held = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    return f"""<div id="{name}" class="moeits-live">
<style>{style}</style>
{body}
<script type="application/json">{held}</script>
<script>(() => {{
const root = document.getElementById("{name}");
const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
{script}
}})();</script>
</div>"""
