"""What other methods would keep: each behind one interface, from a layer's weights and statistics.

A criterion chooses the experts of a layer that stay, or changes the weights of the layer, and says how a
share of all experts is spread over the layers. Statistics come from :mod:`moeits.criteria.statistics`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from moeits.criteria import (
    clusters,
    compression,
    controls,
    information,
    recombination,
    reconstruction,
    router,
)
from moeits.criteria.base import (
    Change,
    Choose,
    Layer,
    Score,
    Spread,
    across_layers,
    best,
    uniform,
    whole_groups,
)
from moeits.errors import BudgetError, MoeitsError
from moeits.machine.keys import by_value


@dataclass(frozen=True)
class Criterion:
    """One method.

    Attributes
    ----------
    title : str
        Name in prose.
    citation : str
        Key in the bibliography; empty for what has no source.
    definition : str
        What it keeps, in one sentence.
    simplified : str
        What is done more simply here than in the source; of a method that is only quoted, what its
        definition lacks. Empty where nothing is.
    needs_calibration : bool
        Whether it reads statistics of calibration text.
    needs_probe : bool
        Whether it reads statistics of random tokens.
    needs_loss : bool
        Whether it asks the model for its loss, once for each subset of a layer's experts.
    equation : str
        Its definition in symbols, as Markdown with LaTeX; the book's page of the methods explains them.
    score : callable, optional
        Layer -> importance of its experts (E,); those with the largest stay.
    choose : callable, optional
        Layer, number -> experts to keep.
    change : callable, optional
        Layer, number -> new weights, in about the bytes of that number of experts.
    spread : callable
        Layers, share -> number of experts to keep in each.
    """

    title: str
    citation: str
    definition: str
    simplified: str = ""
    needs_calibration: bool = True
    needs_probe: bool = False
    needs_loss: bool = False
    equation: str = ""
    score: Score | None = None
    choose: Choose | None = None
    change: Callable[[Layer, int], Change] | None = None
    spread: Spread = uniform

    @property
    def quoted_only(self) -> bool:
        """Whether the method's definition is not complete enough to measure it."""
        return self.score is None and self.choose is None and self.change is None

    @property
    def parts(self) -> list[Callable]:
        """Functions that the choice is computed by."""
        return [part for part in (self.score, self.choose, self.change, self.spread) if part is not None]

    @property
    def functions(self) -> list[object]:
        """Names and options of what computes the choice, as JSON can write them."""
        return [_named(part) for part in (self.score, self.choose, self.change, self.spread)]

    def keep(self, layer: Layer, n_keep: int) -> tuple[int, ...]:
        """Choose `n_keep` experts of a layer.

        Raises
        ------
        MoeitsError
            If the number is out of range, statistics are missing, or the method chooses no experts.
        """
        _check_number(layer, n_keep, layer.groups)
        if self.choose is not None:
            return tuple(self.choose(layer, n_keep))
        if self.score is not None:
            scores = np.asarray(self.score(layer))
            if not np.isfinite(scores).all():
                raise MoeitsError(f"layer {layer.number}: {self.title} gives scores that are not finite")
            return best(scores, n_keep, layer.groups)
        what = "is only quoted" if self.quoted_only else "changes weights instead of choosing experts"
        raise MoeitsError(f"{self.title} {what}")

    def apply(self, layer: Layer, n_keep: int) -> Change:
        """Compute new weights of a layer, in about the bytes of `n_keep` experts.

        Raises
        ------
        MoeitsError
            If the number is out of range, statistics are missing, or the method changes no weights.
        """
        _check_number(layer, n_keep)
        if self.change is None:
            raise MoeitsError(f"{self.title} changes no weights")
        return self.change(layer, n_keep)


def _named(part: object) -> object:
    if isinstance(part, partial):
        return [_named(part.func), {key: _named(value) for key, value in part.keywords.items()}]
    return f"{part.__module__}.{part.__qualname__}" if callable(part) else part


def _check_number(layer: Layer, n_keep: int, groups: int = 1) -> None:
    if n_keep % groups:
        raise BudgetError(
            f"layer {layer.number}: cannot keep {n_keep} experts: the router selects among {groups} groups, "
            "which must stay equally large"
        )
    if not layer.minimum <= n_keep <= layer.experts:
        raise BudgetError(
            f"layer {layer.number}: cannot keep {n_keep} of {layer.experts} experts, at least {layer.minimum}"
        )


@by_value
def criterion(name: str) -> Criterion:
    """Look up a criterion.

    Raises
    ------
    MoeitsError
        If there is none of that name.
    """
    if name not in CRITERIA:
        raise MoeitsError(f"no criterion {name!r}: there are {', '.join(CRITERIA)}")
    return CRITERIA[name]


