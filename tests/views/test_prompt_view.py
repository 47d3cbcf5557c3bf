"The prompt view: lawful whatever it holds; loss effects and quantiles equal an independent computation."

import math

import numpy as np
import pytest
import torch
from hostile import texts
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lab.coders.contract import make
from sae_lab.features.index import FeatureIndex
from sae_lab.ground.errors import InputError, ShapeError, UnknownName
from sae_lab.sources.corpus import named
from sae_lab.sources.stream import Stream
from sae_lab.sources.subject import Subject
from sae_lab.views.payload import check_view
from sae_lab.views.prompt import METRICS, PromptView, PromptWidget, entries, packed, peaks
from sae_lab.workbench.browser import top_words
from sae_lab.workbench.prompt import ablated, prompt, prompt_view, quantile

words = texts(6)
numbers = st.floats(width=32)
maybe = st.none() | numbers


@st.composite
def prompts(draw):
    n, m = draw(st.integers(1, 5)), draw(st.integers(0, 4))
    size = draw(st.integers(0, 12)) if m else 0

    def some(each, k):
        return tuple(draw(st.lists(each, min_size=k, max_size=k)))

    return PromptView(
        some(words, n),
        some(st.booleans(), n),
        some(maybe, n),
        some(st.integers(0, 10**6), m),
        some(st.integers(0, 9), m),
        some(maybe, m),
        some(words, m),
        some(st.integers(0, n - 1), size),
        some(st.integers(0, max(m - 1, 0)), size),
        some(numbers, size),
        some(maybe, size),
        some(maybe, size),
        some(maybe, size),
        draw(words),
        draw(words),
    )


@settings(deadline=None, max_examples=60)
@given(prompts(), st.sampled_from(list(METRICS)))
def test_any_prompt_is_lawful(view, metric):
    check_view(view)
    html = view.to_html()
    assert "<script" not in html and "<img" not in html and len(html.encode()) < 60_000
    order = entries(view, metric, special=True)
    sizes = [abs(getattr(view, metric)[i]) for i in order]
    assert sizes == sorted(sizes, reverse=True) and all(map(math.isfinite, sizes))
    assert len(set(peaks(view, order, 3))) == len(peaks(view, order, 3)) <= 3
    assert len(packed(view)["numbers"]) == 24 * len(view.at)


def test_wrong_prompts_are_refused():
    with pytest.raises(ShapeError):
        PromptView(("a",), (), (None,), (), (), (), ())
    with pytest.raises(InputError):
        PromptView(("a",), (False,), (None,), (), (), (), (), (3,), (0,), (1.0,), (None,), (None,), (None,))
    with pytest.raises(UnknownName):
        entries(PromptView(("a",), (False,), (None,), (), (), (), ()), "colour")


@pytest.fixture(scope="module", params=["topk", "gated"])
def bench(request, tmp_path_factory):
    "A subject, a coder with a bias and an index."
    subject, hook = Subject.bundled(), "blocks.1.hook_resid_post"
    tokens = named("bundled").split("explain", seed=0).tokens(subject, 3_000)
    size = {"k": 12} if request.param == "topk" else {}
    coder = make(request.param, d_in=subject.hooks[hook], d_sae=96, seed=1, **size)
    coder.spec = coder.spec.with_(hooks_in=(hook,), subject=subject.identity)
    source, folder = Stream(subject, tokens, (hook,), seed=None), tmp_path_factory.mktemp("index") / "index"
    return (
        subject,
        coder,
        FeatureIndex.build(coder, source, tokens, folder, subject.strings(range(subject.d_vocab))),
        hook,
    )


def by_hand(subject, coder, ids, hook, at, latent):
    "The loss of every next token with one latent's part taken out of the hook, by plain PyTorch hooks of the model."
    with torch.no_grad():
        codes = coder.encode(subject.run(ids, hook)[hook][0]).dense()
        part = codes[at, latent] * coder.W_dec[latent]

        def edit(act, hook=None):
            act = act.clone()
            act[0, at] -= part
            return act

        logits = subject.model.run_with_hooks(ids, fwd_hooks=[(hook, edit)], return_type="logits")
        clean = subject.model.run_with_hooks(ids, fwd_hooks=[], return_type="logits")
        loss = [-each[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0] for each in (logits, clean)]
    return loss[0] - loss[1]


