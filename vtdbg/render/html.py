"""A report as HTML: the same words as the text, in tables; and the frame of a page that stands alone.

Everything that comes out of memory is hostile: it is escaped here, and nowhere else.  The page also carries a content security policy that
allows the one script and the one style sheet that this module puts in, by their hashes, and no request of any kind.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import pkgutil
from dataclasses import replace
from typing import Any, List, Mapping, Optional, Sequence

from vtdbg.report import Block, Cell, Group, Lines, Pairs, Report, Table, Value, cell

STYLES = ("dim", "good", "bad", "warn", "strong")
MOST_ROWS = 2000
"""Rows of a table that are put on a page."""


def escape(words: str) -> str:
    """Text that is inert in element content and in quoted attributes.  Control characters, which could reorder or hide text, become "?"."""
    return html.escape("".join(letter if letter.isprintable() else " " if letter in "\n\t" else "?" for letter in words), quote=True)


def identifier(words: str) -> str:
    """An id or fragment out of any words: letters, digits and hyphens."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in words)


class HtmlRenderer:
    """Blocks of reports as HTML.  `anchors` are places on the page by the command that they stand for ("vmcs dump 0x6826000" -> "#...");
    another link becomes a hint with the command to type, unless `program` is empty."""

    def __init__(self, anchors: Optional[Mapping[str, str]] = None, program: str = "vtdbg") -> None:
        self._anchors, self._program = dict(anchors or {}), program

    def blocks(self, blocks: Sequence[Block], level: int = 3, fold: int = 0) -> str:
        """Blocks one after the other; titles are headings of `level`.  With `fold`, longer tables are folded."""
        return "\n".join(piece for piece in (self._block(block, level, fold) for block in blocks) if piece)

    def notes(self, report: Report) -> str:
        """What the reader must not miss."""
        return "".join(f'<p class="note warn"><b aria-hidden="true">!</b> {escape(note)}</p>' for note in report.notes)

    def value(self, value: Value) -> str:
        """A cell with its style and its link."""
        words = escape(value.text)
        if value.link and words:
            anchor = self._anchors.get(value.link)
            command = escape(f"{self._program} {value.link}")
            if anchor:
                words = f'<a href="{escape(anchor)}">{words}</a>'
            elif self._program:
                words = f'<span class="command" title="{command}">{words}</span>'
        return f'<span class="{value.style}">{words}</span>' if value.style in STYLES and words else words

    def _block(self, block: Block, level: int, fold: int) -> str:
        if isinstance(block, Group):
            inner = self.blocks(block.blocks, min(level + 1, 6), fold)
            return f'<section class="group">{self._heading(block.title, level)}{inner}</section>'
        if isinstance(block, Table) and 0 < fold < len(block.rows):
            words = f"{block.title or 'Table'} ({len(block.rows)} rows)"
            return f"<details><summary>{escape(words)}</summary>{self._table(replace(block, title=''))}</details>"
        if isinstance(block, Table):
            return self._table(block)
        if isinstance(block, Pairs):
            rows = "".join(f'<tr><th scope="row">{escape(label)}</th><td>{self.value(cell(content))}</td></tr>'
                           for _, label, content in block.items if label or cell(content).text)
            return f'<div class="scroll"><table class="pairs">{self._caption(block.title)}<tbody>{rows}</tbody></table></div>' if rows else ""
        return self._lines(block)

    def _heading(self, words: str, level: int) -> str:
        return f"<h{level}>{escape(words)}</h{level}>" if words else ""

    def _caption(self, words: str) -> str:
        return f"<caption>{escape(words)}</caption>" if words else ""

    def _table(self, block: Table) -> str:
        if not block.rows:
            return f'<p class="dim">{escape(block.title + ": " if block.title else "")}{escape(block.empty)}</p>' if block.empty else ""
        shown = [index for index, (_, heading) in enumerate(block.columns) if heading]
        head = "".join(f'<th scope="col">{escape(block.columns[index][1])}</th>' for index in shown) if block.headings else ""
        rows = "".join("<tr>" + "".join(f"<td>{self.value(cell(row[index]))}</td>" for index in shown) + "</tr>" for row in block.rows[:MOST_ROWS])
        more = len(block.rows) - MOST_ROWS
        rest = f'<p class="warn">{more} more rows are not on this page.</p>' if more > 0 else ""
        return (f'<div class="scroll"><table class="table-{identifier(block.key)}">{self._caption(block.title)}'
                + (f"<thead><tr>{head}</tr></thead>" if head else "") + f"<tbody>{rows}</tbody></table></div>{rest}")

    def _lines(self, block: Lines) -> str:
        values: List[Cell] = list(block.lines)
        if not values:
            return ""
        title = f'<p class="title">{escape(block.title)}</p>' if block.title else ""
        words = [self.value(cell(content)) for content in values]
        if block.verbatim:
            return title + "<pre>" + "\n".join(words) + "</pre>"
        if block.bullet:
            return title + "<ul>" + "".join(f"<li>{line}</li>" for line in words) + "</ul>"
        return title + "".join(f"<p>{line}</p>" for line in words)


def render_html(report: Report, anchors: Optional[Mapping[str, str]] = None) -> str:
    """The blocks of a report, with its header and notes, as a fragment of a page."""
    renderer = HtmlRenderer(anchors)
    head = f'<p class="dim">{escape(report.header)}</p>' if report.header else ""
    return head + renderer.notes(report) + renderer.blocks(report.blocks)


def resource(name: str) -> str:
    """The style sheet or the script that comes with the package."""
    return (pkgutil.get_data("vtdbg", f"render/{name}") or b"").decode("ascii")


def embedded(data: Any) -> str:
    """JSON inside a script element: no character that could end the element or begin a comment."""
    words = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return words.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(content: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode("ascii")).digest()).decode("ascii") + "'"


def page(title: str, body: str, data: Any) -> bytes:
    """A page that needs nothing else: style, script and `data` (for the script, as JSON) are in it.  ASCII, whatever `body` holds."""
    style, script = resource("report.css"), resource("report.js")
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; base-uri 'none'; form-action 'none'"
    words = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="vtdbg">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{embedded(data)}</script>
<script>{script}</script>
</body>
</html>
"""
    return words.encode("ascii", "xmlcharrefreplace")
