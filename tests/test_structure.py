"""The layout, held over the syntax trees: who imports whom, what stays out, names and lengths of files."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("gigagan_jax", "configs", "tools", "launch", "tests")
PACKAGE = "gigagan_jax"
LONGEST = 450
LONGEST_FUNCTION = 80
# Users copy them whole into programs of their own: files of torch alone.
COPIED = ("gigagan_jax/interop/torch_gigagan.py", "gigagan_jax/interop/torch_training.py")

# Higher may import lower; groups of one row do not know each other.
ROWS = (
    ("core",),
    ("config",),
    ("data", "parallel", "telemetry"),
    ("models", "checkpoint", "cli", "reporting"),
    ("interop",),
    ("training", "inference"),
    ("evaluation", "planning", "preparation"),
    ("verb",),
)
ROW = {group: i for i, row in enumerate(ROWS) for group in row}
# What a benchmark of models and losses has installed; ml_collections comes with config/.
LIGHT = {"jax", "flax", "numpy"}


def sources():
    """{path relative to the root: text} of all Python files of the project."""
    files = [*ROOT.glob("*.py"), *(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py"))]
    return {f.relative_to(ROOT).as_posix(): f.read_text(encoding="utf-8") for f in files}


SOURCES = sources()


def module_of(path):
    """'gigagan_jax/models/conditioning.py' -> 'gigagan_jax.models.conditioning'"""
    return ".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def group(module):
    """The box of the layout that a module of the package is in: a package, a module of the lowest rows, or a verb."""
    name = module.split(".")[1]
    return name if name in ROW else "verb"


def imported(path, text, top_level_only=False):
    """Dotted names that a file imports, at its top or anywhere; `from a import b` is a.b where that is a module."""
    package = module_of(path).split(".")
    if not path.endswith("__init__.py"):
        package = package[:-1]
    tree = ast.parse(text)
    if top_level_only:
        inner = [
            n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
        ]
    else:
        inner = []
    names = set()
    for node in ast.walk(tree):
        if any(node is n for n in inner):
            continue
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "importorskip"):
                names.add(str(node.args[0].value))
    return names


def top(name):
    return name.split(".")[0]


# ---------------------------------------------------------------- the rules: path, text -> complaints


def wrong_neighbours(path, text):
    """Imports of the project's own modules that the layout does not allow."""
    own = {n for n in imported(path, text) if top(n) in FOLDERS and n != PACKAGE}
    folder = path.split("/")[0]
    if folder == "tests":
        return []
    if folder != PACKAGE:
        # A config is data. A tool is beside the verbs, and shares with them what lies below both.
        allowed = {
            "configs": lambda n: n == f"{PACKAGE}.config" or top(n) == "configs",
            "launch": lambda n: False,
            "tools": lambda n: top(n) in ("tools", "configs") or (top(n) == PACKAGE and group(n) != "verb"),
        }.get(folder, lambda n: False)
        return [n for n in own if not allowed(n)]
    if module_of(path) == PACKAGE:
        return sorted(own)  # it runs before everything else
    here = group(module_of(path))
    lower = lambda n: top(n) == PACKAGE and (group(n) == here or ROW[group(n)] < ROW[here])
    return sorted(n for n in own if not lower(n))


def light(path):
    return path.startswith(f"{PACKAGE}/models/") or path == f"{PACKAGE}/training/losses.py"


def heavy_imports(path, text):
    """What models and losses must do without."""
    if not light(path):
        return []
    # Weights come from files and a hub: one file each knows how, and imports it when it is asked to.
    readers = {"hub.py": {"huggingface_hub"}, "weights.py": {"safetensors"}, "perceptual.py": {"h5py"}}
    reads = readers.get(PurePosixPath(path).name, set())
    allowed = LIGHT | reads | {PACKAGE} | sys.stdlib_module_names
    names = imported(path, text)
    outside = {n for n in names if top(n) not in allowed}
    beside = {
        n for n in names if n.startswith(f"{PACKAGE}.") and group(n) not in ("core", "config", "parallel", "models")
    }
    return sorted(outside | beside)


def tensorflow(path, text):
    """TensorFlow under any of its names; tensorflow_datasets runs without it."""
    return sorted(n for n in imported(path, text) if top(n) in ("tensorflow", "tf_keras", "keras", "tensorflow_hub"))


