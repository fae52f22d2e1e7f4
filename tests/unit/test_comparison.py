import math
import re
import time
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model, tokens

from moeits import criteria, evaluation
from moeits.book import baselines
from moeits.cli import main
from moeits.criteria import controls, information, reconstruction
from moeits.criteria.folder import select_by
from moeits.criteria.reconstruction import subset_error
from moeits.criteria.statistics import gather, layers_of
from moeits.healing.lora import train_model
from moeits.healing.refit import refit_model
from moeits.kept import Kept
from moeits.machine.paths import BOOK
from moeits.models.families import moe_layers
from moeits.models.folder import load_model
from moeits.models.surgery import prune_model
from moeits.study import comparison, pipeline, profiles, records, tables
from moeits.study.comparison import Comparison
from moeits.study.methods import METHODS, recombination
from moeits.study.tables import (
    chance_jaccard,
    differences,
    finals_table,
    jaccard,
    oracle_table,
    overlaps,
    paired,
    speed_table,
    table,
)


class Letters:
    """A tokenizer whose token n is written as n letters."""

    pad_token_id = eos_token_id = 0

    def decode(self, ids, **_):
        return "".join("x" * int(i) for i in ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model("qwen2_moe").save_pretrained(path)
    return path


@pytest.fixture
def compared(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "DATA", tmp_path / "data")
    for module in (pipeline, comparison):
        monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(Comparison, "_tokenizer", Letters())
    texts = {"calibration": tokens(seed=1, batch=4, length=20), "heldout": tokens(seed=2, batch=5, length=12)}
    texts["healing"] = HEALING
    monkeypatch.setattr("moeits.corpus.blocks", lambda part, *_, **__: texts[part].numpy())
    settings = profiles.load("laptop").models["mini-qwen"].model_copy(update={"source": str(folder)})
    profile = profiles.load(
        "laptop",
        models={"tiny": settings.model_dump()},
        random_draws=2,
        seed=3,
        rivals=["random", "reap"],
        rival_models=["tiny"],
        dtype="float32",
        device="cpu",
    )
    return Comparison(profile, "tiny")


def values(cell):
    return {row["metric"]: row["value"] for row in cell.rows}


HELDOUT = tokens(seed=2, batch=5, length=12)
HEALING = tokens(seed=4, batch=24, length=16)


def test_a_cell_measures_the_model_that_the_criterion_leaves(compared, folder):
    model = load_model(folder, dtype=torch.float32)
    statistics = gather(model, tokens(seed=1, batch=4, length=20).numpy())
    kept = criteria.criterion("reap").select(layers_of(model, statistics), share=0.5)
    pruned = prune_model(load_model(folder, dtype=torch.float32), kept)
    cell = compared.cell("reap", 0.5)
    assert cell.details["kept"] == {str(layer): list(ids) for layer, ids in kept.items()}
    expected = evaluation.perplexity(pruned, HELDOUT)
    assert values(cell)["perplexity"] == pytest.approx(expected["value"], rel=1e-5)
    errors = {row["metric"]: row["stderr"] for row in cell.rows}
    assert errors["perplexity"] == pytest.approx(expected["stderr"], rel=1e-4)
    bits = math.log2(expected["value"]) * 5 * 11 / HELDOUT[:, 1:].sum().item()
    assert values(cell)["bits per byte"] == pytest.approx(bits, rel=1e-5)
    assert {row["kept_share"] for row in cell.rows} == {0.5}
    assert values(cell)["calibration tokens"] == compared.profile.calibration_tokens


def test_a_method_that_changes_weights_is_measured_with_them(compared, folder):
    model = load_model(folder, dtype=torch.float32)
    statistics = gather(model, tokens(seed=1, batch=4, length=20).numpy())
    for number, layer in layers_of(model, statistics).items():
        block = METHODS["dern"].apply(layer, 4)
        moe = next(layer for layer in moe_layers(model) if layer.layer == number)
        with torch.no_grad():
            moe.experts.down_proj.copy_(torch.from_numpy(block.block["down"].copy()))
            both = np.concatenate([block.block["gate"], block.block["up"]], axis=1)
            moe.experts.gate_up_proj.copy_(torch.from_numpy(both))
    cell = compared.cell("dern", 0.5)
    kept = {int(layer): ids for layer, ids in cell.details["kept"].items()}
    expected = evaluation.perplexity(prune_model(model, kept), HELDOUT)["value"]
    assert values(cell)["perplexity"] == pytest.approx(expected, rel=1e-5)
    merged = compared.cell("hc-smoe", 0.5)
    assert all(ids == list(range(8)) for ids in merged.details["kept"].values())
    assert {row["kept_share"] for row in merged.rows} == {0.5}


def test_a_cell_is_measured_once(compared, monkeypatch):
    first = compared.cell("reap", 0.5)
    again = Comparison(compared.profile, "tiny")
    monkeypatch.setattr(evaluation, "log_losses", None)
    monkeypatch.setattr("moeits.criteria.statistics.gather", None)
    assert again.cell("reap", 0.5) == first
    assert again.found() == [first]


def test_the_same_experts_are_measured_once(compared, monkeypatch):
    first = compared.cell("first", 1.0)
    monkeypatch.setattr(evaluation, "log_losses", None)
    again = compared.cell("weight-product", 1.0)
    assert again.inputs["method"] == "weight-product"
    assert again.details["nats"] == first.details["nats"]
    assert values(again)["perplexity"] == values(first)["perplexity"]
    with pytest.raises(TypeError, match="not callable"):
        compared.cell("first", 0.5)


def test_budgets_share_the_nmi_and_each_counts_its_seconds(compared, monkeypatch):
    slow, calls = information.nmi_matrix, []

    def measure(*args, **options):
        calls.append(options["correction"])
        time.sleep(0.1)
        return slow(*args, **options)

    monkeypatch.setattr(information, "nmi_matrix", measure)
    layers = len(compared._layers)
    for budget in (0.5, 0.75):
        for method in ("moeits-null", "moeits-null-uniform"):
            cell = compared.cell(method, budget)
            alone = Comparison(compared.profile, "tiny")._choose(method, budget)
            assert {int(layer): tuple(ids) for layer, ids in cell.details["kept"].items()} == alone.kept
            assert values(cell)["selection seconds"] >= 0.1 * layers
    assert len(calls) == (1 + 4) * layers
    compared.cell("moeits-uniform", 0.5)
    assert len(calls) == (1 + 4 + 1) * layers


def test_the_own_budget_is_moeits_at_its_tau(compared):
    tau = compared.profile.models["tiny"].tau
    own = {str(n): list(chosen.kept) for n, chosen in compared.study.selections(tau).items()}
    assert compared.cell("moeits", "own").details["kept"] == own
    random = compared.cell("random 1", "own").details["kept"]
    assert {layer: len(ids) for layer, ids in random.items()} == {n: len(ids) for n, ids in own.items()}
    assert random != compared.cell("random 0", "own").details["kept"]


def test_what_is_impossible_is_recorded_with_its_reason(compared, monkeypatch):
    monkeypatch.setattr("moeits.study.methods.compression.CODES", (15,))
    cell = compared.cell("mc-moe", 0.5)
    assert cell.rows == []
    assert "below the" in cell.details["impossible"]
    shown = table([cell])
    assert "coarsest codes" in shown.impossible[0]


def test_a_bug_of_a_criterion_is_no_result(compared, monkeypatch):
    def bug(*_):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(criteria.Criterion, "keep", bug)
    with pytest.raises(ValueError, match="broadcast"):
        compared.cell("first", 0.5)
    assert not list(compared.study.records.glob("rival-*"))


def test_the_oracle_tries_every_subset_by_the_models_loss(compared, folder, monkeypatch):
    calibration = tokens(seed=1, batch=4, length=20)
    oracle = compared.oracle()
    layers = oracle.details["layers"]
    known = compared.statistics("calibration")
    for number, layer in layers.items():
        kept = [tuple(ids) for ids in layer["kept"]]
        assert kept == list(combinations(range(8), 4))
        for at in (0, 33):
            pruned = prune_model(load_model(folder, dtype=torch.float32), {int(number): kept[at]})
            expected = math.log(evaluation.perplexity(pruned, calibration)["value"])
            assert np.mean(layer["nats"][at]) == pytest.approx(expected, abs=1e-5)
        seen = replace(compared._layers[int(number)], calibration=known[int(number)])
        assert layer["error"][33] == pytest.approx(subset_error(seen, kept[33]))
    best = {row["task"]: row["value"] for row in oracle.rows if row["variant"] == "best"}
    assert best == {
        f"layer {number}": pytest.approx(np.mean(layer["nats"], axis=1).min(), abs=1e-6)
        for number, layer in layers.items()
    }
    assert compared.found("oracle") == [oracle]
    monkeypatch.setattr("moeits.criteria.controls.SUBSETS", 69)
    assert "70 subsets of 4 of 8" in compared._try_subsets()[1]["impossible"]


def test_methods_are_ranked_among_all_subsets():
    sets = [[0], [1], [2]]
    nats = [[3.0, 3.2], [1.0, 1.0], [2.0, 2.4]]
    inputs = {"model": "tiny"}
    oracle = records.Record(
        "oracle", inputs, [], {"layers": {"4": {"kept": sets, "nats": nats, "error": [0.2, 0.3, 0.1]}}}
    )
    cells = [
        records.Record(
            "rival",
            inputs | {"method": method, "budget": budget},
            [],
            {"kept": {"4": ids}, "experts": {"4": 3}},
        )
        for method, budget, ids in [
            ("reap", 0.5, [0]),
            ("lu", 0.5, [1]),
            ("frequency", 0.25, [2]),
            ("first", 0.5, [0, 1]),
            ("dern", 0.5, [2]),
        ]
    ]
    ranks = oracle_table([oracle], cells).set_index("method")
    assert ranks["rank"].to_dict() == {"layer error": 2, "reap": 3, "lu": 1}
    assert ranks.loss["reap"] == pytest.approx(2.1)
    assert ranks.stderr["reap"] == pytest.approx(0.1)


def test_the_oracle_chooses_from_a_folder(folder, monkeypatch):
    calibration = tokens(seed=1, batch=2, length=12).numpy()
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: None)
    monkeypatch.setattr("moeits.corpus.blocks", lambda *_, **__: calibration)
    kept = select_by("oracle", folder, n_keep=7)
    losses = {}
    for ids in combinations(range(8), 7):
        pruned = prune_model(load_model(folder), {1: ids})
        losses[ids] = evaluation.log_losses(pruned, calibration).sum()
    assert kept.layers[1] == min(losses, key=losses.get)


