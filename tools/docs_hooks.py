"""For mkdocs: the notebooks of docs/ become pages, with the outputs that they ship with. Nothing runs."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Put a page in for every notebook, and its pictures beside it."""
    for path in sorted(Path(config.docs_dir).glob("*.ipynb")):
        pictures: dict[str, bytes] = {}
        page = _page(json.loads(path.read_text(encoding="utf-8")), path.stem, pictures)
        files.append(File.generated(config, f"{path.stem}.md", content=page))
        for name, data in pictures.items():
            files.append(File.generated(config, name, content=data))
    return files


def _page(notebook: dict[str, Any], stem: str, pictures: dict[str, bytes]) -> str:
    parts: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [_output(output, stem, pictures) for output in cell["outputs"]]
    note = f"*This page is the notebook [{stem}.ipynb]({stem}.ipynb), with the outputs of its last run.*"
    head, _, rest = "\n\n".join(part for part in parts if part).partition("\n")
    return f"{head}\n\n{note}\n{rest}\n"


def _output(output: dict[str, Any], stem: str, pictures: dict[str, bytes]) -> str:
    """One output of a cell: a picture, a table, or text."""
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{stem}_{len(pictures)}.png"
        pictures[name] = base64.b64decode("".join(data["image/png"]))
        return f"![output]({name})"
    if "text/html" in data:
        # A blank line would end the HTML for Markdown.
        return re.sub(r"\n\s*\n", "\n&nbsp;\n", "".join(data["text/html"]))
    text = "".join(data.get("text/plain", output.get("text", [])))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""
