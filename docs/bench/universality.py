"Do two seeds of a dictionary find the same latents? Best correlations on the bundled subject, beside controls."
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from shared import commit, options, read_rows, write_rows, write_svg

from sae_lab.coders.contract import AbstractCoder, coders, make
from sae_lab.coders.transcoder import at
from sae_lab.features.index import FeatureIndex
from sae_lab.features.matching import shared
from sae_lab.features.universality import Universality, universality
from sae_lab.sources.corpus import Tokens, named
from sae_lab.sources.stream import Stream
from sae_lab.sources.subject import Subject
from sae_lab.training.fit import train
from sae_lab.views.figures import SERIES

HOOK, K, BATCH, FIT, READ, LEAST, LEVEL = "blocks.1.mlp.hook_post", 16, 1024, 400_000, 60_000, 30, 0.7
SIZES = (512,)
KINDS = ("topk",)
FACTS = ("median", "low", "high", "share", "share_low", "share_high")
COLUMNS = ["kind", "d_sae", "against", "candidates", *FACTS, "n", "tokens", "fit", "commit"]
GRID = np.linspace(0, 1, 101)


def trained(seed: int, subject: Subject, tokens: Tokens) -> dict[tuple[str, int], AbstractCoder]:
    "Every kind and size of one seed, on one stream whose order is the seed's too."
    width = subject.hooks[HOOK]
    made = {(kind, size): at(make(kind, d_in=width, d_sae=size, k=K, seed=seed), HOOK)
            for kind in KINDS for size in SIZES}
    names = {f"{kind}-{size}": coder for (kind, size), coder in made.items()}
    train(names, Stream(subject, tokens, HOOK, batch=BATCH, seed=seed), seed=seed)
    return made


def blind(size: int, subject: Subject, tokens: Tokens) -> AbstractCoder:
    "The control: as many random directions around the mean of the data, the same number a token."
    coder = make("random", d_in=subject.hooks[HOOK], d_sae=size, k=K, seed=99)
    some = (batch.acts[HOOK] for batch, _ in zip(Stream(subject, tokens, HOOK, batch=BATCH).batches(), range(50)))
    return at(coders["random"].meta["solve"](coder, some), HOOK)


def compared(one: AbstractCoder, other: AbstractCoder, control: AbstractCoder, subject: Subject, text: Tokens,
             folder: Path) -> Universality:
    "One seed held against another, neurons, and random directions."
    source = Stream(subject, text, HOOK, seed=None)
    index = {name: FeatureIndex.build(coder, source, text, folder / name)
             for name, coder in (("one", one), ("other", other), ("random", control))}
    against = {"another seed": index["other"], "neurons": source, "random directions": index["random"]}
    return universality(index["one"], against, least=LEAST, level=LEVEL)


def lines(kind: str, size: int, found: Universality, both, fit: int, commit: str) -> tuple[list[dict], list[dict]]:
    "Rows of the table, and of the cumulative shares that are drawn."
    facts = {"kind": kind, "d_sae": size, "tokens": found.n, "fit": fit, "commit": commit}
    rows = [{**facts, **{key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}}
            for row in found.summary.to_dict("records")]
    m = both.share
    rows.append({**facts, "against": "shared by weights (decoder and encoder)", "candidates": size, "share": m.value,
                 "share_low": round(m.low, 5), "share_high": round(m.high, 5), "n": m.count})
    curves = [{"kind": kind, "d_sae": size, "against": name, "r": round(float(r), 2),
               "share": round(float((found.best[name].dropna() > r).mean()), 5)}
              for name in found.best.columns[1:] for r in GRID]
    return rows, curves


