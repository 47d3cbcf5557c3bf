"A real character model in a TransformerLens model of our own making, against a plain forward written out here."
import copy

import pytest
import torch
import torch.nn.functional as F

from sae_lab.coders.contract import make
from sae_lab.measures.reconstruction import reconstruction
from sae_lab.sources.bridge import native
from sae_lab.sources.stream import TensorSource
from sae_lab.sources.subject import Subject
from sae_lab.training.fit import train

LAYERS, HEADS, D_MODEL, D_HEAD, CTX, VOCAB = 4, 4, 64, 16, 32, 169


@pytest.fixture(scope="module")
def weights(data):
    "The author's state dict."
    return torch.load(data / "models" / "char_lm_223k" / "model_weights.pth", map_location="cpu", weights_only=True)


def converted(w):
    "The author's weights under TransformerLens' names; W_Q is halved: scores are divided by 8, not 4."
    new = {"embed.weight": w["token_embedding_table.weight"], "pos_embed.weight": w["position_embedding_table.weight"],
           "ln_final.weight": w["ln_f.weight"], "ln_final.bias": w["ln_f.bias"],
           "unembed.weight": w["lm_head.weight"], "unembed.bias": w["lm_head.bias"]}
    for layer in range(LAYERS):
        old, to = f"blocks.{layer}.", f"blocks.{layer}."
        for key, name, factor in (("q", "query", 0.5), ("k", "key", 1), ("v", "value", 1)):
            heads = [w[f"{old}sa.heads.{head}.{name}.weight"] for head in range(HEADS)]
            new[f"{to}attn.{key}.weight"] = torch.cat(heads) * factor
            new[f"{to}attn.{key}.bias"] = torch.zeros(D_MODEL)
        for key, name in {"attn.o": "sa.proj", "mlp.in": "ffwd.net.0", "mlp.out": "ffwd.net.2",
                          "ln1": "ln1", "ln2": "ln2"}.items():
            for kind in ("weight", "bias"):
                new[f"{to}{key}.{kind}"] = w[f"{old}{name}.{kind}"]
    return new


def forward(w, ids):
    "The model as its author describes it, in float64; also the stream behind block 2."
    w = {key: value.double() for key, value in w.items()}
    x = w["token_embedding_table.weight"][ids] + w["position_embedding_table.weight"][: ids.shape[1]]
    mask = torch.ones(ids.shape[1], ids.shape[1]).tril() == 0
    kept = {}
    for layer in range(LAYERS):
        p = f"blocks.{layer}."
        norm = lambda x, name, p=p: F.layer_norm(x, (D_MODEL,), w[f"{p}{name}.weight"], w[f"{p}{name}.bias"])
        h, heads = norm(x, "ln1"), []
        for head in range(HEADS):
            q, k, v = (h @ w[f"{p}sa.heads.{head}.{name}.weight"].T for name in ("query", "key", "value"))
            scores = (q @ k.transpose(-2, -1) / D_MODEL**0.5).masked_fill(mask, float("-inf"))
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ w[f"{p}sa.proj.weight"].T + w[f"{p}sa.proj.bias"]
        h = (norm(x, "ln2") @ w[f"{p}ffwd.net.0.weight"].T + w[f"{p}ffwd.net.0.bias"]).relu()
        x = x + h @ w[f"{p}ffwd.net.2.weight"].T + w[f"{p}ffwd.net.2.bias"]
        kept[layer] = x
    x = F.layer_norm(x, (D_MODEL,), w["ln_f.weight"], w["ln_f.bias"])
    return x @ w["lm_head.weight"].T + w["lm_head.bias"], kept[2]


@pytest.fixture(scope="module")
def subject(weights):
    model = native(d_model=D_MODEL, d_head=D_HEAD, n_layers=LAYERS, n_ctx=CTX, n_heads=HEADS, d_vocab=VOCAB,
                   d_mlp=256, act_fn="relu", normalization_type="LN")
    new = converted(weights)
    assert model.state_dict().keys() == new.keys()
    model.load_state_dict(new)
    return Subject.wrap(model, name="char_lm_223k")


def test_logits_equal_a_plain_forward(subject, weights):
    "To 1e-5 in float32; in float64 to 1e-10, so that what is left is rounding."
    ids = torch.randint(VOCAB, (8, CTX), generator=torch.Generator().manual_seed(0))
    logits, stream = forward(weights, ids)
    got = subject.run(ids, "blocks.2.hook_resid_post")["blocks.2.hook_resid_post"]
    assert torch.allclose(subject.logits(ids).double(), logits, atol=1e-5, rtol=1e-5)
    assert torch.allclose(got.double(), stream, atol=1e-5, rtol=1e-5)
    exact = Subject.wrap(copy.deepcopy(subject.model).double())
    assert (exact.logits(ids) - logits).abs().max() < 1e-10


def test_it_is_the_published_model(subject):
    "English written in its own ids costs far less than chance: the weights are where they belong."
    code = {"\t": 0, "\n": 1, " ": 2} | {chr(ord("!") + i): 3 + i for i in range(58)}
    code = {c: i for c, i in code.items() if c <= "X"} | {chr(ord("c") + i): 68 + i for i in range(24)}
    text = "He had been the first to see the light of the sun, and he went down to the river"
    ids = torch.tensor([code[c] for c in text if c in code])
    loss = subject.loss(ids.unfold(0, CTX, 8))
    assert loss.mean() < 3 < torch.tensor(float(VOCAB)).log()


def written(subject, n, seed):
    "Text the model itself writes, from a newline on: `n` sequences that fill its context."
    generator = torch.Generator().manual_seed(seed)
    ids = torch.ones(n, 1, dtype=torch.long)
    while ids.shape[1] < CTX:
        likely = subject.logits(ids)[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(likely, 1, generator=generator)], 1)
    return ids


def test_a_topk_coder_explains_it(subject):
    "512 latents, 8 at a time, explain 0.92 of the variance on text held out; none is silent on all it was fitted to."
    hook = "blocks.2.hook_resid_post"
    acts = [subject.run(written(subject, 1000, seed), hook)[hook].flatten(0, 1) for seed in range(6)]
    fitted, held_out = torch.cat(acts[:5]), acts[5]
    coder = make("topk", d_in=D_MODEL, d_sae=512, k=8)
    train(coder, TensorSource(fitted, hook=hook, epochs=8), progress=False)
    found = reconstruction(coder, TensorSource(held_out, hook=hook))
    assert found["explained_variance"].value >= 0.92
    assert found["l0"].value <= 8
    assert reconstruction(coder, TensorSource(fitted, hook=hook))["dead"].value == 0
