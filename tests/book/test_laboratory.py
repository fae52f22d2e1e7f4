"""The laboratory and the slider over budgets, in a real browser, against the package."""

import base64
import json

import numpy as np
import pytest
from browser import browser, executable, visit

from moeits.book import live
from moeits.nmi import nmi_matrix
from moeits.selection import select_experts
from moeits.study import corpus, planted, trials

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        executable() is None, reason="no Chromium on the PATH: the laboratory is not tried in a browser"
    ),
]
UNCHANGED = {
    "layer": 0,
    "bins": 0,
    "permuted": 0,
    "scale": "none",
    "noise": 0,
    "tau": 1.25,
    "diagonal": "zero",
}
MEASURE = """(() => {{
  const found = document.getElementById("laboratory").measure({settings});
  const text = (numbers) => {{
    const bytes = new Uint8Array(numbers.buffer, numbers.byteOffset, numbers.byteLength);
    let letters = "";
    for (const byte of bytes) letters += String.fromCharCode(byte);
    return btoa(letters);
  }};
  return {{
    R: found.R.map((row) => [...row]), limit: found.limit, kept: found.kept, steps: found.steps,
    bins: [found.fewest, found.most],
    weights: found.block.map((matrices) => matrices.map(text)),
  }};
}})()"""


def measured_budgets():
    return [*trials.committed(), *trials.committed(trials.FURTHER)]


@pytest.fixture(scope="module")
def layers():
    return {name: live.trained_layer(name, 2, 32) for name in ("upcycled-1", "scratch-1")}


@pytest.fixture(scope="module")
def page(tmp_path_factory, layers):
    """A page with both figures, and the port of a browser."""
    folder = tmp_path_factory.mktemp("page")
    parts = live.laboratory(layers) + live.budgets(measured_budgets(), corpus.DOMAINS)
    head = "<!doctype html><html lang='en'><head><title>Both</title><meta charset='utf-8'>"
    head += "<meta name='viewport' content='width=device-width'></head>"
    (folder / "both.html").write_text(f"{head}<body><main><h1>Both</h1>{parts}</main></body></html>")
    with browser() as port:
        yield port, folder


CHANGES = [
    {},
    {"layer": 1},
    {"bins": 4},
    {"bins": 256, "layer": 1},
    {"permuted": 5},
    {"permuted": 16},
    {"scale": "expert"},
    {"scale": "neuron"},
    {"noise": 0.7},
    {"tau": 0.2, "layer": 1, "diagonal": "one"},
    {"tau": 3.1, "layer": 1, "diagonal": "exclude", "noise": 0.1, "bins": 32, "permuted": 16},
]

SET = """(() => {{
  const field = document.getElementById("{0}");
  field.value = {1};
  field.dispatchEvent(new Event("input", {{bubbles: true}}));
}})()"""
SAYS = "new Promise((done) => setTimeout(() => done(document.getElementById('{0}-text').textContent), 500))"
REMOVED = "document.querySelectorAll('#laboratory ol li').length"
FRAMED = "document.querySelectorAll('#laboratory rect.above').length"


@pytest.fixture(scope="module")
def visited(page):
    """One visit: what the page measures with each of the changes, and what it says when it is moved."""
    moves = [SAYS.format("laboratory"), REMOVED, FRAMED]
    moves += [SET.format("laboratory-permuted", 16), SAYS.format("laboratory"), SAYS.format("budget")]
    for at in range(1, 6):  # more than there are: the last is the unpruned model
        moves += [SET.format("budget-budget", at), SAYS.format("budget")]
    asked = [MEASURE.format(settings=json.dumps(UNCHANGED | changes)) for changes in CHANGES]
    found = visit(*page, "both.html", expressions=(*moves, *asked))
    found["said"], found["measured"] = found["values"][: len(moves)], found["values"][len(moves) :]
    return found


