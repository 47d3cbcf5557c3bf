"Order from a seed, purity of a batch, resuming, memory."
import gc
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lab.ground.errors import InputError, NumericError, ShapeError, UnknownName
from sae_lab.sources.stream import (Batch, Source, Stream, TensorSource, bos_report, harvest, norms, order, picked,
                                    rebatched)

HOOKS = ("blocks.0.mlp.hook_post", "blocks.1.attn.hook_z", "blocks.2.hook_resid_post")


def same(a, b):
    "Equal in every bit."
    facts = all(getattr(a, key).equal(getattr(b, key)) for key in ("token", "doc", "seq", "pos"))
    return facts and a.acts.keys() == b.acts.keys() and all(a.acts[hook].equal(b.acts[hook]) for hook in a.acts)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 4), st.sampled_from([None, 0, 7]))
def test_picking_is_exact(n, batch, epochs, seed):
    "Each epoch takes every row once; batches do not depend on where one starts; None keeps the order."
    rows = list(picked(n, batch, seed, epochs))
    flat = torch.cat(rows)
    assert [len(r) for r in rows[:-1]] == [batch] * (len(rows) - 1) and len(flat) == n * epochs
    for epoch in range(epochs):
        part = flat[epoch * n:(epoch + 1) * n]
        assert part.sort().values.equal(torch.arange(n)) and part.equal(order(n, seed, "rows", epoch))
    for start in {0, len(rows) // 2, len(rows) - 1}:
        assert all(a.equal(b) for a, b in zip(picked(n, batch, seed, epochs, start), rows[start:], strict=True))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 25), min_size=1, max_size=8), st.integers(1, 40))
def test_rebatching_loses_nothing(sizes, batch):
    "Blocks of any size come out in order, in batches of one size."
    total, blocks = 0, []
    for size in sizes:
        at = torch.arange(total, total + size)
        blocks.append((Batch({"a": at[:, None].float()}, at, at, at, at), torch.arange(size)))
        total += size
    out = list(rebatched(blocks, batch))
    assert torch.cat([each.token for each in out] or [torch.arange(0)]).tolist() == list(range(total))
    assert all(len(each) == batch for each in out[:-1])


@pytest.mark.parametrize("block", [100, 512, 10**6])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_batch_depends_on_arguments_alone(subject, tokens, block, seed):
    "Batch i is the same in a full run, in a run that starts with it, and from another stream made alike."
    make = lambda: Stream(subject, tokens, HOOKS, batch=300, block=block, seed=seed, epochs=2)
    stream = make()
    every = list(stream.batches())
    assert isinstance(stream, Source) and len(every) == stream.n_batches
    assert sum(map(len, every)) == stream.n_tokens == 2 * tokens.n
    for start in (0, 1, 7, stream.n_batches - 1):
        rest = list(make().batches(start))
        assert len(rest) == len(every) - start and all(same(a, b) for a, b in zip(rest, every[start:], strict=True))
    assert stream.identity == make().identity


def test_every_usable_token_once_with_its_activation(subject, tokens):
    "Tokens, documents and activations belong together."
    whole = subject.run(tokens.ids, HOOKS)
    seen = Batch.cat(list(Stream(subject, tokens, HOOKS, batch=300, block=512, seed=1).batches()))
    places = seen.seq * 10_000 + seen.pos
    wanted = (~tokens.special).nonzero()
    assert places.sort().values.equal(wanted[:, 0] * 10_000 + wanted[:, 1])
    assert seen.token.equal(tokens.ids[seen.seq, seen.pos]) and seen.doc.equal(tokens.doc[seen.seq, seen.pos])
    for hook in HOOKS:
        assert torch.allclose(seen.acts[hook], whole[hook][seen.seq, seen.pos], atol=1e-5)


def test_order_is_shuffled_over_the_corpus(subject, tokens):
    "Seeds differ, epochs differ; with seed None the corpus' own order comes."
    first = lambda **args: Batch.cat(list(Stream(subject, tokens, HOOKS[0], batch=300, block=512, **args).batches()))
    a, b, plain = first(seed=0), first(seed=1), first(seed=None)
    assert not a.pos.equal(b.pos) and len(a.seq[:300].unique()) > 3
    assert plain.token.equal(tokens.ids[~tokens.special])
    two = first(seed=0, epochs=2)
    assert not two.pos[:tokens.n].equal(two.pos[tokens.n:])


