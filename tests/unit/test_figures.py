"""Figures and tables are saved whole, the same bytes each time, and refuse what a reader would miss."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from moeits.book import figures

ALT = "The share of experts kept rises with tau."
DATA = pd.DataFrame({"tau": [0.5, 1.25], "share": [1 / 3, 0.5]})


@pytest.fixture
def shown(monkeypatch):
    """What a notebook would show, as pairs of bundle and metadata."""
    outputs = []
    monkeypatch.setattr(figures, "get_ipython", object)
    monkeypatch.setattr(
        figures,
        "display",
        lambda bundle, *, raw, metadata: outputs.append((bundle, metadata)) if raw else None,
    )
    return outputs


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEITS_FIGURES", str(tmp_path / "page"))
    monkeypatch.delenv("MOEITS_VARIANT", raising=False)
    return tmp_path / "page"


def draw():
    fig, ax = plt.subplots()
    ax.plot(DATA["tau"], DATA["share"], label="kept")
    ax.imshow(np.arange(16.0).reshape(4, 4), extent=(0, 1, 0, 1))
    ax.legend()
    return fig


def save(name="share", **changes):
    settings = {"caption": "Share kept; n = 2.", "alt": ALT, "data": DATA} | changes
    figures.save(draw(), name, **settings)


def test_figure_is_saved_in_four_files_and_shown_once(folder, shown):
    fig = draw()
    figures.save(fig, "share", caption="  Share\n kept. ", alt=ALT, data=DATA, records=["b", "a", "b"])
    assert sorted(path.name for path in folder.iterdir()) == [
        f"fig-share.{k}" for k in ("csv", "json", "pdf", "svg")
    ]
    side = json.loads((folder / "fig-share.json").read_text())
    assert side == {
        "label": "fig-share",
        "caption": "Share kept.",
        "alt": ALT,
        "records": ["a", "b"],
        "files": ["fig-share.svg", "fig-share.pdf", "fig-share.csv"],
    }
    pd.testing.assert_frame_equal(pd.read_csv(folder / "fig-share.csv"), DATA)
    (bundle, metadata), *more = shown
    assert not more
    assert bundle["image/svg+xml"] == (folder / "fig-share.svg").read_text()
    assert metadata == {"moeits": side}
    assert fig.number not in plt.get_fignums(), "closed, so that the notebook does not show it again"


def test_same_figure_gives_same_bytes(folder, monkeypatch, tmp_path):
    save()
    monkeypatch.setenv("MOEITS_FIGURES", str(tmp_path / "again"))
    with plt.rc_context({"svg.hashsalt": None, "svg.fonttype": "none"}):
        save()
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_text_in_figures_needs_no_font_of_the_reader(folder):
    save()
    assert "<text" not in (folder / "fig-share.svg").read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"caption": " "}, "fig-share: no caption"),
        ({"alt": "a curve"}, "fig-share: alt text 'a curve' is too short.*20 characters"),
        ({"data": DATA.iloc[:0]}, "fig-share: no data"),
        ({"records": "abc"}, "fig-share: records is one string"),
        ({"name": "Share"}, "name 'Share': give lower-case words"),
        ({"name": "fig-share"}, "without 'fig-'"),
        ({"name": "tau-1.25"}, "lower-case words"),
    ],
)
def test_incomplete_figure_is_refused_and_leaves_nothing(folder, shown, changes, says):
    with pytest.raises(ValueError, match=says):
        save(**changes)
    assert not folder.exists()
    assert not shown


@pytest.mark.usefixtures("folder")
def test_same_name_twice_on_a_page_is_refused(shown):
    save()
    with pytest.raises(ValueError, match="fig-share is already saved in this notebook"):
        save()
    assert len(shown) == 1


def test_by_hand_the_same_cell_may_run_again(monkeypatch, tmp_path):
    monkeypatch.delenv("MOEITS_FIGURES", raising=False)
    monkeypatch.delenv("MOEITS_VARIANT", raising=False)
    monkeypatch.setattr(figures, "DATA", tmp_path)
    save()
    save(caption="Another.")
    side = json.loads((tmp_path / "figures" / "by-hand" / "fig-share.json").read_text())
    assert side["caption"] == "Another."


def test_variant_ends_every_label(folder, monkeypatch):
    monkeypatch.setenv("MOEITS_VARIANT", "qwen")
    save()
    figures.table(DATA, "share", caption="Share.")
    assert {path.stem for path in folder.iterdir()} == {"fig-share-qwen", "tab-share-qwen"}


def test_records_may_be_given_as_records(folder):
    class Record:
        id = "abc"

    save(records=[Record()])
    assert json.loads((folder / "fig-share.json").read_text())["records"] == ["abc"]


def test_without_a_notebook_files_are_written_and_nothing_is_shown(folder, capsys):
    save()
    assert (folder / "fig-share.pdf").exists()
    assert capsys.readouterr().out == ""


def test_style_cycles_colours_and_markers_together():
    with plt.rc_context():
        figures.style()
        cycle = list(plt.rcParams["axes.prop_cycle"])
    assert [entry["color"] for entry in cycle] == list(figures.COLOURS)
    assert len({entry["marker"] for entry in cycle}) == len(cycle)


def test_table_shows_rounded_numbers_and_keeps_them_whole(folder, shown):
    data = pd.DataFrame(
        {"model": ["a|b", "c"], "share": [1 / 3, None], "ppl": [12.34567, 1e-7], "n": [40, 2376]}
    )
    figures.table(data, "scores", caption="Scores.", formats={"share": ".1%"}, records=["x"])
    ((bundle, metadata),) = shown
    assert bundle["text/markdown"] == (
        "| model | share | ppl | n |\n"
        "| :--- | ---: | ---: | ---: |\n"
        "| a\\|b | 33.3% | 12.35 | 40 |\n"
        "| c | – | 1e-07 | 2376 |\n"
    )
    assert "<td>33.3%</td>" in bundle["text/html"]
    pd.testing.assert_frame_equal(pd.read_csv(folder / "tab-scores.csv"), data)
    assert metadata["moeits"] == {
        "label": "tab-scores",
        "caption": "Scores.",
        "records": ["x"],
        "files": ["tab-scores.csv"],
    }


@pytest.mark.usefixtures("folder")
def test_table_leaves_text_among_numbers_and_rounds_single_precision(shown):
    data = pd.DataFrame({"n": ["all", 3], "share": np.array([1 / 3, 0.5], dtype=np.float32)})
    figures.table(data, "mixed", caption="Mixed.", formats={"n": ".1f"})
    assert shown[0][0]["text/markdown"].splitlines()[2:] == ["| all | 0.3333 |", "| 3.0 | 0.5 |"]


def test_named_index_becomes_columns_of_a_table(folder, shown):
    figures.table(DATA.set_index("tau"), "share", caption="Share.")
    assert shown[0][0]["text/markdown"].startswith("| tau | share |")
    assert list(pd.read_csv(folder / "tab-share.csv")) == ["tau", "share"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"caption": ""}, "tab-share: no caption"),
        ({"data": DATA.iloc[:0]}, "tab-share: no data"),
        ({"formats": {"tua": ".1f"}}, "formats for \\['tua'\\], columns are \\['tau', 'share'\\]"),
    ],
)
def test_incomplete_table_is_refused(folder, changes, says):
    settings = {"data": DATA, "caption": "Share."} | changes
    with pytest.raises(ValueError, match=says):
        figures.table(settings.pop("data"), "share", **settings)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("value", "text"), [(np.float64(0.5), "0.5"), (np.int64(3), "3"), ("38 %", "'38 %'"), (True, "True")]
)
def test_glued_values_are_plain(shown, value, text):
    figures.glue("kept_share", value)
    ((bundle, metadata),) = shown
    prefix = metadata["scrapbook"]["mime_prefix"]
    assert metadata["scrapbook"]["name"] == "kept_share"
    assert bundle == {f"{prefix}text/plain": text}


@pytest.mark.parametrize(("name", "value"), [("kept share", 1.0), ("curve", DATA), ("none", None)])
def test_glue_refuses_what_prose_cannot_show(shown, name, value):
    with pytest.raises(ValueError, match=f"glue '{name}'"):
        figures.glue(name, value)
    assert not shown


def test_a_table_that_may_have_no_rows_says_so(folder, shown):
    nothing = DATA.iloc[:0]
    with pytest.raises(ValueError, match="tab-share: no data"):
        figures.table(nothing, "share", caption="Share.", formats={"share": ".1%"})
    figures.table(nothing, "share", caption="Share.", formats={"share": ".1%"}, empty="not measured here")
    [(bundle, _)] = shown
    assert bundle["text/markdown"] == "| result |\n| :--- |\n| not measured here |\n"
    assert (folder / "tab-share.csv").read_text() == "result\nnot measured here\n"
