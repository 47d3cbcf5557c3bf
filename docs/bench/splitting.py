"Children of a latent against the size of the dictionary, on the bundled subject: as found, with intervals."
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from shared import commit, options, write_svg

from sae_lab.features.splitting import Splitting, heirs, split
from sae_lab.lab import Lab
from sae_lab.views.figures import SERIES

HOOK, SIZES, K, FIT, READ = "blocks.1.mlp.hook_post", (512, 4096, 16384), 32, 400_000, 200_000

STATES = ("kept", "split", "absorbed", "novel", "rare")


def found(folder: Path) -> tuple[Splitting, float]:
    "The splitting of the ladder, and the seconds of processor time that it took."
    lab = Lab("bundled")
    lab.collect(HOOK, tokens=FIT)
    coders = lab.train(SIZES, k=K, show=False)
    indexes = [lab.index(name, READ) for name in coders]
    start = time.process_time()
    made = split(coders, indexes)
    made.save(folder)
    return made, time.process_time() - start


def rows(made: Splitting) -> pd.DataFrame:
    "A row a level: children per latent, states of the next dictionary, medians of the evidence of shown edges."
    table = made.children_per_latent()
    for level in table.level:
        here = made.states[made.states.level == level + 1]
        shown = made.edges[made.edges.shown & (made.edges.level == level)]
        parents = made.states[(made.states.level == level) & (made.states.state != "rare")]
        facts = {state: int((here.state == state).sum()) for state in STATES}
        facts |= {"edges": len(shown), "childless": int((parents.children == 0).sum()),
                  "heirs": len(heirs(shown, made.rules["same"]))}
        facts |= {name: round(float(shown[name].median()), 4) for name in ("cosine", "correlation", "given", "reverse")}
        table.loc[table.level == level, list(facts)] = list(facts.values())
    return table.astype(dict.fromkeys([*STATES, "edges", "childless", "heirs"], int)).round(5)


def histogram(made: Splitting) -> pd.DataFrame:
    "Share of judged latents with 0, 1, 2 ... children, by level."
    kept = made.states[(made.states.state != "rare") & (made.states.level < len(made.sizes) - 1)]
    share = kept.groupby("level").children.value_counts(normalize=True).rename("share").reset_index()
    return share.sort_values(["level", "children"])


def picture(made: Splitting):
    "Share of latents with at least so many children, a line a step of the ladder."
    import plotly.graph_objects as go
    fig, share = go.Figure(), histogram(made)
    for i, level in enumerate(sorted(set(share.level))):
        mine = share[share.level == level]
        at_least = [1.0, *(1 - mine.share.cumsum()).clip(lower=0).tolist()[:-1]]
        fig.add_scatter(x=mine.children, y=at_least, mode="lines+markers", line={"color": SERIES[i], "shape": "hv"},
                        marker={"symbol": ("circle", "diamond", "square")[i % 3], "size": 5},
                        name=f"{made.sizes[level]:,} into {made.sizes[level + 1]:,}")
    fig.update_xaxes(title_text="children", rangemode="tozero")
    return fig.update_yaxes(title_text="share of latents with at least so many", rangemode="tozero")


def markdown(frame: pd.DataFrame) -> str:
    "A Markdown table."
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    return "\n".join(lines + ["| " + " | ".join(map(_short, row)) + " |" for row in frame.itertuples(index=False)])


def _short(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else str(value)


PAGE = """# Splitting

Dictionaries of {sizes} latents with {k} a token (`topk`, one seed) at `{hook}` of the bundled subject, trained on
{fit:,} tokens and read on {read:,} others. An edge joins a latent of one dictionary with one of the next. It is shown
when decoder cosine, activation correlation and P(parent | child) all exceed what chance gives (p is the largest of
the three; Benjamini and Hochberg over all {tests:,} pairs, false discovery rate at most {fdr:.0%}) and the child fires
inside the parent: (P(parent | child) - P(parent)) / (1 - P(parent)) is at least {least}. A latent that fires on fewer
than {count} tokens is not judged.

## Children of a latent
Mean number of shown children, with a bootstrap interval over the latents that can be judged.

{children}

![Share of latents with at least so many children](splitting.svg)

## What became of the latents of the larger dictionary
{states}

*kept*: the only child of its parent, or the same direction on at least half of the parent's tokens; *absorbed*: the
parent lives on, but falls silent where this latent fires; *split*: one of several children; *novel*: no shown parent;
*rare*: too few tokens to judge. *childless* counts latents of the smaller dictionary without a shown child; the four
columns of evidence are medians over shown edges. *heirs* counts latents of the smaller dictionary that live on in one
direction (cosine of at least {same}): only with an heir can anything be called absorbed, so where there is none, no
absorbed latent says nothing about absorption.

## What chance gives
{nulls}

One subject, one hook, one seed of coders: what is found here is found here. A latent without a parent may have one that
these tokens or this bound do not show. All of it took {seconds:.0f} s of one core.

```sh
python docs/bench/splitting.py
```
"""


def draw(made: Splitting, seconds: float, commit: str, out: Path) -> None:
    "Table, page and figure; the figure needs Chromium."
    table = rows(made)
    facts = table.assign(seconds=round(seconds, 1), commit=commit)
    facts.to_csv(out / "splitting.csv", index=False, lineterminator="\n")
    states = ["level", *STATES, "edges", "childless", "heirs", "cosine", "correlation", "given", "reverse"]
    page = PAGE.format(sizes=" / ".join(f"{size:,}" for size in made.sizes), k=K, hook=HOOK, fit=FIT,
                       read=made.rules["tokens"], tests=sum(made.rules["tests"]), fdr=made.fdr,
                       least=made.rules["least"], same=made.rules["same"],
                       count=made.rules["count"], seconds=seconds, nulls=markdown(made.nulls),
                       children=markdown(table[["size", "into", "mean", "low", "high", "n"]]),
                       states=markdown(table[states]))
    (out / "splitting.md").write_text(page, encoding="utf-8")
    write_svg(picture(made), out / "splitting.svg")


def main() -> None:
    "Train what is missing, split, draw and write."
    parser = options(__doc__, draw=False)
    parser.add_argument("--keep", type=Path, help="folder for the splitting itself")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        draw(*found(args.keep or Path(folder) / "splitting"), commit(), args.out)


if __name__ == "__main__":
    main()
