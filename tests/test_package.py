"""The package itself: what importing it needs, that its types match the compiled module, that its kernels ship."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import heedful
from heedful import _core

PACKAGE = Path(heedful.__file__).parent


def test_version_is_that_of_the_installed_package() -> None:
    assert heedful.__version__ == metadata.version("heedful")


def test_importing_needs_numpy_alone() -> None:
    code = "import sys, heedful; print(*sorted(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "transformers", "safetensors", "tqdm", "triton", "tokenizers"}.isdisjoint(loaded)
    foreign = {
        name for name in loaded if name not in sys.stdlib_module_names and not name.startswith(("_", "sitecustom"))
    }
    assert foreign - {"heedful", "numpy"} == set()


def test_pieces_work_without_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
import numpy as np, heedful
from heedful import builtin
tokenizer = heedful.Tokenizer.from_pretrained(builtin.path())
ids = tokenizer.encode("The cat sat on the mat.")
assert tokenizer.decode(ids) == "The cat sat on the mat."
scheduler = heedful.Scheduler(heedful.SchedulerConfig(num_blocks=4))
scheduler.add("a", ids, max_tokens=1)
step = scheduler.schedule()
assert step.token_ids.tolist() == ids
assert scheduler.update(np.zeros(1, np.int32)) == [("a", "length")]
rng = np.random.default_rng(0)
scores = rng.normal(size=(3, 100)).astype(np.float32)
assert heedful.top_k(scores, 4).tolist() == np.argsort(-scores)[:, :4].tolist()
q, kv = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 2, 8), (100, 8)))
out, lse = heedful.sparse_attention(q, kv, heedful.top_k(scores, 4), scale=0.3)
assert out.shape == (3, 2, 8) and lse.shape == (3, 2) and np.isfinite(out).all()
try:
    heedful.LLM
except ModuleNotFoundError as error:
    assert "heedful[torch]" in str(error), error
else:
    raise AssertionError("LLM came without torch")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def stub_names(node: ast.Module | ast.ClassDef) -> dict[str, ast.stmt]:
    names: dict[str, ast.stmt] = {}
    for statement in node.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names[statement.name] = statement
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names[statement.target.id] = statement
    return {name: s for name, s in names.items() if not name.startswith("_") or name in ("__version__",)}


STUB = ast.parse((PACKAGE / "_core.pyi").read_text())


def public(thing: object) -> set[str]:
    return {name for name in vars(thing) if not name.startswith("_")} | ({"__version__"} & set(vars(thing)))


def test_stub_names_are_those_of_the_module() -> None:
    assert set(stub_names(STUB)) == public(_core)


@pytest.mark.parametrize("name", sorted(n for n, s in stub_names(STUB).items() if isinstance(s, ast.ClassDef)))
def test_stub_members_are_those_of_the_class(name: str) -> None:
    stub = stub_names(STUB)[name]
    assert isinstance(stub, ast.ClassDef)
    assert set(stub_names(stub)) == public(getattr(_core, name))


def functions() -> list[tuple[str, ast.FunctionDef, object]]:
    found = []
    for name, statement in stub_names(STUB).items():
        if isinstance(statement, ast.FunctionDef):
            found.append((name, statement, getattr(_core, name)))
        elif isinstance(statement, ast.ClassDef):
            for member, inner in stub_names(statement).items():
                is_property = isinstance(inner, ast.FunctionDef) and any(
                    isinstance(d, ast.Name) and d.id == "property" for d in inner.decorator_list
                )
                if isinstance(inner, ast.FunctionDef) and not is_property:
                    found.append((f"{name}.{member}", inner, getattr(getattr(_core, name), member)))
    return found


@pytest.mark.parametrize(
    ("name", "stub", "function"), functions(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_stub_arguments_are_those_of_the_function(name: str, stub: ast.FunctionDef, function: object) -> None:
    expected = [a.arg for a in (*stub.args.posonlyargs, *stub.args.args, *stub.args.kwonlyargs)]
    actual = list(inspect.signature(function).parameters)  # type: ignore[arg-type]
    assert [a for a in expected if a not in ("self", "cls")] == [a for a in actual if a not in ("self", "cls")]


def test_kernels_and_types_ship_with_the_package() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "kernels" / "__init__.py").is_file()