def test_loss_effects_equal_an_independent_computation(bench):
    subject, coder, index, hook = bench
    view = prompt_view(subject, coder, index, "The small fox saw a crow on the fence.", effects=3)
    ids = torch.tensor([view.ids])
    done = [i for i, x in enumerate(view.effect) if x is not None]
    assert len(done) >= len(view.tokens) and view.tokens[0] == "<|endoftext|>" and view.special[0]
    assert all(view.at[i] not in (0, len(view.tokens) - 1) for i in done)
    for i in done[::5]:
        change = by_hand(subject, coder, ids, hook, view.at[i], view.latents[view.which[i]])
        assert math.isclose(view.effect[i], change[view.at[i]], abs_tol=2e-5)
        assert math.isclose(view.total[i], change.sum(), abs_tol=2e-4)
        assert change[: view.at[i]].abs().max() < 1e-5  # nothing before it moves


def test_batches_do_not_matter(bench):
    subject, coder, index, hook = bench
    ids = subject.tokens("The small fox saw a crow.")
    row, latent, _ = coder.encode(subject.run(ids, hook)[hook][0]).flat()
    whole, parts = (ablated(subject, coder, ids, row[:20], latent[:20], batch=b) for b in (64, 3))
    assert torch.allclose(whole, parts, atol=1e-5) and whole.shape == (20, ids.shape[1] - 1)
    assert ablated(subject, coder, ids, row[:0], latent[:0]).shape == (0, ids.shape[1] - 1)


def test_what_fires_is_what_the_coder_says(bench):
    subject, coder, index, hook = bench
    view = prompt_view(subject, coder, index, "A crow said nothing.", effects=0)
    dense = np.zeros((len(view.tokens), coder.d_sae), np.float32)
    for row in view.rows():
        dense[row["position"], row["latent"]] = row["activation"]
    with torch.no_grad():
        own = coder.encode(subject.run(torch.tensor([view.ids]), hook)[hook][0]).dense()
    assert np.allclose(dense, own.numpy()) and not any(x is not None for x in view.effect)
    assert view.loss[:-1] == pytest.approx(subject.loss(torch.tensor([view.ids]))[0].tolist()) and view.loss[-1] is None


def test_quantiles_and_words_equal_a_naive_count(bench):
    subject, coder, index, hook = bench
    view = prompt_view(subject, coder, index, "A crow said nothing.", effects=0)
    for row in view.rows()[::7]:
        natural = np.abs(index.activations(row["latent"])[1])
        share = float((natural <= np.float32(abs(row["activation"]))).mean()) if len(natural) else None
        assert row["quantile"] == share and row["n"] == len(natural)
    latent = int(index.stats["count"].idxmax())
    assert top_words(index, 3, [latent])[0][0].split("\u241f") == [t.string for t in index.page(latent).tokens[:3]]
    assert quantile(index, latent, np.array([np.inf, 0.0], np.float32)) == [1.0, 0.0]


def test_one_token_and_no_token(bench):
    subject, coder, index, hook = bench
    view = prompt_view(subject, coder, index, "", bos=True)
    assert len(view.tokens) == 1 and view.loss == (None,) and check_view(view)
    assert PromptWidget(view).html
    with pytest.raises(InputError):
        prompt_view(subject, coder, index, "", bos=False)
    with pytest.raises(ShapeError):
        prompt_view(subject, make("topk", d_in=subject.hooks[hook], d_sae=32, k=2), index, "a", hook=hook)


def test_the_kernel_answers(bench):
    subject, coder, index, hook = bench
    widget = prompt(subject, coder, index, "The fox slept.", effects=1, token=2, metric="effect")
    widget.answers["effects"](token=2)
    assert all(x is not None for x, at in zip(widget.view.effect, widget.view.at) if at == 2) and widget.token == 2
    widget.answers["read"](text="A crow.")
    assert widget.view.tokens[1] == "A" and widget.token == -1 and widget.metric == "effect"
    with pytest.raises(InputError):
        widget.answers["read"](text=" fox" * 5_000)
