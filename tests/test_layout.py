"""The house: a module imports only from its own wing and the wings before it; what is heavy is imported where it belongs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import scoreact

ROOT = Path(scoreact.__file__).parent
WINGS = (
    "types", "support", "dynamics", "models", "rewards", "control", "algorithms", "sampling", "evaluation", "training",
    "recipes", "runs", "feedback", "report", "api", "arena", "cli",
)  # fmt: skip
FRONT_DOOR = {"__init__", "__main__"}  # the package itself: opens whatever a user asks for
HEAVY = {"diffusers", "transformers", "peft", "onnx"}
HEAVY_AT = (
    "models/lora",
    "models/pipelines/",
    "rewards/text_image",
    "rewards/vision_language",
    "rewards/published_weights",
    "rewards/onnx_graph",
)


def modules() -> Iterator[tuple[str, Path, ast.Module]]:
    """Dotted name below scoreact, file, syntax tree."""
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, path, ast.parse(path.read_text(encoding="utf-8"))


def imported(name: str, path: Path, tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """What a module imports of this package: dotted name below scoreact, line, and whether only for the type checker."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    quiet = {
        id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif (node.module or "").split(".")[0] == "scoreact":
                base = []
            else:
                continue
            module = (node.module or "").removeprefix("scoreact").lstrip(".")
            target = ".".join([*base, *([module] if module else [])])
            for alias in node.names:
                whole = f"{target}.{alias.name}" if target else alias.name
                inner = ROOT.joinpath(*whole.split("."))
                found = whole if inner.is_dir() or inner.with_suffix(".py").is_file() else target
                yield found, node.lineno, id(node) in quiet


def test_a_module_imports_only_from_its_own_wing_and_those_before_it() -> None:
    wrong = []
    for name, path, tree in modules():
        wing = name.split(".")[0]
        if wing in FRONT_DOOR or name == "":
            continue
        for target, line, _ in imported(name, path, tree):
            other = target.split(".")[0]
            if other and WINGS.index(other) > WINGS.index(wing):
                wrong.append(f"{name}, line {line}: {target}")
    assert wrong == []


def test_every_folder_is_a_wing_in_the_list() -> None:
    found = {name.split(".")[0] for name, _, _ in modules()} - FRONT_DOOR - {""}
    assert found == set(WINGS)


def test_no_circle_between_modules() -> None:
    """At import: lazy imports inside functions and those for the type checker do not count."""
    edges: dict[str, set[str]] = defaultdict(set)
    for name, path, tree in modules():
        lazy = {
            id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for inner in ast.walk(node)
        }  # fmt: skip
        top = ast.Module(
            [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and id(node) not in lazy], []
        )
        quiet = {line for _, line, only_types in imported(name, path, tree) if only_types}
        edges[name] = {target for target, line, _ in imported(name, path, top) if line not in quiet and target != name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


def test_heavy_packages_are_imported_in_their_place_only() -> None:
    wrong = []
    for name, path, tree in modules():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if {n.split(".")[0] for n in names} & HEAVY and not str(path.relative_to(ROOT)).startswith(HEAVY_AT):
                wrong.append(name)
    assert wrong == []


def test_no_two_public_names_are_alike() -> None:
    """Classes and functions of different modules, and modules themselves."""
    where: dict[str, list[str]] = defaultdict(list)
    for name, path, tree in modules():
        if "cli." in name or name.endswith("remote.child"):  # words of the command line; a script for another Python
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].append(name)
        if path.name != "__init__.py":
            where[f"module {path.stem}"].append(name)
    alike = {name: places for name, places in where.items() if len(places) > 1 and name not in ALIKE}
    assert alike == {}


# said by what they are part of: `make_reference.main`, `gaussian.build`
# by the name of its wing: `models.base`, `arena.run`
ALIKE = {"main", "build", "module base", "module check", "module registry", "module run"}


def test_what_is_imported_by_its_bare_name_has_the_name_alone() -> None:
    """Tests and scripts import what stands beside them; of two files of one name whoever comes second gets the first."""
    top = Path(__file__).parents[1]
    where: dict[str, list[str]] = defaultdict(list)
    for folder in ("benchmarks", "docs", "examples", "tests"):
        for path in sorted((top / folder).rglob("*.py")):
            where[path.stem].append(str(path.relative_to(top)))
    alike = {name: places for name, places in where.items() if len(places) > 1 or name in sys.stdlib_module_names}
    assert alike == {}


def test_help_imports_no_torch() -> None:
    code = "import sys; from scoreact.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_files_are_neither_crumbs_nor_slabs() -> None:
    """Over 400 lines a file wants a reason, which is given here."""
    reasons = {
        "models/trial.py": "one look at a model, each part on what the one before found",
        "models/pipelines/families.py": "what differs between pipelines, side by side",
        "rewards/onnx_operators.py": "a table: one short function an operator, looked up by name and not read through",
    }
    long = [
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > 400 and str(path.relative_to(ROOT)) not in reasons
    ]  # fmt: skip
    assert long == []
