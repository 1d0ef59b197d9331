"""What is installed: the core alone, what an extra adds, and the wheel and sdist themselves.

``make test-wheel`` runs this, and other tests, with the wheel installed and no checkout around:
`LSTMJAX_TEST_DIST` is then the folder of what was built. Elsewhere it is built here.
"""

import ast
import email
import importlib.metadata
import importlib.util
import io
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import numpy as np
import pytest

import lstmjax
from lstmjax.errors import MissingExtraError, extra

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = pathlib.Path(lstmjax.__file__).parent
BUILT = os.environ.get("LSTMJAX_TEST_DIST")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CORE = ("jax", "flax", "optax", "jaxtyping", "numpy", "scipy")


def names(requirements):
    """The packages of a list of requirements, as PyPI normalises them."""
    found = (re.match(r"[\w.-]+", text)[0] for text in requirements)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in found}


def test_what_the_core_needs():
    assert names(PROJECT["dependencies"]) == {*CORE}
    assert {*EXTRAS} >= {"cpu", "train", "imdb", "tasks", "interop", "all"}
    assert EXTRAS["all"] == ["lstmjax[cpu,train,imdb,tasks,interop]"]


def test_the_installed_package_is_the_one_tested():
    """With the wheel, no checkout's package is imported, by this process or by those it starts."""
    code = "import lstmjax; print(lstmjax.__file__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert pathlib.Path(run.stdout.strip()) == PACKAGE / "__init__.py"
    assert ("site-packages" in PACKAGE.parts) == bool(BUILT)


# -- extras ---------------------------------------------------------------------------------------

NAMED = {"sklearn": "scikit-learn"}  # where the package need not be installed
BESIDE = {"llvmlite", "tensorboardX", "wandb"}  # asked for before they are imported


