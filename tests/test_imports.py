"""Imports: eval -> train -> the shared part of preprocess; stage 1 without torch, the rest without video."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT, one_thread, tiny_config

MODULES = {
    package: sorted(
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in (ROOT / package).rglob("*.py")
    )
    for package in ("preprocess", "train", "eval")
}
NAMES = ("schema", "shards", "draw", "manifest", "files", "command", "transfer")
SHARED = {f"preprocess.{name}" for name in NAMES}
"""What of stage 1 the later stages may use."""

BLOCK = """
import sys

class Absent:
    def __init__(self, names):
        self.names = set(names)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

def block(*names):
    assert not [n for n in names if n in sys.modules]
    sys.meta_path.insert(0, Absent(names))
    for name in names:
        try:
            __import__(name)
        except ModuleNotFoundError:
            continue
        raise AssertionError(f"{name} is not blocked")
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + code, *arguments], cwd=ROOT, env=one_thread(), text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stage_one_imports_without_torch() -> None:
    python(
        "import importlib\n"
        "block('torch', 'torchvision', 'kornia', 'tensorboard', 'safetensors')\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n",
        *MODULES["preprocess"],
    )


def test_stages_two_and_three_run_without_video_libraries(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    code = """
import importlib
block("av", "mvextractor", "cv2", "torchcodec", "decord", "imageio")
names, (shards, table, out, config) = sys.argv[5:], sys.argv[1:5]
for name in names: importlib.import_module(name)
from pathlib import Path
from train.trained import load_run
from eval.features import Machine
from eval.results import Data
from eval.retrieve import measure
from preprocess.manifest import Manifest
from train.config import Config, Runtime
from train.loop import train
rows = Manifest.read(Path(table))
line = train(Config.from_json(config), Runtime("cpu", 0), Path(shards), rows.subset("train"), Path(out))
assert line["step"] == 1, line
found = measure(load_run(Path(out)), Data.open(Path(shards), Path(table)), machine=Machine("cpu", 0))
assert sorted(found.recalls["both"]) == [1, 5, 10]
"""
    config = tiny_config(batch_size=12, epochs=1).to_json()
    python(code, str(tiny[0]), str(tiny[1]), str(tmp_path / "run"), config, *MODULES["train"], *MODULES["eval"])


def test_shards_need_numpy_and_h5py_alone() -> None:
    code = """
before = set(sys.modules)
import preprocess.shards
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(n for n in new if "site-packages" in (getattr(sys.modules[n], "__file__", None) or "")))
"""
    assert set(python(code).split()) <= {"numpy", "h5py"}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, absolute: `from preprocess import shards` gives both names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            hidden = [a.name for a in node.names if not a.asname and a.name.partition(".")[0] == "eval"]
            assert not hidden, f"{path} says import {hidden[0]}, which hides Python's own eval"
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", MODULES)
def test_imports_run_one_way(package: str) -> None:
    allowed = {"preprocess": {"preprocess"}, "train": {"train"}, "eval": {"eval", "train"}}[package]
    for path in sorted((ROOT / package).rglob("*.py")):
        for name in sorted(imported(path)):
            top = name.partition(".")[0]
            if top not in MODULES or top in allowed:
                continue
            within = name == "preprocess" or any(name == s or name.startswith(s + ".") for s in SHARED)
            assert top == "preprocess" and within, f"{path} imports {name}"


def test_imports_go_in_no_circle() -> None:
    every = {name for names in MODULES.values() for name in names}
    paths = {name: ROOT.joinpath(*name.split(".")) for name in every}
    files = {name: p / "__init__.py" if p.is_dir() else p.with_suffix(".py") for name, p in paths.items()}
    order = TopologicalSorter({name: (imported(path) & every) - {name} for name, path in files.items()})
    assert len([*order.static_order()]) == len(every)  # a CycleError names the circle


def test_measuring_knows_nothing_of_publishing() -> None:
    for path in sorted((ROOT / "eval").glob("*.py")):
        names = {name for name in imported(path) if name.startswith("eval.publish")}
        assert not names or path.name == "__main__.py", f"{path} imports {', '.join(names)}"


def test_help_comes_without_torch() -> None:
    python(
        "import runpy\n"
        "block('torch', 'matplotlib', 'h5py')\nsys.argv = ['eval', '--help']\n"
        "try: runpy.run_module('eval', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
    )


def test_the_check_sees_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from preprocess import codec\n    import eval.tables as t\n")
    assert imported(path) == {"preprocess", "preprocess.codec", "eval.tables"}
    path.write_text("import eval.tables\n")
    with pytest.raises(AssertionError, match="hides Python's own eval"):
        imported(path)
    assert sum(len(names) for names in MODULES.values()) > 25


@pytest.mark.skipif(sys.platform != "linux", reason="torch for Linux is built with libgomp")
@pytest.mark.parametrize(("given", "spins"), [({}, "1000"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")])
def test_threads_wait_asleep_unless_the_user_says_otherwise(given: dict[str, str], spins: str) -> None:
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = clean | given | {"OMP_DISPLAY_ENV": "verbose"}
    for module in ("train.loop", "eval.features"):
        code = f"import {module}, torch"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr, done.stderr  # as libgomp says that it read it