def picture(curves: list[dict]):
    "Share of latents whose best correlation is above r, against r."
    import plotly.graph_objects as go
    fig = go.Figure()
    mine = [row for row in curves if row["kind"] == KINDS[0] and int(row["d_sae"]) == max(SIZES)]
    dash = ("solid", "dash", "dot", "dashdot", "longdash")
    for i, name in enumerate(dict.fromkeys(row["against"] for row in mine)):
        own = [row for row in mine if row["against"] == name]
        fig.add_scatter(x=[float(row["r"]) for row in own], y=[float(row["share"]) for row in own], name=name,
                        mode="lines", line={"color": SERIES[i % len(SERIES)], "dash": dash[i % len(dash)], "width": 2})
    fig.update_xaxes(title_text="correlation r")
    return fig.update_yaxes(title_text="latents whose best is above r", tickformat=".0%")


def cell(row: dict, name: str, low: str, high: str) -> str:
    "A number with its interval."
    if row[name] == "": return "–"
    return f"{float(row[name]):.3f} ({float(row[low]):.3f} to {float(row[high]):.3f})"


def table(rows: list[dict]) -> str:
    "A Markdown table."
    head = ["coder", "latents asked", "against", "candidates", "median best r", f"share above {LEVEL}"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        out.append(f"| {row['kind']} {int(row['d_sae']):,} | {int(row['n']):,} | {row['against']} | "
                   f"{int(row['candidates']):,} | {cell(row, 'median', 'low', 'high')} | "
                   f"{cell(row, 'share', 'share_low', 'share_high')} |")
    return "\n".join(out)


PAGE = """# Universality between two seeds

Two seeds of each coder ({k} latents a token, at `{hook}` of the bundled subject), each trained on {fit:,} tokens in
an order of its own. For every latent of the first seed that fires on at least {least} of {read:,} tokens of the
explain part: its largest activation correlation with the latents of the second seed, with the neurons of the hook,
with as many random directions (the same number a token, around the mean), and with the second seed's latents when the
text under them is moved by half the corpus. Medians with a bootstrap interval over latents; shares with Wilson's. The
last line of each coder counts by weights alone: latents whose decoder match and encoder match agree, both with a
cosine above 0.7 (after Paulo & Belrose 2025), with Wilson's interval. Two seeds of one small model, trained briefly:
what is found here is found here.

{table}

![Share of latents whose best correlation is above r](universality.svg)

The figure shows `{first}` with {most:,} latents; all curves are in `universality_curves.csv`.

```sh
python docs/bench/universality.py --fit {fit}
```
"""


def draw(out: Path) -> None:
    "Page and figure; the figure needs Chromium."
    rows, curves = (read_rows(out / f"{name}.csv", number=str) for name in ("universality", "universality_curves"))
    fit, read = (int(rows[0][name]) for name in ("fit", "tokens"))
    page = PAGE.format(k=K, hook=HOOK, fit=fit, read=read, least=LEAST, table=table(rows), first=KINDS[0],
                       most=max(SIZES))
    (out / "universality.md").write_text(page, encoding="utf-8")
    write_svg(picture(curves), out / "universality.svg")


def main() -> None:
    "Train, compare, write and draw."
    parser = options(__doc__)
    parser.add_argument("--fit", type=int, default=FIT, help="tokens to train on")
    args = parser.parse_args()
    if args.draw: return draw(args.out)
    subject, corpus = Subject.bundled(), named("bundled")
    fit, text = (corpus.split(part, seed=0).tokens(subject, n) for part, n in (("fit", args.fit), ("explain", READ)))
    one, other = (trained(seed, subject, fit) for seed in (0, 1))
    rows, curves = [], []
    for kind, size in one:
        with TemporaryDirectory() as folder:
            pair = one[kind, size], other[kind, size]
            found = compared(*pair, blind(size, subject, fit), subject, text, Path(folder))
            more = lines(kind, size, found, shared(*pair), args.fit, commit())
        rows, curves = rows + more[0], curves + more[1]
        write_rows(args.out / "universality.csv", COLUMNS, rows)
        write_rows(args.out / "universality_curves.csv", ["kind", "d_sae", "against", "r", "share"], curves)
    draw(args.out)


if __name__ == "__main__":
    main()
