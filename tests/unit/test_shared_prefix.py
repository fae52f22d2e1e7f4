import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from moeits.evaluation import shared_prefix
from moeits.evaluation.shared_prefix import (
    SharedPrefixLM,
    ancestor_mask,
    token_tree,
    tree_batches,
    tree_logits,
)

SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8)


@pytest.fixture
def tokenizer():
    words = {f"w{i}": i for i in range(tiny.VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0", eos_token="w2"
    )


def questions(*, n: int = 6, context: int = 20, seed: int = 0):
    """Requests of some questions with three answers each; the last two answers are single tokens."""
    rng = np.random.default_rng(seed)
    requests = []
    for question in range(n):
        prompt = rng.integers(3, tiny.VOCABULARY, context + question).tolist()
        for length in (4, 1, 1):
            answer = rng.integers(3, tiny.VOCABULARY, length).tolist()
            requests.append((("prompt", "answer"), prompt, answer))
    return requests


def likelihoods(lm, requests):
    return np.array([value for value, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)])


@given(SEQUENCES)
def test_tree_holds_every_prefix_once_and_every_sequence(sequences):
    tokens, parents, ends = token_tree(sequences)
    prefixes = {tuple(sequence[: n + 1]) for sequence in sequences for n in range(len(sequence))}
    assert len(tokens) == len(prefixes)
    assert (parents < np.arange(len(parents))).all()
    mask = ancestor_mask(parents)
    for sequence, end in zip(sequences, ends, strict=True):
        assert tokens[mask[end]].tolist() == sequence


@given(SEQUENCES, st.integers(1, 20))
def test_batches_deal_out_every_sequence_once_and_keep_the_budget(sequences, budget):
    batches = list(tree_batches(sequences, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(sequences)))
    for batch in batches:
        _, parents, ends = token_tree([sequences[i] for i in batch])
        trunk = ancestor_mask(parents)[ends].all(axis=0).sum()
        assert len(batch) == 1 or len(parents) - trunk <= budget


def test_answers_of_a_long_prompt_stay_together():
    prompt = list(range(100))
    sequences = [[*prompt, 200 + i] for i in range(4)] + [[500, *prompt, 300]]
    assert list(tree_batches(sequences, 8)) == [[0, 1, 2, 3], [4]]


@pytest.mark.parametrize("long_trunk", [1, 10**6], ids=["cached", "at-once"])
@pytest.mark.parametrize(
    "family", ["llama", "mixtral", "qwen2_moe", "deepseek_v2", "glm4_moe", "gpt_oss", "granitemoe"]
)
def test_tree_logits_are_those_of_the_sequences(family, long_trunk):
    model = tiny.tiny_model(family)
    ids = tiny.tokens(batch=1, length=26)[0].tolist()
    sequences = [ids[:16], ids[:12] + ids[16:20], ids[:12] + ids[20:26], ids[:9]]
    tokens, parents, ends = token_tree(sequences)
    with torch.inference_mode():
        plain = torch.stack([model(input_ids=torch.tensor([s])).logits[0, -1] for s in sequences])
        tree = tree_logits(model, tokens, parents, np.unique(ends), long_trunk=long_trunk)
    torch.testing.assert_close(tree[np.searchsorted(np.unique(ends), ends)], plain, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("long_trunk", [1, 1024])
def test_scores_are_those_of_hflm(tokenizer, monkeypatch, batch_size, long_trunk):
    monkeypatch.setitem(tree_logits.__kwdefaults__, "long_trunk", long_trunk)
    model = tiny.tiny_model("qwen2_moe")
    requests = questions()
    ours = SharedPrefixLM(model, tokenizer=tokenizer, batch_size=batch_size)
    assert ours.obstacle is None
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    expected = stock._loglikelihood_tokens(requests, disable_tqdm=True)
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], atol=2e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_greedy_answers_are_recognised(tokenizer):
    model = tiny.tiny_model("mixtral")
    prompt = tiny.tokens(batch=1, length=12)
    best = model.generate(prompt, max_new_tokens=3, do_sample=False)[0, 12:].tolist()
    other = [*best[:2], (best[2] + 1) % tiny.VOCABULARY]
    requests = [(("", ""), prompt[0].tolist(), answer) for answer in (best, other)]
    lm = SharedPrefixLM(model, tokenizer=tokenizer)
    assert [greedy for _, greedy in lm._loglikelihood_tokens(requests, disable_tqdm=True)] == [True, False]


def test_prompts_are_cut_from_the_left_as_hflm_does(tokenizer):
    model = tiny.tiny_model("mixtral")
    requests = questions(context=40)
    ours = SharedPrefixLM(model, tokenizer=tokenizer, max_length=16, truncate=True)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, max_length=16)
    np.testing.assert_allclose(likelihoods(ours, requests), likelihoods(stock, requests), atol=2e-4)


def test_a_question_is_read_once_and_without_padding(tokenizer):
    model = tiny.tiny_model("mixtral")
    lm = SharedPrefixLM(model, tokenizer=tokenizer, batch_size=1)
    read = []
    model.register_forward_pre_hook(lambda *call: read.append(call[2]["input_ids"].numel()), with_kwargs=True)
    likelihoods(lm, questions(n=1, context=60))
    assert sum(read) == 60 + 3  # one prompt, and all but the last token of the answer of four


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2_moe"])
def test_models_with_a_state_are_scored_by_hflm(tokenizer, family, monkeypatch):
    model = tiny.tiny_model(family)
    lm = SharedPrefixLM(model, tokenizer=tokenizer)
    assert "layers other than attention" in lm.obstacle
    monkeypatch.setattr(shared_prefix, "tree_logits", None)  # would fail if it were called
    stock = HFLM(pretrained=model, tokenizer=tokenizer)
    requests = questions(n=2)
    np.testing.assert_array_equal(likelihoods(lm, requests), likelihoods(stock, requests))


def test_prompts_longer_than_the_window_are_scored_by_hflm(tokenizer):
    model = tiny.tiny_model("gpt_oss")  # attends to the last 32 tokens in two layers of three
    lm = SharedPrefixLM(model, tokenizer=tokenizer)
    stock = HFLM(pretrained=model, tokenizer=tokenizer)
    for context in (20, 60):
        requests = questions(n=2, context=context)
        np.testing.assert_allclose(likelihoods(lm, requests), likelihoods(stock, requests), atol=2e-4)


def test_a_model_that_ignores_the_mask_is_found_out(monkeypatch):
    model = tiny.tiny_model("mixtral")
    inner = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *args, **kwargs: inner(*args, **(kwargs | {"attention_mask": None}))
    )
    assert "token tree" in shared_prefix.tree_obstacle(model)