def optional_imports(path):
    """Imports outside of `TYPE_CHECKING`, with the extra around them: module -> extra or None."""

    def look(nodes, around):
        for node in nodes:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                yield from look(node.orelse, around)
            elif isinstance(node, ast.With) and ast.unparse(node).startswith("with extra("):
                yield from look(node.body, node.items[0].context_expr.args[0].value)
            elif isinstance(node, ast.Import):
                yield from ((alias.name, around) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module, around
            else:
                yield from look(ast.iter_child_nodes(node), around)

    found = look([ast.parse(path.read_text())], None)
    return [(name.partition(".")[0], around) for name, around in found]


def test_every_import_is_of_the_core_or_of_the_extra_around_it():
    """A module's package is in the extra that its import names; a bare import is of the core."""
    packages = importlib.metadata.packages_distributions()
    guarded = set()
    for path in PACKAGE.rglob("*.py"):
        before = set()
        for module, around in optional_imports(path):
            if module in sys.stdlib_module_names or module in BESIDE | {"lstmjax"}:
                continue
            of = names(packages.get(module, [NAMED.get(module, module)]))
            if around is not None:
                assert of & names(EXTRAS[around]), (path, module, around)
                before.add(module)
                guarded.add(module)
            elif module not in before:
                assert of & {*CORE, "jaxlib", "libtpu"}, (path, module)
    assert guarded >= {"tyro", "tqdm", "matplotlib", "tensorflow_datasets", "grain", "safetensors"}


def test_a_missing_extra_is_named():
    said = r"^nonesuch is missing: pip install 'lstmjax\[tasks\]'$"
    with pytest.raises(MissingExtraError, match=said), extra("tasks"):
        import nonesuch.inside
    with pytest.raises(ImportError), extra("tasks"):
        from lstmjax import nonesuch


def _read_imdb(folder):
    from lstmjax.data import imdb

    imdb._read_texts(folder, "train", False)


def _write_rows(folder):
    from lstmjax.data import write_rows

    write_rows(folder / "rows", [(np.array([1], np.int32), 0)])


def _stream(folder):
    from lstmjax.data import StreamedBatches

    _write_rows(folder)
    next(StreamedBatches(folder / "rows", 1, boundaries=(4,)).in_order())


def _digits(folder):
    from lstmjax.tasks import load_task

    load_task("digits").train(0)


def _mnist1d(folder):
    from lstmjax.tasks import load_task

    load_task("mnist1d").train(0)


def _weights(folder):
    from lstmjax import interop

    interop.write_safetensors(folder / "a.safetensors", {"a": np.ones(3)})


def _keras(folder):
    from lstmjax import interop

    interop.read_keras(folder / "a.keras")


def _picture(folder):
    from lstmjax.training import draw_curves

    draw_curves(folder / "a.png", "a", [])


def _evaluate(folder):
    from tests.trained_run import train

    train(folder / "run", epochs=1)


def _export(folder):
    from lstmjax.commands.export import Config, main
    from tests.trained_run import train

    main(Config(train(folder / "run", epochs=1), folder / "exported"))


def _parse(folder):
    from lstmjax.commands import train

    train.run()


def _check(folder):
    from lstmjax import LSTM, check_cell

    check_cell(LSTM(3), speed=False, targets=(), progress=True)


@pytest.mark.parametrize(
    ("module", "name", "use"),
    [
        ("tensorflow_datasets", "imdb", _read_imdb),
        ("array_record", "imdb", _write_rows),
        ("grain", "imdb", _stream),
        ("sklearn", "tasks", _digits),
        ("mnist1d", "tasks", _mnist1d),
        ("safetensors", "interop", _weights),
        ("h5py", "interop", _keras),
        ("matplotlib", "train", _picture),
        ("tqdm", "train", _evaluate),
        ("tqdm", "train", _check),
        ("flatbuffers", "train", _export),
        ("tyro", "train", _parse),
    ],
)
def test_without_a_package_the_extra_is_named(module, name, use, tmp_path, monkeypatch, capsys):
    for loaded in [m for m in sys.modules if m.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    said = f"{module} is missing: pip install 'lstmjax[{name}]'"
    with pytest.raises((MissingExtraError, SystemExit)) as raised:
        use(tmp_path)
    if raised.type is SystemExit:  # of a command
        assert raised.value.code == 2
        assert capsys.readouterr().err == f"error: {said}\n"
    else:
        assert str(raised.value) == said


OPTIONAL = names(itertools.chain(*(v for k, v in EXTRAS.items() if k != "all"))) - {*CORE}
HIDE = f"""
import sys
from importlib.metadata import packages_distributions

hidden = {{*{sorted(OPTIONAL - {"orbax-checkpoint"})}}}  # Flax needs that
for module, of in packages_distributions().items():
    if hidden & {{name.replace("_", "-").lower() for name in of}}:
        sys.modules[module] = None
"""

PROGRAM = """
import jax, jax.numpy as jnp
import lstmjax
from flax import nnx
from lstmjax import *

for name in lstmjax.__all__:
    getattr(lstmjax, name)
x, lengths = jnp.ones((3, 5, 4)), jnp.array([5, 3, 0])
for cell in (LSTM(6), LMU(6), SLSTM(6)):
    hs, final = unroll(cell, cell.init(jax.random.key(0), input_size=4), x, lengths=lengths)
    assert hs.shape == (3, 5, 6)
assert Stack([LSTM(6), GRU(5)], 4, rngs=nnx.Rngs(0))(x)[0].shape == (3, 5, 5)
model = Classifier(LSTM(6), ClassifierConfig(top_words=20, hidden_size=6), rngs=nnx.Rngs(0))
assert model(jnp.ones((2, 7), int)).shape == (2,)
report = check_cell(LSTM(4), speed=False, targets=())
assert report.ok, report
import lstmjax.data, lstmjax.training, lstmjax.statistics, lstmjax.interop
"""


def test_the_core_needs_no_extra():
    """Cells, unroll, layers, models and check_cell, every package of an extra being hidden."""
    run = subprocess.run(
        [sys.executable, "-c", HIDE + PROGRAM], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr


WINDOWS = """
import os, sys

sys.modules["fcntl"] = None
for name in ("getuid", "O_CLOEXEC", "O_NONBLOCK", "sched_getaffinity"):
    delattr(os, name)
import jax, jax.numpy as jnp
from lstmjax import LSTM, check_cell, unroll
from lstmjax.errors import UserError
from lstmjax.workbench import Config, train

cell = LSTM(4)
params = cell.init(jax.random.key(0), input_size=3)
assert unroll(cell, params, jnp.ones((2, 5, 3)), engine="cpu")[0].shape == (2, 5, 4)
assert check_cell(cell, speed=False, targets=()).ok
try:
    train(Config())
except UserError as error:
    assert "Linux and macOS only" in str(error), error
else:
    raise AssertionError("it trained")
"""


@pytest.mark.slow
def test_what_is_left_where_there_are_no_locks(tmp_path):
    """As on Windows: cells run, on every engine, and are checked; nothing is written."""
    if importlib.util.find_spec("llvmlite") is None:
        pytest.skip("no llvmlite")
    run = subprocess.run(
        [sys.executable, "-c", WINDOWS], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["predict", "check", "aot"])
def test_a_command_without_its_extra_is_one_line(command):
    """Whether it needs the package to be imported at all, or to read its flags."""
    code = f"{HIDE}\nfrom lstmjax import commands\ncommands.run({command!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    name = "aot" if command == "aot" else "train"
    assert run.stderr == f"error: tyro is missing: pip install 'lstmjax[{name}]'\n"
    assert (run.returncode, run.stdout) == (2, "")


# -- wheel and sdist ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel, opened; built from the working tree, unless `LSTMJAX_TEST_DIST` has one."""
    folder = pathlib.Path(BUILT) if BUILT else _built(tmp_path_factory.mktemp("dist"))
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def _built(folder):
    source = folder / "source"
    shutil.copytree(PACKAGE, source / "lstmjax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    version = PROJECT["version"]
    inside = {name for name in wheel.namelist() if not name.startswith(f"lstmjax-{version}.")}
    files = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert inside == {f"lstmjax/{path.relative_to(PACKAGE).as_posix()}" for path in files}
    assert {"lstmjax/py.typed", "lstmjax/data/imdb_stars.bin", "lstmjax/__main__.py"} <= inside
    scripts = wheel.read(f"lstmjax-{version}.dist-info/entry_points.txt").decode()
    assert scripts.split() == ["[console_scripts]", "lstmjax", "=", "lstmjax.commands:main"]


def test_what_the_wheel_says_of_itself(wheel):
    dist = f"lstmjax-{PROJECT['version']}.dist-info"
    said = email.message_from_string(wheel.read(f"{dist}/METADATA").decode())
    assert said["Version"] == lstmjax.__version__ == PROJECT["version"]
    assert (said["License-Expression"], said["Author"]) == ("Apache-2.0", "The lstmjax authors")
    assert f"{dist}/licenses/LICENSE" in wheel.namelist()
    needed = [text for text in said.get_all("Requires-Dist") if "extra ==" not in text]
    assert names(needed) == {*CORE}
    classifiers = said.get_all("Classifier")
    assert {"Typing :: Typed", "Operating System :: POSIX :: Linux"} < {*classifiers}
    assert not [c for c in classifiers if c.startswith("License ::")]  # PEP 639: the expression


@pytest.mark.skipif(not BUILT, reason="`make test-wheel` has one")
def test_the_sdist_holds_what_git_knows():
    (path,) = pathlib.Path(BUILT).glob("*.tar.gz")
    top = f"lstmjax-{PROJECT['version']}"
    with tarfile.open(path) as packed:
        inside = {m.name.removeprefix(f"{top}/") for m in packed.getmembers() if m.isfile()}
    folders = {name.partition("/")[0] for name in inside if "/" in name}
    assert folders == {
        *("lstmjax", "lstmjax.egg-info", "tests", "docs", "experiments", "benchmarks"),
    }
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "Makefile", "requirements.lock"):
        assert name in inside
    for name in ("tests/faults.c", "tests/references/__init__.py", "docs/odyssey.png"):
        assert name in inside
    kinds = {pathlib.PurePath(name).suffix for name in inside}
    assert not kinds & {".pyc", ".so", ".log", ".whl"}
    assert not [name for name in inside if "__pycache__" in name or "checkpoints" in name]


def test_the_versions_agree():
    """Of the package, the citation, and the changelog's newest."""
    version = PROJECT["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    released = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == version


USERS = """
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid

from lstmjax import Cell, check_cell, unroll


class Mine(Cell):
    class Gates(NamedTuple):
        f: Array
        g: Array

    class State(NamedTuple):
        c: Array

    def step(self, pre: Gates, state: State, params: object) -> tuple[Array, State]:
        reveal_type(pre.f)
        reveal_type(state.c)
        pre.q
        c = sigmoid(pre.f) * state.c + jnp.tanh(pre.g)
        return jnp.tanh(c), self.State(c)


hs, final = unroll(Mine(8), Mine(8).init(jax.random.key(0), input_size=3), jnp.ones((2, 5, 3)))
reveal_type(hs)
check_cell(Mine, hidden_size="8")
"""
FOUND = (
    'note: Revealed type is "jax._src.basearray.Array"',
    'note: Revealed type is "jax._src.basearray.Array"',
    'error: "Gates" has no attribute "q"',
    'note: Revealed type is "jax._src.basearray.Array"',
    'error: Argument "hidden_size" to "check_cell" has incompatible type "str"; expected "int"',
)


@pytest.mark.slow
def test_mypy_knows_the_installed_package(wheel, tmp_path, pytestconfig):
    """In the site-packages of a fresh environment, far from its sources, strictly checked."""
    pytest.importorskip("mypy")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    site = pathlib.Path(run.stdout.strip())
    wheel.extractall(site)
    (site / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    (tmp_path / "mine.py").write_text(USERS)
    cache = pytestconfig.cache.mkdir("mypy-installed")
    run = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache}"),
            *(f"--python-executable={python}", "--no-pretty", "mine.py"),
        ],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k not in ("MYPYPATH", "PYTHONPATH")},
        capture_output=True,
        text=True,
    )
    lines = re.findall(r"^mine\.py:\d+: (.*?)(?:  \[[\w-]+\])?$", run.stdout, re.MULTILINE)
    assert [*FOUND] == lines, run.stdout + run.stderr
