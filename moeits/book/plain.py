"""NMI in plain NumPy: the book explains the equations by it, and the tests check the package by it."""

import numpy as np


def nmi(x, y, bins):
    """NMI by the two-dimensional histogram; `bins` as in numpy.histogram2d (equations 4 to 6)."""
    counts = np.histogram2d(np.ravel(x), np.ravel(y), bins)[0]
    p_xy = counts / counts.sum()
    p_x, p_y = p_xy.sum(axis=1), p_xy.sum(axis=0)

    def entropy(p):
        p = p[p > 0]
        return -(p * np.log(p)).sum()

    information = entropy(p_x) + entropy(p_y) - entropy(p_xy)
    return information / np.sqrt(entropy(p_x) * entropy(p_y))
