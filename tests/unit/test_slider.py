import json
import re

import numpy as np
import pytest

from moeits.book.slider import tau_slider
from moeits.selection import select_experts


@pytest.fixture(scope="module")
def R():
    R = np.random.default_rng(0).random((6, 6))
    return (R + R.T) / 2


def data(html):
    return json.loads(re.search(r'application/json">(.*?)</script>', html)[1])


@pytest.mark.parametrize("diagonal", ["zero", "one", "exclude"])
@pytest.mark.parametrize("tau", [0, 0.3, 1.25, 4])
def test_its_numbers_make_the_same_choice_as_the_package(R, tau, diagonal):
    given = data(tau_slider(R, tau=1, diagonal=diagonal))
    limit = given["mean"] + tau * given["iqr"]
    chosen = select_experts(R, tau, diagonal=diagonal)
    assert limit == pytest.approx(chosen.threshold)
    assert tuple(step["removed"] for step in given["steps"] if step["nmi"] > limit) == chosen.removed


def test_it_is_whole_and_asks_for_nothing_from_outside(R):
    html = tau_slider(R, tau=1.25, name="here")
    assert not re.search(r"https?:|src=|href=|NAME", html)
    assert html.count("<rect") == 6 * 5
    assert 'label for="here-tau"' in html
    assert 'aria-live="polite"' in html
    assert "aria-label=" in html


@pytest.mark.parametrize(
    ("options", "says"), [({"tau": 9}, "from 0 to 5"), ({"tau": 1, "name": "A b"}, "'A b'")]
)
def test_wrong_options_are_named(R, options, says):
    with pytest.raises(ValueError, match=says):
        tau_slider(R, **options)