def counts_for(
    name: str,
    layers: Mapping[int, Layer],
    *,
    n_keep: int | None = None,
    share: float | None = None,
    counts: Mapping[int, int] | None = None,
) -> dict[int, int]:
    """Count the experts that stay in each layer.

    Parameters
    ----------
    name : str
        A criterion.
    layers : mapping of int to Layer
        All layers of a model.
    n_keep : int, optional
        The same number in every layer.
    share : float, optional
        Share of all experts, spread as the criterion does.
    counts : mapping of int to int, optional
        The numbers themselves, for every layer.

    Returns
    -------
    dict of int to int
        By layer.

    Raises
    ------
    MoeitsError
        If not exactly one budget is given, a share is not in (0, 1], or `counts` leaves a layer out.
    """
    if sum(given is not None for given in (n_keep, share, counts)) != 1:
        raise MoeitsError("give exactly one of n_keep, share and counts")
    if n_keep is not None:
        return dict.fromkeys(layers, n_keep)
    if counts is not None:
        if set(counts) != set(layers):
            raise MoeitsError(f"counts are given for layers {sorted(counts)}, the model has {sorted(layers)}")
        return dict(counts)
    if not 0 < share <= 1:
        raise MoeitsError(f"share is {share}: give a fraction of the experts to keep, above 0 and at most 1")
    return whole_groups(criterion(name).spread(layers, share), layers)


def select(
    name: str,
    layers: Mapping[int, Layer],
    *,
    n_keep: int | None = None,
    share: float | None = None,
    counts: Mapping[int, int] | None = None,
) -> dict[int, tuple[int, ...]]:
    """Choose the experts of every layer that stay.

    Parameters
    ----------
    name, layers, n_keep, share, counts
        As in :func:`counts_for`.

    Returns
    -------
    dict of int to tuple of int
        Kept experts by layer, ascending.

    Raises
    ------
    MoeitsError
        See :func:`counts_for` and :meth:`Criterion.keep`.
    """
    chosen = counts_for(name, layers, n_keep=n_keep, share=share, counts=counts)
    return {number: criterion(name).keep(layer, chosen[number]) for number, layer in layers.items()}


def _moeits(
    title: str, definition: str, equation: str, *, diagonal: str = "zero", **options: object
) -> Criterion:
    return Criterion(
        title,
        "balderas2026moeits",
        definition,
        equation=equation,
        needs_calibration=False,
        choose=partial(information.moeits, **options),
        spread=partial(information.by_one_tau, diagonal=diagonal, **options),
    )


_RANKED = {
    "frequency": Criterion(
        "Frequency",
        "muzio2024seermoe",
        "Keep the experts that most tokens are routed to.",
        "Counted once, without the source's fine-tuning.",
        equation=r"$s_e = \lvert T_e \rvert / \lvert T \rvert$",
        score=router.frequency,
    ),
    "router-weight": Criterion(
        "Router weight",
        "muzio2024seermoe",
        "Keep the experts with the largest mean router weight over all tokens.",
        "Counted once, without the source's fine-tuning.",
        equation=r"$s_e = \frac{1}{\lvert T \rvert} \sum_{x \in T_e} g_e(x)$",
        score=router.router_weight,
    ),
    "activation-norm": Criterion(
        "Activation norm (EAN)",
        "jaiswal2025experts",
        "Keep the experts whose outputs have the largest sum of norms over the tokens routed to them.",
        "One shot, where the source also prunes and estimates in turns.",
        equation=r"$s_e = \sum_{x \in T_e} \lVert f_e(x) \rVert$",
        score=router.activation_norm,
    ),
    "reap": Criterion(
        "REAP",
        "lasby2025reap",
        "Keep the experts with the largest mean, over the tokens routed to them, of router weight times norm "
        "of the output.",
        equation=r"$s_e = \frac{1}{\lvert T_e \rvert} \sum_{x \in T_e} g_e(x) \lVert f_e(x) \rVert$",
        score=router.reap,
    ),
    "weight-product": Criterion(
        "Weight product",
        "",
        "Keep the experts whose neurons have the largest sum of the product of the norms of their gate, up "
        "and down weights.",
        needs_calibration=False,
        equation=r"$s_e = \sum_{i \in e} \lVert G_i \rVert \, \lVert U_i \rVert \, \lVert D_i \rVert$",
        score=information.weight_product,
    ),
}