def speed(form, share, reading, error=1.0):
    rows = [{"metric": metric, "value": reading, "stderr": error} for metric in ("prefill", "decode")]
    return records.Record("speed", {"model": "tiny", "form": form, "share": share}, rows, {})


def test_what_methods_leave_is_set_beside_experts_removed_at_equal_speed():
    speeds = [speed("whole", 1.0, 100), speed("pruned", 0.5, 120), speed("pruned", 0.25, 140)]
    speeds += [speed("int8", 0.5, 117.5), speed("sparse", 0.5, 50), speed("low-rank", 0.5, 150)]
    cells = [
        records.Record(
            "rival",
            {"model": "tiny", "method": method, "budget": 0.5},
            [{"metric": "bits per byte", "value": bits, "stderr": 0.1}],
            {},
        )
        for method, bits in [("mc-moe", 1.5), ("moe-pruner", 1.25), ("reap", 2.0)]
    ]
    found = speed_table(speeds, cells).set_index(["method", "share"])
    fast = found["as fast"]
    assert fast["mc-moe", 0.5] == 0.5
    assert fast["moe-pruner", 0.5] == fast["whole", 1.0] == 1.0
    assert math.isnan(fast["moe-i2-low-rank", 0.5])
    assert math.isnan(fast["reap", 0.5])
    assert found["bits per byte"]["reap", 0.5] == 2.0
    assert math.isnan(found["bits per byte"]["reap", 0.25])


