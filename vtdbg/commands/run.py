"""Words in, text and exit status out: what every front end calls."""

from __future__ import annotations

from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence

from vtdbg.commands import registry
from vtdbg.commands.session import Session
from vtdbg.errors import VtdbgError
from vtdbg.report import BAD_INPUT, FINE, Report


class Outcome(NamedTuple):
    """What a command line came to.  `error` is the one line for the user; `text` is empty then."""

    text: str
    status: int
    error: str = ""
    report: Optional[Report] = None


Render = Callable[[Report, Dict[str, Any]], str]


def run_words(words: Sequence[str], session: Session, render: Render) -> Outcome:
    """Runs one command line.  `render(report, options)` makes the text where neither --json nor --python is asked for.

    Every VtdbgError becomes one line and status 2.  Anything else is a bug and passes through.
    """
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            return Outcome(overview(session.program, words[1:]), FINE)
        if len(words) == 1 and words[0] in registry.GROUPS and all(len(found.words) > 1 for found in registry.verbs_of(words[0])):
            return Outcome(group_help(words[0], session.program), FINE)
        if len(words) == 2 and words[0] in registry.GROUPS and words[1] in ("-h", "--help"):
            return Outcome(group_help(words[0], session.program), FINE)
        found, rest = registry.find_verb(words)
        if any(word in ("-h", "--help") for word in rest):
            return Outcome(registry.usage(found, session.program), FINE)
        options = registry.parse(found, rest, session.convert, session.program)
        session.configure(options)
        common = {option.dest for option in registry.COMMON_OPTIONS} | {"help"}
        report = found.run(session, **{name: session.resolved(value) for name, value in options.items() if name not in common})
    except VtdbgError as error:
        return Outcome("", BAD_INPUT, f"{session.program}: {error}".replace("\n", " "))
    if options.get("python"):
        return Outcome("\n".join(report.python) + "\n", report.status, report=report)
    if options.get("json"):
        from vtdbg.render.text import render_json

        return Outcome(render_json(report), report.status, report=report)
    return Outcome(render(report, options), report.status, report=report)


def overview(program: str, words: Sequence[str] = ()) -> str:
    """The list of groups, or the help of the named verb."""
    if words:
        if len(words) == 1 and words[0] in registry.GROUPS:
            return group_help(words[0], program)
        found, _ = registry.find_verb(words)
        return registry.usage(found, program)
    lines = [f"usage: {program} GROUP VERB [arguments] [-s SOURCE]".replace("  ", " "), ""]
    lines += [f"  {group:<10} {summary}" for group, summary in registry.GROUPS.items()]
    lines += [
        "",
        f"{program} GROUP lists its verbs; {program} GROUP VERB --help explains one.".strip(),
        "Exit status: 0 fine, 1 findings, 2 bad input.",
    ]
    return "\n".join(lines) + "\n"


def group_help(group: str, program: str) -> str:
    """The verbs of a group, one a line."""
    verbs = registry.verbs_of(group)
    width = max(len(found.name) for found in verbs)
    lines = [f"{group}: {registry.GROUPS[group]}", ""]
    lines += [f"  {found.name:<{width}}  {found.summary}" for found in verbs]
    lines += ["", f"{program} {verbs[0].name} --help explains one.".strip()]
    return "\n".join(lines) + "\n"
