"Inside a coder: what is recorded, what an edit does, and where gradients go, each against plain torch."
import pytest
import torch

from sae_lab.coders.contract import coders, make
from sae_lab.coders.transcoder import at
from sae_lab.ground.errors import InputError, UnknownName
from sae_lab.ground.sparse import Codes
from sae_lab.sources.bridge import native
from sae_lab.sources.subject import Subject
from sae_lab.splice.inside import KINDS, Taps, Way, chosen, full, inner, merged, preactivations
from sae_lab.splice.splice import splice

RESID, LN, MLP = "blocks.0.hook_resid_post", "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def subject():
    return Subject.wrap(native(d_model=32, d_head=8, n_layers=2, n_ctx=64, n_heads=4, d_vocab=100, act_fn="gelu"))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 100, (3, 7), generator=torch.Generator().manual_seed(0))


def filled(kind, read, write=None, seed=0, **how):
    "A coder at some hooks with every parameter drawn at random."
    coder = at(make(kind, **({"d_in": 32, "d_sae": 48} | how)), read, write)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in coder.parameters(): each.copy_(torch.randn(each.shape, generator=draw) / each.shape[-1] ** 0.5)
    return coder


def three():
    "An autoencoder, a transcoder and a skip transcoder, as (coder, hook read, hook written)."
    for kind, read, write in (("topk", RESID, RESID), ("transcoder", LN, MLP), ("skip_transcoder", LN, MLP)):
        yield filled(kind, read, write, k=4), read, write


def by_hand(coder, x, f=None, pre=None):
    "Pre-activations, codes and reconstruction of a TopK coder in dense torch; `f` and `pre` take the place of its own."
    centred = x - coder.b_dec if coder.subtract_b_dec else x
    pre = centred @ coder.W_enc + coder.b_enc if pre is None else pre
    if f is None:
        best = pre.topk(4, dim=-1)
        f = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    y = f @ coder.W_dec + coder.b_dec
    return pre, f, y if coder.W_skip is None else y + x @ coder.W_skip


def test_names_are_saelens_names():
    for kind in KINDS:
        assert inner(f"{RESID}.hook_sae_{kind}") == (RESID, kind)
    for name in (RESID, f"{RESID}.hook_sae_acts", f"{RESID}.hook_acts_post", "hook_sae_input", ""):
        assert inner(name) is None


@pytest.mark.parametrize("which", range(3), ids=["sae", "transcoder", "skip"])
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_what_is_recorded_inside_is_dense_and_right(subject, ids, which, error):
    coder, read, write = list(three())[which]
    acts = subject.run(ids, [read, write])
    x, y = acts[read], acts[write]
    pre, f, recons = by_hand(coder, x)
    expected = {"input": x, "acts_pre": pre, "acts_post": f, "recons": recons}
    expected |= {"error": y - recons, "output": y} if error == "keep" else {"output": recons}
    names = {f"{write}.hook_sae_{kind}": value for kind, value in expected.items()}
    logits, found = splice(subject, coder, error=error).run(ids, names)
    for name, value in names.items():
        assert found[name].shape == value.shape
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, subject.logits(ids)) == (error == "keep")
    if error == "drop":
        with pytest.raises(UnknownName, match="hook_sae_output"):
            splice(subject, coder, error=error).run(ids, f"{write}.hook_sae_error")


@pytest.mark.parametrize("which", range(3), ids=["sae", "transcoder", "skip"])
@pytest.mark.parametrize("error, kind", [(error, kind) for error in ("keep", "drop") for kind in KINDS
                                         if error == "keep" or kind != "error"])
def test_an_edit_inside_does_what_dense_torch_does(subject, ids, which, error, kind):
    coder, read, write = list(three())[which]
    acts = subject.run(ids, [read, write])
    x, y = acts[read], acts[write]
    noise = lambda act: act + torch.linspace(-1, 1, act.shape[-1])
    pre, f, plain = by_hand(coder, x)
    new = {"input": by_hand(coder, noise(x))[2], "acts_pre": by_hand(coder, x, pre=noise(pre))[2],
           "acts_post": by_hand(coder, x, f=noise(f))[2], "recons": noise(plain)}.get(kind, plain)
    left = (noise(y - plain) if kind == "error" else y - plain) if error == "keep" else 0
    value = noise(new + left) if kind == "output" else new + left
    by_hooks = subject.model.run_with_hooks(ids, return_type="logits", fwd_hooks=[(write, lambda act, hook: value)])
    name = f"{write}.hook_sae_{kind}"
    logits, found = splice(subject, coder, error=error).run(ids, [write, name], edits={name: noise})
    torch.testing.assert_close(found[write], value.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, by_hooks.detach(), rtol=1e-4, atol=1e-4)
    mine = {"input": x, "acts_pre": pre, "acts_post": f, "recons": plain, "error": y - plain}.get(kind, new + left)
    torch.testing.assert_close(found[name], noise(mine).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(coders))
