"""The house rules, held by reading the source: which way imports go, and who may import what."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "proteingpt"
MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
LAUNCH = sorted((REPOSITORY / "launch").glob("*.py"))

# From the bottom up: a room imports from itself and from those before it.
ROOMS = ["base", "data", "encoders", "model", "demo", "inference", "evaluation", "training", "cluster"]
CONFIG = tuple(name for name in MODULES if name.startswith("config/"))
BASE = ("__init__.py", *CONFIG, "console.py", "devices.py", "protein.py", "distributed.py", "web.py", "endpoint.py")

# Each of these is imported in one place only. biotite has a second door: fair-esm imports it by itself, for a function
# that has been renamed since, and fair_esm.py makes the two meet.
ONLY_IN = {
    "deepspeed": ("training/engine.py",),
    "biotite": (*(name for name in MODULES if name.startswith("data/structure/")), "encoders/fair_esm.py"),
    "webdataset": ("data/shards.py",),
    "mpi4py": ("data/build.py",),
    "esm": tuple(name for name in MODULES if name.startswith("encoders/")),
}


def imports(path: Path) -> set[str]:
    """Full dotted names of what a file imports, inside functions too; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def room(name: str) -> str:
    """The room of a module, by its file (data/plan.py) or dotted name (proteingpt.data.plan)."""
    parts = name.removeprefix("proteingpt.").removesuffix(".py").replace("/", ".").split(".")
    return parts[0] if parts[0] in ROOMS else "base"


def test_every_module_is_in_a_room_that_has_its_place():
    homeless = [name for name in MODULES if room(name) == "base" and name not in BASE]
    assert not homeless
    assert all(any(name.startswith(f"{place}/") for name in MODULES) for place in ROOMS[1:])


# `proteingpt.load`: what a user calls first leads to what is on top, and imports it only when called.
FRONT_DOOR = "__init__.py"


@pytest.mark.parametrize("name", [name for name in MODULES if name != FRONT_DOOR])
def test_imports_go_one_way(name):
    mine = ROOMS.index(room(name))
    ours = {other for other in imports(MODULES[name]) if other.startswith("proteingpt.")}
    upward = [other for other in ours if ROOMS.index(room(other)) > mine]
    assert not upward, f"{name} imports from above it: {sorted(upward)}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_that_has_one_door_comes_in_by_it(library):
    users = [name for name, path in MODULES.items() if any(n.split(".")[0] == library for n in imports(path))]
    assert users, f"{library} is imported nowhere"
    assert set(users) <= set(ONLY_IN[library])


def test_under_everything_lie_types_and_settings_that_import_nothing_of_ours():
    top = ast.parse(MODULES[FRONT_DOOR].read_text(encoding="utf-8")).body
    assert not [node for node in top if isinstance(node, ast.Import | ast.ImportFrom)]
    for name in set(BASE) - {FRONT_DOOR}:
        # One of them lies on another: an endpoint is asked over HTTP. And settings are a folder.
        allowed = ("proteingpt.web",) if name == "endpoint.py" else ("proteingpt.config",) if name in CONFIG else ()
        ours = {n for n in imports(MODULES[name]) if n.startswith("proteingpt") and not n.startswith(allowed)}
        assert not ours, f"{name} imports {ours}"


# The plan's modules, each of which imports those before it.
PLAN = ("packing", "groups", "window", "plan", "shares")


@pytest.mark.parametrize("name", PLAN)
def test_the_plan_looks_at_integers_only(name):
    """Pure: no torch, no files, and nothing of ours but what is pure as well."""
    plain = {
        "collections",
        "collections.abc",
        "dataclasses",
        "hashlib",
        "itertools",
        "numpy",
        *(f"proteingpt.data.{n}" for n in PLAN[: PLAN.index(name)]),
    }
    found = imports(MODULES[f"data/{name}.py"])
    assert not {n for n in found if n not in plain and n.rpartition(".")[0] not in plain}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("data/")])
def test_inside_data_nobody_imports_the_loader(name):
    assert not {other for other in imports(MODULES[name]) if other.startswith("proteingpt.data.loader")}


@pytest.mark.parametrize("name", [*PLAN, "prompts", "collate"])
def test_plan_prompts_and_packs_know_nothing_of_files(name):
    readers = ("structure", "shards", "build", "index", "loader")
    files = tuple(f"proteingpt.data.{reader}" for reader in readers)
    assert not {other for other in imports(MODULES[f"data/{name}.py"]) if other.startswith(files)}


READS_TENSORS = ("collate", "loader", "index", "prompts")


@pytest.mark.parametrize(
    "name", [n for n in MODULES if n.startswith("data/") and n.removeprefix("data/")[:-3] not in READS_TENSORS]
)
def test_processes_that_parse_structures_need_not_import_torch(name):
    top = ast.parse(MODULES[name].read_text(encoding="utf-8")).body
    direct = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    direct |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
    heavy = {"torch", "transformers", "webdataset", "deepspeed", "mpi4py"}
    assert not {module.split(".")[0] for module in direct} & heavy


def test_launch_files_bear_no_name_that_python_would_import_instead():
    """The deepspeed launcher puts launch/ first on sys.path: a launch/datasets.py would hide the library `datasets`.
    launch/evaluate.py is allowed while no library of that name is installed: nothing that we import asks for one."""
    libraries = importlib.metadata.packages_distributions().keys() | sys.stdlib_module_names | {"datasets"}
    assert LAUNCH and not {path.stem for path in LAUNCH} & libraries


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_launch_files_parse_call_and_exit(path):
    """Arguments may be named here; what is done with them is in the package."""
    defined = [
        n
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(n, (ast.FunctionDef, ast.ClassDef))
    ]
    assert not [node.name for node in defined if isinstance(node, ast.ClassDef)]
    others = [node for node in defined if not node.name.startswith("parse_arguments")]
    assert all(node.end_lineno - node.lineno < 20 for node in others), "logic belongs in the package"