def test_forms_are_timed_with_the_bytes_they_are_asked_for(compared, monkeypatch):
    asked = []

    def costs(_, kept, **options):
        asked.append((options["variants"], options["share"], {n: list(ids) for n, ids in kept.items()}))
        found = {"prefill": 9.0, "prefill_stderr": 1.0, "decode": 3.0, "decode_stderr": 0.5}
        return [found | {"n": 5, "memory_bytes": 7}]

    monkeypatch.setattr(comparison.cost, "compare_costs", costs)
    profile = compared.profile.model_copy(update={"green": ["tiny"]})
    labels = []
    for step in comparison.speed_steps(profile, ["tiny", "other"]):
        labels.append(step.label)
        step.do()
    assert labels[0] == "tiny: speed of whole, 100%"
    assert len(asked) == len(labels) == 11
    assert (["sparse"], 0.25, {1: [0, 1], 2: [0, 1]}) in asked
    found = Comparison(profile, "tiny").found("speed")
    assert {row["metric"]: row["value"] for row in found[0].rows} == {
        "prefill": 9.0,
        "decode": 3.0,
        "memory": 7,
    }


def test_the_table_pairs_every_method_with_moeits(compared):
    cells = [compared.cell(method, 0.5) for method in ("moeits", "reap")]
    shown = table(cells).set_index("method")
    bits = {cell.inputs["method"]: np.array(cell.details["nats"]) / math.log(2) for cell in cells}
    size = np.array(cells[0].details["bytes"])
    assert size.tolist() == HELDOUT[:, 1:].sum(1).tolist()
    difference = (bits["reap"] - bits["moeits"]).sum() / size.sum()
    assert shown.difference["reap"] == pytest.approx(difference)
    assert shown["bits per byte"]["reap"] - shown["bits per byte"]["moeits"] == pytest.approx(difference)
    assert math.isnan(shown.difference["moeits"])
    stderr = evaluation.ratio(bits["reap"] - bits["moeits"], size)[1]
    assert shown["difference stderr"]["reap"] == pytest.approx(stderr)


