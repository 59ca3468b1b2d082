"""Setting up: what is installed has a reason, and what is promised is there."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from proteingpt.config import recipe_names

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def setup_arguments() -> dict:
    tree = ast.parse((REPOSITORY / "setup.py").read_text(encoding="utf-8"))
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup")
    return {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg != "packages"}


def project(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0]


def section(title: str) -> str:
    """Text of a README section, up to the next heading of its level or above."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found, f"README.md has no section {title}"
    return found[1]


EXTRA = [project(requirement) for names in setup_arguments()["extras_require"].values() for requirement in names]
REQUIRED = [project(requirement) for requirement in setup_arguments()["install_requires"]]


@pytest.mark.parametrize("name", REQUIRED)
def test_each_dependency_has_its_reason_in_the_readme(name):
    assert re.search(rf"^- `{re.escape(name)}`: \S.*$", section("Dependencies"), re.MULTILINE)


def test_the_readme_gives_reasons_for_nothing_that_is_not_installed():
    assert set(re.findall(r"^- `([^`]+)`:", section("Dependencies"), re.MULTILINE)) == set(REQUIRED)
    for name in {*EXTRA} - {"proteingpt"}:
        assert f"`{name}`" in section("Dependencies")


def test_the_promised_dependencies_are_there():
    promised = {"torch", "deepspeed", "fair-esm", "transformers", "webdataset", "mpi4py", "biotite", "tensorboard"}
    assert promised <= set(REQUIRED)
    assert "esm" not in REQUIRED  # the other package of that import name
    assert setup_arguments()["python_requires"] == ">=3.11"


def test_every_library_that_is_imported_is_required():
    """By ast, against what setup.py asks for; torch_geometric and torch_scatter stay out (fair_esm.py stands in)."""
    import_names = {"fair-esm": "esm", "pyyaml": "yaml", "bert-score": "bert_score", "rouge-score": "rouge_score"}
    import_names["mlflow-skinny"] = "mlflow"
    known = {import_names.get(name, name) for name in [*REQUIRED, *EXTRA]}
    imported = set()
    for path in [*(REPOSITORY / "proteingpt").rglob("*.py"), *(REPOSITORY / "launch").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    assert imported - known - sys.stdlib_module_names == set()


def test_constraints_pin_what_is_required_and_torch_above_all():
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert set(pins) <= {*REQUIRED, *EXTRA} and "torch" in pins


def test_what_is_not_code_is_installed_with_the_package():
    package = REPOSITORY / "proteingpt"
    installed = {path for pattern in setup_arguments()["package_data"]["proteingpt"] for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert installed == others
    assert len(recipe_names()) == len(list((REPOSITORY / "proteingpt" / "recipes").iterdir()))


def dry_run(target: str) -> str:
    return subprocess.run(
        ["make", "--dry-run", "--always-make", target], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    "target, does", [("train", "deepspeed launch/train.py --ds_config ds_configs/zero2.json"), ("test", "pytest")]
)
def test_one_command_sets_up_and_then_works(target, does):
    """As make itself plans it in a clone without .venv: the environment first, then the work."""
    planned = dry_run(target)
    assert planned.index("-m venv .venv") < planned.index("pip install") < planned.index(does)
    assert "constraints.txt" in planned


def test_make_train_writes_to_where_the_readme_says():
    assert "--output runs/demo" in dry_run("train")


def test_ci_runs_make_test():
    path = REPOSITORY / ".ci" / "run"
    assert os.access(path, os.X_OK)
    assert re.search(r"^make test$", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_what_a_run_makes_is_ignored_by_git():
    made = [".venv/x", "runs/demo/model/x", "shards/demo/manifest.json", "proteingpt/__pycache__/x.pyc"]
    kept = ["shards/README.md", "proteingpt/recipes/demo.yaml", "ds_configs/zero2.json"]
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git clone")
    found = subprocess.run(
        ["git", "check-ignore", "--no-index", *made, *kept], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout.split()
    assert found == made


def named_in_tree() -> set[str]:
    """Paths that the README's file tree names; two blanks deeper is one folder deeper."""
    tree = re.search(r"```\n(.*?)```", section("Files"), re.DOTALL)[1]
    named, folders = set(), []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        named.add("/".join([*folders[:depth], name.rstrip("/")]))
        if name.endswith("/"):
            folders = [*folders[:depth], name.rstrip("/")]
    return named


def test_the_file_tree_of_the_readme_names_nothing_that_is_not_there():
    assert not [name for name in named_in_tree() if not list(REPOSITORY.glob(name))]


def test_the_file_tree_of_the_readme_names_every_module_or_its_folder_as_a_whole():
    named = named_in_tree()
    opened = {name.rpartition("/")[0] for name in named}
    for path in (REPOSITORY / "proteingpt").rglob("*.py"):
        name = str(path.relative_to(REPOSITORY))
        folder = name.rpartition("/")[0]
        whole = folder in named and folder not in opened
        assert path.name == "__init__.py" or name in named or whole, f"{name} is not in the README's file tree"