def test_special_tokens_on_request(subject, tokens):
    "skip_special=False gives begin tokens too, and never padding."
    stream = Stream(subject, tokens, HOOKS[0], batch=4096, seed=None, skip_special=False)
    token = torch.cat([each.token for each in stream.batches()])
    assert len(token) == int((tokens.doc >= 0).sum()) and (token == subject.bos).any()


def test_one_block_is_held(subject, tokens):
    "While the next block is harvested the last is gone."
    class Watch:
        def __init__(self): self.counts = []
        def __getattr__(self, name): return getattr(subject, name)
        def run(self, ids, hooks):
            gc.collect()
            tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.ndim == 2]
            held = [t for t in tensors if t.shape[1] == subject.d_mlp and t.shape[0] > 400]
            self.counts.append(len({t.untyped_storage().data_ptr() for t in held}))
            return subject.run(ids, hooks)

    watch = Watch()
    stream = Stream(subject, tokens, HOOKS[0], batch=64, block=512)
    stream.subject = watch
    for _ in stream.batches():
        pass
    assert max(watch.counts) <= 1 and len(watch.counts) > 4


def test_norms(subject, tokens):
    "Mean and scale by definition, in float64."
    stream = Stream(subject, tokens, HOOKS, batch=512)
    for hook, (mean, scale) in stream.norms().items():
        x = subject.run(tokens.ids, hook)[hook][~tokens.special].double()
        assert torch.allclose(mean.double(), x.mean(0), atol=1e-5)
        assert abs(scale - math.sqrt(x.shape[1]) / float(x.norm(dim=1).mean())) < 1e-5 * scale
    with pytest.raises(NumericError, match="toy, batch 1"):
        x = torch.ones(4, 3)
        x[3] = float("nan")
        norms(TensorSource(x, batch=2, seed=None))


def test_report_on_begin_tokens(subject, tokens):
    "Shares by definition; a planted long token is found."
    hook = "blocks.2.hook_resid_post"
    report = bos_report(subject, tokens, hook)
    x = subject.run(tokens.ids, hook)[hook]
    kept = tokens.doc >= 0
    error = (x - x[kept].mean(0)).square().sum(-1)
    share = {group["group"]: group["share"] for group in report.groups}
    assert abs(share["begin"] - float(error[tokens.special & kept].sum() / error[kept].sum())) < 1e-5
    assert abs(sum(share.values()) - 1) < 1e-9 and sum(g["tokens"] for g in report.groups) == int(kept.sum())
    assert len(report.positions) == 16

    class Spiked:
        def __getattr__(self, name): return getattr(subject, name)
        def run(self, ids, hooks):
            return {hook: torch.where(torch.arange(act.shape[1])[:, None] == 9, act * 1000, act)
                    for hook, act in subject.run(ids, hooks).items()}

    long = {group["group"]: group for group in bos_report(Spiked(), tokens, hook).groups}["long"]
    assert long["tokens"] > 0 and long["share"] > 0.9


def test_tensors_in_memory():
    "Several hooks, rows kept together; wrong shapes refused."
    x = torch.arange(20.0)[:, None]
    source = TensorSource({"a": x, "b": x * 2}, batch=7, seed=3, epochs=2)
    assert all(each.acts["b"].equal(each.acts["a"] * 2) for each in source.batches())
    assert source.identity != TensorSource({"a": x, "b": x * 3}, batch=7, seed=3, epochs=2).identity
    assert same(next(source.batches(4)), list(source.batches())[4])
    with pytest.raises(ShapeError, match="20"):
        TensorSource({"a": x, "b": x[:3]})
    with pytest.raises(InputError):
        TensorSource(x, batch=0)


def test_mistakes(subject, tokens):
    "Unknown hooks, nothing to stream."
    with pytest.raises(UnknownName):
        Stream(subject, tokens, "blocks.9.mlp.hook_post")
    with pytest.raises(InputError):
        Stream(subject, tokens, [])
    with pytest.raises(InputError):
        Stream(subject, tokens, HOOKS, batch=0)
    twice = Stream(subject, tokens, ["blocks.1.hook_out", "blocks.1.hook_resid_post"])
    assert twice.hooks == ("blocks.1.hook_resid_post",)
    assert len(harvest(subject, tokens, torch.arange(0), HOOKS)) == 0