_MOEITS = {
    "moeits": _moeits(
        "MoEITS",
        "Algorithm 3 on the plain mean of the projections' NMI, with the diagonal at 0.",
        r"while $\max R_{ef} > \bar R + \tau \, \mathrm{IQR}(R)$, remove of that pair the one with the "
        r"larger $\sum_g R_{eg}$",
    ),
    "moeits-official": _moeits(
        "MoEITS, official weights",
        "The same with the projection weights of the authors' code, where it has some for the family.",
        r"$R_{ef} = \sum_p a_p \mathrm{NMI}(W^p_e, W^p_f)$ with weights $a_p$ of the projections",
        preset="official",
    ),
    "moeits-exclude": _moeits(
        "MoEITS, no diagonal",
        "The same with mean and IQR over all entries off the diagonal.",
        r"$\bar R$ and IQR over $e \neq f$",
        diagonal="exclude",
    ),
    "moeits-miller-madow": _moeits(
        "MoEITS, Miller-Madow",
        "The same with entropies corrected for their bias by Miller and Madow.",
        r"$H \leftarrow H + (K - 1) / 2N$ with $K$ occupied cells and $N$ weights",
        correction="miller-madow",
    ),
    "moeits-null": _moeits(
        "MoEITS, less null",
        "The same with the NMI of shuffled weights subtracted from every pair's.",
        r"$R_{ef} \leftarrow R_{ef} - R_{e \pi(f)}$, mean over shuffles $\pi$ of the weights",
        correction="null",
    ),
    "moeits-aligned": _moeits(
        "MoEITS, aligned",
        "The same with hidden neurons of every pair matched before their NMI is measured.",
        r"$\mathrm{NMI}(W_e, P_{ef} W_f)$ with a permutation $P_{ef}$ of the neurons",
        align=True,
    ),
}