def test_no_edit_is_no_change_for_every_kind(kind):
    "Plain and edited reconstruction take one way, whatever is tapped, and what a tap shows of the codes is the codes."
    coder = make(kind, d_in=16, d_sae=16 if kind in ("neurons", "pca") else 32)
    x, where = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)), torch.ones(4, 10, dtype=torch.bool)
    if kind == "nmf": x = x.abs()
    for kinds in ((), ("acts_post",), ("input", "acts_pre"), KINDS):
        taps = Taps({f"a.hook_sae_{each}": (each, 0) for each in kinds})
        try: plain, new = Way(coder, taps=taps).read(x, x, where)
        except InputError as error:
            assert "acts_pre" in kinds and "use hook_sae_acts_post" in str(error)
            continue
        assert torch.equal(plain, new), kinds
        torch.testing.assert_close(plain, coder(x)[1], rtol=1e-5, atol=1e-5)
        if "acts_pre" in kinds:
            torch.testing.assert_close(chosen(coder, preactivations(coder, x), x).dense(), coder.encode(x).dense(),
                                       rtol=1e-5, atol=1e-5)
        if "acts_post" in kinds:
            dense = coder.encode(x).dense().reshape(4, 10, -1)
            torch.testing.assert_close(taps.store["a.hook_sae_acts_post"], dense, rtol=1e-5, atol=1e-5)


def test_codes_that_store_everything_are_the_codes():
    z = torch.randn(5, 9) * (torch.rand(5, 9) < 0.4)
    assert torch.equal(full(z).dense(), z) and torch.equal(full(z).dense(), Codes.from_dense(z).dense())


