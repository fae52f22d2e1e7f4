"""How the tests are shared out among processes, and which of them run where time is short."""

import pytest
from xdist.scheduler import LoadScopeScheduling

FEW = {"deepseek_v2", "glm4_moe", "gpt_oss", "mixtral", "qwen2_moe"}
"""The families of `make test-fast`: softmax and sigmoid routers, shared experts, groups, stacked weights."""


@pytest.fixture(scope="module", params=sorted(FEW))
def few(request):
    """Name of one of the few families, for what does not depend on the family."""
    return request.param


class ByFile(LoadScopeScheduling):
    """A file's tests share fixtures, and all of the book's the built book: they run in one process."""

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0]
        return "book" if "/book/" in file else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    from moeits.models.families import FAMILIES

    others = FAMILIES.keys() - FEW
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value in others for value in parameters):
            item.add_marker("family")
        if "smoke" in item.fixturenames:
            item.add_marker("book")


@pytest.fixture
def sparse_model():
    """Mixtral of two layers of eight experts, with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