def test_differences_in_pairs_and_their_verdicts():
    nats = {
        "moeits": [2.0, 2.1, 1.9],
        "reap": [1.0, 1.2, 1.0],
        "lu": [2.3, 1.9, 1.8],
        "first": [4.0, 4.1, 3.9],
    }
    cells = [
        records.Record(
            "rival",
            {"model": "tiny", "method": method, "budget": 0.5},
            [{}],
            {"nats": values, "bytes": [1, 1, 1]},
        )
        for method, values in nats.items()
    ]
    cells.append(replace(cells[1], inputs=cells[1].inputs | {"budget": 0.25}))
    found = differences(iter(cells), [(method, "moeits") for method in ("reap", "lu", "first", "dern")])
    assert found["first"].tolist() == ["reap", "lu", "first"]
    assert found.budget.unique().tolist() == ["50%"]
    assert found.verdict.tolist() == ["better", "undecided", "worse"]
    assert found.difference[0] == pytest.approx(-2.8 / 3 / math.log(2))


def test_the_order_alone_is_compared_where_all_layers_keep_the_same_number():
    methods = {
        "moeits-uniform": ([2.0, 2.1, 1.9], {"0": [0, 1], "1": [0, 1]}),
        "moeits": ([1.0, 1.1, 0.9], {"0": [0], "1": [0, 1, 2]}),
        "reap": ([1.0, 1.2, 1.0], {"0": [1, 2], "1": [0, 1]}),
        "lu": ([4.0, 4.1, 3.9], {"0": [2, 3], "1": [0, 1]}),
        "reap-global": ([1.0, 1.2, 1.0], {"0": [0], "1": [0, 1, 2]}),
        "moeits-null": ([1.0, 1.2, 1.0], {"0": [0, 1], "1": [0, 1]}),
        "random 0": ([1.0, 1.2, 1.0], {"0": [0, 3], "1": [0, 1]}),
        "first": ([1.0, 1.2, 1.0], {"0": [0, 1], "1": [0, 1]}),
        "wanda": ([1.0, 1.2, 1.0], None),
    }
    cells = [
        records.Record(
            "rival",
            {"model": "tiny", "method": method, "budget": 0.5},
            [{}],
            {"nats": nats, "bytes": [1, 1, 1], "kept": kept, "experts": {"0": 4, "1": 4}},
        )
        for method, (nats, kept) in methods.items()
    ]
    said = baselines.order_alone(cells, ["tiny", "other"])
    assert said == "tiny: better in 1 and worse in 1 of 2 comparisons"
    assert baselines.order_alone(cells[1:], ["tiny"]) == "not measured"


def test_cells_of_different_text_are_not_paired():
    cells = [records.Record("rival", {}, [], {"nats": [1.0], "bytes": [size]}) for size in (3, 4)]
    with pytest.raises(ValueError, match="not measured on the same text"):
        paired(*cells)


