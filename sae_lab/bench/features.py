"What compares features of two large dictionaries over one text: time and memory of each, alone in a process (hand-written)."
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from sae_lab.bench.frame import Row, seconds
from sae_lab.coders.contract import make
from sae_lab.features.concepts import concept_scores
from sae_lab.features.index import FeatureIndex, open_index
from sae_lab.features.masks import masked, placed
from sae_lab.features.matching import match
from sae_lab.features.neighbours import neighbours
from sae_lab.features.products import sweep
from sae_lab.features.splitting import split
from sae_lab.features.universality import universality
from sae_lab.ground.sparse import Codes
from sae_lab.sources.stream import Batch

D_IN, K, WIDTH, BATCH = 64, 32, 128, 2048
SIZES = {"small": 4_096, "large": 16_384, "again": 16_384}  # the third is another seed of the second
MINUTES, MEMORY = 600.0, 2.0  # seconds and GB that each case may take


@dataclass(frozen=True)
class Drawn:
    "Which latents of `large` fire, drawn token by token: one in each of K ranges, the first of a range more often."
    tokens: SimpleNamespace
    hooks: tuple = ("drawn",)

    @property
    def n_tokens(self): return self.tokens.ids.numel()

    @property
    def identity(self): return {"name": "drawn", "seed": 0}

    def batches(self, start=0):
        wide, flat = SIZES["large"] // K, self.tokens.ids.reshape(-1)
        for i in range(start * BATCH, self.n_tokens, BATCH):
            at, g = torch.arange(i, min(i + BATCH, self.n_tokens)), torch.Generator().manual_seed(i)
            place = (wide * torch.rand(len(at), K, generator=g).square()).floor()
            strength = .1 - torch.rand(len(at), K, generator=g).clamp_min(1e-6).log()
            x = torch.cat([place + wide * torch.arange(K), strength], 1)
            yield Batch({"drawn": x}, flat[at], at // 1000, at // WIDTH, at % WIDTH)


@dataclass(frozen=True)
class Reader:
    "Codes of a dictionary for what was drawn: four latents of `large` are one of `small`; `again` differs on a fifth."
    name: str

    @property
    def d_sae(self): return SIZES[self.name]

    @property
    def spec(self): return coder(self.name).spec

    @property
    def identity(self): return self.name

    def encode(self, x):
        latent, strength = x[:, :K].long(), x[:, K:]
        if self.name == "small": latent = latent // 4
        if self.name == "again": latent = torch.where(strength.frac() < .2, latent ^ 1, latent)
        return Codes(strength, latent, self.d_sae)


def text(n: int) -> SimpleNamespace:
    "About `n` tokens in documents of 1,000."
    ids = torch.randint(0, 4096, (n // WIDTH, WIDTH), generator=torch.Generator().manual_seed(1))
    doc = (torch.arange(ids.numel()) // 1000).reshape(ids.shape)
    documents = tuple(f"doc {i}" for i in range(int(doc.max()) + 1))
    return SimpleNamespace(ids=ids, doc=doc, special=ids < 0, documents=documents, provenance={"source": "drawn"})


@cache
def coder(name: str) -> Any:
    "The dictionary that goes with what it reads: children stand around the direction of their parent."
    made, g = make("topk", d_in=D_IN, d_sae=SIZES[name], k=K), torch.Generator().manual_seed(7)
    rows = torch.randn(SIZES["small"], D_IN, generator=g)
    if name != "small": rows = rows.repeat_interleave(4, 0) + .5 * torch.randn(SIZES["large"], D_IN, generator=g)
    if name == "again": rows = rows + .3 * torch.randn(rows.shape, generator=g)
    rows = torch.nn.functional.normalize(rows, dim=1)
    made.W_dec.data, made.W_enc.data = rows, rows.T.clone()
    return made


def concepts(index: FeatureIndex) -> Any:
    "Two hundred sets of token ids, and places."
    return masked(index.text, {f"set {i}": index.text.ids % 200 == i for i in range(200)}) + placed(index.text)


def cases(home: Path) -> dict[str, Callable[[], object]]:  # name -> what to run
    "What is measured, on the indexes below `home`."
    index = {name: open_index(home / name) for name in SIZES}
    large, again = index["large"], index["again"]
    ladder = ("small", "large")
    return {
        "neighbours of 10": lambda: [neighbours(coder("large"), large, latent) for latent in range(10)],
        "sweep": lambda: sweep(large, again),
        "matching, decoder": lambda: match(coder("large"), coder("again"), null=False),
        "matching, correlation": lambda: match(large, again, by="correlation", null=False),
        "splitting": lambda: split({each: coder(each) for each in ladder}, [index[each] for each in ladder]),
        "universality": lambda: universality(large, {"again": again}),
        "concepts": lambda: concept_scores(large, concepts(large)).table(),
    }


def _alone(home: Path, case: str) -> tuple[float, float]:
    "Seconds and peak GB of one case in a process of its own."
    done = subprocess.run([sys.executable, "-m", "sae_lab.bench.features", str(home), case], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"{case}: {done.stderr[-500:]}")
    found = json.loads(done.stdout)
    return found["s"], found["gb"]


def rows(
    reps: int = 1,  # not used: each case runs once, in minutes
    n: int = 1_000_000,  # tokens
) -> list[Row]:  # seconds and GB of each case; bounds: ten minutes and 2 GB; ratios to them
    "Two dictionaries of 16,384 latents (for splitting 4,096 and 16,384), 32 a token, over the same tokens."
    made, tokens = [], text(n)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for name in SIZES: FeatureIndex.build(Reader(name), Drawn(tokens), tokens, home / name)
        for case in cases(home):
            took, peak = _alone(home, case)
            made += [Row(case, took, "s", MINUTES, took / MINUTES), Row(f"{case}, peak", peak, "GB", MEMORY, peak / MEMORY)]
    return made


if __name__ == "__main__":
    took = seconds(cases(Path(sys.argv[1]))[sys.argv[2]])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    sys.stdout.write(json.dumps({"s": took, "gb": peak}))
