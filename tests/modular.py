"Networks that add modulo 113, whose features are known by other means: their key frequencies."
import os
from pathlib import Path

import torch

P, D_MLP = 113, 512
ROOT = Path(__file__).resolve().parents[1]
MODELS = Path(os.environ.get("SAE_LAB_DATA", ROOT.parent / "shared" / "data")) / "models" / "modular_addition_5_seeds"
KEYS = {0: {15, 18, 1, 8}, 1: {1, 30, 38, 49}, 2: {49, 3, 19, 44}, 3: {36, 38, 49}, 4: {19, 15, 7, 20, 36}}
A, B = torch.arange(P).repeat_interleave(P), torch.arange(P).repeat(P)
PAIRS = torch.stack([A, B, torch.full_like(A, P)], 1)  # every question: a, b, =


def weights(seed):
    "One network's weights as its authors saved them."
    folder = next(MODELS.glob("lr-*" if seed == 0 else f"seed{seed}-*"))
    return torch.load(folder / "model_epoch_60000.pt", map_location="cpu", weights_only=True)


def forward(w):
    "MLP activations [113 * 113, 512] and logits [113 * 113, 114] at the last token of every question; plain torch."
    x = w["embed.W_E"][PAIRS] + w["pos_embed.W_pos"]
    weight = lambda name: w[f"blocks.0.{name}"]
    q = torch.einsum("nd,hde->nhe", x[:, 2], weight("attn.W_Q")) + weight("attn.b_Q")
    k, v = (torch.einsum("npd,hde->nphe", x, weight(f"attn.W_{c}")) + weight(f"attn.b_{c}") for c in "KV")
    pattern = (torch.einsum("nhe,nphe->nhp", q, k) / 32**0.5).softmax(-1)
    z = torch.einsum("nhp,nphe->nhe", pattern, v)
    mid = x[:, 2] + torch.einsum("nhe,hed->nd", z, weight("attn.W_O")) + weight("attn.b_O")
    mlp = torch.relu(mid @ weight("mlp.W_in") + weight("mlp.b_in"))
    out = mid + mlp @ weight("mlp.W_out") + weight("mlp.b_out")
    return mlp, out @ w["unembed.W_U"] + w["unembed.b_U"]


def power(acts):
    "Power of each column at each frequency 1 to 56 of a, of b, of a + b and of a - b, [m, 56]; the constant left out."
    spectrum = torch.fft.fft2(acts.T.reshape(-1, P, P).double()).abs().square()
    f, g = torch.arange(1, 57), P - torch.arange(1, 57)
    zero = torch.zeros_like(f)
    pairs = [(f, zero), (g, zero), (zero, f), (zero, g), (f, f), (g, g), (f, g), (g, f)]
    return sum(spectrum[:, i, j] for i, j in pairs)
