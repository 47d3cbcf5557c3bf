"The bundled subject: its training is exact, its baselines are right, and its card says what is measured."

import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_lab.sources import bundled_card, train_bundled
from sae_lab.sources.bundled_card import completion_scores, heldout_loss, kneser_ney, ngram_probabilities, task_accuracy
from sae_lab.sources.fable_worlds import lexicon
from sae_lab.sources.fables import fables
from sae_lab.sources.train_bundled import Plan, batch_at, new_model, pack, rate_at, rows_at, token_losses, train

FOLDER = Path(train_bundled.__file__).parent.parent / "data" / "subject"
TINY = Plan(tokens=6 * 4 * 32, d_vocab=64, n_ctx=32, d_model=16, n_layers=2, n_heads=2, batch_rows=4, micro_rows=2,
            lesson_steps=2, lesson_rows=4, review_rows=2, lesson_ctx=8, compile=False)  # fmt: skip


@pytest.fixture
def streams(tmp_path):
    "Two short token files in a training folder."
    for i, name in enumerate(train_bundled.SOURCES):
        np.random.default_rng(i).integers(0, TINY.d_vocab, 700).astype("<u2").tofile(tmp_path / f"{name}.train.u16")
    lessons = np.random.default_rng(2).integers(0, TINY.d_vocab, (2, 10, TINY.lesson_ctx))
    lessons[1] = 1
    lessons.astype("<u2").tofile(tmp_path / "lessons.u16")
    return tmp_path


@pytest.fixture(scope="module")
def subject():
    "The bundled model and tokenizer, loaded as any user would without a network."
    os.environ["HF_HUB_OFFLINE"] = "1"
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval(), AutoTokenizer.from_pretrained(FOLDER)


# training


def test_a_stopped_run_resumes_to_the_same_bits(streams):
    whole, facts = train(TINY, streams)
    assert facts["rows"] == TINY.rows == 24
    train(TINY, streams, stop=lambda steps: steps == 1)
    train(TINY, streams, resume=True, stop=lambda steps: steps == 5)
    resumed, facts = train(TINY, streams, resume=True)
    assert facts["steps"] == 8 and facts["lessons"] == 2 * 4 + 6 * 2 and len(facts["plans"]) == 1
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_changed_plan_is_kept_in_the_history(streams):
    train(TINY, streams, stop=lambda steps: steps == 4)
    shorter = replace(TINY, tokens=4 * 4 * 32, batch_rows=2)
    _, facts = train(shorter, streams, resume=True)
    assert facts["rows"] == 16 and facts["steps"] == 8
    assert [part["from_row"] for part in facts["plans"]] == [0, 8]


