"""The repository checks itself: public names, layers of imports, docstring examples, the wheel."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fxbasis

ROOT = Path(__file__).parent.parent
LAYERS = {
    0: [
        "errors",
        "arguments",
        "tables",
        "progress",
        "files",
        "promises",
        "costs",
        "paper",
        "contexts",
        "nests",
        "running",
        "rebinding",
        "copying",
        "calibration_data",
        "recalibration",
        "snapshots",
        "comparing",
        "steps",
        "structures",
        "compositions",
        "bases",
        "gauge",
        "clustering",
        "coding",
        "evbmf",
        "input_moments",
        "tensor_bases",
        "cp_starts",
        "cp_effort",
        "cp",
        "candidates",
        "fronts",
        "programs",
        "solvers",
        "sweeping",
    ],
    1: ["recipe", "kernels", "carrying", "factors", "fitting", "forms", "passes.base"],
    2: [
        "passes.contents",
        "passes.calls",
        "passes.pictures",
        "passes.attributes",
        "passes.graphs",
        "passes.entropy",
        "passes.codes",
        "passes.blaming",
        "passes.proxies",
        "passes.patching",
        "passes.guarding",
        "passes.states",
        "passes.capturing",
        "passes.trials",
        "passes.parts",
        "passes.tracing",
        "passes.readers",
        "passes.watching",
        "passes.records",
        "passes.numbering",
        "passes.ranking",
        "passes.settings",
        "passes.selection",
        "passes.rewriting",
        "passes.folding",
        "passes.converting",
        "passes.counting",
        "passes.training_steps",
        "passes.profiles",
        "passes.profiling",
        "passes",
        "export.checking",
        "export.exporters",
        "export.lowering",
        "export.exporting",
        "export.runners",
        "export.measuring",
        "export.layer_graphs",
        "export.time_cache",
        "export.layer_runs",
        "export.layer_times",
        "export",
    ],
    3: [
        "form_table",
        "proving",
        "timing",
        "windows",
        "divergence",
        "least_squares",
        "statistics",
        "statistics_file",
        "datafit",
        "lockstep",
        "refitting",
        "proposals",
        "subjects",
        "estimating",
        "screening",
        "sensitivities",
        "calibrating",
        "choices",
        "relinearising",
        "latency",
        "planning",
        "compression",
        "stored_state",
        "saving",
        "diagnosis",
    ],
    4: ["canvas", "pictures", "reports", "reporting"],
    5: [
        "weights",
        "models",
        "images",
        "demo.network",
        "demo.digits",
        "demo.job",
        "demo",
        "options",
        "plan_verbs",
        "verbs",
        "cli",
        "__main__",
    ],
}
ORDER = [name for layer in LAYERS.values() for name in layer]


def source_of(module: str) -> Path:
    head, _, rest = module.partition(".")
    folder = ROOT / head if head in ("passes", "export") else ROOT / "fxbasis" / module.replace(".", "/")
    if head in ("passes", "export"):
        return folder / (f"{rest}.py" if rest else "__init__.py")
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def modules() -> list[str]:
    folders = {"": ROOT / "fxbasis", "demo.": ROOT / "fxbasis/demo", "passes.": ROOT / "passes"}
    folders["export."] = ROOT / "export"
    found = [prefix + file.stem for prefix, folder in folders.items() for file in folder.glob("*.py")]
    return sorted(name.removesuffix(".__init__") for name in found if name != "__init__")


def imports_of(module: str) -> set[str]:
    """The fxbasis modules that the file imports anywhere, inside functions too."""
    package = (
        f"fxbasis.{module}"
        if source_of(module).name == "__init__.py"
        else f"fxbasis.{module}".rpartition(".")[0]
    )
    found = set()
    for node in ast.walk(ast.parse(source_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            found.add(
                ".".join([*base, *([node.module] if node.module else [])]).removeprefix("fxbasis").lstrip(".")
            )
    return found


def test_every_module_stands_in_a_layer() -> None:
    assert sorted(ORDER) == modules()


@pytest.mark.parametrize("module", modules())
def test_imports_point_downwards(module: str) -> None:
    below = ORDER[: ORDER.index(module)]
    upward = {name for name in imports_of(module) if name and name not in below}
    assert not upward
    assert "" not in imports_of(module) or module in ("cli",)  # the version alone


def test_public_names_are_those_of_all_and_documented() -> None:
    names = {name for name, value in vars(fxbasis).items() if not name.startswith("_") and callable(value)}
    assert names == set(fxbasis.__all__)
    assert fxbasis.__all__ == sorted(fxbasis.__all__)
    assert not [name for name in fxbasis.__all__ if not getattr(fxbasis, name).__doc__]


VERBS = ["trace", "number_convs", "compress", "fold", "profile", "save", "load", "export_onnx", "measure"]
VERBS += ["recalibrate_batchnorm_", "measure_layer", "sensitivities", "plan", "pareto"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_and_says_what_it_raises(verb: str) -> None:
    text = getattr(fxbasis, verb).__doc__
    assert ">>>" in text or verb == "load"  # the example of save loads
    assert "Raises:" in text


@pytest.mark.parametrize("module", [name for name in modules() if name != "__main__"])
def test_docstring_examples(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"fxbasis.{module}")).failed == 0


def test_import_is_light() -> None:
    heavy = {"onnxruntime", "matplotlib", "timm", "sklearn"}
    code = f"import sys, fxbasis; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert result.stdout.strip() == "[]"


def test_the_wheel_holds_fxbasis_and_nothing_else(tmp_path: Path) -> None:
    for name in ("fxbasis", "passes", "export"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fxbasis"}
    expected = {"fxbasis/" + module.replace(".", "/") for module in modules()}
    held = {name.removesuffix(".py").removesuffix("/__init__") for name in names if name.endswith(".py")}
    assert held == expected | {"fxbasis"}
    assert {"fxbasis/py.typed", "fxbasis/demo/digits_resnet.safetensors"} <= set(names)


def test_readme_has_the_two_set_up_lines_and_only_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^pip install ", text, re.MULTILINE)) == 2
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path
