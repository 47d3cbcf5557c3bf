"What the benchmarks share: their options, the commit they ran at, tables and figures."
import argparse
import csv
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent


def options(about: str | None, draw: bool = True) -> argparse.ArgumentParser:
    "A parser with the options of every benchmark; `draw`: it can write what is there without running."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of tables, pages and figures")
    if draw:
        parser.add_argument("--draw", action="store_true", help="write page and figure of what is there, run nothing")
    return parser


def commit() -> str:
    "The commit of the tree, short; empty outside a checkout."
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return head.stdout.strip()


def read_rows(path: Path, words: Iterable[str] = (), number: Callable = float) -> list[dict]:
    "Rows that are there; all but `words` as numbers."
    if not path.is_file(): return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: value if key in words else number(value) for key, value in line.items()}
                for line in csv.DictReader(file)]


def write_rows(path: Path, columns: Iterable[str], rows: Iterable[dict]) -> None:
    "Write a table."
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(columns), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def write_svg(fig, path: Path, width: str = "text") -> None:
    "Write a figure; needs Chromium."
    from sae_lab.views.figures import save_figures
    with TemporaryDirectory() as folder:
        saved = save_figures(fig, Path(folder) / path.stem, width=width, images=("svg",))
        if saved.left_out: raise SystemExit(f"No figure: {saved.left_out}")
        shutil.copy(Path(folder) / path.name, path)
