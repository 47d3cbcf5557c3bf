"Networks that add modulo 113: latents of one key frequency carry the answer, random directions do not."
import pytest
import torch
from modular import KEYS, MODELS, PAIRS, A, B, P, forward, power, weights

from sae_lab.causal.effects import effect, turned
from sae_lab.causal.metrics import accuracy
from sae_lab.coders.contract import make
from sae_lab.coders.transcoder import at
from sae_lab.sources.bridge import native
from sae_lab.sources.stream import TensorSource
from sae_lab.sources.subject import Subject
from sae_lab.splice.edits import ablate
from sae_lab.splice.splice import placed
from sae_lab.splice.targets import Latents, Neurons
from sae_lab.training.fit import train

HOOK, POST = "blocks.0.hook_mlp_out", "blocks.0.mlp.hook_post"
LAST, CARRIED = torch.full((P * P,), 2), 0.03  # a latent carries a frequency that holds this share of its power

pytestmark = pytest.mark.skipif(not MODELS.is_dir(), reason=f"no networks in {MODELS}; set SAE_LAB_DATA")


def network(w):
    "The weights in a TransformerLens model."
    new = {"embed.weight": w["embed.W_E"], "pos_embed.weight": w["pos_embed.W_pos"],
           "unembed.weight": w["unembed.W_U"].T, "unembed.bias": w["unembed.b_U"]}
    for name in "QKV":
        new[f"blocks.0.attn.{name.lower()}.weight"] = w[f"blocks.0.attn.W_{name}"].permute(0, 2, 1).flatten(0, 1)
        new[f"blocks.0.attn.{name.lower()}.bias"] = w[f"blocks.0.attn.b_{name}"].flatten()
    new |= {"blocks.0.attn.o.weight": w["blocks.0.attn.W_O"].flatten(0, 1).T,
            "blocks.0.attn.o.bias": w["blocks.0.attn.b_O"]}
    for name in ("in", "out"):
        new |= {f"blocks.0.mlp.{name}.weight": w[f"blocks.0.mlp.W_{name}"].T,
                f"blocks.0.mlp.{name}.bias": w[f"blocks.0.mlp.b_{name}"]}
    model = native(d_model=128, d_head=32, n_layers=1, n_ctx=3, n_heads=4, d_vocab=114, d_mlp=512, act_fn="relu",
                   normalization_type=None)
    model.load_state_dict({key: value.contiguous() for key, value in new.items()})
    return Subject.wrap(model, name="modular addition")


def carriers(acts, frequency):
    "Columns of activations that carry a frequency."
    found = power(acts)
    share = found[:, frequency - 1] / found.sum(1).clamp(min=1e-9)
    return tuple(((share > CARRIED) & (found.sum(1) > 0)).nonzero()[:, 0].tolist())


def left(subject, metric, edit):
    "Accuracy after an edit, with the no-op checked."
    found = effect(subject, edit, (PAIRS, LAST), metric, controls=0)
    assert found.noop == 0 and found.clean["accuracy"].mean() >= 0.999
    return float(found.edited["accuracy"].mean())


def elsewhere(subject, metric, out, edit, n=8):
    "Accuracy when the very change of an edit is turned in random directions, prompt by prompt of the same length."
    _, acts = subject.run_with(PAIRS, edit.edits(subject, PAIRS), [HOOK])
    step, where = (acts[HOOK] - out)[:, 2], torch.zeros_like(PAIRS, dtype=torch.bool)
    where[:, 2] = True
    runs = (subject.run_with(PAIRS, {HOOK: placed(turned(step, seed), where, True)})[0] for seed in range(n))
    return [float(metric(logits, PAIRS).mean()) for logits in runs]


def told(seed):
    "The table of one network: frequency -> accuracy without its latents, with the change turned, without its neurons."
    w = weights(seed)
    subject, (mlp, logits) = network(w), forward(w)
    torch.testing.assert_close(subject.logits(PAIRS)[:, 2], logits, rtol=1e-4, atol=1e-3)
    metric, out = accuracy((A + B) % P, LAST), subject.run(PAIRS, HOOK)[HOOK]
    made = make("batchtopk", d_in=128, d_sae=128, k=16, seed=0)
    (made,) = train(made, TensorSource(out[:, 2], batch=512, seed=0, epochs=15), progress=False, seed=0).values()
    coder = at(made, HOOK)
    with torch.no_grad():
        dense = coder.encode(out[:, 2]).dense()
    rows = {}
    for frequency in sorted(KEYS[seed]):
        latents, neurons = carriers(dense, frequency), carriers(mlp, frequency)
        if not latents: continue
        edit = ablate(Latents(coder, latents), at=2)
        turns = elsewhere(subject, metric, out, edit)
        rows[frequency] = dict(latents=len(latents), left=left(subject, metric, edit), turned=sum(turns) / len(turns),
                               least=min(turns), neurons=len(neurons),
                               without=left(subject, metric, ablate(Neurons(POST, neurons), at=2)))
        print(seed, frequency, {key: round(value, 3) for key, value in rows[frequency].items()})
    return rows


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3, 4))])
def test_one_key_frequency(seed):
    "Without the latents of some key frequency hardly an answer is right; the same change elsewhere hardly matters."
    rows = told(seed).values()
    assert any(row["left"] <= 0.10 and row["turned"] >= 0.95 for row in rows)
