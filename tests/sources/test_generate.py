"Text token by token: against Hugging Face's own generation, with the cache and without, edits and seeds."
import pytest
import torch

from sae_lab.ground.errors import InputError, ShapeError, UnknownName
from sae_lab.sources.bridge import native, untrained
from sae_lab.sources.generate import advance, caches, choose, generate, gumbel, steps
from sae_lab.sources.subject import Subject

RESID, Z = "blocks.1.hook_resid_post", "blocks.2.attn.hook_z"


@pytest.fixture(scope="module")
def subject():
    return Subject.bundled()


@pytest.fixture(scope="module")
def ids(subject):
    return subject.tokens(["The fox met the crow. The fox was", "Anna saw the cat. Then the girl was"])[:, :11]


def written(subject, ids, n, edits=None, **how):
    "New tokens [batch, n] and the logits they were chosen from."
    found = list(steps(subject, ids, n, edits, **how))
    return torch.stack([step.token for step in found], 1), torch.stack([step.logits for step in found], 1)


def test_greedy_text_is_hugging_faces_own(subject, ids):
    tokens, logits = written(subject, ids, 20, temperature=0.0)
    theirs = subject.plain.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
                                          use_cache=True, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(tokens, theirs.sequences[:, ids.shape[1] :])
    torch.testing.assert_close(logits, torch.stack(theirs.logits, 1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("how", [dict(temperature=0.0), dict(temperature=0.8), dict(temperature=1.5, top_k=20, seed=7)],
                         ids=["greedy", "warm", "top 20"])
def test_the_cache_changes_nothing(subject, ids, how):
    (fast, quick), (slow, whole) = (written(subject, ids, 16, cache=cache, **how) for cache in (True, False))
    assert caches(subject) and torch.equal(fast, slow)
    torch.testing.assert_close(quick, whole, rtol=1e-4, atol=1e-3)
    text = torch.cat([ids, fast], 1)
    torch.testing.assert_close(whole, subject.logits(text)[:, 10:-1], rtol=1e-4, atol=1e-3)


def late(tokens, first):
    "Edits made from the text: heads silenced from the eighth position on, and what follows a full stop pushed."
    n = tokens.shape[1]
    stop = torch.nn.functional.pad(tokens == 14, (1, 0))[:, first:n, None]
    push = torch.linspace(-1, 1, 128)
    return {Z: lambda z: z * (torch.arange(first, n) < 8)[:, None], RESID: lambda x: x + stop * push}


def test_edits_made_for_each_pass_are_those_of_one_run(subject, ids):
    both = (written(subject, ids, 16, late, temperature=0.0, cache=cache) for cache in (True, False))
    (fast, quick), (slow, whole) = both
    text = torch.cat([ids, fast], 1)[:, :-1]
    truth = subject.run_with(text, late(text, 0))[0][:, 10:]
    assert (text == 14).any() and torch.equal(fast, slow)
    for found in (quick, whole): torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(truth, subject.logits(text)[:, 10:], atol=1e-1)


def test_edits_that_are_the_same_for_every_pass(subject, ids):
    edits = {RESID: lambda x: 0.5 * x}
    (fast, quick), (slow, whole) = (written(subject, ids, 9, edits, cache=cache) for cache in (True, False))
    assert torch.equal(fast, slow)
    torch.testing.assert_close(quick, whole, rtol=1e-4, atol=1e-3)


def test_a_pass_goes_on_where_the_last_one_ended(subject, ids):
    whole, cache, parts = subject.logits(ids), None, []
    for first, end in ((0, 4), (4, 5), (5, 11)):
        logits, cache = advance(subject, ids[:, :end], first, {}, cache)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-3)


def test_a_row_is_what_it_is_alone(subject, ids):
    "Its own seed, its own end: the batch it stands in does not matter."
    state = torch.get_rng_state()
    both, _ = written(subject, ids, 12, seed=5)
    for row in (0, 1):
        alone, _ = written(subject, ids[row : row + 1], 12, seed=5 + row)
        assert torch.equal(alone[0], both[row])
    again, other = (written(subject, ids, 12, seed=seed)[0] for seed in (5, 6))
    assert torch.equal(again, both) and not torch.equal(other, both)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_have_the_probabilities_asked_for():
    "Chi-square of 20,000 draws, with temperature and with the k likeliest."
    logits = torch.linspace(-2, 2, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    noise = [torch.Generator().manual_seed(row) for row in range(20_000)]
    for temperature, top_k in ((1.0, None), (0.5, 5), (2.0, 12), (1.0, 1)):
        counts = choose(logits.expand(20_000, -1), temperature, top_k, noise).bincount(minlength=12)
        wanted = (logits / temperature).softmax(0)
        if top_k: wanted = torch.where(wanted >= wanted.topk(top_k).values[-1], wanted, 0.0)
        wanted = 20_000 * wanted / wanted.sum()
        there = wanted > 0
        assert counts[~there].sum() == 0
        assert ((counts - wanted)[there].square() / wanted[there]).sum() < 33.1  # 11 degrees of freedom: 0.9995
    assert gumbel(12, noise[:3]).shape == (3, 12)


def test_a_row_ends_where_it_is_told(subject, ids):
    free, _ = written(subject, ids, 12, temperature=0.0)
    stop = [int(free[0, 4]), int(free[1, 7])]
    ended, _ = written(subject, ids, 12, temperature=0.0, stop=stop)
    ends = [next(i for i, token in enumerate(row) if token in stop) for row in free.tolist()]
    assert ended.shape[1] == max(ends) + 1
    for row, end in enumerate(ends):
        assert torch.equal(ended[row, : end + 1], free[row, : end + 1]) and (ended[row, end:] == free[row, end]).all()


def test_a_model_without_a_cache_computes_the_whole_text():
    model = Subject.wrap(native(d_model=32, d_head=8, n_layers=2, n_ctx=16, n_heads=4, d_vocab=50, act_fn="gelu"))
    ids = torch.randint(0, 50, (3, 5), generator=torch.Generator().manual_seed(0))
    tokens, logits = written(model, ids, 6, temperature=0.0)
    assert not caches(model)
    text = torch.cat([ids, tokens], 1)
    assert torch.equal(model.logits(text)[:, 4:-1].argmax(-1), tokens)


def test_the_context_may_be_filled_to_the_last_token(tmp_path):
    small = Subject.load(untrained(tmp_path / "gpt2", ["one two three"] * 4, vocabulary=300, n_positions=12))
    ids = small.tokens("one two")
    room = small.n_ctx + 1 - ids.shape[1]
    assert len(list(generate(small, ids, room, temperature=0.0))) == room
    with pytest.raises(InputError, match="context of 12"): generate(small, ids, room + 1)


def test_wrong_arguments_say_so_at_the_call(subject, ids):
    padded = torch.stack([ids[0], torch.cat([ids[1, :-2], ids[1, :1], ids[1, :1]])])
    for error, match, call in (
        (InputError, "n=0", lambda: generate(subject, ids, 0)),
        (InputError, "temperature=-1", lambda: generate(subject, ids, 1, temperature=-1.0)),
        (InputError, "temperature=nan", lambda: generate(subject, ids, 1, temperature=float("nan"))),
        (InputError, "top_k=0", lambda: generate(subject, ids, 1, top_k=0)),
        (ShapeError, "not empty", lambda: generate(subject, ids[0], 1)),
        (ShapeError, "not empty", lambda: generate(subject, ids[:, :0], 1)),
        (InputError, "padding", lambda: generate(subject, padded, 1)),
        (InputError, "context", lambda: steps(subject, ids, 1000)),
        (InputError, "token ids", lambda: generate(subject, ids + 4096, 1)),
    ):
        with pytest.raises(error, match=match): call()
    with pytest.raises(UnknownName, match="hook_resid_post"):
        list(generate(subject, ids, 1, {"blocks.1.hook_resid_pots": lambda x: x}))


def test_a_pass_that_fails_leaves_nothing(subject, ids):
    hooks = lambda: [(name, tuple(m._forward_hooks)) for name, m in subject.model.named_modules()]
    before, calls = hooks(), []

    def broken(act):
        calls.append(act.shape[1])
        if len(calls) == 3: raise KeyboardInterrupt
        return act

    with pytest.raises(KeyboardInterrupt): list(generate(subject, ids, 5, {RESID: broken}))
    assert calls == [11, 1, 1] and hooks() == before
