import matplotlib.pyplot as plt
import numpy as np

from moeits.book.diagram import method_diagram
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