@pytest.mark.parametrize("kind", ["relu_l1", "topk", "jumprelu", "transcoder", "skip_transcoder"])
def test_gradients_have_their_closed_form(kind):
    "With J = W_enc diag(active) W_dec (+ W_skip): features J, error (identity, -J), and both their sum."
    same = "trans" not in kind
    coder = filled(kind, "a", "a" if same else "b", **({} if same else {"k": 4})).double()
    draw, where = torch.Generator().manual_seed(2), torch.ones(1, 1, dtype=torch.bool)
    x, y = (torch.randn(32, generator=draw, dtype=torch.float64) for _ in range(2))
    active = (coder.encode(x[None]).dense()[0] != 0).double()
    assert 0 < active.sum() < len(active)
    jacobian = ((coder.W_enc * active) @ coder.W_dec + (0 if coder.W_skip is None else coder.W_skip)).T.detach()

    def put(x, y, gradients):
        way = Way(coder, gradients=gradients)
        return merged(way, y[None], *way.read(x[None], x[None], where), 0, where)[0]

    eye, none = torch.eye(32, dtype=torch.float64), torch.zeros(32, 32, dtype=torch.float64)
    truth = {"features": (jacobian, none), "error": (-jacobian, eye), "both": (none, eye)}
    for gradients, (to_x, to_y) in truth.items():
        found = torch.autograd.functional.jacobian(lambda x, y, g=gradients: put(x, y, g), (x, y))
        torch.testing.assert_close(found, (to_x, to_y), rtol=1e-10, atol=1e-10)
        if same:
            one = torch.autograd.functional.jacobian(lambda x, g=gradients: put(x, x, g), x)
            torch.testing.assert_close(one, to_x + to_y, rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def bundled():
    return Subject.bundled()


def straight(hf, tokens, delta, splices):
    "GPT-2 over the Hugging Face modules; `splices`: layer -> function of its MLP's input, output and the stream."
    body = hf.transformer
    x = body.wte(tokens) + body.wpe(torch.arange(tokens.shape[1])) + delta
    for layer, block in enumerate(body.h):
        x = x + block.attn(block.ln_1(x))[0]
        read = block.ln_2(x)
        x = splices.get(layer, lambda read, out, stream: stream + out)(read, block.mlp(read), x)
    return hf.lm_head(body.ln_f(x))


def hand_spliced(coder, skip, gradients, error, text):
    "The formula of a splice with its gradients, in dense torch."
    def put(read, out, stream):
        there = out if skip else stream + out
        x = read if skip else there
        _, f, plain = by_hand(coder, x)
        seen, codes = (each.detach() if gradients == "error" else each for each in (x, f))
        new = by_hand(coder, seen, f=codes * 0.5)[2]
        left = there - plain
        value = new + (left.detach() if gradients == "features" else left) if error == "keep" else new
        value = torch.where(text, value, there)
        return stream + value if skip else value
    return put


@pytest.mark.parametrize("error, gradients",
                         [("keep", "features"), ("keep", "error"), ("keep", "both"), ("drop", "features")])
@pytest.mark.parametrize("kind", ["topk", "skip_transcoder"])
def test_gradients_through_a_whole_subject(bundled, kind, error, gradients):
    "Of a loss, with respect to the embedding and to the coder's parameters, against a forward written by hand."
    skip = kind != "topk"
    read, write = (("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out") if skip else ("blocks.1.hook_resid_post",) * 2)
    coder = filled(kind, read, write, d_in=128, d_sae=64, k=4)
    ids = bundled.tokens("Anna saw the cat by the river.")
    text, answer = (ids != bundled.bos)[..., None], torch.tensor([17])
    halve = lambda codes: codes.with_values(codes.values / 2)

    def slopes(run):
        delta = torch.zeros(1, ids.shape[1], 128, requires_grad=True)
        loss = torch.nn.functional.cross_entropy(run(delta)[:, -1], answer)
        wanted = [delta, coder.enc, coder.b_enc, coder.dec, coder.b_dec, *([coder.W_skip] if skip else [])]
        return loss, torch.autograd.grad(loss, wanted, allow_unused=True)

    spliced = splice(bundled, coder, error=error, gradients=gradients, edit=halve)
    mine = slopes(lambda delta: spliced.run(ids, grad=True, edits={"blocks.0.hook_resid_pre": lambda y: y + delta})[0])
    put = {1: hand_spliced(coder, skip, gradients, error, text)}
    hand = slopes(lambda delta: straight(bundled.plain.model, ids, delta, put))
    torch.testing.assert_close(mine[0], hand[0], rtol=1e-4, atol=1e-5)
    for one, other in zip(mine[1], hand[1]):
        one, other = (torch.zeros(1) if each is None else each for each in (one, other))
        atol = 1e-4 * float(other.abs().max().clamp(min=1e-3))
        torch.testing.assert_close(one.expand_as(other), other, rtol=1e-3, atol=atol)
    assert mine[1][0].abs().max() > 1e-4


def test_inner_places_are_nodes_of_the_graph(bundled):
    "A loss has a gradient at codes, reconstruction and error, also where the splice passes none on to what is below."
    hook = "blocks.1.hook_resid_post"
    coder, ids = filled("topk", hook, d_in=128, d_sae=64, k=4), bundled.tokens("Anna saw the cat.")
    names = [f"{hook}.hook_sae_{kind}" for kind in ("acts_post", "recons", "error")]
    step = torch.zeros(1, ids.shape[1], 128, requires_grad=True)
    plain = straight(bundled.plain.model, ids, 0, {1: lambda read, out, stream: stream + out + step})
    (slope,) = torch.autograd.grad(plain[0, -1, 17], step)
    text = (ids != bundled.bos)[..., None]
    for gradients in ("features", "error", "both"):
        logits, acts = splice(bundled, coder, gradients=gradients).run(ids, names, grad=True)
        codes, recons, error = torch.autograd.grad(logits[0, -1, 17], [acts[name] for name in names])
        torch.testing.assert_close(codes, text * (slope @ coder.W_dec.T).detach(), rtol=1e-3, atol=1e-4)
        for each in (recons, error): torch.testing.assert_close(each, text * slope, rtol=1e-3, atol=1e-4)
