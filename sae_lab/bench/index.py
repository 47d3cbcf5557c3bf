"The feature index: building beside encoding alone, a page, opening, memory (hand-written)."
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from sae_lab.bench.frame import Row, interleaved, seconds
from sae_lab.coders.contract import make
from sae_lab.features.index import FeatureIndex, open_index
from sae_lab.sources.stream import Batch

D_IN, D_SAE, K, WIDTH, BATCH = 512, 16_384, 32, 128, 2048
LIMITS = {"page_p95": 50.0, "open": 1.0, "peak": 1.5}


@dataclass(frozen=True)
class Synthetic:
    "Sparse mixtures of Zipf-frequent directions, so that some latents are dense and many rare."
    tokens: SimpleNamespace
    hooks: tuple = ("synthetic",)

    @property
    def n_tokens(self): return self.tokens.ids.numel()

    @property
    def identity(self): return {"name": "synthetic", "seed": 0}

    @cached_property
    def pool(self):
        "A few distinct batches, read in turn: making data must cost nothing beside encoding it."
        g = torch.Generator().manual_seed(0)
        directions = torch.nn.functional.normalize(torch.randn(4096, D_IN, generator=g), dim=1)
        which = torch.multinomial(1 / torch.arange(1, 4097).float(), 16 * BATCH * 24, replacement=True, generator=g)
        x = torch.nn.functional.embedding_bag(which.reshape(-1, 24), directions, mode="sum")
        return (x + .02 * torch.randn(x.shape, generator=g)).split(BATCH)

    def batches(self, start=0):
        flat = self.tokens.ids.reshape(-1)
        for i in range(start * BATCH, self.n_tokens, BATCH):
            at = torch.arange(i, min(i + BATCH, self.n_tokens))
            x = self.pool[i // BATCH % len(self.pool)][:len(at)]
            yield Batch({"synthetic": x}, flat[at], at // 1000, at // WIDTH, at % WIDTH)


def synthetic(n):
    "A source of `n` tokens and its tokens."
    rows = n // WIDTH
    ids = torch.randint(0, 4096, (rows, WIDTH), generator=torch.Generator().manual_seed(1))
    doc = (torch.arange(rows * WIDTH) // 1000).reshape(rows, WIDTH)
    documents = tuple(f"doc {i}" for i in range(int(doc.max()) + 1))
    tokens = SimpleNamespace(ids=ids, doc=doc, special=ids < 0, documents=documents, provenance={"source": "synthetic"})
    return Synthetic(tokens), tokens


def encode_only(coder, source):
    "The bound: every batch encoded and dropped."
    with torch.no_grad():
        for batch in source.batches(): coder.encode(batch.acts["synthetic"])


def _pages(index, sample=400):
    g = np.random.default_rng(0)
    latents = g.choice(index.d_sae, min(sample, index.d_sae), replace=False).tolist()
    densest = np.argsort(-index.raw["count"])[:20].tolist()
    usual, dense = ([1000 * seconds(partial(index.page, latent)) for latent in some] for some in (latents, densest))
    return float(np.quantile(usual, .95)), max(dense)


def _peak(n):
    "Largest resident memory of a process that builds and reads an index, GB."
    done = subprocess.run([sys.executable, "-m", "sae_lab.bench.index", str(n)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _build_once(n):
    source, tokens = synthetic(n)
    with tempfile.TemporaryDirectory() as folder:
        index = FeatureIndex.build(make("topk", d_in=D_IN, d_sae=D_SAE, k=K), source, tokens, Path(folder) / "index")
        for latent in range(50): index.page(latent)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def rows(reps=5, n=1_000_000, n_build=100_000):
    "Cases `build` (s, against encoding alone, on `n_build` tokens), `page_p95` (ms), `open` (s), `peak` (GB), the last three on `n` tokens."
    coder = make("topk", d_in=D_IN, d_sae=D_SAE, k=K)
    source, tokens = synthetic(n_build)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        made = interleaved({"build": lambda: FeatureIndex.build(coder, source, tokens, home / "small")},
                           {"build": lambda: encode_only(coder, source)}, reps=reps)
        source, tokens = synthetic(n)
        index = FeatureIndex.build(coder, source, tokens, home / "index")
        opening = statistics.median(seconds(lambda: open_index(home / "index")) for _ in range(reps))
        p95, worst = _pages(index)
    values = {"page_p95": (p95, "ms"), "open": (opening, "s"), "peak": (_peak(n), "GB")}
    limited = [Row(case, value, unit, LIMITS[case], value / LIMITS[case]) for case, (value, unit) in values.items()]
    return [*made, *limited, Row("page_densest", worst, "ms")]


if __name__ == "__main__":
    sys.stdout.write(f"{_build_once(int(sys.argv[1]))}\n")