def answers(right):
    """Items of one benchmark of four questions with two choices; `right` says which are answered rightly."""
    rows = [
        {"task": "arc_easy", "question": i, "n_choices": 2, "gold": 0, "choice": int(not good)}
        | {"choice_norm": int(not good), "acc": int(good), "acc_norm": int(good)}
        | {"bits": 3.0 + i, "bytes": 4, "shots": 0}
        for i, good in enumerate(right)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def scored(compared, monkeypatch):
    """The comparison, with answers of our own."""
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: answers([True, True, False, True]))
    return compared


def test_a_final_is_healed_before_it_is_measured(scored, folder):
    calibration = tokens(seed=1, batch=4, length=20)
    whole = load_model(folder, dtype=torch.float32)
    kept = criteria.criterion("reap").select(layers_of(whole, gather(whole, calibration.numpy())), share=0.5)
    pruned = prune_model(load_model(folder, dtype=torch.float32), kept)
    refit_model(pruned, whole, calibration)
    final = scored.final("reap", "refit")
    found = {row["metric"]: row for row in final.rows if row["task"] == "heldout"}
    expected = evaluation.perplexity(pruned, HELDOUT)["value"]
    assert found["perplexity"]["value"] == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(values(scored.cell("reap", 0.5))["perplexity"], rel=1e-3)
    (mean,) = (row for row in final.rows if row["task"] == "mean" and row["variant"] == "acc")
    assert mean["value"] == 0.75
    assert [record.id for record in scored.found("final")] == [final.id]


def test_a_final_is_healed_by_lora_and_by_both(scored, folder, tmp_path):
    calibration = tokens(seed=1, batch=4, length=20)
    whole = load_model(folder, dtype=torch.float32)
    kept = criteria.criterion("first").select(layers_of(whole), share=0.5)
    for way in ("lora", "refit + lora"):
        pruned = prune_model(load_model(folder, dtype=torch.float32), kept)
        if "refit" in way:
            refit_model(pruned, whole, calibration)
        train_model(pruned, Letters(), scored.profile.healing, tmp_path / way)
        rows = scored.final("first", way).rows
        found = {row["metric"]: row["value"] for row in rows if row["task"] == "heldout"}
        assert found["perplexity"] == pytest.approx(evaluation.perplexity(pruned, HELDOUT)["value"], rel=1e-4)
        assert {row["task"] for row in rows if row["metric"] == "seconds"} == set(way.split(" + "))
    assert found["perplexity"] != pytest.approx(values(scored.cell("first", 0.5))["perplexity"], rel=1e-3)


def test_the_whole_model_is_a_final_too(scored):
    bits = {row["metric"]: row["value"] for row in scored.final("whole").rows if row["task"] == "heldout"}
    assert bits["bits per byte"] == values(scored.cell("whole", 1.0))["bits per byte"]


def test_finals_are_paired_with_moeits_in_the_same_state(scored, monkeypatch):
    finals = [scored.final("moeits"), scored.final("whole")]
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: answers([False, True, True, True]))
    finals.append(scored.final("first"))
    scores = finals_table(finals).set_index("method")
    assert scores.flips["first"] == 2
    assert scores["acc difference"]["first"] == 0
    assert scores.difference["first"] == pytest.approx(
        scores["bits per byte"]["first"] - scores["bits per byte"]["moeits"]
    )
    assert scores.difference.isna()["moeits"]


def test_the_finalists_are_the_best_and_the_fixed_ones(compared):
    methods = ["first", "moeits", "moe-pruner", "random 0", "random 1", "weight-product"]
    cells = [compared.cell(method, budget) for method in methods for budget in (0.5, 0.75)]
    removing = {
        method: values(cell)["bits per byte"]
        for method, cell in zip(methods, cells[::2], strict=True)
        if method != "moe-pruner" and "random" not in method
    }
    best = min(removing, key=removing.get)
    (found,) = comparison.finalists(cells).values()
    assert found == list(dict.fromkeys([best, "moeits", "random 0"]))
    labels = [step.label for step in comparison.final_steps(compared.profile, cells, [None, "refit"])]
    healed = [f"tiny: {method}, refit, benchmarks" for method in found]
    plain = [f"tiny: {method}, as it is, benchmarks" for method in found]
    assert labels == [*healed, *plain, "tiny: whole, as it is, benchmarks"]


