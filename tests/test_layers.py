"""Imports run one way: tables, memory, decoding, live targets, commands, front ends.  Lazy imports count like others."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

import pytest

ROOT = Path(__file__).parent.parent
FRONT = ("vtdbg.cli", "vtdbg.shell", "vtdbg.demo", "vtdbg_gdb", "vtdbg_windbg", "gdb", "pykd")
SHOWING = ("vtdbg.commands", "vtdbg.render", "vtdbg.report", *FRONT)
LIVE = ("vtdbg.targets",)

MUST_NOT: Tuple[Tuple[str, Tuple[str, ...]], ...] = (
    ("vtdbg.bits", ("vtdbg.memory", "vtdbg.vmx", "vtdbg.svm", "vtdbg.x86", *LIVE, *SHOWING)),
    ("vtdbg.memory", ("vtdbg.textdump", *LIVE, *SHOWING)),
    ("vtdbg.x86", ("vtdbg.textdump", "vtdbg.vmx.entry", *LIVE, *SHOWING)),
    ("vtdbg.vmx", ("vtdbg.svm", *LIVE, *SHOWING)),
    ("vtdbg.svm", ("vtdbg.vmx.entry", *LIVE, *SHOWING)),
    ("vtdbg.walk", (*LIVE, *SHOWING)),
    ("vtdbg.nested", (*LIVE, *SHOWING)),
    ("vtdbg.textdump", (*LIVE, *SHOWING)),
    ("vtdbg.linux", SHOWING),
    ("vtdbg.targets", SHOWING),
    ("vtdbg.report", ("vtdbg.commands", "vtdbg.memory", *LIVE, *FRONT)),
    ("vtdbg.render", ("vtdbg.commands", "vtdbg.memory", *LIVE, *FRONT)),
    ("vtdbg.commands", FRONT),
)
"""(what, what it does not import).  pykd and gdb are a debugger's own modules: only its plugin knows them."""


def imported(path: Path, module: str) -> Iterator[Tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, item.name) for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            yield from ((node.lineno, f"{node.module}.{item.name}") for item in node.names)


@pytest.fixture(scope="module")
def imports() -> Dict[str, List[Tuple[int, str]]]:
    found = {}
    for path in (ROOT / "vtdbg").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[module.replace(".__init__", "")] = list(imported(path, module))
    return found


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("what, forbidden", MUST_NOT)
def test_imports_run_one_way(what: str, forbidden: Tuple[str, ...], imports: Dict[str, List[Tuple[int, str]]]) -> None:
    modules = [module for module in imports if below(module, what)]
    assert modules, what
    wrong = [f"{module}:{line} {name}" for module in modules for line, name in imports[module] if any(below(name, item) for item in forbidden)]
    assert not wrong, wrong


def test_no_module_needs_itself_while_it_is_imported(imports: Dict[str, List[Tuple[int, str]]]) -> None:
    """Imports at the head of modules make no circle (those inside functions and for type checkers may)."""
    heads: Dict[str, Set[str]] = {}
    for module in imports:
        path = ROOT / Path(*module.split("."))
        tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
        names = {f"{node.module}.{item.name}" for node in tree.body if isinstance(node, ast.ImportFrom) for item in node.names}
        names |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
        heads[module] = {name for name in names if name in imports and name != module}
    done: Set[str] = set()

    def visit(module: str, way: Tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module):], module))
        if module not in done:
            for name in sorted(heads[module]):
                # A package that is imported for one of its modules is not waited for.
                if not below(module, name):
                    visit(name, (*way, module))
            done.add(module)

    for module in sorted(heads):
        visit(module, ())
