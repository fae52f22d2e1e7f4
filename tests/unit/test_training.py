"""Trainings: initialisations, the loop, interruption and resumption, and the files that are kept."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from moeits.models.families import expert_block, moe_layers
from moeits.study import corpus, trained, training
from moeits.study.initialisation import branches, redraw, router_rows, slices

STEPS, SAVED = 40, 15
TINY = {"rows": 2, "context": 16, "warmup": 4}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Plan one seed and the shipped models at a tiny width, on made-up text, in folders of their own."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 60, 400)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.zipf(1.3, starts[-1]).clip(0, 127).astype(np.uint16)
    ids[starts[:-1]] = 0
    domain = (np.arange(400) % len(corpus.DOMAINS)).astype(np.uint8)
    text = corpus.Text(ids=ids, starts=starts, domain=domain, size=lengths * 4)
    tokenizer = tmp_path / "tokenizer.json"
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({corpus.END: 0}, unk_token=corpus.END)).save(str(tokenizer))
    monkeypatch.setattr(corpus, "load", lambda _: text)
    monkeypatch.setattr(corpus, "tokenizer_file", lambda: tokenizer)
    monkeypatch.setattr(trained, "MODELS", tmp_path / "models")
    monkeypatch.setattr(trained, "CACHE", tmp_path / "cache")

    def shrink(plan):
        sizes = {"vocab_size": 128, "hidden_size": 24, "head_dim": 8}
        settings = plan.config.to_dict()
        config = type(plan.config)(**settings | {key: sizes[key] for key in sizes.keys() & settings})
        schedule = plan.schedule.model_copy(update=TINY)
        return replace(plan, config=config, schedule=schedule, first=plan.first // (8 * 256) * 2 * 16)

    plans = {plan.name: shrink(plan) for plan in [*trained.matched(1, STEPS), *trained.shipped(STEPS)]}
    monkeypatch.setattr(trained, "plans", lambda: plans)
    return plans


def _prepared(plans, name):
    """Train what a model needs, for a single step."""
    for parent in plans[name].parents:
        _prepared(plans, parent)
        short = plans[parent].schedule.model_copy(update={"steps": 1})
        plans[parent] = replace(plans[parent], schedule=short)
        trained.make(plans[parent])


def _weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


class Killed(Exception):
    pass


NAMES = [
    "parent-1",
    "dense-1",
    "scratch-1",
    "upcycled-1",
    "drop-upcycled-1",
    "btm-1",
    "mini-mixtral",
    "mini-qwen",
    "mini-deepseek",
]


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_training_ends_with_the_same_weights(tiny, name, monkeypatch, tmp_path):
    _prepared(tiny, name)
    plan = tiny[name] = replace(tiny[name], schedule=tiny[name].schedule.model_copy(update={"steps": STEPS}))
    straight = _weights(trained.make(plan))
    before = trained.history(name)
    monkeypatch.setattr(trained, "CACHE", tmp_path / "again")
    for parent in plan.parents:
        if not tiny[parent].kept:
            trained.make(tiny[parent])
    monkeypatch.setattr(trained, "MODELS", tmp_path / "again" / "models")
    for parent in (name for name in tiny if tiny[name].kept and (tmp_path / "models" / name).exists()):
        if parent != name:
            trained.MODELS.mkdir(parents=True, exist_ok=True)
            (trained.MODELS / parent).symlink_to(tmp_path / "models" / parent)

    save, saved = training._save, []

    def save_and_die(file, step, *rest):
        save(file, step, *rest)
        saved.append(step)
        if len(saved) == 1:
            raise Killed

    monkeypatch.setattr(training, "_save", save_and_die)
    original = trained.train
    monkeypatch.setattr(
        trained, "train", lambda *args, **more: original(*args, **more | {"save_every": SAVED})
    )
    with pytest.raises(Killed):
        trained.make(plan)
    resumed = _weights(trained.make(plan))
    assert saved[0] == SAVED
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)
    after = trained.history(name)
    assert all(np.array_equal(before[key], after[key]) for key in before if key != "seconds")


@pytest.mark.parametrize("name", ["upcycled-1", "btm-1", "mini-mixtral"])
def test_a_child_computes_what_its_parent_does_before_training(tiny, name):
    _prepared(tiny, name)
    if name == "btm-1":  # four equal branches: their mean is the parent
        tiny[name] = replace(tiny[name], parents=("parent-1",) * 4)
    ids = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        child, parent = trained.begin(tiny[name]).eval(), trained.load(tiny[name].parents[0])
        assert torch.allclose(child(ids).logits, parent(ids).logits, rtol=0, atol=2e-6)


def test_a_drop_upcycled_child_shares_half_of_each_experts_neurons_with_its_parent(tiny):
    _prepared(tiny, "drop-upcycled-1")
    whole, half = (trained.begin(tiny[f"{kind}-1"]) for kind in ("upcycled", "drop-upcycled"))
    for one, other in zip(moe_layers(whole), moe_layers(half), strict=True):
        a, b = expert_block(one), expert_block(other)
        same = (a["up"] == b["up"]).all(2)
        assert (same.sum(1) == a["up"].shape[1] // 2).all()
        assert torch.equal(same, (a["down"] == b["down"]).all(1))
        assert not torch.equal(same[0], same[4])  # each copy of a slice lost neurons of its own


def test_slices_and_copies_are_where_the_names_say():
    ffn = {"gate": torch.randn(8, 3), "up": torch.randn(8, 3), "down": torch.randn(3, 8)}
    block = slices(ffn, 4, 2, scale=4.0)
    assert block["up"].shape == (8, 2, 3)
    assert torch.equal(block["up"][6], ffn["up"][4:6])  # copy 1, slice 2
    assert torch.equal(block["down"][6], 4 * ffn["down"][:, 4:6])
    x = torch.randn(5, 3)
    dense = (functional.silu(x @ ffn["gate"].T) * (x @ ffn["up"].T)) @ ffn["down"].T
    parts = [
        (functional.silu(x @ block["gate"][e].T) * (x @ block["up"][e].T)) @ block["down"][e].T
        for e in range(4)
    ]
    assert torch.allclose(sum(parts) / 4, dense, atol=1e-5)
    with pytest.raises(ValueError, match="8 neurons cannot be cut into 3"):
        slices(ffn, 3, 1, scale=1.0)
    other = {name: weight + 1 for name, weight in ffn.items()}
    mixed = branches([ffn, other], 4, scale=4.0)
    assert torch.equal(mixed["gate"][6], other["gate"][4:6])


def test_redrawn_neurons_have_the_spread_of_their_expert():
    block = {name: torch.randn(2, 400, 50) * 0.3 + 0.1 for name in ("gate", "up")}
    block["down"] = torch.randn(2, 50, 400) * 3
    new = redraw(block, 0.25, torch.Generator().manual_seed(0))
    changed = ~(new["up"] == block["up"]).all(2)
    assert (changed.sum(1) == 100).all()
    assert torch.equal(changed, ~(new["down"] == block["down"]).all(1))
    assert new["down"][0][:, changed[0]].std().item() == pytest.approx(3, rel=0.05)
    assert new["up"][0][changed[0]].mean().item() == pytest.approx(0.1, abs=0.02)


def test_router_rows_choose_all_slices_of_one_copy():
    rows = router_rows(8, 4, 4, 0.02, torch.Generator().manual_seed(0))
    chosen = (torch.randn(100, 8) @ rows.T).topk(4).indices.sort().values
    assert torch.equal(chosen % 4, torch.arange(4).expand(100, 4))
    assert (chosen // 4 == chosen[:, :1] // 4).all()


def test_the_balancing_loss_is_one_where_the_load_is_even_and_the_experts_where_one_takes_all():
    even = torch.arange(8).reshape(8, 1) % 4
    assert training.balancing_loss(torch.zeros(8, 4), even).item() == pytest.approx(1)
    alone = torch.tensor([[50.0, 0, 0, 0]]).expand(8, 4)
    assert training.balancing_loss(alone, torch.zeros(8, 1, dtype=torch.long)).item() == pytest.approx(4)
    assert training.z_loss(torch.zeros(3, 4)).item() == pytest.approx(np.log(4) ** 2)


def test_the_models_of_a_seed_read_the_same_text_and_a_child_goes_on_where_its_parent_ended(tiny):
    text = corpus.load("training")
    read = {name: trained.stream(text, plan) for name, plan in tiny.items() if plan.seed == 1}
    both = np.concatenate([read["parent-1"], read["dense-1"]])
    assert np.array_equal(both, read["scratch-1"])
    assert np.array_equal(read["upcycled-1"], read["dense-1"])
    assert np.array_equal(read["btm-1"], read["dense-1"][-read["btm-1"].size :])
    other = replace(tiny["parent-1"], seed=2)
    assert not np.array_equal(trained.stream(text, other), read["parent-1"])


def test_a_branch_reads_its_domains_only(tiny):
    text = corpus.load("training")
    plan = tiny["branch-1-mathematics"]
    wanted = [corpus.DOMAINS.index(name) for name in ("mathematics", "code")]
    spans = {text.document(i).tobytes() for i in np.flatnonzero(np.isin(text.domain, wanted))}
    read = trained.stream(text, plan)
    cuts = np.flatnonzero(read == 0)
    inner = [read[a:b].tobytes() for a, b in pairwise(cuts[1:])]
    assert set(inner) <= {piece for span in spans for piece in _pieces(span)}


def _pieces(span: bytes) -> list[bytes]:
    """Parts of a document between the zeros that the made-up text also holds inside."""
    ids = np.frombuffer(span, np.uint16)
    cuts = [*np.flatnonzero(ids == 0), ids.size]
    return [ids[a:b].tobytes() for a, b in pairwise(cuts)]


def test_too_little_text_is_an_error_before_the_training(tiny):
    plan = tiny["parent-1"]
    long = replace(plan, schedule=plan.schedule.model_copy(update={"steps": 10**6}))
    with pytest.raises(ValueError, match=r"parent-1 reads 32000000 tokens .* but only \d+ are left"):
        trained.make(long)


def test_a_training_with_other_settings_is_not_resumed(tiny, monkeypatch):
    plan = tiny["parent-1"]
    monkeypatch.setattr(trained, "_save", lambda *_: None)
    trained.make(plan)
    other = replace(plan, schedule=plan.schedule.model_copy(update={"learning_rate": 1e-4}))
    with pytest.raises(ValueError, match=r"other settings \(schedule: .*delete that folder"):
        trained.make(other)
    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="threads: 1 then, 2 now"):
        trained.make(plan)


def test_a_finished_model_of_other_settings_is_not_taken_for_this_one(tiny):
    plan = tiny["parent-1"]
    trained.make(plan)
    with pytest.raises(ValueError, match="trained with another seed"):
        trained.make(replace(plan, seed=9))


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_state(tiny, monkeypatch):
    plan = tiny["parent-1"]
    original = trained.train
    monkeypatch.setattr(trained, "train", lambda *args, **more: original(*args, **more | {"save_every": 5}))
    rate = training.Schedule.rate
    monkeypatch.setattr(
        training.Schedule, "rate", lambda self, step: 1e30 if step == 12 else rate(self, step)
    )
    with pytest.raises(FloatingPointError, match=r"parent-1: the loss is .* at step 13 of 40"):
        trained.make(plan)
    assert (trained.CACHE / "training" / "parent-1" / training.STATE).exists()
    assert not plan.folder.exists()
    monkeypatch.setattr(training.Schedule, "rate", rate)
    trained.make(plan)
    assert np.isfinite(trained.history("parent-1")["loss"]).all()


def test_an_unknown_model_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown model 'smol': expected one of parent-1, dense-1"):
        trained.find("smol")


def test_a_model_that_has_not_been_trained_is_named_with_the_command(tiny):
    with pytest.raises(FileNotFoundError, match="make train MODEL=upcycled-1"):
        trained.load("upcycled-1")
    with pytest.raises(FileNotFoundError, match="make train MODEL=parent-1"):
        trained.make(tiny["upcycled-1"])


def test_the_files_of_a_model_agree_with_each_other(tiny):
    _prepared(tiny, "upcycled-1")
    plan = tiny["upcycled-1"]
    folder = trained.make(plan)
    told = json.loads((folder / trained.FACTS).read_text())
    assert told["weights"] == trained.weights_digest(folder)
    assert told["settings"]["weights"] == {"parent-1": trained.weights_digest(tiny["parent-1"].folder)}
    assert told["cost"]["tokens"] == plan.schedule.tokens
    seen = trained.history("upcycled-1")
    steps = trained.observed_at(STEPS)
    assert {key for key in seen if key.startswith("nmi@")} == {f"nmi@{step}" for step in steps}
    assert not seen["from_parent@0"].any()  # it starts as the parent's slices
    assert (seen[f"from_parent@{STEPS}"] > 0).all()
    copies = np.arange(16)[:, None] % 4 == np.arange(16) % 4
    assert np.allclose(seen["nmi@0"][:, copies & ~np.eye(16, dtype=bool)], 1, atol=1e-6)
    assert seen["nmi@0"][:, ~copies].max() < 0.9


def test_distance_is_relative_to_what_it_is_compared_with():
    block = {"up": torch.full((2, 2, 2), 2.0), "down": torch.full((2, 2, 2), 2.0)}
    other = {name: weight / 2 for name, weight in block.items()}
    assert np.allclose(trained.distance(block, other), 1.0)
    assert np.allclose(trained.distance(other, block), 0.5)


@pytest.mark.parametrize("name", ["mini-mixtral", "btm-1"])
def test_a_finished_model_needs_no_intermediate_parents(tiny, name, monkeypatch, tmp_path):
    """As on a fresh clone, where the cache is empty."""
    _prepared(tiny, name)
    folder = trained.make(tiny[name])
    monkeypatch.setattr(trained, "CACHE", tmp_path / "empty")
    monkeypatch.setattr(trained, "train", lambda *_, **__: pytest.fail("a model was trained again"))
    assert trained.train_all([name], progress=False) == [folder]
    assert json.loads((folder / trained.FACTS).read_text())["settings"]["weights"].keys() == set(
        tiny[name].parents
    )
