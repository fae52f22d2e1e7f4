"""The anatomy of a trained model: known cases by hand, masks that equal surgery, records found again."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from moeits.book import trained_models
from moeits.models.families import expert_block, moe_layers
from moeits.models.surgery import prune_model
from moeits.nmi import nmi_matrix
from moeits.study import anatomy, corpus, measurement, records, trained
from moeits.study.initialisation import slices
from moeits.study.records import Record
from moeits.study.training import routers

BASE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SIZES = anatomy.Sizes(
    documents=3, rerouted=2, removed=1, context=8, shuffles=1, subsets=3, permutations=4, nulls=1
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = MixtralConfig(**BASE, num_local_experts=8, num_experts_per_tok=2, sliding_window=None)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture
def text():
    """Nine documents of 3 to 11 tokens, three of each of three domains, mixed."""
    random = np.random.default_rng(0)
    lengths = np.arange(9) + 3
    ids = random.integers(1, 64, lengths.sum()).astype(np.uint16)
    starts = np.cumsum([0, *lengths])
    ids[starts[:-1]] = 0
    return corpus.Text(ids, starts, np.arange(9).astype(np.uint8) % 3, lengths * 4)


@pytest.fixture
def read(text):
    return anatomy.sample(text, 3, 8, np.r_[0, np.full(63, 4)])


# Arrays


def test_a_router_that_follows_the_domain_has_the_information_of_the_domains():
    domain = np.repeat([0, 1, 2], 20)
    counts = np.eye(3, dtype=int)[domain] * 50
    measured, null, _ = anatomy.specialisation(counts, domain, 50)
    assert measured == pytest.approx(math.log(3))
    assert null < 0.1 * measured


def test_domains_count_the_same_however_long_their_documents_are():
    shares = anatomy.domain_shares(np.array([[900, 0], [0, 1], [0, 1]]), np.array([0, 1, 1]))
    np.testing.assert_array_equal(shares, [[1, 0], [0, 1]])
    assert anatomy.mutual_information(shares) == pytest.approx(math.log(2))


def test_a_router_that_ignores_the_domain_has_none_beyond_its_null():
    random = np.random.default_rng(1)
    domain = np.repeat(np.arange(6), 30)
    mix = random.dirichlet(np.ones(8), len(domain))  # documents differ, domains do not
    counts = np.array([random.multinomial(100, one) for one in mix])
    measured, null, spread = anatomy.specialisation(counts, domain, 200)
    assert measured > 0.01  # what is there without the correction
    assert abs(measured - null) < 3 * spread


def test_co_activation_is_shared_tokens_over_either():
    chosen = np.array([[0, 1], [0, 1], [0, 2], [3, 2]])
    together = anatomy.co_activation(chosen, 5)
    assert together[0, 1] == pytest.approx(2 / 3)  # tokens 0 and 1, of 0, 1 and 2
    assert together[0, 2] == pytest.approx(1 / 4)
    assert together[1, 2] == 0
    assert not together[4].any()  # never chosen
    np.testing.assert_array_equal(together, together.T)


def test_random_halves_keep_half_of_every_layer_and_do_not_depend_on_how_many_are_drawn():
    drawn = anatomy.halves(16, 4, 39, seed=3)
    assert drawn.shape == (39, 4, 8)
    assert all(len(set(one)) == 8 for one in drawn.reshape(-1, 8))
    assert (np.diff(drawn) > 0).all()
    assert len({one.tobytes() for one in drawn.reshape(-1, 8)}) > 100
    np.testing.assert_array_equal(anatomy.halves(16, 4, 5, seed=3), drawn[:5])
    assert (anatomy.halves(16, 4, 5, seed=4) != drawn[:5]).any()


def test_subsets_that_cost_the_same_everywhere_differ_without_an_error_over_text():
    size = np.array([10, 20, 30])
    told = anatomy.spread(np.outer([1.0, 2.0, 3.0], size), size)
    assert told["mean"] == pytest.approx(2)
    assert told["sd"] == pytest.approx(1)
    assert told["difference"] == pytest.approx(0, abs=1e-9)
    # the same cost on average, by other documents: all difference is the text's
    told = anatomy.spread(np.array([[4.0, 0.0], [0.0, 4.0]]), np.array([1, 1]))
    assert told["sd"] == pytest.approx(0)
    assert told["difference"] == pytest.approx(4)  # of +4 and -4: sd 4 sqrt 2, over sqrt 2


def test_top_tokens_are_frequent_ones_that_choose_the_expert():
    token = np.repeat([5, 6, 7], [40, 40, 3])
    chosen = np.concatenate([np.zeros(40), [0] * 10 + [1] * 30, np.full(3, 2)]).astype(int)[:, None]
    tops = anatomy.top_tokens(token, chosen, 3, decode=str)
    assert tops == [[["5", 1.0], ["6", 0.25]], [["6", 0.75]], []]


def test_saturation_counts_the_choices_of_the_end():
    last = np.array([[0, 1], [2, 3]])
    first = np.array([[1, 0], [2, 0]])  # the order does not count
    found = trained_models.saturation(np.array([[first], [last]]))
    np.testing.assert_allclose(found, [[0.75], [1]])


# Passes


def test_losses_are_those_of_each_document_read_alone(model, read):
    bits = anatomy.losses(model, read)
    for number, ids in enumerate(read.ids):
        ids = torch.from_numpy(ids)[None]
        with torch.no_grad():
            alone = model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1) / math.log(2)
        assert bits[number] == pytest.approx(alone, rel=1e-5)


def test_a_sample_takes_the_first_documents_of_every_domain_and_the_bytes_that_are_read(text):
    read = anatomy.sample(text, 2, 8, np.r_[0, np.full(63, 4)])
    assert read.domain.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(read.ids[1], text.document(3))
    assert [len(ids) for ids in read.ids] == [3, 6, 4, 7, 5, 8]
    np.testing.assert_array_equal(read.size, [4 * (len(ids) - 1) for ids in read.ids])
    cut = anatomy.sample(text, 3, 8, np.ones(64, int))
    assert max(len(ids) for ids in cut.ids) == 8


def test_removals_and_subsets_are_what_surgery_gives(model, read):
    single = anatomy.removals(model, read)
    pair = anatomy.subsets(model, read, [[[0, 2, 3, 5], [1, 2, 6, 7]]])[0]
    pruned = prune_model(copy.deepcopy(model), {1: [0, 1, 2, 4, 5, 6, 7]})
    np.testing.assert_allclose(single[1, 3], anatomy.losses(pruned, read), rtol=1e-5)
    pruned = prune_model(copy.deepcopy(model), {0: [0, 2, 3, 5], 1: [1, 2, 6, 7]})
    np.testing.assert_allclose(pair, anatomy.losses(pruned, read), rtol=1e-5)
    assert np.abs(single[1, 3] - anatomy.losses(model, read)).max() > 1e-3


def test_removing_an_expert_that_no_token_chooses_costs_exactly_nothing(model, read):
    model.model.embed_tokens.weight.data[:, 0] = 0.05  # stays so: nothing else writes there
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[0] = 0
        layer.mlp.experts.down_proj.data[:, 0] = 0
        layer.mlp.gate.weight.data[:, 0] = 0
        layer.mlp.gate.weight.data[5] = torch.eye(16)[0] * -1e4
    before, routes = anatomy.routes(model, read)
    costs = anatomy.removals(model, read) - before
    assert not (routes.chosen == 5).any()
    np.testing.assert_array_equal(costs[:, 5], 0)
    assert (np.abs(costs).max(-1) > 0).sum() > 7


def test_shuffled_rows_are_a_router_whose_rows_are_shuffled(model, read):
    change = anatomy.shuffled_rows(8, seed=3)
    with anatomy.rerouted(model, change):
        found = anatomy.losses(model, read)
    for number, router in routers(model).items():
        order = change(number, None, torch.arange(8))[1]
        shuffled = torch.empty_like(router.weight.data)
        shuffled[order] = router.weight.data
        router.weight.data = shuffled
    np.testing.assert_allclose(found, anatomy.losses(model, read), rtol=1e-5)


def test_random_experts_are_distinct_and_uniform_weights_keep_their_sum():
    weights, chosen = torch.tensor([[0.7, 0.3]] * 500), torch.zeros(500, 2, dtype=torch.long)
    _, drawn = anatomy.random_experts(4, seed=0)(0, weights, chosen)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert torch.bincount(drawn.flatten()).min() > 200
    even, same = anatomy.uniform_weights(0, weights, chosen)
    torch.testing.assert_close(even, torch.full((500, 2), 0.5))
    assert same is chosen


def test_counts_of_routes_are_by_document(model, read):
    _, routes = anatomy.routes(model, read)
    counts = routes.counts(1)
    assert counts.shape == (9, 8)
    assert counts.sum(1).tolist() == [2 * len(ids) for ids in read.ids]
    third = routes.chosen[1][routes.document == 2]
    np.testing.assert_array_equal(counts[2], np.bincount(third.ravel(), minlength=8))


# Ancestry


def test_identical_copies_have_nmi_1_and_other_slices_do_not():
    random = torch.Generator().manual_seed(0)
    ffn = {
        name: torch.randn(shape, generator=random)
        for name, shape in (("gate", (64, 32)), ("up", (64, 32)), ("down", (32, 64)))
    }
    R = nmi_matrix(slices(ffn, 4, 2, scale=4.0))
    copies, others = anatomy.by_ancestry(R, 4)
    assert copies == pytest.approx(1)
    assert others < 0.5
    assert anatomy.same_slice(8, 4)[0].tolist() == [False] * 4 + [True] + [False] * 3


def test_where_all_experts_are_copies_of_one_there_are_no_other_pairs():
    copies, others = anatomy.by_ancestry(np.full((4, 4), 0.5), 1)
    assert copies == 0.5
    assert math.isnan(others)


# The record


@pytest.fixture
def shelf(tmp_path, monkeypatch, model, text):
    """A finished model, its text, and places of its own."""
    plan = trained.Plan("upcycled-7", model.config, trained.Schedule(steps=1), 7, trained.upcycled)
    monkeypatch.setattr(trained, "MODELS", tmp_path / "models")
    monkeypatch.setattr(trained, "plans", lambda: {plan.name: plan})
    monkeypatch.setattr(anatomy, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(anatomy, "token_bytes", lambda: np.r_[0, np.full(63, 4)])
    monkeypatch.setattr(anatomy, "_decode", str)
    monkeypatch.setattr(anatomy, "passages", lambda _: anatomy.sample(text, 1, 8, np.ones(64, int)))
    monkeypatch.setattr(corpus, "load", lambda _: text)
    model.save_pretrained(plan.folder)
    (plan.folder / trained.FACTS).write_text("{}")
    return plan


def test_a_record_is_found_again_by_weights_whatever_code_made_it(shelf, model, monkeypatch):
    first = anatomy.measure("upcycled-7", sizes=SIZES)
    assert "code" not in str(first.inputs)
    monkeypatch.setattr(measurement, "code_digest", lambda *_: "other code")
    assert anatomy.measure("upcycled-7", sizes=SIZES).id == first.id
    model.lm_head.weight.data += 0.1
    model.save_pretrained(shelf.folder)
    again = anatomy.measure("upcycled-7", sizes=SIZES)
    assert again.identity != first.identity
    assert len(list(anatomy.RECORDS.glob("*.json"))) == 2


@pytest.mark.usefixtures("shelf")
def test_a_record_has_what_the_page_shows(model, text):
    found = anatomy.measure("upcycled-7", sizes=SIZES)
    rows = {(row["task"], row["metric"], row["variant"]): row for row in found.rows}
    bits = anatomy.losses(model, anatomy.sample(text, 3, 8, anatomy.token_bytes()))
    whole = rows["all", "bits per byte", "held-out text"]
    assert whole["value"] == pytest.approx(bits.sum() / sum(found.details["documents"]["bytes"]))
    assert whole["n"] == 9
    assert rows["all", "loss increase", "uniform weights"]["n"] == 6
    assert rows["all", "loss increase", "mean"]["kept_share"] == 0.5
    assert np.shape(found.details["removal"]) == (2, 8, 4)
    assert np.shape(found.details["shares"]) == (2, 3, 8)
    R = nmi_matrix(expert_block(moe_layers(model)[0]))
    np.testing.assert_allclose(trained_models.square(found.details["nmi"][0]), R, rtol=1e-3)
    assert found.details["initialisation"] == "upcycled"


def test_a_dense_model_has_losses_alone(read):
    config = LlamaConfig(**BASE)
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    rows, details = anatomy.anatomy(dense, [read] * 4, SIZES, seed=0, slices=4)
    assert {row["metric"] for row in rows} == {"bits per byte"}
    assert list(details) == ["documents"]


def test_only_finished_models_are_measured(shelf):
    (shelf.folder / trained.FACTS).unlink()
    assert anatomy.measure_all() == []


# The page


def _record(kind, seed, bits, costs=(0.2, 0.05, 0.01), size=(10, 20)):
    names = ("mean", "sd over subsets", "error of a difference over text")
    rows = [
        records.row(model=f"{kind}-{seed}", task="all", metric="loss increase", variant=name, value=value)
        for name, value in zip(names, costs, strict=True)
    ]
    details = {
        "initialisation": kind,
        "seed": seed,
        "domains": ["science", "code"],
        "documents": {"bits": list(bits), "bytes": list(size), "domain": [0, 1]},
    }
    if kind == "dense":
        rows = [rows[0] | {"metric": "bits per byte"}]
    return Record("anatomy", {"model": f"{kind}-{seed}"}, rows, details)


def test_differences_to_the_baseline_are_paired_by_seed_and_document():
    found = trained_models.quantities(
        [
            _record("dense", 1, (30, 60)),
            _record("dense", 2, (300, 600)),
            _record("scratch", 1, (27, 54)),
            _record("scratch", 2, (303, 606)),
        ]
    ).set_index(["initialisation", "seed", "quantity"])
    assert found.value["scratch", 1, "minus dense, all"] == pytest.approx(-0.3)
    assert found.stderr["scratch", 1, "minus dense, all"] == pytest.approx(0, abs=1e-9)
    assert found.value["scratch", 2, "minus dense, code"] == pytest.approx(0.3)
    assert trained_models.losers(found.reset_index()) == (
        "1 of 2 beat the dense baseline of their seed; scratch-2 do not."
    )


def test_the_registered_rule_asks_for_cost_and_spread():
    table = trained_models.quantities(
        [
            _record("scratch", 1, (1, 1), costs=(0.2, 0.05, 0.01)),
            _record("scratch", 2, (1, 1), costs=(0.09, 0.05, 0.01)),
            _record("scratch", 3, (1, 1), costs=(0.2, 0.05, 0.06)),
        ]
    )
    assert trained_models.worth_selecting(table).selectable.tolist() == [True, False, False]


def test_one_training_has_no_error_over_trainings():
    assert trained_models.over_trainings([0.5]) == "0.500"
    # t of one degree of freedom at 97.5 %: 12.706; standard error 0.1
    assert trained_models.over_trainings([0.4, 0.6], ".2f") == "0.50 ± 1.27"
