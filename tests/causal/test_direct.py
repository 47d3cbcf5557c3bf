"Direct effects add up to the logit, and each of them is what plain Hugging Face hooks say."
from importlib.resources import files
from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM

from sae_lab.causal.direct import by_unembedding, direct_effects, logit_lens, neurons_by_unembedding, part_lens, readout
from sae_lab.coders.contract import make
from sae_lab.coders.transcoder import at
from sae_lab.ground.errors import InputError, ShapeError
from sae_lab.sources.bridge import native
from sae_lab.sources.fable_tasks import indirect_object
from sae_lab.sources.subject import Subject
from sae_lab.splice.targets import Heads, Latents, Neurons

FOLDER = str(files("sae_lab") / "data" / "subject")


@pytest.fixture(scope="module")
def exact():
    "The bundled subject in float64."
    subject = Subject.bundled()
    subject.model.double()
    return subject


@pytest.fixture(scope="module")
def prompts(exact):
    "Prompts of unequal length, their answers and the wrong ones."
    some = indirect_object(seed=0, n=16)
    first = lambda word: int(exact.tokens(word, bos=False)[0, 0])
    answer, wrong = (torch.tensor([first(getattr(p, side)) for p in some]) for side in ("answer", "distractor"))
    return exact.tokens([p.text for p in some]), answer, wrong


def _coder(kind, hook, out=None, width=128, seed=0, **settings):
    "An untrained coder in float64, at its hooks, with biases that are not zero."
    made = make(kind, d_in=width, d_sae=200, k=12, seed=seed, **settings).double()
    with torch.no_grad(): made.b_dec.copy_(torch.randn(made.b_dec.shape, generator=torch.Generator().manual_seed(seed)))
    hooks = (hook,) if isinstance(hook, str) else tuple(hook)
    return at(made, hooks, out) if out else at(made, hooks)


