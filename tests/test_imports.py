"""The arrows between the rooms, read from the source: who may import whom, and which libraries."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ROOMS = ("bertscale", "data_prep", "launcher")

# The rooms of each package, its folders: a room imports only from those before it in its list.
FLOORS = {
    "bertscale": (
        "bertscale",  # the files that all others may import
        "bertscale.config",
        "bertscale.tokenizer",
        "bertscale.tasks",
        "bertscale.examples",
        "bertscale.data",
        "bertscale.model",
        "bertscale.optim",
        "bertscale.train",
        "bertscale.convert",
        "bertscale.onnx",
        "bertscale.export",
        "bertscale.inspect",
        "bertscale.pretrain",
        "bertscale.finetune",
        "bertscale.bench",
        "command line",
    ),
    "data_prep": ("data_prep.readers", "data_prep.filters", "data_prep", "data_prep.demo"),
    "launcher": ("launcher", "launcher.nodes", "launcher.submit", "launcher.status"),
}
COMMAND_LINE = {f"bertscale.{name}" for name in ("checks", "cli", "console", "quickstart", "__main__")}
# Modules that a person or a script starts; nothing imports them.
DOORS = {"data_prep.__main__", "data_prep.docstrings", "launcher.guard", "launcher.watch"}

# What another room may take from bertscale; and labelled files are opened as those of prep are.
OPEN_TO = {
    "data_prep": {
        *("bertscale.config", "bertscale.errors", "bertscale.files", "bertscale.progress"),
        *("bertscale.data.quality", "bertscale.data.report", "bertscale.data.shards", "bertscale.tokenizer"),
    },
    "launcher": {
        *("bertscale", "bertscale.config", "bertscale.errors", "bertscale.files", "bertscale.progress"),
        *(
            "bertscale.run_folder",
            "bertscale.data.samples",
            "bertscale.data.shards",
            "bertscale.examples.read",
        ),
        *("bertscale.config.glue", "bertscale.config.glue_tasks"),
    },
    "bertscale.examples": {
        *("data_prep.readers.compressed", "data_prep.readers.encodings", "data_prep.readers.tables"),
    },
}
# Who may import a library that the rest of the code is not to know.
ONLY = {
    "megatron": {"bertscale.model.tensor_parallel"},
    "deepspeed": {"bertscale.train.zero"},
    "tensorboard": {"bertscale.train.metrics"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}


def imports(path: Path, inside_functions: bool = True) -> set[str]:
    """Dotted names of all modules that the file imports, those for type checkers left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            # `from launcher import ranks` imports launcher.ranks.
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found.update(inner or {node.module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def ours(path: Path, inside_functions: bool = True) -> set[str]:
    return {name for name in imports(path, inside_functions) if name.split(".")[0] in ROOMS}


def room_of(module: str) -> str:
    """The folder of a module; of a door the module itself."""
    if module in COMMAND_LINE:
        return "command line"
    if module in DOORS or FILES[module].name == "__init__.py":
        return module
    return module.rpartition(".")[0]


@pytest.mark.parametrize("module", FILES)
def test_arrows_between_rooms_go_one_way(module: str) -> None:
    package = module.split(".")[0]
    floors = FLOORS[package]
    assert room_of(module) in {*floors, *DOORS}, f"{module} is in a room that has no place in FLOORS"
    for imported in ours(FILES[module]):
        if imported.split(".")[0] == package:
            assert imported not in DOORS, f"{module} imports {imported}, which is to be started"
            above = floors if module in DOORS else floors[: floors.index(room_of(module)) + 1]
            assert room_of(imported) in above, f"{module} imports {imported}"


def test_the_map_tells_the_arrows() -> None:
    """docs/architecture.md, whose tables name each room and the rooms that it imports."""
    arrows: dict[str, set[str]] = {room: set() for floors in FLOORS.values() for room in floors}
    for module, path in FILES.items():
        room = room_of(module)
        if room in arrows:
            arrows[room] |= {room_of(name) for name in ours(path) & FILES.keys()} - {room}
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `?([\w. ]+?)`? \|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    told = {room: set(re.findall(r"[\w.]+", imported)) for room, imported in rows if room in arrows}
    assert told == arrows


def test_few_files_side_by_side() -> None:
    for package in FLOORS:
        for folder in {path.parent for name, path in FILES.items() if name.split(".")[0] == package}:
            files = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
            assert len(files) <= 16, f"{folder}: {len(files)} files"


def test_no_circles() -> None:
    graph = {module: ours(path) & FILES.keys() for module, path in FILES.items()}
    while leaves := [module for module, imported in graph.items() if not imported & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"these import one another: {sorted(graph)}"


@pytest.mark.parametrize(
    "module", [name for name in FILES if name.split(".")[0] in ("data_prep", "launcher")]
)
def test_other_rooms_take_only_what_is_open_to_them(module: str) -> None:
    room = module.split(".")[0]
    allowed = OPEN_TO[room] | {name for name in FILES if name.split(".")[0] == room}
    if module.endswith(".__main__"):
        allowed.add("bertscale.cli")  # `python -m data_prep` is the command
    assert ours(FILES[module]) <= allowed


def test_only_the_command_line_imports_the_other_rooms() -> None:
    for module, path in FILES.items():
        if module.startswith("bertscale.") and module != "bertscale.cli":
            others = {name for name in ours(path) if not name.startswith("bertscale")}
            assert others <= OPEN_TO.get(room_of(module), set()), module
    assert ours(FILES["bertscale.cli"], inside_functions=False) == {"bertscale.console", "bertscale.errors"}
    assert ours(FILES["bertscale.console"], inside_functions=False) == {"bertscale.errors"}


def test_libraries_stay_in_their_room() -> None:
    for module, path in FILES.items():
        for name in imports(path):
            allowed = ONLY.get(name.split(".")[0])
            assert allowed is None or module in allowed, f"{module} imports {name}"


def loaded(*modules: str) -> set[str]:
    """The libraries and rooms that an import of `modules` loads, as far as our own imports tell."""
    seen, todo = set[str](), set(modules)
    while todo:
        module = todo.pop()
        seen.add(module)
        if module in FILES:
            todo |= imports(FILES[module], inside_functions=False) - seen
    return {name.split(".")[0] for name in seen}


def test_checks_before_a_start_load_no_torch() -> None:
    """What is checked before ranks start must not cost the seconds that torch takes."""
    libraries = loaded(
        "bertscale.data.shards", "bertscale.data.samples", "bertscale.tokenizer", "launcher.ranks"
    )
    assert not libraries & {"torch", "deepspeed", "megatron", "transformers"}


def test_a_batch_host_needs_no_packages() -> None:
    """The supervisor of a job and the parents of its ranks run on a plain Python."""
    libraries = loaded("launcher.watch", "launcher.guard", "launcher.rank", "launcher.nodes.measure")
    assert libraries <= {*sys.stdlib_module_names, *ROOMS}


def declared() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for extra in project["optional-dependencies"].values() for text in extra]
    wanted = [Requirement(text) for text in project["dependencies"] + extras]
    return {canonicalize_name(each.name): each for each in wanted if each.name != "bertscale"}


def test_every_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for name, requirement in declared().items():
        assert requirement.specifier.contains(pins[name]), f"{requirement} against {name}=={pins[name]}"


def test_every_imported_library_is_declared() -> None:
    distributions = importlib.metadata.packages_distributions()
    for module, path in FILES.items():
        for name in {name.split(".")[0] for name in imports(path)} - set(ROOMS) - sys.stdlib_module_names:
            owners = {canonicalize_name(owner) for owner in distributions[name]}
            assert owners & declared().keys(), f"{module} imports {name}, which pyproject.toml does not name"
