"""The plan of the repository: imports go one way, files and functions stay within their budgets."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not {".venv", "runs", "tests"} & set(path.relative_to(ROOT).parts) and not path.name.startswith(".")
)
# Who may import whom: a layer may import the ones listed for it.
LAYERS = {
    "utils": set(),
    "models": set(),
    "adaptive": {"utils", "models"},
    "training": {"utils", "models"},
    "datasets": {"utils", "models", "training"},
    "engine": {"utils", "models", "adaptive", "training", "datasets"},
    "eval_dynamic": {"utils", "models", "adaptive", "training", "datasets", "engine"},
    "main_earlyExit": {"utils", "models", "adaptive", "training", "datasets", "engine", "eval_dynamic"},
}
# Edges inside and between folders that are allowed or forbidden by themselves.
FAMILY_HELPERS = {
    *("models.registry", "models.multi_exit", "models.layers", "models.attention", "models.backbones"),
    *("models.rexnet_blocks", "models.cifar"),
}
EXCEPTIONS = {("training.l2w", "adaptive.confidence")}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path):
    """Modules of this repository that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return {name for name in names if name.split(".")[0] in LAYERS}


def forbidden(importer, imported):
    """True where module `importer` may not import module `imported`."""
    layer, other = importer.split(".")[0], imported.split(".")[0]
    if layer == "scripts" or (importer, imported) in EXCEPTIONS:
        return False
    if layer == other == "models":
        return importer != "models" and imported not in FAMILY_HELPERS
    if layer == "datasets" and other == "training":
        return imported != "training.augment"
    return layer != other and other not in LAYERS[layer]


def test_every_file_is_seen():
    assert {"models.msdnet", "engine", "adaptive.inference", "scripts.bench_runtime"} <= {
        module_of(f) for f in FILES
    }


def test_the_check_finds_forbidden_edges():
    assert forbidden("adaptive.report", "training.optim")
    assert forbidden("models.ranet", "models.msdnet") and forbidden("models.layers", "utils")
    assert forbidden("engine", "eval_dynamic") and forbidden("datasets", "training.optim")
    assert not forbidden("models.ranet", "models.layers") and not forbidden("datasets", "training.augment")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_one_way(path):
    importer = module_of(path)
    wrong = {name for name in imports_of(path) if forbidden(importer, name)}
    assert not wrong, f"{importer} must not import {wrong}"


def test_nothing_imports_scripts():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "scripts" for name in names), path


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_budgets(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= (230 if path.parent.name == "scripts" else 420)
    assert max(map(len, lines), default=0) <= 122
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            limit = 60 if node.name == "train_one_epoch" else 100
            assert node.end_lineno - node.lineno + 1 <= limit, node.name


def test_training_step_has_few_parameters():
    tree = ast.parse((ROOT / "engine.py").read_text(encoding="utf-8"))
    step = next(node for node in tree.body if getattr(node, "name", "") == "train_one_epoch")
    assert len(step.args.args) + len(step.args.kwonlyargs) <= 10


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_public_names_are_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name != "__init__.py" or tree.body:
        assert ast.get_docstring(tree), f"{path} says nothing of itself"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_every_load_is_weights_only(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "torch.load",
            "torch.hub.load_state_dict_from_url",
        ):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("weights_only") == "True", f"{path}:{node.lineno}"