def test_the_book_shows_the_larger_comparison(compared, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "DATA", tmp_path)
    mine = [compared.cell(method, 0.5) for method in ("moeits", "first")]
    laptop = compared.profile.model_copy(update={"name": "laptop"})
    here = tables.shown(laptop)
    assert [cell.id for cell in here.cells] == [cell.id for cell in mine][::-1]
    assert here.source == "The 2 measurements of this page were made on this machine."
    other = mine[0].details | {"nats": [2 * value for value in mine[0].details["nats"]]}
    for number, budget in enumerate((0.5, 0.25, 0.75)):
        inputs = mine[0].inputs | {"budget": budget, "source": "another"}
        details = other if number == 0 else mine[0].details
        records.write(
            tmp_path / "reference" / "laptop",
            replace(mine[0], inputs=inputs, details=details),
        )
    there = tables.shown(laptop)
    assert {cell.inputs["source"] for cell in there.cells} == {"another"}
    assert "has repeated 1 of them; the bits per byte differ by at most 100.0%" in there.source
    assert there.finals == []


def test_eight_bits_are_timed_where_there_are_kernels_for_them(compared, monkeypatch):
    assert ("int8", 0.5) in compared.forms
    monkeypatch.setattr(Comparison, "_place", {"device": "cuda"})
    assert "int8" not in dict(Comparison(compared.profile, "tiny").forms)


def test_steps_are_the_profiles_or_those_asked_for(compared):
    labels = [step.label for step in comparison.steps(compared.profile)]
    assert labels == [
        "tiny: whole model",
        "tiny: statistics of calibration tokens",
        "tiny: random 0, 50%",
        "tiny: random 1, 50%",
        "tiny: reap, 50%",
    ]
    steps = comparison.steps(compared.profile, models=["tiny"], methods=["first"], budgets=[0.25, "own"])
    assert [step.label for step in steps] == ["tiny: whole model", "tiny: first, 25%", "tiny: first, own"]


def test_methods_that_differ_by_their_spread_are_measured_once_where_it_is_given(compared):
    methods = ["moeits", "moeits-exclude", "moeits-uniform", "moeits-null", "reap", "reap-global"]
    steps = comparison.steps(compared.profile, models=["tiny"], methods=methods, budgets=[0.5, "own"])
    labels = [step.label for step in steps if step.label.endswith(("own", "50%"))]
    assert [label for label in labels if label.endswith("own")] == [
        "tiny: moeits, own",
        "tiny: moeits-null, own",
        "tiny: reap, own",
    ]
    assert len(labels) == len(methods) + 3
    by_spread = [compared.cell(method, "own").details["nats"] for method in ("reap", "reap-global")]
    assert by_spread[0] == by_spread[1]


def test_more_random_draws_are_made_at_the_budget_of_the_finalists_alone(compared):
    steps = comparison.steps(compared.profile, methods=["random"], budgets=[0.25, comparison.FINAL], draws=4)
    labels = [step.label for step in steps if "random" in step.label]
    assert labels == [
        *(f"tiny: random {draw}, {share}" for draw in range(2) for share in ("25%", "50%")),
        *(f"tiny: random {draw}, 50%" for draw in (2, 3)),
    ]
    found = compared.cell("random 3", comparison.FINAL)
    assert found in compared.found()
    # A lucky draw is no finalist by its luck.
    assert comparison.finalists([found]) == {"tiny": []}


def test_overlap_by_hand():
    assert jaccard([0, 1, 2], [1, 2, 3]) == 0.5
    kept = {"moeits": {"1": [0, 1], "2": [0]}, "reap": {"1": [0, 1], "2": [1]}, "mc-moe": {"1": [0, 1, 2, 3]}}
    cells = [
        records.Record(
            "rival",
            {"model": "tiny", "method": method, "budget": 0.5},
            [],
            {"kept": ids, "experts": {"1": 4, "2": 2}},
        )
        for method, ids in kept.items()
    ]
    [line] = overlaps(cells).to_dict("records")
    assert (line["first"], line["second"], line["jaccard"]) == ("moeits", "reap", 0.5)
    assert line["chance"] == pytest.approx((chance_jaccard(2, 2, 4) + 0.5) / 2)


