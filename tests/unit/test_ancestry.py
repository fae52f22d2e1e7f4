"""Families of experts: found where there are copies, also permuted ones; none among independent experts."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from moeits.ancestry import Ancestry, ancestry, families, report
from moeits.cli import main
from moeits.study import trained


def block(experts, *, neurons=24, width=16, seed=0):
    random = np.random.default_rng(seed)
    shapes = {"gate": (neurons, width), "up": (neurons, width), "down": (width, neurons)}
    return {name: random.normal(size=(experts, *shape)).astype(np.float32) for name, shape in shapes.items()}


def descendants(*, permuted=False, seed=1):
    """Experts 0 and 3, and 1, 4 and 5, are noisy copies; expert 2 is alone."""
    random = np.random.default_rng(seed)
    made = block(6)
    for child, parent in ((3, 0), (4, 1), (5, 1)):
        order = random.permutation(24) if permuted else np.arange(24)
        for name, weight in made.items():
            source = weight[parent][:, order] if name == "down" else weight[parent][order]
            weight[child] = source + random.normal(scale=0.1, size=source.shape)
    return made


def test_copies_form_families():
    found = ancestry(descendants(), n_jobs=1)
    assert found.families == ((1, 4, 5), (0, 3), (2,))
    assert found.found
    assert found.kept[0.0] <= 3
    assert found.kept[5.0] >= found.kept[0.0]


def test_permuted_copies_are_found_once_neurons_are_aligned():
    made = descendants(permuted=True)
    assert not ancestry(made, n_jobs=1).found
    assert ancestry(made, align=True, n_jobs=1).families == ((1, 4, 5), (0, 3), (2,))


@pytest.mark.parametrize("align", [False, True])
def test_independent_experts_have_no_families(align):
    assert not any(ancestry(block(6, seed=s), align=align, seed=s, n_jobs=1).found for s in range(8))


def test_weights_of_a_checkpoint_may_be_bfloat16():
    made = {name: torch.from_numpy(weight).bfloat16() for name, weight in descendants().items()}
    assert ancestry(made, n_jobs=1).families == ((1, 4, 5), (0, 3), (2,))


def test_one_close_pair_does_not_join_two_families():
    R = np.full((4, 4), 0.1)
    R[0, 1] = R[1, 0] = R[2, 3] = R[3, 2] = 0.9
    R[1, 2] = R[2, 1] = 0.6
    np.fill_diagonal(R, 0)
    assert families(R, 0.5) == ((0, 1), (2, 3))
    assert families(R, 0.2) == ((0, 1, 2, 3),)  # the mean of the four pairs is 0.225
    assert families(R, 0.95) == ((0,), (1,), (2,), (3,))
    assert families(np.zeros((1, 1)), 0.5) == ((0,),)


def test_no_shuffle_is_an_error():
    with pytest.raises(ValueError, match="draws is 0"):
        ancestry(block(3), draws=0)


def test_the_report_says_whether_the_method_has_anything_to_work_with():
    none = Ancestry(np.zeros((3, 3)), 0.5, ((0,), (1,), (2,)), {0.0: 1, 1.0: 2})
    some = Ancestry(np.zeros((3, 3)), 0.5, ((0, 1), (2,)), {0.0: 2, 1.0: 2})
    assert "another criterion" in report({0: none})
    told = report({0: none, 1: some})
    assert "1 of 2 layers" in told
    assert "(2 a layer)" in told
    assert "In 1 of these layers the method keeps the same number" in told


def test_the_command_finds_the_slices_of_an_upcycled_model_and_none_from_scratch():
    slices = [sorted(range(first, 16, 4)) for first in range(4)]
    folder = str(trained.find("upcycled-1").folder)
    run = CliRunner().invoke(main, ["ancestry", folder, "--layers", "0,2", "--n-jobs", "1", "--json"])
    assert run.exit_code == 0, run.output
    told = json.loads(run.stdout)
    assert {layer: sorted(one["families"]) for layer, one in told["layers"].items()} == {
        "0": slices,
        "2": slices,
    }
    folder = str(trained.find("scratch-1").folder)
    run = CliRunner().invoke(main, ["ancestry", folder, "--layers", "0", "--n-jobs", "1"])
    assert run.exit_code == 0, run.output
    assert "layer 0: 16 families" in run.output
    assert "No two experts of a layer share more" in run.output