CODERS = {
    "none": [],
    "resid_mid": [("topk", "blocks.1.hook_resid_mid")],
    "resid_post": [("topk", "blocks.3.hook_resid_post")],
    "first": [("topk", "blocks.0.hook_resid_pre")],
    "mlp_out": [("topk", "blocks.2.hook_mlp_out")],
    "neurons": [("topk", "blocks.2.mlp.hook_post", None, 512)],
    "heads": [("topk", "blocks.3.attn.hook_z")],
    "attention": [("topk", "blocks.0.hook_attn_out")],
    "two": [("topk", "blocks.0.hook_resid_post"), ("topk", "blocks.2.hook_mlp_out")],
    "transcoder": [("transcoder", "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")],
    "skip_transcoder": [("skip_transcoder", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out")],
}


@pytest.mark.parametrize("name, against", list(product(CODERS, (None, "mean", "other"))), ids=str)
def test_parts_add_up_to_the_logit(exact, prompts, name, against):
    "Embeddings, heads, MLPs, biases, latents and errors sum to the logit to 1e-4 in float64."
    tokens, answer, wrong = prompts
    coders = [_coder(*which, seed=i) for i, which in enumerate(CODERS[name])]
    found = direct_effects(exact, tokens, answer, wrong if against == "other" else against, coders=coders, neurons=[0])
    assert found.missing < 1e-9 < 1e-4
    gone = {"none": {"latent", "error"}, "resid_post": {"head"}}.get(name, set())
    assert {"bias", "head", "latent", "error"} - set(found.table.kind) == gone
    assert found.logit.dtype == torch.float64 and found.logit.abs().min() > 1e-3


def test_parts_are_those_of_hugging_face(exact, prompts):
    "Heads, MLPs and embeddings as read off the plain model with hooks of its own, in float64."
    tokens, answer, wrong = prompts
    model = AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="eager").double().eval()
    z, mlp, end = {}, {}, {}
    for layer, block in enumerate(model.transformer.h):
        block.attn.c_proj.register_forward_pre_hook(lambda _, args, layer=layer: z.update({layer: args[0]}))
        block.mlp.register_forward_hook(lambda _, __, out, layer=layer: mlp.update({layer: out}))
    model.transformer.ln_f.register_forward_pre_hook(lambda _, args: end.update(x=args[0]))
    with torch.no_grad(): logits = model(tokens).logits
    position = torch.tensor([int((row != 0).nonzero().max()) for row in tokens])
    rows, final = torch.arange(len(tokens)), model.transformer.ln_f
    x = end["x"][rows, position]
    std = (x.var(1, unbiased=False) + final.eps).sqrt()
    weight = model.lm_head.weight[answer] - model.lm_head.weight[wrong]

    def direct(part):
        part = part - part.mean(1, keepdim=True)
        return (part / std[:, None] * final.weight * weight).sum(1)
    found = direct_effects(exact, tokens, answer, wrong)
    assert torch.allclose(found.logit, logits[rows, position, answer] - logits[rows, position, wrong], atol=1e-9)
    table = found.table.set_index(["part", "row"]).effect
    for layer, block in enumerate(model.transformer.h):
        for head in range(4):
            cut = slice(32 * head, 32 * head + 32)
            mine = direct(z[layer][rows, position][:, cut] @ block.attn.c_proj.weight[cut])
            assert torch.allclose(torch.tensor(table[f"head {layer}.{head}"].sort_index().to_numpy()), mine, atol=1e-9)
        whole = torch.tensor((table[f"MLP {layer}"] + table[f"MLP {layer} bias"]).sort_index().to_numpy())
        assert torch.allclose(whole, direct(mlp[layer][rows, position]), atol=1e-9)
    words = direct(model.transformer.wte(tokens[rows, position]))
    assert torch.allclose(torch.tensor(table["embed"].sort_index().to_numpy()), words, atol=1e-9)


def test_latents_are_ablations_with_the_scale_frozen(exact, prompts):
    "At the last stream, silencing a latent moves the frozen logit by minus its direct effect."
    tokens, answer, wrong = prompts
    hook = "blocks.3.hook_resid_post"
    coder = _coder("topk", hook)
    found = direct_effects(exact, tokens[:1], answer[:1], wrong[:1], coders=coder)
    line = found.table[found.table.kind == "latent"].iloc[3]
    length = int((tokens[0] != 0).nonzero().max()) + 1
    text = tokens[:1, :length]
    scale = exact.run(text, "ln_final.hook_scale")["ln_final.hook_scale"]
    values = []
    for factor in (0.0, 1.0):
        step = (factor - 1) * line.activation * coder.W_dec[int(line["index"])].detach()
        logits, _ = exact.run_with(text, {hook: lambda x, step=step: x + step, "ln_final.hook_scale": lambda _: scale})
        values.append(float(logits[0, -1, answer[0]] - logits[0, -1, wrong[0]]))
    assert values[1] - values[0] == pytest.approx(line.effect, abs=1e-9)


def test_processed_weights_add_up():
    "With norms folded and weights centred the parts still add up, in float32."
    subject = Subject.load(FOLDER, fold_ln=True, center_writing_weights=True, center_unembed=True)
    tokens = subject.tokens("The fox gave the crow the")
    assert direct_effects(subject, tokens, against="mean").missing < 1e-4


@pytest.mark.parametrize("normalization_type", ["LN", "RMS", None])
def test_other_norms_add_up(normalization_type):
    "Any final norm, no tokenizer, no padding."
    sizes = dict(d_model=24, d_head=8, n_layers=2, n_ctx=12, n_heads=3, d_vocab=30)
    subject = Subject.wrap(native(seed=1, act_fn="relu", normalization_type=normalization_type, **sizes))
    tokens = torch.randint(1, 30, (3, 7), generator=torch.Generator().manual_seed(0))
    assert direct_effects(subject, tokens, neurons=[1]).missing < 1e-4
    assert logit_lens(subject, tokens).kl[-1].max() < 1e-4


def test_earlier_coders_are_left_out_and_said(exact, prompts):
    "What lies before a coder on the stream is inside it."
    coders = {"early": _coder("topk", "blocks.0.hook_mlp_out"),
              "late": _coder("topk", "blocks.2.hook_resid_pre", seed=1)}
    found = direct_effects(exact, prompts[0], coders=coders)
    assert list(found.left_out) == ["early"] and found.missing < 1e-9
    assert not any(part.startswith("early") for part in found.table.part) and "early left out" in found._repr_html_()


def test_position_and_mistakes(exact, prompts):
    "Negative positions count from the last token of text; what cannot be is refused."
    tokens = prompts[0]
    last = torch.tensor([int((row != 0).nonzero().max()) for row in tokens])
    assert torch.equal(direct_effects(exact, tokens, at=-2).logit, direct_effects(exact, tokens, at=last - 1).logit)
    with pytest.raises(ShapeError): direct_effects(exact, tokens, at=10_000)
    with pytest.raises(InputError, match="against"): readout(exact, prompts[1], "median")
    twice = [_coder("topk", "blocks.0.hook_resid_post"), _coder("topk", "blocks.1.hook_resid_pre")]
    with pytest.raises(InputError, match="two coders"): direct_effects(exact, tokens, coders=twice)
    query = _coder("topk", "blocks.1.attn.hook_q")
    with pytest.raises(InputError, match="linearly"): direct_effects(exact, tokens, coders=query)
    with pytest.raises(InputError, match="logit lens"): logit_lens(exact, tokens, ["blocks.1.hook_mlp_out"])
    with pytest.raises(InputError, match="side"): neurons_by_unembedding(exact, 0, "sideways")


def test_lens_ends_in_the_model(exact, prompts):
    "At the end the lens is the model, and the probability of what follows is that of its loss."
    tokens = prompts[0][:4, :12]
    lens = logit_lens(exact, tokens)
    assert lens.kl[-1].max() < 1e-6 and lens.kl.min() > -1e-6
    loss = -lens.following[-1].log()
    assert torch.allclose(loss, exact.loss(tokens).float(), atol=1e-4)
    assert torch.equal(lens.top[-1, ..., 0], exact.logits(tokens).argmax(-1))


def test_the_lens_half_way_is_that_of_hugging_face(exact, prompts):
    "The stream after each layer, through the plain model's own last norm and unembedding."
    tokens = prompts[0][:4, :12]
    model = AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="eager").double().eval()
    places = [f"blocks.{i}.hook_resid_pre" for i in range(4)]
    lens = logit_lens(exact, tokens, places, k=3)
    with torch.no_grad():
        states, logits = (lambda out: (out.hidden_states, out.logits))(model(tokens, output_hidden_states=True))
        final = logits.log_softmax(-1)
        for i in range(4):
            said = model.lm_head(model.transformer.ln_f(states[i])).log_softmax(-1)
            torch.testing.assert_close(lens.probability[i].double(), said.exp().topk(3).values, rtol=1e-5, atol=1e-7)
            follows = said[:, :-1].gather(2, tokens[:, 1:, None])[..., 0].exp()
            torch.testing.assert_close(lens.following[i].double(), follows, rtol=1e-5, atol=1e-7)
            apart = (final.exp() * (final - said)).sum(-1)
            torch.testing.assert_close(lens.kl[i].double(), apart, rtol=1e-4, atol=1e-5)


