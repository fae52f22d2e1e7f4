"""A figure with a slider for tau, as one piece of HTML that needs nothing else: no network, no library.

Without JavaScript it shows the state at the first tau.
"""

import json
import re
from html import escape
from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import numpy as np

from moeits.book.figures import COLOURS
from moeits.errors import MoeitsError
from moeits.selection import select_experts

CELL, LEFT, TOP = 24, 28, 24  # in units of the drawing, which scales to the width of the page
_STYLE = """
#NAME { max-width: 30rem; margin: 1rem auto; }
#NAME svg { background: #fff; display: block; width: 100%; height: auto; }
#NAME svg text { fill: #222; font: 11px sans-serif; text-anchor: middle; }
#NAME label, #NAME input { display: block; width: 100%; }
#NAME rect.above { stroke: COLOUR; stroke-width: 3; }
#NAME line.above { stroke: COLOUR; }
#NAME rect.gone { opacity: 0.12; stroke: none; }
#NAME line.gone { opacity: 0.15; }
#NAME text.gone { fill: #777; text-decoration: line-through; }
"""


def tau_slider(
    R: np.ndarray, *, tau: float, largest_tau: float = 5.0, diagonal: str = "zero", name: str = "tau-slider"
) -> str:
    """Draw a layer's NMI matrix with a slider that moves tau.

    The heat map fades the removed experts, in the order of Algorithm 3, and frames the pairs above the
    threshold. Below it, every pair is a line on the scale of NMI, on which rho moves. A sentence gives the
    same information to readers who cannot see the drawing.

    Parameters
    ----------
    R : ndarray, shape (E, E)
        NMI of all pairs of experts.
    tau : float
        Where the slider starts.
    largest_tau : float
        Where it ends; it begins at 0.
    diagonal : {"zero", "one", "exclude"}
        As in :func:`moeits.selection.select_experts`.
    name : str
        Id of the element, unique on its page.

    Returns
    -------
    str
        HTML.

    Raises
    ------
    MoeitsError
        If tau is outside the slider's range, or the name is no id.
    """
    if not 0 <= tau <= largest_tau:
        raise MoeitsError(f"tau is {tau}: the slider goes from 0 to {largest_tau}")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise MoeitsError(f"name is {name!r}: give lower-case words joined by hyphens")
    experts = len(R)
    pairs = [(i, j, float(R[i, j])) for i, j in combinations(range(experts), 2)]
    values = [value for *_, value in pairs]
    least, largest = min(values), max(values)
    # rho = mean + tau IQR, so two thresholds give both numbers
    mean, with_iqr = (select_experts(R, t, diagonal=diagonal).threshold for t in (0.0, 1.0))
    side = experts * CELL
    scale = side / ((largest - least) or 1.0)
    data = {
        "experts": experts,
        "mean": mean,
        "iqr": with_iqr - mean,
        "steps": [
            {"removed": step.removed, "pair": step.pair, "nmi": step.nmi}
            for step in select_experts(R, n_keep=1).steps
        ],
        "left": LEFT,
        "scale": scale,
        "least": least,
        "largest": largest,
    }
    drawing = _drawing(experts, pairs, least, largest, scale)
    style = _STYLE.replace("COLOUR", COLOURS[1]).replace("NAME", name)
    script = (Path(__file__).with_name("slider.js")).read_text(encoding="utf-8").replace("NAME", name)
    return f"""<div id="{name}">
<style>{style}</style>
<label for="{name}-tau">Threshold tau: <output for="{name}-tau">{tau:.2f}</output></label>
<input type="range" id="{name}-tau" min="0" max="{largest_tau:g}" step="0.05" value="{tau:g}" disabled
 aria-describedby="{name}-text">
{drawing}
<p id="{name}-text" aria-live="polite">The slider needs JavaScript.</p>
<script type="application/json">{json.dumps(data)}</script>
<script>{script}</script>
</div>"""


def _drawing(
    experts: int, pairs: list[tuple[int, int, float]], least: float, largest: float, scale: float
) -> str:
    colours = mpl.colormaps["cividis"]
    side = experts * CELL
    strip, height = TOP + side + 30, TOP + side + 92
    parts = []
    for expert in range(experts):
        at = CELL * (expert + 0.5)
        parts += [
            f'<text data-expert="{expert}" x="{LEFT + at}" y="{TOP - 8}">{expert}</text>',
            f'<text data-expert="{expert}" x="{LEFT - 12}" y="{TOP + at + 4}">{expert}</text>',
        ]
    for i, j, value in pairs:
        colour = mpl.colors.to_hex(colours((value - least) / ((largest - least) or 1.0)))
        for row, column in ((i, j), (j, i)):
            parts.append(
                f'<rect data-i="{i}" data-j="{j}" data-nmi="{value:.6f}" x="{LEFT + CELL * column + 1.5}" '
                f'y="{TOP + CELL * row + 1.5}" width="{CELL - 3}" height="{CELL - 3}" fill="{colour}"/>'
            )
        x = LEFT + scale * (value - least)
        parts.append(
            f'<line data-i="{i}" data-j="{j}" data-nmi="{value:.6f}" x1="{x:.1f}" x2="{x:.1f}" y1="{strip}" '
            f'y2="{strip + 24}" stroke="{COLOURS[0]}" stroke-width="1.5"/>'
        )
    parts += [
        f'<text x="{LEFT + 14}" y="{strip + 40}">{least:.3f}</text>',
        f'<text x="{LEFT + side - 14}" y="{strip + 40}">{largest:.3f}</text>',
        f'<text x="{LEFT + side / 2}" y="{strip + 58}">NMI of a pair; the dashed line is rho</text>',
        f'<line class="rho" x1="0" x2="0" y1="{strip - 8}" y2="{strip + 28}" stroke="#000" stroke-width="2" '
        'stroke-dasharray="5 3"/>',
    ]
    title = f"NMI of all pairs of {experts} experts, {least:.3f} to {largest:.3f}; see the sentence below"
    width = LEFT + side + 20
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
