"""What README.md and docs/ show is what the commands print: every block that begins with "$ vtdbg" is run.

After a deliberate change: VTDBG_UPDATE_GOLDEN=1 pytest tests/test_docs.py rewrites the blocks; read the difference before committing it.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import pytest

from vtdbg.commands import registry
from vtdbg.commands.run import run_words
from vtdbg.commands.session import Session
from vtdbg.render.text import render_text
from vtdbg.report import Report

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```\n\$ (vtdbg [^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shown_by(command: str) -> str:
    """The output of a documented command line; `| head -N` is understood."""
    line, _, head = command.partition(" | head -")
    session = Session()

    def render(report: Report, _options: Dict[str, Any]) -> str:
        return render_text(report, 80)

    try:
        outcome = run_words(shlex.split(line)[1:], session, render)
    finally:
        session.close()
    text = outcome.error + "\n" if outcome.error else outcome.text
    return "".join(text.splitlines(keepends=True)[:int(head)]) if head else text


def blocks() -> Iterator[Tuple[str, str, str]]:
    for path in DOCUMENTS:
        for match in BLOCK.finditer(path.read_text()):
            yield path.name, match.group(1), match.group(2)


@pytest.mark.parametrize(("document", "command", "text"), list(blocks()))
def test_documented_output_is_real(document: str, command: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    real = shown_by(command)
    if os.environ.get("VTDBG_UPDATE_GOLDEN"):
        path = next(path for path in DOCUMENTS if path.name == document)
        path.write_text(path.read_text().replace(f"$ {command}\n{text}```", f"$ {command}\n{real}```"))
        return
    assert text == real, f"{document}: `{command}` prints something else now"


def test_documents_show_output() -> None:
    """A README without a run command would make the test above pass on nothing."""
    assert len([1 for document, _, _ in blocks() if document == "README.md"]) >= 5


def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The sample holds a page without a VMCS too, over which a script must not fall."""
    for code in re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(code, "README.md", "exec"), {})
    assert "0x6bd9000 0x1009e" in capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        assert "://" in target or (document.parent / target).exists(), target


def test_every_group_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for group in registry.GROUPS:
        assert f"`{group}`" in readme, group
    for verb in registry.all_verbs():
        assert f"`{verb.words[-1]}`" in readme, verb.name
