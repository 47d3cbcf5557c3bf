"A splice changes what it says, where it says, and leaves nothing behind."

import pytest
import torch

from sae_lab.coders.contract import make
from sae_lab.ground.errors import InputError, ShapeError, UnknownName
from sae_lab.ground.sparse import Codes
from sae_lab.sources.bridge import native
from sae_lab.sources.generate import generate, steps
from sae_lab.sources.subject import Subject
from sae_lab.splice.splice import Splice, ports, splice

RESID, MLP, IN, Z = (
    "blocks.0.hook_resid_post",
    "blocks.1.mlp.hook_post",
    "blocks.0.ln2.hook_normalized",
    "blocks.1.attn.hook_z",
)


@pytest.fixture(scope="module")
def subject():
    return Subject.wrap(
        native(d_model=32, d_head=8, n_layers=2, n_ctx=64, n_heads=4, d_vocab=100, act_fn="gelu")
    )


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 100, (5, 20), generator=torch.Generator().manual_seed(0))


def topk(read, write=None, d_in=32, d_out=None):
    coder = make("topk", d_in=d_in, d_sae=48, k=4, d_out=d_out)
    read = (read,) if isinstance(read, str) else read
    coder.spec = coder.spec.with_(
        hooks_in=read, hooks_out=read if write is None else (write,) if isinstance(write, str) else write
    )
    return coder


def hooks_left(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )


def halve(codes):
    return codes.with_values(codes.values / 2)


