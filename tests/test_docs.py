"""What the documentation shows is run: the README's Python and the examples of docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import heedful
from heedful import Tokenizer, TokenStream, _core, builtin

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(heedful.__path__, "heedful.") if "__main__" not in module.name
)


def test_the_readme_has_examples() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n", 1)[0])
def test_the_readmes_python_runs(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(builtin.path())  # where a tokenizer.json is
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_examples_of_the_compiled_classes_hold() -> None:
    runner = doctest.DocTestRunner()
    for thing in (Tokenizer, TokenStream, heedful.push_batch, heedful.Scheduler, heedful.SchedulerConfig, heedful.Step):
        for test in doctest.DocTestFinder(recurse=False).find(thing, thing.__name__, module=_core, globs={}):
            runner.run(test)
    assert runner.summarize().failed == 0
    assert runner.tries > 0
