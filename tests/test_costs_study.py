"""The page of costs is what its script writes, and the tests that it names exist."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

STUDIES = Path(__file__).parent.parent / "examples/studies"


def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("costs_study", STUDIES / "costs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes() -> None:
    assert (STUDIES / "costs.md").read_text(encoding="utf-8") == study().text()


def test_the_tests_that_it_names_exist() -> None:
    for names in study().ERRORS.values():
        for name in names:
            file, _, test = name.partition("::")
            assert f"def {test}(" in (Path(__file__).parent / file).read_text(encoding="utf-8"), name