def torch(path, text):
    """torch outside of interop/, tools/ and the tests, or in them where it is imported with the module."""
    if path.startswith("tests/") or path in COPIED:
        return []
    lazily = path.startswith((f"{PACKAGE}/interop/", "tools/"))
    return sorted(n for n in imported(path, text, top_level_only=lazily) if top(n) in ("torch", "torchvision"))


def drawers(path, text):
    return [part for part in PurePosixPath(path).parts if part.lower().startswith("util")]


def too_long(path, text):
    lines = text.count("\n")
    return [f"{lines} lines, of {LONGEST}"] if lines > LONGEST and path not in COPIED else []


def long_functions(path, text):
    """Functions of the package past LONGEST_FUNCTION lines."""
    if not path.startswith(f"{PACKAGE}/"):
        return []
    found = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lines = {n.name: n.end_lineno - n.lineno + 1 for n in found}
    return [f"{name}: {n} lines, of {LONGEST_FUNCTION}" for name, n in lines.items() if n > LONGEST_FUNCTION]


RULES = (wrong_neighbours, heavy_imports, tensorflow, torch, drawers, too_long, long_functions)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_rule(rule):
    assert {path: found for path, text in SOURCES.items() if (found := rule(path, text))} == {}


@pytest.mark.parametrize(
    "rule, path, text",
    [
        (wrong_neighbours, "gigagan_jax/models/conditioning.py", "from gigagan_jax.training import losses"),
        (heavy_imports, "gigagan_jax/models/conditioning.py", "import gigagan_jax.data.source"),
        (heavy_imports, "gigagan_jax/models/conditioning.py", "from ..data import source"),
        (wrong_neighbours, "gigagan_jax/models/layers/new.py", "from ...training.losses import r1"),
        (wrong_neighbours, "gigagan_jax/models/conditioning.py", "def f():\n    from gigagan_jax import train"),
        (wrong_neighbours, "gigagan_jax/data/source.py", "from gigagan_jax.models.conditioning import Condition"),
        (wrong_neighbours, "gigagan_jax/training/step.py", "from gigagan_jax.evaluation import fid"),
        (wrong_neighbours, "gigagan_jax/inference/images.py", "from gigagan_jax.training.step import TrainStep"),
        (wrong_neighbours, "gigagan_jax/cli/entry_point.py", "from gigagan_jax.checkpoint import manager"),
        (wrong_neighbours, "gigagan_jax/config/config.py", "from gigagan_jax.parallel.sharding import spec"),
        (wrong_neighbours, "gigagan_jax/core/errors.py", "import gigagan_jax.config"),
        (wrong_neighbours, "gigagan_jax/__init__.py", "from gigagan_jax.models import generator"),
        (wrong_neighbours, "gigagan_jax/train.py", "import tools.plan"),
        (wrong_neighbours, "configs/laion.py", "from gigagan_jax.models import generator"),
        (wrong_neighbours, "tools/plan.py", "from gigagan_jax import train"),
        (heavy_imports, "gigagan_jax/models/conditioning.py", "import optax"),
        (
            heavy_imports,
            "gigagan_jax/training/losses.py",
            "from gigagan_jax.training.mismatched_captions import mismatch",
        ),
        (tensorflow, "tests/test_x.py", "import tensorflow as tf"),
        (tensorflow, "gigagan_jax/data/x.py", "import importlib\nimportlib.import_module('tensorflow.io')"),
        (torch, "gigagan_jax/evaluation/fid.py", "def f():\n    import torch"),
        (torch, "gigagan_jax/interop/keys.py", "if True:\n    from torch import nn"),
        (drawers, "gigagan_jax/models/utils.py", ""),
        (drawers, "gigagan_jax/util/x.py", ""),
        (too_long, "tests/test_x.py", "\n" * (LONGEST + 1)),
        (long_functions, "gigagan_jax/data/x.py", "def f():\n" + "    pass\n" * LONGEST_FUNCTION),
    ],
)
def test_a_rule_sees_what_it_forbids(rule, path, text):
    assert rule(path, text)


