"""The order of the rooms, read from the imports; and what every module owes its reader."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "mmh_jax"
ORDER = (
    ("typing",),
    ("linalg", "mapping", "data", "nn"),
    ("noise",),
    ("denoise",),
    ("analytic",),
    ("train", "sample", "lid"),
    ("memorization", "pretrained", "evaluation", "sklearn"),
    ("mitigation",),
    ("",),  # the root, for its version
    ("plotting",),
    ("report", "console"),
    ("cli",),
)
LAYER = {room: layer for layer, rooms in enumerate(ORDER) for room in rooms}
EXTRAS = {"torch": "pretrained", "diffusers": "pretrained", "transformers": "pretrained"}
EXTRAS |= {"matplotlib": "plotting"}
EXEMPT = {"mmh_jax", "mmh_jax.__main__"}


def name_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}
IMPORTABLE = sorted(set(MODULES) - {"mmh_jax.__main__"})


def room_of(module):
    return module.split(".")[1] if "." in module else ""


def imports_of(module, tree, is_package=False):
    """Every module that `tree` imports anywhere, functions included, by its absolute name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            parents = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from mmh_jax import lid` names a room; `from mmh_jax.lid import flipd` is in one.
            found += (
                [f"{base}.{alias.name}" for alias in node.names] if base == "mmh_jax" else [base]
            )
    return found


def faults_of(module, tree, is_package=False):
    """The imports of `module` that the order of the rooms forbids."""
    room, faults = room_of(module), []
    for target in imports_of(module, tree, is_package):
        top = target.split(".")[0]
        if top in EXTRAS and room != EXTRAS[top]:
            faults.append(f"{module} imports {target}, which belongs to {EXTRAS[top]}")
        if top != "mmh_jax" or module in EXEMPT or room_of(target) == room:
            continue
        if room_of(target) not in LAYER:
            faults.append(f"{module} imports {target}, which is in no layer")
        elif LAYER[room_of(target)] >= LAYER[room]:
            faults.append(f"{module} imports {target}, which is not below it")
    return faults


def test_every_room_has_a_layer():
    rooms = {room_of(module) for module in set(MODULES) - EXEMPT}
    assert rooms <= set(LAYER), f"no layer for {rooms - set(LAYER)}"
    assert {"typing", "linalg", "lid", "report", "cli"} <= rooms  # the files were found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downward(module):
    path = MODULES[module]
    assert faults_of(module, ast.parse(path.read_text()), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("mmh_jax.typing", "from mmh_jax import linalg", "not below"),
        ("mmh_jax.linalg", "from mmh_jax.mapping import over_points", "not below"),
        ("mmh_jax.lid.flipd", "def f():\n    import mmh_jax.train.loss", "not below"),
        ("mmh_jax.lid.flipd", "from ..train import loss", "not below"),
        ("mmh_jax.lid.flipd", "from .. import train", "not below"),
        ("mmh_jax.plotting", "from mmh_jax.report import audit", "not below"),
        ("mmh_jax.lid.flipd", "from mmh_jax import Denoiser", "no layer"),
        ("mmh_jax.lid.flipd", "import mmh_jax", "not below"),
        ("mmh_jax.report.audit", "from matplotlib import pyplot", "belongs to plotting"),
        ("mmh_jax", "import torch.nn", "belongs to pretrained"),
        ("mmh_jax.report.audit", "from mmh_jax import plotting, lid\nimport mmh_jax.cli", "cli"),
    ],
)
def test_the_rule_finds_a_fault(module, source, fault):
    faults = faults_of(module, ast.parse(source))
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("mmh_jax.lid", "from .flipd import flipd", True),
        ("mmh_jax.lid.flipd", "from . import scale\nfrom ..linalg import exact", False),
        ("mmh_jax.report.audit", "from mmh_jax import plotting, lid", False),
        ("mmh_jax.plotting", "import matplotlib as mpl", False),
        ("mmh_jax.report.summary", "import mmh_jax", False),
        ("mmh_jax", "from mmh_jax import lid, cli", True),
    ],
)
def test_the_rule_allows_what_it_should(module, source, is_package):
    assert faults_of(module, ast.parse(source), is_package) == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_are_short_and_introduce_themselves(module):
    source = MODULES[module].read_text()
    assert len(source.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize("module", IMPORTABLE)
def test_public_names_exist_and_are_documented(module):
    if room_of(module) == "plotting":
        pytest.importorskip("matplotlib")
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", [])
    assert len(set(names)) == len(names), "a name is twice in __all__"
    for name in names:
        value = getattr(loaded, name)
        documented = inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value)
        is_alias = getattr(value, "__module__", "mmh_jax").split(".")[0] != "mmh_jax"
        if documented and not is_alias:
            # NamedTuple and dataclass write a signature where there is no docstring.
            text = value.__doc__ or ""
            assert text.strip(), f"{module}.{name} has no docstring"
            assert not text.startswith(f"{name}("), f"{module}.{name} has no docstring"


def test_importing_is_quick_and_light():
    # Processor time: other tests run on the same cores.
    program = (
        "import sys, time; start = time.process_time(); import mmh_jax; "
        "print(time.process_time() - start, 'torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    best = float("inf")
    for _ in range(8):
        command = [sys.executable, "-c", program]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds, *heavy = output.split()
        assert heavy == ["False", "False"]
        best = min(best, float(seconds))
        if best < 2.5:
            break
    assert best < 2.5
