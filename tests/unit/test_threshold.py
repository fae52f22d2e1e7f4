"""What one tau keeps: families whatever tau is, noise by its spread."""

import numpy as np
import pandas as pd
import pytest

from moeits.book import demos
from moeits.study import planted, records, threshold
from moeits.study.records import Record


def _record(name, R):
    upper = R[np.triu_indices(len(R), 1)].tolist()
    row = {"metric": "nmi", "variant": "shuffled weights", "value": 0.02, "stderr": 0.0001}
    details = {"initialisation": name[:-2], "seed": 1, "layers": [3], "nmi": [upper]}
    return Record("anatomy", {"model": name}, [records.row(**row)], details)


def test_families_keep_one_member_each_whatever_tau_is_and_noise_does_not():
    slot = np.arange(16) % 4
    families = np.where(slot[:, None] == slot, 0.3, 0.02) * (1 - np.eye(16))
    noise = planted.noise_matrix(np.random.default_rng(0), 16, 0.1)
    dense = Record("anatomy", {"model": "parent-1"}, [], {"initialisation": "parent", "seed": 1})
    told = threshold.kept_shares(
        [_record("upcycled-1", families), _record("scratch-1", noise), dense], (0.0, 1.25, 2.5)
    )
    shares = told.groupby("model").kept
    assert shares.unique()["upcycled-1"].tolist() == [0.25]
    assert shares.nunique()["scratch-1"] == 3
    assert told.experts.eq(16).all()
    assert set(told.layer) == {3}


def test_the_noise_of_the_estimator_is_relative():
    R = planted.noise_matrix(np.random.default_rng(0), 4, 0.1)
    assert threshold.shuffled_spread([_record("scratch-1", R)]) == pytest.approx(0.005)


def test_the_spread_that_keeps_a_share_is_found_on_the_curve():
    settings = [("zero", spread) for spread in (0.01, 0.03, 0.1, 0.3)]
    noise = demos.paper_noise({"Qwen1.5-MoE": {"experts": 60, "kept": 28.25}}, settings, draws=3)
    curve = noise.assign(kept=noise.kept / 60)
    middle = threshold.spread_that_keeps(curve, curve.kept[2])
    assert middle == pytest.approx(0.1)
    assert 0.1 < threshold.spread_that_keeps(curve, (curve.kept[2] + curve.kept[3]) / 2) < 0.3
    assert np.isnan(threshold.spread_that_keeps(curve, 0.99))
    assert np.isnan(threshold.spread_that_keeps(pd.DataFrame({"spread": [0.1], "kept": [0.5]}), 0.2))
