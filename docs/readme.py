"Write README.md from nbs/index.ipynb: markdown, code and text outputs, hidden cells left out."
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def readme(notebook: Path) -> str:
    "The notebook as Markdown."
    parts = []
    for cell in json.loads(notebook.read_text())["cells"]:
        text = "".join(cell["source"]).strip()
        if re.search(r"^#\| *hide\b", text, re.M):
            continue
        if cell["cell_type"] == "markdown":
            parts.append(text)
        elif text:
            parts.append(f"```python\n{text}\n```")
            shown = ["".join(o.get("text") or o["data"].get("text/plain", "")) for o in cell.get("outputs", [])
                     if o["output_type"] in ("stream", "execute_result", "display_data")]
            if "".join(shown).strip():
                parts.append("```\n" + "\n".join(s.rstrip() for s in shown) + "\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(ROOT / "nbs" / "index.ipynb"), encoding="utf-8")
