"""Notebooks without Jupyter: run their cells, keep what they show, and turn them into pages of the site.

    python docs/notebooks.py examples/mixture.ipynb             # runs every cell; an error in one ends it
    python docs/notebooks.py examples/mixture.ipynb --write     # and stores the outputs in the notebook

A cell is run as Jupyter would: all in one namespace, the last expression is shown, and so are the figures that are open at its
end. Cells are plain Python; there are no magics. `mkdocs.yml` names this file as a hook: the site's pages are made from the
stored outputs, so that building it runs nothing.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
Notebook = dict[str, Any]


# --- running ---------------------------------------------------------------------------------------------------------


def run(path: Path) -> Notebook:
    """The notebook with the outputs of its code cells, run in a temporary folder."""
    import matplotlib

    matplotlib.use("Agg")
    notebook: Notebook = json.loads(path.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            count = 0
            for number, cell in enumerate(notebook["cells"]):
                if cell["cell_type"] == "code":
                    count += 1
                    name = f"{path.name}, cell {number}"
                    cell |= {
                        "execution_count": count,
                        "outputs": outputs_of("".join(cell["source"]), name, namespace, count),
                    }
        finally:
            os.chdir(here)
    return notebook


def outputs_of(source: str, name: str, namespace: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What a cell prints and shows, as a notebook stores it."""
    import matplotlib.pyplot as plt

    tree, shown = ast.parse(source, name), None
    if tree.body and isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";"):
        shown = ast.Expression(tree.body.pop().value)  # type: ignore[attr-defined]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        value = eval(compile(shown, name, "eval"), namespace) if shown is not None else None
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append(
            {"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)}
        )
    pictures = [png(plt.figure(number)) for number in plt.get_fignums()]
    outputs += [{"output_type": "display_data", "metadata": {}, "data": {"image/png": picture}} for picture in pictures]
    plt.close("all")
    if value is not None:
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "savefig"):
            data["image/png"] = png(value)
        elif hasattr(value, "_repr_html_"):
            data["text/html"] = str(value._repr_html_()).splitlines(keepends=True)
        outputs.append({"output_type": "execute_result", "metadata": {}, "execution_count": count, "data": data})
    return outputs


def png(figure: Any) -> str:
    """A matplotlib figure as a notebook stores it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80, bbox_inches="tight", metadata={"Software": None})
    return base64.b64encode(file.getvalue()).decode()


# --- pages -----------------------------------------------------------------------------------------------------------


def page(notebook: Notebook, name: str) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook with its stored outputs, and the pictures beside it."""
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{name}-{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode(data["image/png"])
                parts.append(f"![What the cell shows]({picture})")
            else:
                text = "".join(output.get("text", ()) or data.get("text/plain", ()))
                parts.append(f"```text\n{text.rstrip()}\n```")
    parts.append(f"*This page is `examples/{name}.ipynb`; a test runs its cells.*")
    return "\n\n".join(parts) + "\n", pictures


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: a page for each notebook in examples/."""
    from mkdocs.structure.files import File

    for path in sorted(EXAMPLES.glob("*.ipynb")):
        text, pictures = page(json.loads(path.read_text(encoding="utf-8")), path.stem)
        files.append(File.generated(config, f"examples/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"examples/{name}", content=content))
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="store the outputs in the notebook")
    options = parser.parse_args()
    for path in options.notebooks:
        notebook = run(path)
        if options.write:
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path}: every cell ran")


if __name__ == "__main__":
    main()
