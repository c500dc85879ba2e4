"""The house is as CONTRIBUTING.md says: modules stand in an order, and import only what stands before them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = re.findall(r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
ORDER = [name for row in ROWS for name in re.findall(r"`(\w+)`", row)]
MODULES = sorted(path.stem for path in (ROOT / "l2m_jax").glob("[a-z]*.py"))


def test_every_module_stands_in_the_table_once():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", [name for name in MODULES if name != "cli"])
def test_modules_import_only_what_stands_before_them(module):
    tree = ast.parse((ROOT / "l2m_jax" / f"{module}.py").read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [node.module.split(".")[1] for node in imports if (node.module or "").startswith("l2m_jax.")]
    names += [alias.name for node in imports if node.module == "l2m_jax" for alias in node.names]
    assert not [name for name in names if ORDER.index(name) >= ORDER.index(module)]