PARTS = {"heads": Heads(1, (3, 0)), "neurons": Neurons("blocks.2.mlp.hook_post", (5, 77)),
         "resid": "blocks.1.hook_resid_post", "mlp": "blocks.3.hook_mlp_out",
         "transcoder": ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")}


@pytest.mark.parametrize("name", PARTS)
def test_the_lens_through_a_part_is_its_direct_effect(exact, prompts, name):
    "For the tokens that it shows, what a part says is the direct effect of that part on them, above the mean."
    part, tokens = PARTS[name], prompts[0][:2]
    coder = None
    if name in ("resid", "mlp"): coder = _coder("topk", part)
    if name == "transcoder": coder = _coder("transcoder", *part)
    if coder is not None:
        seen = direct_effects(exact, tokens[:1], coders=coder).table
        part = Latents(coder, tuple(seen[seen.kind == "latent"]["index"].astype(int)[:2]))
    made = part_lens(exact, tokens, part, n=1)
    assert len(made) == 4 and made.row.tolist() == [0, 0, 1, 1]
    names = {"heads": "head 1.3", "neurons": "neuron 2.5"}
    for row in (0, 1):
        line = made[made.row == row].iloc[0]
        promoted = next(i for i, word in enumerate(exact.strings(range(exact.d_vocab))) if word == line.promoted)
        parts = direct_effects(exact, tokens[row:row + 1], torch.tensor([promoted]), "mean",
                               coders=[] if coder is None else coder, neurons=[2]).table
        mine = parts.part.str.endswith(names.get(name, line.part))
        want = float(parts[mine].effect.sum())
        assert line.logit == pytest.approx(want, rel=1e-5, abs=1e-6)
        if coder is not None: assert line.activation == pytest.approx(float(parts[mine].activation.sum()))


def test_neurons_are_decoded_as_by_hand(exact):
    "Tokens and peaks of neurons by their writing and reading weights, from the plain model's matrices."
    model = AutoModelForCausalLM.from_pretrained(FOLDER).double()
    gain, words = model.transformer.ln_f.weight, model.lm_head.weight
    out = (words * gain).T
    out = out - out.mean(0, keepdim=True)
    mlp = model.transformer.h[2].mlp
    for side, rows in (("out", mlp.c_proj.weight), ("in", mlp.c_fc.weight.T)):
        weights = (rows @ (out - out.mean(1, keepdim=True))).detach()
        z = (weights - weights.mean(1, keepdim=True)) / weights.std(1, keepdim=True)
        found = neurons_by_unembedding(exact, 2, side, n=1, controls=64)
        assert found.promoted.tolist() == exact.strings(weights.argmax(1))
        assert found.suppressed.tolist() == exact.strings(weights.argmin(1))
        torch.testing.assert_close(torch.tensor(found.peak.to_numpy()).double(), z.amax(1), rtol=1e-4, atol=1e-4)
        skew = torch.tensor(found["skew"].to_numpy()).double()
        torch.testing.assert_close(skew, z.pow(3).mean(1), rtol=1e-3, atol=1e-3)


def test_a_planted_direction_is_found(exact):
    "The column of a token, by the unembedding: that token first, sharper than every control."
    column = exact.unembed()[:, [300, 301]].t()
    found = by_unembedding(exact, column, n=1)
    assert found.promoted.tolist() == [" ".join(exact.strings(torch.tensor([i]))) for i in (300, 301)]
    assert (found.p < 0.01).all()
