import matplotlib.pyplot as plt
import numpy as np
import pytest

from moeits.book.diagram import method_diagram, permuted_neurons, router_softmax, slices_and_copies
from moeits.selection import select_experts


def test_the_drawing_shows_what_the_algorithm_does():
    figure, pairs = method_diagram()
    plt.close(figure)
    R = np.zeros((6, 6))
    for row in pairs.itertuples():
        R[row.expert, row.other] = R[row.other, row.expert] = row.nmi
    stay = {e for row in pairs[pairs.both_kept].itertuples() for e in (row.expert, row.other)}
    assert stay == set(select_experts(R, n_keep=len(stay)).kept)
    assert len(stay) == 4


def test_permuted_neurons_compute_the_same_at_the_nmi_of_strangers():
    figure, data = permuted_neurons()
    plt.close(figure)
    assert data.nmi.tolist() == pytest.approx([1, 0], abs=0.1)
    assert data.difference.max() < 1e-12


def test_slices_share_out_the_neurons_and_experts_copy_them_in_turn():
    figure, data = slices_and_copies(4, 3)
    plt.close(figure)
    assert data.expert.tolist() == list(range(12))
    assert data.slice.tolist() == list("ABCD" * 3)
    assert sorted({n for row in data.itertuples() for n in range(row.first, row.last + 1)}) == list(range(16))


def test_without_an_expert_in_use_the_next_one_runs():
    figure, data = router_softmax(np.array([2.0, 1.0, 0.0, -1.0]), 2, (None, 3, 1))
    plt.close(figure)
    panels = data.groupby("removed", sort=False)
    assert panels.score.sum().tolist() == pytest.approx([1, 1, 1])
    assert panels.weight.sum().tolist() == pytest.approx([1, 1, 1])
    assert [part.expert[part.used].tolist() for _, part in panels] == [[0, 1], [0, 1], [0, 2]]