@given(st.integers(1, 5), st.integers(1, 5))
def test_chance_is_the_mean_over_all_sets(first, second):
    sets = [[*combinations(range(5), size)] for size in (first, second)]
    everything = [jaccard(a, b) for a in sets[0] for b in sets[1]]
    assert chance_jaccard(first, second, 5) == pytest.approx(np.mean(everything))


def test_a_folder_is_selected_from(folder, monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: None)
    monkeypatch.setattr("moeits.corpus.blocks", lambda *_, **__: tokens(batch=4, length=20).numpy())
    kept = select_by("frequency", folder, n_keep=3)
    model = load_model(folder)
    layers = layers_of(model, gather(model, tokens(batch=4, length=20).numpy()))
    assert kept.layers == criteria.criterion("frequency").select(layers, n_keep=3)
    assert kept.criterion == "frequency"
    assert kept.budget == {"n_keep": 3, "calibration_tokens": 80, "seed": 0}
    assert isinstance(kept, Kept)
    with pytest.raises(ValueError, match="no criterion 'hc-smoe'"):
        select_by("hc-smoe", folder, n_keep=3)


@pytest.mark.parametrize("name", ["laptop", "smoke"])
def test_the_profiles_name_methods_that_can_be_measured(name):
    profile = profiles.load(name)
    assert comparison.REFERENCE in profile.rivals
    assert set(profile.rivals) <= set(METHODS)
    assert set(profile.rival_models or []) <= set(profile.models)


def test_the_smoke_profile_has_every_computation():
    computed = {repr(entry.functions[:-1]) for entry in METHODS.values()}
    covered = {repr(METHODS[method].functions[:-1]) for method in profiles.load("smoke").rivals}
    assert covered == computed


def test_select_by_a_criterion_writes_what_prune_takes(folder, tmp_path):
    file, smaller = tmp_path / "kept.json", tmp_path / "smaller"
    arguments = ["select", str(folder), "--criterion", "weight-product", "--n-keep", "3", "-o", str(file)]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    kept = Kept.read(file)
    assert kept.layers == criteria.criterion("weight-product").select(layers_of(load_model(folder)), n_keep=3)
    assert "keeps 6 experts, 37.5% of all" in done.output
    CliRunner().invoke(
        main, ["prune", str(folder), "--kept", str(file), "-o", str(smaller)], catch_exceptions=False
    )
    assert {layer.num_experts for layer in moe_layers(load_model(smaller))} == {3}


def test_select_refuses_what_belongs_to_nmi_matrices(folder):
    arguments = ["select", str(folder), "--criterion", "first", "--tau", "1", "--n-keep", "3"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert "belong to an nmi.npz, not to --criterion" in done.output


def test_every_method_is_described_so_that_a_table_can_hold_it():
    told = tables.describe().set_index("name")
    measured = told[told.kind != "quoted only"]
    assert list(measured.index) == list(METHODS)
    assert (measured.equation != "").all()
    assert (told.definition != "").all()
    quoted = told.drop(index=measured.index)
    assert list(quoted.index) == ["mop", "c-gnn-prune"]
    assert (quoted.equation == "").all()
    assert quoted.simplified.str.contains("not give").all()
    for name, equation in told.equation.items():
        assert equation.count("$") % 2 == 0, name
        assert "|" not in equation, name
        for pair in ("{}", "()"):
            assert equation.count(pair[0]) == equation.count(pair[1]), name
    keys = set(re.findall(r"^@\w+\{([^,]+),", (BOOK / "references.bib").read_text(), re.MULTILINE))
    assert set(told.citation) - {""} <= keys
    assert told.definition["reap-global"].startswith("As REAP, but the experts of all layers")
    assert told.citation["moeits-null-uniform"] == told.citation["moeits"]


def test_the_descriptions_have_the_numbers_of_the_code():
    simplified = tables.describe().set_index("name").simplified
    assert f"at most {controls.SUBSETS} subsets" in simplified["oracle"]
    assert f"up to {reconstruction.SUBSETS:,};" in simplified["lu"]
    assert f"a cosine of {recombination.SIMILAR:g} " in simplified["dern"]
