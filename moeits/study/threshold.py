"""What share of the experts one tau keeps, of trained experts and of noise."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from moeits.selection import select_experts
from moeits.study.records import Record
from moeits.study.relatedness import square


def kept_shares(anatomies: Iterable[Record], taus: Iterable[float]) -> pd.DataFrame:
    """Apply the threshold rule to the recorded NMI of every Mixture-of-Experts model, without a floor.

    Parameters
    ----------
    anatomies : iterable of Record
        Of the step ``"anatomy"``; those of dense models are passed over.
    taus : iterable of float
        Thresholds.

    Returns
    -------
    DataFrame
        One row for each model, layer and tau: ``model``, ``initialisation`` (the model's name without its
        seed), ``seed``, ``experts``, ``layer``, ``tau``, ``kept`` (the share of the experts).
    """
    taus = list(taus)
    rows = []
    for record in anatomies:
        for layer, upper in zip(record.details.get("layers", ()), record.details.get("nmi", ()), strict=True):
            R = square(upper)
            rows += [
                {
                    "model": record.inputs["model"],
                    "initialisation": record.details["initialisation"],
                    "seed": record.details["seed"],
                    "experts": len(R),
                    "layer": layer,
                    "tau": tau,
                    "kept": len(select_experts(R, tau).kept) / len(R),
                }
                for tau in taus
            ]
    return pd.DataFrame(rows)


def shuffled_spread(anatomies: Iterable[Record]) -> float:
    """Spread of the NMI of shuffled weights, relative to its mean: the estimator's own noise.

    Mean over models and layers of the standard deviation over pairs by the mean, from the rows of the step
    ``"anatomy"``.
    """
    return float(
        np.mean(
            [
                row["stderr"] / row["value"]
                for record in anatomies
                for row in record.rows
                if row["metric"] == "nmi" and row["variant"] == "shuffled weights"
            ]
        )
    )


def spread_that_keeps(curve: pd.DataFrame, share: float) -> float:
    """Spread of pure noise at which the rule keeps a share of the experts.

    Parameters
    ----------
    curve : DataFrame
        Mean ``kept`` share by ``spread``, ascending in both.
    share : float
        The share.

    Returns
    -------
    float
        Interpolated on the logarithm of the spread; NaN outside the curve.
    """
    kept = np.maximum.accumulate(curve.kept.to_numpy())
    if not kept[0] <= share <= kept[-1]:
        return float("nan")
    return float(np.exp(np.interp(share, kept, np.log(curve.spread.to_numpy()))))