@pytest.fixture(scope="module")
def measured(visited):
    """What the page measures with one of the changes, by its place in `CHANGES`."""

    def unpacked(found):
        weights = [[base64.b64decode(one) for one in matrices] for matrices in found["weights"]]
        return found | {
            "weights": np.array([[np.frombuffer(w) for w in m] for m in weights]).reshape(3, 16, 32, 96)
        }

    known = [unpacked(found) for found in visited["measured"]]
    return lambda **changes: known[CHANGES.index(changes)]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_its_numbers_are_the_packages(measured, changes):
    found, settings = measured(**changes), UNCHANGED | changes
    R = nmi_matrix(
        dict(zip(live.PROJECTIONS, found["weights"], strict=True)), bins=settings["bins"] or "auto", n_jobs=1
    )
    np.testing.assert_allclose(found["R"], R, rtol=0, atol=1e-9)
    chosen = select_experts(R, settings["tau"], diagonal=settings["diagonal"])
    assert found["limit"] == pytest.approx(chosen.threshold, abs=1e-9)
    assert tuple(found["kept"]) == chosen.kept
    assert tuple(step["removed"] for step in found["steps"]) == chosen.removed


def test_unchanged_it_shows_the_trained_weights(measured, layers):
    for found, layer in zip((measured(), measured(layer=1)), layers.values(), strict=True):
        gate, up, down = found["weights"]
        block = live.as_block(layer)
        np.testing.assert_array_equal([gate, up], [block["gate"], block["up"]])
        np.testing.assert_array_equal(down.swapaxes(1, 2), block["down"])


def outputs(weights):
    """What each expert computes of a few tokens."""
    gate, up, down = weights
    block = {"gate": gate, "up": up, "down": down.swapaxes(1, 2)}
    tokens = np.random.default_rng(0).standard_normal((7, 96))
    return [planted.output(block, expert, tokens) for expert in range(len(gate))]


@pytest.mark.parametrize("changes", [{"permuted": 16}, {"scale": "neuron"}], ids=str)
def test_a_disguise_changes_weights_and_nmi_but_not_what_experts_compute(measured, changes):
    plain, disguised = measured(), measured(**changes)
    np.testing.assert_allclose(outputs(disguised["weights"]), outputs(plain["weights"]), atol=1e-12)
    assert np.max(disguised["R"]) < np.max(plain["R"]) - 0.05


def test_a_factor_for_a_whole_expert_changes_nothing(measured):
    plain, scaled = measured(), measured(scale="expert")
    assert not np.array_equal(plain["weights"], scaled["weights"])
    np.testing.assert_allclose(scaled["R"], plain["R"], atol=1e-12)


def test_noise_has_the_size_that_is_asked_for(measured):
    plain, noisy = measured()["weights"], measured(noise=0.7)["weights"]
    ratio = (noisy - plain).std(axis=(2, 3)) / plain.std(axis=(2, 3))
    np.testing.assert_allclose(ratio, 0.7, rtol=0.06)


def test_it_says_in_words_what_it_draws(visited, measured):
    words, removed, framed, _, disguised, *_ = visited["said"]
    plain = measured()
    assert f"{len(plain['kept'])} of 16 experts are kept" in words
    assert "One copy or more of every slice is kept" in words
    assert removed == 16 - len(plain["kept"])
    assert framed == sum(value > plain["limit"] for row in plain["R"] for value in row)
    assert f"{len(measured(permuted=16)['kept'])} of 16 experts are kept" in disguised


def test_the_slider_over_budgets_tells_the_records(visited):
    name = min(record.inputs["model"] for record in measured_budgets())
    records = [record for record in measured_budgets() if record.inputs["model"] == name]
    table = trials.differences(records).query("method == 'moeits'").sort_values("kept", kind="stable")
    said = [text for text in visited["said"][5:] if text]
    for row, text in zip(table.itertuples(), said, strict=False):
        assert f"{name}, experts kept {row.kept:g} of 16" in text
        assert f"random subsets +{row.cost:.3f} on average" in text
        assert f"MoEITS costs +{row.cost + row.delta:.3f}" in text
    unpruned = sum(records[0].details["unpruned"]) / sum(records[0].details["bytes"])
    assert f"unpruned: all text {unpruned:.3f}" in said[-1]


def test_everyone_can_use_both(visited):
    kinds = ("errors", "outside", "images", "rules", "wide")
    assert {kind: visited[kind] for kind in kinds if visited[kind]} == {}


def test_it_is_small(layers):
    assert len(live.laboratory(layers)) < 450_000