CRITERIA: dict[str, Criterion] = {
    "random": Criterion(
        "Random",
        "",
        "Keep experts drawn at random.",
        needs_calibration=False,
        equation=r"$P(S) = 1 / \binom{E}{n}$",
        choose=controls.random,
    ),
    "first": Criterion(
        "First",
        "",
        "Keep the experts with the smallest numbers.",
        needs_calibration=False,
        equation=r"$s_e = -e$",
        score=controls.first,
    ),
    "oracle": Criterion(
        "Oracle",
        "",
        "Keep the subset with the least loss of the model on calibration text, of all subsets of a layer, "
        "while every other layer is whole.",
        f"Where a layer has at most {controls.SUBSETS} subsets, and on a few layers alone.",
        needs_loss=True,
        equation=r"$\arg\min_S \mathcal{L}(S)$",
        choose=controls.oracle,
    ),
    **_RANKED,
    **{
        f"{name}-global": replace(
            entry,
            title=f"{entry.title}, global",
            definition=f"As {entry.title}, but the experts of all layers compete for one budget.",
            equation=r"$\sum_\ell \lvert S_\ell \rvert$ is given",
            spread=partial(across_layers, score=entry.score),
        )
        for name, entry in _RANKED.items()
    },
    "lu": Criterion(
        "Lu et al.",
        "lu2024naee",
        "Keep the subset with the least error of the layer's output on sampled tokens, each token "
        "routed anew.",
        f"All subsets are tried up to {reconstruction.SUBSETS:,}; above, experts go one by one.",
        equation=r"$\arg\min_S \mathcal{E}(S)$",
        choose=reconstruction.lu,
    ),
    "moe-i2": Criterion(
        "MoE-I², experts",
        "yang2024moei2",
        "Give every layer experts in proportion to the damage that the loss of single experts does to it, "
        "then keep the subset with the least error of the layer's output.",
        "Damage is the error of the layer's output, not the model's loss; Lu et al.'s search replaces the "
        "genetic one; no search over blocks of layers, no fine-tuning.",
        equation=r"$\lvert S_\ell \rvert \propto \sum_e \mathcal{E}_\ell(\overline{\{e\}})$, then "
        r"$\arg\min_S \mathcal{E}(S)$",
        choose=reconstruction.lu,
        spread=reconstruction.by_layer_importance,
    ),
    "moe-i2-low-rank": Criterion(
        "MoE-I², low rank",
        "yang2024moei2",
        "Replace every matrix of an expert by its best approximation of low rank.",
        "The same rank for all experts; no fine-tuning.",
        needs_calibration=False,
        equation=r"$W_e \approx \sum_{i \le r} \sigma_i u_i v_i^\top$",
        change=compression.low_rank,
    ),
    "stun": Criterion(
        "STUN, experts",
        "lee2025stun",
        "Group experts by similar router rows and co-activation, and keep of each group the one "
        "nearest to its mean.",
        "The two similarities count equally, and groups are made by average linkage for an exact number; no "
        "reconstruction of small groups.",
        equation=r"$d_{ef} = \lVert r_e - r_f \rVert + 1 - \lvert T_e \cap T_f \rvert$, both scaled to at "
        r"most 1; of a group $C$ stays $\arg\min_{e \in C} \lVert w_e - \bar w_C \rVert$",
        choose=clusters.stun,
    ),
    "stun-sparse": Criterion(
        "STUN, both stages",
        "lee2025stun",
        "Remove half of what must go as experts, as above, then zero in every row of the others the weights "
        "with the least magnitude times norm of the input.",
        "As above; the norms are weighted by the router, every layer is thinned alike, and the mask counts "
        "as a bit per weight.",
        equation=r"$s_{ij} = \lvert W_{ij} \rvert \, \lVert g_e x_j \rVert$ in each row $i$",
        change=compression.stun_sparse,
    ),
    "dern": Criterion(
        "DERN",
        "zhou2025dern",
        "Drop the experts with the least router weight; every neuron of theirs joins the most "
        "similar kept neuron.",
        "One assignment to the nearest kept neuron above a cosine of "
        f"{recombination.SIMILAR:g} replaces the clustering inside each kept expert.",
        equation=r"$i \to \arg\max_k \cos(w_i, w_k)$ and "
        r"$w_k \leftarrow \sum_{i \to k} s_{e(i)} w_i / \sum_{i \to k} s_{e(i)}$, with the router weight "
        r"for $s$",
        change=recombination.dern,
    ),
    "hc-smoe": Criterion(
        "HC-SMoE",
        "chen2024hcsmoe",
        "Group experts with similar mean outputs by average linkage, and merge each group, weighted by use.",
        "Mean outputs are over sampled tokens.",
        equation=r"$d_{ef} = \lVert \bar f_e - \bar f_f \rVert$, then "
        r"$W_C = \sum_{e \in C} \lvert T_e \rvert W_e / \sum_{e \in C} \lvert T_e \rvert$",
        change=clusters.hc_smoe,
    ),
    "m-smoe": Criterion(
        "M-SMoE",
        "li2023merge",
        "Let the most used experts lead groups, which the others join by similar router logits; align the "
        "neurons and merge each group, weighted by use.",
        "The same number of groups in each layer; no knowledge distillation, no low-rank stage.",
        equation=r"$e \to \arg\max_{k \in S} \cos(h_e, h_k)$, then "
        r"$W_C = \sum_{e \in C} \lvert T_e \rvert P_e W_e / \sum_{e \in C} \lvert T_e \rvert$ with "
        r"permutations $P_e$",
        change=clusters.m_smoe,
    ),
    "moe-pruner": Criterion(
        "MoE-Pruner",
        "xie2024moepruner",
        "Zero in every row the weights with the least magnitude times norm of the router-weighted input.",
        "No distillation; the mask counts as a bit per weight.",
        equation=r"$s_{ij} = \lvert W_{ij} \rvert \, \lVert g_e x_j \rVert$ in each row $i$",
        change=compression.moe_pruner,
    ),
    "mc-moe": Criterion(
        "MC-MoE",
        "huang2025mcmoe",
        "Store every expert in as many bits as its use and its router weight deserve.",
        "Rounding to nearest replaces GPTQ, a greedy allocation the integer program; experts are not skipped "
        "while generating.",
        equation=r"$\min_b \sum_e a_e \lVert w_e - Q_{b_e}(w_e) \rVert$ with "
        r"$a_e^2 = \lvert T_e \rvert \sum_x g_e(x)$, the sum of the bits $b_e$ being given",
        change=compression.mc_moe,
    ),
    **_MOEITS,
    **{
        f"{name}-uniform": replace(
            entry,
            title=f"{entry.title}, uniform",
            definition=f"As {entry.title}, but every layer keeps the same share.",
            equation=r"$\lvert S_\ell \rvert = n$",
            spread=uniform,
        )
        for name, entry in _MOEITS.items()
        if name != "moeits-exclude"  # whose order of removal is that of moeits
    },
    "random-token-norm": Criterion(
        "Activation norm on random tokens",
        "",
        "Keep the experts whose outputs have the largest sum of norms over the tokens routed to them, where "
        "tokens are drawn at random from the vocabulary.",
        needs_calibration=False,
        needs_probe=True,
        equation=r"$s_e = \sum_{x \in T_e} \lVert f_e(x) \rVert$, $x$ drawn from the vocabulary",
        score=router.random_token_norm,
    ),
    "mop": Criterion(
        "Mosaic Pruning",
        "hu2026mosaic",
        "Cluster experts by what they do on several domains, and keep one of each cluster.",
        "Quoted only: the text at hand does not give the similarity over domains, the domains' texts, or the "
        "formula of the score that picks an expert.",
    ),
    "c-gnn-prune": Criterion(
        "C-GNN-Prune",
        "li2026cgnn",
        "Score experts with a graph neural network on the graph of their relations.",
        "Quoted only: the text at hand does not give the graph's features, the network, or what it "
        "is trained on.",
    ),
}
"""Every method by name."""
