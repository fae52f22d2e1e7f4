import pytest

from moeits import evaluation
from moeits.study import paper, profiles


@pytest.mark.parametrize("name", profiles.names())
def test_every_shipped_profile_is_valid_and_fills_the_pages(name):
    profile = profiles.load(name)
    pages = {model.page for model in profile.models.values()}
    assert pages >= {"prune-deepseek", "prune-mixtral", "prune-qwen"}
    for model in profile.models.values():
        assert model.like in paper.TAU
        evaluation.check_tasks(model.tasks or profile.tasks)


def test_the_profiles_of_the_readme_exist():
    assert {"smoke", "laptop", "small", "paper"} <= set(profiles.names())


def test_the_paper_profile_has_the_papers_settings():
    profile = profiles.load("paper")
    assert profile.shots == 15
    assert profile.questions is None
    assert {model.like: model.tau for model in profile.models.values()} == paper.TAU


def test_a_profile_extends_another():
    laptop, smoke = profiles.load("laptop"), profiles.load("smoke")
    assert smoke.preset == laptop.preset
    assert smoke.models.keys() == laptop.models.keys()
    assert smoke.questions < laptop.questions
    assert smoke.name == "smoke"


def test_overrides_replace_by_name_and_none_leaves_the_file():
    assert profiles.load("laptop", shots=5, questions=None).shots == 5
    assert profiles.load("laptop", questions=None) == profiles.load("laptop")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quesions": 3}, r"unknown setting 'quesions' \(known: .*questions"),
        ({"shots": -1}, "shots = -1"),
        ({"tau_grid": [1.25, float("nan")]}, r"tau_grid\.1 = nan"),
        ({"tau_grid": [-0.5]}, r"tau_grid\.0 = -0\.5"),
        ({"tau_grid": []}, "tau_grid"),
        ({"questions": 0}, "questions = 0"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"device": "gpu"}, "device = 'gpu'"),
        ({"models": {}}, "models"),
        ({"models": {"m": {"source": "nowhere"}}}, r"models\.m\.source = 'nowhere'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        profiles.load("laptop", **settings)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="no profile 'laptob': there are laptop, paper, small, smoke"):
        profiles.load("laptob")
    with pytest.raises(ValueError, match="no model 'smol': it has mini-mixtral, mini-qwen"):
        profiles.load("laptop").model("smol")