@pytest.mark.parametrize("hook", [RESID, MLP, Z])
@pytest.mark.parametrize("edit", [None, lambda codes: codes, lambda codes: codes.csr()])
def test_no_edit_is_no_change(subject, ids, hook, edit):
    coder = topk(hook, d_in=subject.hooks[hook])
    with splice(subject, coder, edit=edit) as spliced:
        if edit is None or edit(Codes.from_dense(torch.eye(2))).indptr is None:
            assert torch.equal(spliced.logits(ids), subject.logits(ids))
        else:
            torch.testing.assert_close(spliced.logits(ids), subject.logits(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("hook", [RESID, MLP, Z])
def test_what_flows_on_is_what_the_formula_says(subject, ids, hook):
    coder = topk(hook, d_in=subject.hooks[hook])
    x = subject.run(ids, [hook])[hook].flatten(0, 1)
    codes, y = coder(x)
    expected = {"drop": coder.decode(halve(codes)), "keep": x + coder.decode(halve(codes)) - y}
    for error, value in expected.items():
        with splice(subject, coder, error=error, edit=halve) as spliced:
            after = spliced.run(ids, [hook])[1][hook].flatten(0, 1)
        torch.testing.assert_close(after, value.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_ablations(subject, ids, mode):
    mean = torch.arange(32.0)
    with splice(subject, topk(RESID), mode=mode, mean=mean if mode == "mean" else None) as spliced:
        after = spliced.run(ids, [RESID])[1][RESID]
    assert torch.equal(after, (mean if mode == "mean" else torch.zeros(32)).expand_as(after))


def test_a_transcoder_reads_one_hook_and_writes_another(subject, ids):
    write = "blocks.0.hook_mlp_out"
    coder = topk(IN, write, d_out=32)
    acts = subject.run(ids, [IN, write])
    with splice(subject, coder, error="drop") as spliced:
        after = spliced.run(ids, [write])[1][write]
    torch.testing.assert_close(
        after.flatten(0, 1), coder(acts[IN].flatten(0, 1))[1].detach(), rtol=1e-5, atol=1e-5
    )
    with splice(subject, coder) as spliced:
        assert torch.equal(spliced.logits(ids), subject.logits(ids))
    with (
        splice(subject, topk(write, IN, d_out=32), error="drop") as spliced,
        pytest.raises(InputError, match="before"),
    ):
        spliced.logits(ids)


def test_several_hooks_are_read_from_a_clean_run(subject, ids):
    pair = (RESID, "blocks.1.hook_resid_post")
    coder = topk(pair, d_in=64)
    acts = subject.run(ids, pair)
    _, y = coder(torch.cat([acts[name] for name in pair], -1).flatten(0, 1))
    with splice(subject, coder, error="drop") as spliced:
        after = spliced.run(ids, pair)[1]
    for name, part in zip(pair, y.detach().split(32, -1)):
        torch.testing.assert_close(after[name].flatten(0, 1), part, rtol=1e-5, atol=1e-5)


def test_a_skip_path_is_part_of_the_reconstruction(subject, ids):
    write, draw = "blocks.0.hook_mlp_out", torch.Generator().manual_seed(0)
    coder = make("skip_transcoder", d_in=32, d_sae=48, k=4)
    coder.spec = coder.spec.with_(hooks_in=(IN,), hooks_out=(write,))
    with torch.no_grad():
        for each in (coder.dec, coder.W_skip): each.copy_(torch.randn(each.shape, generator=draw))
    x = subject.run(ids, IN)[IN].flatten(0, 1)
    value = coder.encode(x).dense() @ coder.W_dec + coder.b_dec + x @ coder.W_skip
    with splice(subject, coder, error="drop") as spliced:
        after = spliced.run(ids, write)[1][write].flatten(0, 1)
    torch.testing.assert_close(after, value.detach(), rtol=1e-5, atol=1e-5)
    with splice(subject, coder) as spliced:
        assert torch.equal(spliced.logits(ids), subject.logits(ids))


PAIR = (RESID, "blocks.1.hook_resid_post")


def across(seed=0):
    "A crosscoder over both blocks."
    coder = make("crosscoder_batchtopk", d_in=64, d_sae=48, widths=[32, 32], k=4, seed=seed)
    coder.spec = coder.spec.with_(hooks_in=PAIR, hooks_out=PAIR)
    return coder


def test_a_crosscoder_takes_two_passes(subject, ids):
    "Codes from a run of its own, the first hook written from the last one read; every other edit is in that run too."
    coder, below, lift = across(), topk("blocks.0.hook_resid_mid"), {"blocks.0.hook_resid_pre": lambda y: y + 1}
    for edits, under in (({}, None), (lift, None), ({}, below), (lift, below)):
        first = subject if under is None else splice(subject, under, error="drop")
        acts = first.run(ids, PAIR, edits=edits)[1] if under else subject.run_with(ids, edits, PAIR)[1]
        f, y = coder(torch.cat([acts[name] for name in PAIR], -1).flatten(0, 1))
        step = (coder.decode(halve(f)) - y).detach().split(32, -1)
        after = splice(first, coder, edit=halve).run(ids, PAIR, edits=edits)[1]
        first_step, second_step = (each.reshape(acts[RESID].shape) for each in step)
        torch.testing.assert_close(after[RESID], acts[RESID] + first_step, rtol=1e-5, atol=1e-5)
        hooks = [(RESID, lambda act, hook, value=after[RESID]: value),  # then block 1, then the second step
                 (PAIR[1], lambda act, hook, step=second_step: act + step)]
        by_hand = subject.model.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks)
        logits = splice(first, coder, edit=halve).run(ids, edits=edits)[0]
        torch.testing.assert_close(logits, by_hand.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(splice(subject, coder).logits(ids), subject.logits(ids))


@pytest.mark.parametrize("gradients", ["features", "error", "both"])
def test_a_crosscoders_gradient_goes_through_both_passes(subject, ids, gradients):
    "With respect to the stream below; nothing is edited, so features and error together make up the identity."
    coder, below = across(), torch.zeros(32, requires_grad=True)
    lift = {"blocks.0.hook_resid_pre": lambda y: y + below}
    draw = torch.randn(*ids.shape, 100, generator=torch.Generator().manual_seed(3))
    logits = splice(subject, coder, gradients=gradients).run(ids, grad=True, edits=lift)[0]
    (found,) = torch.autograd.grad((logits * draw).sum(), below)

    x, acts = subject.run_with(ids, lift, PAIR, grad=True)
    read = torch.cat([acts[name] for name in PAIR], -1).flatten(0, 1)
    active = (coder.encode(read).dense() != 0).float()
    plain = ((read @ coder.W_enc + coder.b_enc) * active) @ coder.W_dec + coder.b_dec
    parts = [part.reshape(*ids.shape, 32) for part in plain.split(32, -1)]
    stop = {"features": (True, False), "error": (False, True), "both": (False, False)}[gradients]

    def put(part):
        def edit(y, hook):
            error = y - part
            return (part.detach() if stop[1] else part) + (error.detach() if stop[0] else error)
        return edit
    hooks = [("blocks.0.hook_resid_pre", lambda y, hook: y + below), *zip(PAIR, map(put, parts))]
    by_hand = subject.model.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks)
    torch.testing.assert_close(logits, by_hand, rtol=1e-4, atol=1e-4)
    (truth,) = torch.autograd.grad((by_hand * draw).sum(), below, retain_graph=True)
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-3)
    (whole,) = torch.autograd.grad((x * draw).sum(), below)
    assert torch.allclose(found, whole, rtol=1e-3, atol=1e-3) == (gradients == "both")


def test_several_coders_go_in_together_and_nest(subject, ids):
    "In order: the second reads what the first has written, whether given together or stood one on the other."
    one, two, other = topk(RESID), topk("blocks.1.hook_resid_post"), "blocks.1.hook_resid_post"
    with splice(subject, [one, two], error="drop") as spliced:
        logits, acts = spliced.run(ids, [RESID, other, f"{RESID}.hook_sae_acts_post", f"{other}.hook_sae_acts_post"])
    x = subject.run(ids, RESID)[RESID]
    first = one(x.flatten(0, 1))[1].detach().reshape(x.shape)
    middle = subject.run_with(ids, {RESID: lambda y: first}, other)[1][other]
    second = two(middle.flatten(0, 1))[1].detach().reshape(x.shape)
    torch.testing.assert_close(acts[RESID], first, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(acts[other], second, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(acts[f"{other}.hook_sae_acts_post"],
                               two.encode(middle.flatten(0, 1)).dense().reshape(*ids.shape, -1).detach())
    with splice(subject, one, error="drop") as inside:
        with splice(inside, two, error="drop") as both:
            assert torch.equal(both(ids), logits)
        alone = inside(ids)  # the inner block has left nothing on the outer one
    assert torch.equal(alone, splice(subject, one, error="drop")(ids)) and not torch.equal(alone, logits)
    twice = splice(subject, [one, topk(RESID)])
    assert torch.equal(twice(ids), subject.logits(ids))
    with pytest.raises(InputError, match="2 coders"): twice.run(ids, f"{RESID}.hook_sae_acts_post")


def test_a_hook_may_be_called_by_any_of_its_names(subject, ids):
    other = next(name for name, place in subject.aliases.items() if place == RESID and name != RESID)
    by_alias = splice(subject, topk(other), error="drop")
    acts = f"{RESID}.hook_sae_acts_post"
    assert by_alias.ports == splice(subject, topk(RESID)).ports
    logits, found = by_alias.run(ids, acts, edits={f"{other}.hook_sae_acts_post": lambda f: f * 2})
    assert torch.equal(found[acts], 2 * splice(subject, topk(RESID), error="drop").run(ids, acts)[1][acts])
    lifted = by_alias.run(ids, edits={RESID: lambda y: y + 1})[0]
    assert torch.equal(lifted, by_alias.run(ids, edits={other: lambda y: y + 1})[0])


def test_it_says_what_becomes_of_the_error(subject):
    coder = topk(RESID)
    assert "topk" in repr(splice(subject, coder)) and "error kept" in repr(splice(subject, coder))
    assert repr(splice(subject, [coder, coder], error="drop")).count("error dropped") == 2
    assert "error" not in repr(splice(subject, coder, mode="zero"))


def test_only_the_chosen_tokens_change(subject, ids):
    where = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    for mode in ("reconstruct", "zero"):
        with splice(subject, topk(RESID), mode=mode, error="drop") as spliced:
            after = spliced.run(ids, [RESID], where=where)[1][RESID]
        clean = subject.run(ids, [RESID])[RESID]
        assert (
            torch.equal(after[~where], clean[~where])
            and not torch.isclose(after[where], clean[where]).all(-1).any()
        )


class Speaker:
    all_special_ids, bos_token_id, eos_token_id, pad_token_id = [7], 7, 7, 7


def test_special_tokens_stay(subject, ids):
    ids = ids.clone()
    ids[:, 0] = 7
    wrapped = Subject.wrap(subject.model, Speaker())
    clean = wrapped.run(ids, [RESID])[RESID]
    for special in (False, True):
        with splice(wrapped, topk(RESID), mode="zero", special=special) as spliced:
            after = spliced.run(ids, [RESID])[1][RESID]
        assert (
            torch.equal(after[ids == 7], torch.zeros_like(clean[ids == 7]) if special else clean[ids == 7])
            and (after[ids != 7] == 0).all()
        )


def test_nothing_is_left_behind_after_a_failure(subject, ids):
    clean, before = subject.logits(ids), hooks_left(subject.model)

    def broken(codes):
        raise ZeroDivisionError

    def interrupted(act):
        raise KeyboardInterrupt

    for coder in (topk(RESID), topk(IN, "blocks.0.hook_mlp_out", d_out=32), across()):
        with pytest.raises(ZeroDivisionError), splice(subject, coder, edit=broken) as spliced:
            spliced.logits(ids)
        for kind in ("acts_post", "recons", "error", "output"):
            name = f"{spliced.ports.write[0]}.hook_sae_{kind}"
            with pytest.raises(KeyboardInterrupt):
                splice(subject, coder).run(ids, name, edits={name: interrupted}, grad=kind == "error")
        with pytest.raises(KeyboardInterrupt), splice(subject, coder, error="drop") as spliced:
            spliced.logits(ids)
            raise KeyboardInterrupt
        assert hooks_left(subject.model) == before and torch.equal(subject.logits(ids), clean)


def test_gradients_pass_through_the_coder(subject, ids):
    coder = topk(RESID)
    spliced = Splice(subject, coder, ports(subject, coder), error="drop")
    spliced.run(ids, grad=True)[0].square().mean().backward()
    assert coder.W_dec.grad.abs().sum() > 0


def test_loss_is_the_subjects_loss_when_nothing_changes(subject, ids):
    with splice(subject, topk(RESID)) as spliced:
        assert torch.equal(spliced.loss(ids), subject.loss(ids))


def test_wrong_arguments_say_so(subject):
    bare = make("topk", d_in=32, d_sae=8, k=2)
    for error, match, call in (
        (InputError, "names no hook", lambda: splice(subject, bare)),
        (InputError, "mode=", lambda: splice(subject, topk(RESID), mode="off")),
        (InputError, "error=", lambda: splice(subject, topk(RESID), error="maybe")),
        (InputError, "no coder", lambda: splice(subject, [])),
        (InputError, "keep the error", lambda: splice(subject, topk(RESID), error="drop", gradients="error")),
        (InputError, "gradients=", lambda: splice(subject, topk(RESID), gradients="all")),
        (UnknownName, "inside a coder", lambda: splice(subject, topk(RESID)).run(
            torch.zeros(1, 2, dtype=torch.long), f"{MLP}.hook_sae_acts_post")),
        (InputError, "no fitting mean", lambda: splice(subject, topk(RESID), mode="mean")),
        (ShapeError, "reads 32", lambda: splice(subject, bare, hook=MLP)),
        (UnknownName, "blocks.0", lambda: splice(subject, topk("blocks.0.hook_resid_pots"))),
    ):
        with pytest.raises(error, match=match):
            with call():
                pass


def test_attention_heads_are_flattened_and_restored_once(subject, ids):
    "A coder at hook_z reads heads side by side, and what it writes goes back to the head it came from."
    heads, width = subject.model.cfg.n_heads, subject.model.cfg.d_head
    same = make("neurons", d_in=heads * width, k=None)
    same.spec = same.spec.with_(hooks_in=(Z,), hooks_out=(Z,))
    raw = {}
    run = subject.model.run_with_hooks(ids, return_type="logits", fwd_hooks=[
        (Z, lambda act, hook: raw.update(shape=act.shape, z=act.detach().clone()))])
    assert raw["shape"] == (*ids.shape, heads, width)
    assert torch.equal(subject.run(ids, Z)[Z], raw["z"].flatten(2))
    with splice(subject, same, error="drop", special=True) as spliced:
        logits, acts = spliced.run(ids, [Z])
    torch.testing.assert_close(acts[Z], raw["z"].flatten(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits, run, rtol=0, atol=1e-5)

    def silence(codes):  # latents of head 1 alone
        dense = codes.dense()
        dense[:, width : 2 * width] = 0
        return Codes.from_dense(dense)

    by_hand = subject.model.run_with_hooks(ids, return_type="logits", fwd_hooks=[
        (Z, lambda act, hook: act.index_fill(2, torch.tensor([1]), 0.0))])
    with splice(subject, same, error="drop", edit=silence, special=True) as spliced:
        torch.testing.assert_close(spliced.logits(ids), by_hand, rtol=0, atol=1e-5)


def test_a_coder_for_other_weights_is_refused(subject):
    "Folded norms give other activations: refused, unless told."
    coder = topk(RESID)
    given = subject.identity["processing"]["given"]
    coder.spec = coder.spec.with_(subject={"name": "x", "processing": {"fold_ln": not given.endswith("Pre")}})
    with pytest.raises(InputError, match="any_processing=True"), splice(subject, coder):
        pass
    with splice(subject, coder, any_processing=True) as spliced:
        assert isinstance(spliced, Splice)


@pytest.fixture(scope="module")
def bundled():
    return Subject.bundled()


def told(subject, ids, edits, cache, n=10):
    "Tokens and logits of a greedy continuation."
    found = list(steps(subject, ids, n, edits, temperature=0.0, cache=cache))
    return torch.stack([step.token for step in found], 1), torch.stack([step.logits for step in found], 1)


def coders_for(subject):
    "One coder of each kind of splice, made for the bundled subject."
    three = ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post", "blocks.1.hook_mlp_out")
    yield "sae", topk("blocks.1.hook_resid_post", d_in=128)
    yield "transcoder", topk("blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out", d_in=128, d_out=128)
    yield "crosscoder", topk(three[:2], d_in=256)
    yield "two", [topk(three[0], d_in=128), topk(three[1:2], d_in=128)]
    yield "crosscoder on an sae", [topk(three[2], d_in=128), topk(three[:2], d_in=256)]


@pytest.mark.parametrize("which", range(5), ids=["sae", "transcoder", "crosscoder", "two", "crosscoder on an sae"])
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_text_is_continued_through_a_coder_with_the_cache_as_without(bundled, which, error):
    _, coder = list(coders_for(bundled))[which]
    ids = bundled.tokens(["The fox met the crow. The fox was", "Anna saw the cat. Then the girl was"])[:, :11]
    spliced = splice(bundled, coder, error=error, edit=halve)
    (fast, quick), (slow, whole) = (told(bundled, ids, spliced.edits, cache) for cache in (True, False))
    assert torch.equal(fast, slow)
    torch.testing.assert_close(quick, whole, rtol=1e-4, atol=1e-3)
    text = torch.cat([ids, fast], 1)  # and both are what one run over the finished text says
    torch.testing.assert_close(quick, spliced.logits(text)[:, ids.shape[1] - 1 : -1], rtol=1e-4, atol=1e-3)
    plain = told(bundled, ids, None, True)
    assert not torch.allclose(plain[1], quick, atol=1e-2)
    unedited = told(bundled, ids, splice(bundled, coder).edits, True)
    assert torch.equal(unedited[0], plain[0]) and torch.equal(unedited[1], plain[1])


def test_a_continuation_that_is_broken_off_leaves_nothing(bundled):
    coder, ids = topk("blocks.1.hook_resid_post", d_in=128), bundled.tokens("The fox met the crow.")
    before, calls = hooks_left(bundled.model), []

    def tired(codes):
        calls.append(len(codes.values))
        if len(calls) == 3: raise KeyboardInterrupt
        return codes

    with pytest.raises(KeyboardInterrupt):
        list(generate(bundled, ids, 9, splice(bundled, coder, edit=tired).edits))
    stream = generate(bundled, ids, 9, splice(bundled, coder).edits)
    next(stream)
    assert hooks_left(bundled.model) == before  # between two steps too
    stream.close()
    assert hooks_left(bundled.model) == before and calls == [ids.shape[1] - 1, 1, 1]