@pytest.mark.parametrize(
    "rule, path, text",
    [
        (
            wrong_neighbours,
            "gigagan_jax/train.py",
            "from gigagan_jax import cli\nfrom gigagan_jax.parallel import sharding\nimport gigagan_jax.data.source",
        ),
        (
            wrong_neighbours,
            "gigagan_jax/training/step.py",
            "from gigagan_jax.models import generator\nfrom . import optimizer",
        ),
        (
            wrong_neighbours,
            "tools/plan.py",
            "from gigagan_jax import cli\nfrom gigagan_jax.training.step import TrainStep",
        ),
        (wrong_neighbours, "configs/ablation.py", "from gigagan_jax import config\nfrom configs.laion import shrink"),
        (heavy_imports, "gigagan_jax/training/losses.py", "import math\nfrom gigagan_jax.models import discriminator"),
        (heavy_imports, "gigagan_jax/training/optimizer.py", "import optax"),
        (tensorflow, "gigagan_jax/data/x.py", "import tensorflow_datasets as tfds"),
        (torch, "gigagan_jax/interop/keys.py", "def f():\n    import torch"),
        (drawers, "gigagan_jax/models/futile.py", ""),
        (too_long, "tests/test_x.py", "\n" * LONGEST),
        (long_functions, "gigagan_jax/data/x.py", "def f():\n" + "    pass\n" * (LONGEST_FUNCTION - 1)),
    ],
)
def test_a_rule_lets_pass_what_is_right(rule, path, text):
    assert not rule(path, text)


def circles(imports):
    """Modules that import themselves by way of others: {module: what it imports} -> the first circle found, or None."""
    done, way = set(), []

    def visit(module):
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done or module not in imports:
            return None
        way.append(module)
        found = next(filter(None, map(visit, sorted(imports[module]))), None)
        done.add(way.pop())
        return found

    return next(filter(None, map(visit, sorted(imports))), None)


def test_no_import_goes_in_a_circle():
    """Imports within functions count too: they hide a circle, and do not undo it."""
    package = {m: imported(p, SOURCES[p]) & set(MODULES) - {m} for m, p in MODULES.items() if top(m) == PACKAGE}
    assert circles(package) is None
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_names_and_comments():
    """Most functions say what they do to what; every twelfth line or so has a comment, which says why."""
    names, lines, comments = [], 0, 0
    for path, text in SOURCES.items():
        if path.startswith(f"{PACKAGE}/"):
            nodes = ast.walk(ast.parse(text))
            names += [n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
            lines += text.count("\n")
            tokens = tokenize.generate_tokens(io.StringIO(text).readline)
            comments += len({t.start[0] for t in tokens if t.type == tokenize.COMMENT})
    named = [n.strip("_") for n in names if not n.startswith("__")]
    assert sum("_" not in n for n in named) < 0.4 * len(named)
    assert comments >= 0.07 * lines


def test_all_files_are_looked_at():
    assert {
        f"{PACKAGE}/config/config.py",
        f"{PACKAGE}/models/layers/attention.py",
        "configs/laion.py",
        "tests/conftest.py",
    } <= set(SOURCES)


def test_models_and_losses_load_where_only_jax_flax_numpy_and_ml_collections_are():
    """In an interpreter that refuses the heavier dependencies, whatever imports them."""
    # Not optax: flax imports it by itself.
    heavy = ["grain", "orbax", "tensorflow", "tensorflow_datasets", "torch", "transformers", "sklearn", "PIL"]
    names = [m for m, path in MODULES.items() if light(path)]
    script = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ImportError("a model must not need " + name)
sys.meta_path.insert(0, Refuse())
for name in {sorted(names)!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_test_files_have_names_of_their_own():
    names = [PurePosixPath(p).name for p in SOURCES if p.startswith("tests/") and not p.endswith("conftest.py")]
    assert sorted(names) == sorted(set(names))


def test_a_skipped_parity_or_sharding_test_fails_the_run(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())

    def run(name, text):
        for old in tmp_path.glob("test_*.py"):
            old.unlink()
        (tmp_path / name).write_text("import pytest\n" + text)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(tmp_path),
            str(tmp_path),
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout

    skip = "@pytest.mark.skip\ndef test_{}(): pass\n"
    code, out = run("test_a.py", skip.format("parity_of_conv") + skip.format("slow"))
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "test_a.py::test_parity_of_conv: a test of sharding, parity, mesh, torch must not be skipped" in out
    assert "test_slow" not in out

    code, out = run("test_mesh.py", "pytest.importorskip('no_such_module')\ndef test_it(): pass\n")
    assert code != 0
    assert "test_mesh.py: a test of" in out

    eight = "def test_it():\n    import jax\n    assert jax.device_count() == 8 and jax.default_backend() == 'cpu'\n"
    assert run("test_b.py", skip.format("slow") + eight)[0] == 0