def test_the_training_loss_is_the_loss_of_transformers():
    model = new_model(TINY)
    rows = torch.randint(0, TINY.d_vocab, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = model(rows, labels=rows).loss
    assert torch.allclose(token_losses(model, rows).mean(), expected, atol=1e-5)


def test_an_epoch_visits_every_place_once():
    stream = np.arange(1000)
    per_epoch = 1000 // 31 - 1
    rows = rows_at(stream, 0, per_epoch, 32, 0)
    assert (rows[:, 0] == 0).all()
    assert len(np.unique(rows[:, 1:])) == per_epoch * 31
    assert not np.array_equal(rows, rows_at(stream, per_epoch, per_epoch, 32, 0))


def test_a_batch_is_half_of_each_source():
    batch = batch_at([np.full(500, 1), np.full(500, 2)], 12, TINY)
    assert batch[:, 1:].unique(dim=1).flatten().tolist() == [1, 2, 1, 2]


def test_lessons_are_of_the_training_split():
    texts = [p.text + p.answer for p in train_bundled.lesson_prompts(0, 100)]
    assert len(texts) == 100 and len(set(texts)) > 90
    held = [p.text + p.answer for make in bundled_card.TASKS.values() for p in make(0, 300, "held_out")]
    assert not set(texts) & set(held)


def test_each_lesson_weighs_the_same_and_what_fills_it_up_nothing():
    rows = torch.tensor([[0, 5, 6, 0], [0, 7, 0, 0]])
    ((same, weights),) = train_bundled.lesson_parts(torch.stack([rows, (rows != 0).long()]), 0.5)
    assert torch.equal(same, rows) and torch.allclose(weights, torch.tensor([[1.0, 1, 0], [2, 0, 0]]) / 8)


def test_a_disguise_keeps_names_and_answer_and_counts_the_answer_alone():
    rows = np.array([[0, 1, 2, 3, 9, 0], [0, 1, 2, 3, 9, 0]], "<u2")
    counted = (rows != 0).astype("<u2")
    plan = replace(TINY, exchanged=1.0)
    train_bundled.disguise((rows, counted), np.array([True, False]), [2], plan, np.random.default_rng(0))
    assert rows[0, [0, 2, 4, 5]].tolist() == [0, 2, 9, 0] and (rows[0, [1, 3]] != [1, 3]).all()
    assert counted.tolist() == [[0, 0, 0, 0, 1, 0], [0, 1, 1, 1, 1, 0]] and rows[1].tolist() == [0, 1, 2, 3, 9, 0]


def test_an_echo_can_be_told_from_what_came_before():
    rows, counted = train_bundled.echo_lessons(50, replace(TINY, lesson_ctx=32), np.random.default_rng(0))
    for row, count in zip(rows, counted, strict=True):
        period = int(count.argmax()) - 1
        assert period >= 4 and (row[1 + period :] == row[1:-period]).all() and count[1 + period :].all()


def test_rate_rises_and_falls_to_zero():
    plan = replace(Plan(), tokens=4_000_000)
    rates = [rate_at(done, plan) for done in range(0, plan.rows, plan.batch_rows)]
    assert max(rates) == plan.lr and rates[0] < plan.lr / 10 and rates[-1] < plan.lr / 100


def test_packing_keeps_the_stream():
    rows = pack(np.arange(1, 100), 10)
    assert (rows[:, 0] == 0).all() and rows[:, 1:].flatten().tolist() == list(range(1, 100))


# baselines


def _naive_kneser_ney(stream, d_vocab, windows):
    "The same smoothing written with dictionaries, one probability at a time."
    trigrams = {}
    for window in zip(stream, stream[1:], stream[2:], strict=False):
        trigrams[window] = trigrams.get(window, 0) + 1
    orders = [trigrams]
    for _ in range(2):
        lower = {}
        for gram in orders[-1]:
            lower[gram[1:]] = lower.get(gram[1:], 0) + 1
        orders.append(lower)

    def probability(window, order):
        if order == 3:
            return 1 / d_vocab
        counts = orders[order]
        window = window[-(3 - order) :]
        off = bundled_card.discounts(np.array(list(counts.values())))
        same = {gram: n for gram, n in counts.items() if gram[:-1] == window[:-1]}
        if not same:
            return probability(window, order + 1)
        total, freed = sum(same.values()), sum(off[min(n, 3)] for n in same.values())
        seen = same.get(window, 0)
        return (seen - off[min(seen, 3)] + freed * probability(window, order + 1)) / total

    return [probability(tuple(window), 0) for window in windows]


def test_trigram_model_equals_a_naive_one():
    rng = np.random.default_rng(0)
    stream = (rng.integers(0, 12, 600) * rng.integers(0, 2, 600)).astype("<u2")
    windows = rng.integers(0, 12, (60, 3))
    ours = ngram_probabilities(kneser_ney(stream, 12), windows, 12)
    assert np.allclose(ours, _naive_kneser_ney(stream.tolist(), 12, windows.tolist()), rtol=1e-12)


def test_trigram_probabilities_sum_to_one():
    stream = np.random.default_rng(1).zipf(1.5, 5000).clip(max=49).astype("<u2")
    levels = kneser_ney(stream, 50)
    for before in ((1, 1), (3, 49), (0, 0)):
        windows = np.array([[*before, token] for token in range(50)])
        assert np.isclose(ngram_probabilities(levels, windows, 50).sum(), 1.0)


# the finished model


def test_folder_is_small_and_holds_no_pickles():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_tokenizer_is_lossless_and_names_are_single_tokens(subject):
    _, tokenizer = subject
    text = "def f(x):\n\treturn 'é' # ☃\n\n  Mira gave it to Tobin."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 4096 and tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    names = [form for name in lexicon()["name_list"] for form in (name, f" {name}")]
    assert [name for name in names if len(tokenizer(name)["input_ids"]) > 1] == []


def test_card_beats_the_baselines_and_the_thresholds():
    card = json.loads((FOLDER / "card.json").read_text())
    for row in card["heldout"].values():
        assert row["high"] < row["trigram"] < row["unigram"]
    for task in ("indirect_object", "pronoun_agreement"):
        row = card["tasks"][f"{task}/held_out"]
        assert row["prompts"] >= 1000 and row["accuracy"] >= 0.95


def test_induction_of_the_card_is_measured_again(subject):
    card = json.loads((FOLDER / "card.json").read_text())
    again, stated = bundled_card.induction(subject[0]), card["induction"]
    assert again["first_half"] == pytest.approx(stated["first_half"], abs=0.02)
    assert again["second_half"] == pytest.approx(stated["second_half"], abs=0.02)
    assert again["heads"] == pytest.approx(stated["heads"], abs=0.02)


def test_the_card_is_the_text_of_its_numbers():
    card = json.loads((FOLDER / "card.json").read_text())
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == bundled_card.render(card)


@pytest.mark.parametrize("task", ["indirect_object", "pronoun_agreement"])
def test_task_numbers_of_the_card_are_measured_again(subject, task):
    card = json.loads((FOLDER / "card.json").read_text())
    again = task_accuracy(*subject, bundled_card.TASKS[task](77, 200, "held_out"))
    stated = card["tasks"][f"{task}/held_out"]
    assert again["low"] <= stated["high"] and stated["low"] <= again["high"]


def test_heldout_losses_of_the_card_are_measured_again(subject):
    card = json.loads((FOLDER / "card.json").read_text())
    model, tokenizer = subject
    texts = {"fables": [document.text for document in fables(1, 100)]}
    if platform.python_version() == card["python"]:
        plan = Plan(**card["plans"][-1]["plan"])
        texts["python_docs"] = train_bundled.library_texts(plan, heldout=True)[:100]
    for name, documents in texts.items():
        stream = np.concatenate([[*tokenizer(text)["input_ids"], 0] for text in documents])
        again, stated = heldout_loss(model, stream), card["heldout"][name]
        assert again["low"] - 0.1 < stated["loss"] < again["high"] + 0.1


def test_scores_of_completions_are_sums_of_log_probabilities(subject):
    model, tokenizer = subject
    texts, completions = ["Mira gave a key to", "import"], [" Tobin", " os\n"]
    scores = completion_scores(model, tokenizer, texts, completions)
    for text, completion, score in zip(texts, completions, scores, strict=True):
        before, after = tokenizer(text)["input_ids"], tokenizer(completion)["input_ids"]
        logits = model(torch.tensor([[0, *before, *after]])).logits.log_softmax(-1)[0, len(before) : -1]
        expected = logits.gather(1, torch.tensor(after)[:, None]).sum()
        assert torch.isclose(score, expected, atol=1e-4)
