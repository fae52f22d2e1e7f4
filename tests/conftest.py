"""How the tests are shared out among processes, and which of them run where time is short."""

import pytest

FEW = {"deepseek_v2", "glm4_moe", "gpt_oss", "mixtral", "qwen2_moe"}
"""The families of `make test-fast`: softmax and sigmoid routers, shared experts, groups, stacked weights."""


@pytest.fixture(scope="module", params=sorted(FEW))
def few(request):
    """Name of one of the few families, for what does not depend on the family."""
    return request.param


def pytest_collection_modifyitems(items):
    from moeits.models.families import FAMILIES

    others = FAMILIES.keys() - FEW
    for item in items:
        # A file's tests share fixtures, and all of the book's the built book: they run in one process.
        in_book = item.path.parent.name == "book"
        item.add_marker(pytest.mark.xdist_group("book" if in_book else item.path.stem))
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value in others for value in parameters):
            item.add_marker("family")
        if "smoke" in item.fixturenames:
            item.add_marker("book")
