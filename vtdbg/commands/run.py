"""Words in, text and exit status out: what every front end calls."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from vtdbg.commands import registry
from vtdbg.commands.session import Session
from vtdbg.errors import NoMemory, VtdbgError
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
        if words == ["version"]:
            import vtdbg

            return Outcome(f"vtdbg {vtdbg.__version__}\n", FINE)
        if len(words) == 1 and _has_verbs(words[0]):
            return Outcome(group_help(words[0], session.program), FINE)
        if len(words) == 2 and words[1] in ("-h", "--help", "help") and words[0] in registry.GROUPS:
            return Outcome(overview(session.program, words[:1]), FINE)
        found, rest = registry.find_verb(words)
        if any(word in ("-h", "--help") for word in rest):
            return Outcome(registry.usage(found, session.program), FINE)
        options = registry.parse(found, rest, session.convert, session.program)
        session.configure(options)
        common = {option.dest for option in registry.COMMON_OPTIONS} | {"help"}
        report = found.run(session, **{name: session.resolved(value) for name, value in options.items() if name not in common})
    except NoMemory as error:
        reads_text = any(option.flag == "--text" for option in found.options)
        hint = ", or a log with --text FILE (--text - reads the standard input)" if reads_text else ""
        return Outcome("", BAD_INPUT, f"{session.program}: {error}{hint}")
    except VtdbgError as error:
        return Outcome("", BAD_INPUT, f"{session.program}: {error}".replace("\n", " "))
    if options.get("python"):
        return Outcome("\n".join(report.python) + "\n", report.status, report=report)
    if options.get("json"):
        from vtdbg.render.text import render_json

        return Outcome(render_json(report), report.status, report=report)
    return Outcome(render(report, options), report.status, report=report)


def overview(program: str, words: Sequence[str] = ()) -> str:
    """The list of groups, or the help of the named verb or group."""
    if words:
        if len(words) == 1 and _has_verbs(words[0]):
            return group_help(words[0], program)
        found, _ = registry.find_verb(words)
        return registry.usage(found, program)
    lines = [f"usage: {program} GROUP VERB [arguments] [-s SOURCE]", "", *_listed(list(registry.GROUPS.items())), ""]
    if program == "vtdbg":
        lines += [*_listed([("shell", "the same commands at a prompt: vtdbg shell -s SOURCE"),
                            ("gdb", "GDB with the same commands loaded: vtdbg gdb [gdb's arguments]")]), ""]
    lines += [f"{program} GROUP lists its verbs; {program} GROUP VERB --help explains one.", "Exit status: 0 fine, 1 findings, 2 bad input."]
    return "\n".join(lines) + "\n"


def _has_verbs(group: str) -> bool:
    """Whether the word is a group of several verbs, and not itself one, as `decode` is."""
    return group in registry.GROUPS and all(len(found.words) > 1 for found in registry.verbs_of(group))


def group_help(group: str, program: str) -> str:
    """The verbs of a group, one a line."""
    verbs = registry.verbs_of(group)
    lines = [f"{group}: {registry.GROUPS[group]}", "", *_listed([(found.name, found.summary) for found in verbs])]
    lines += ["", f"{program} {verbs[0].name} --help explains one."]
    return "\n".join(lines) + "\n"


def _listed(rows: Sequence[Tuple[str, str]]) -> List[str]:
    """Names with a line of text each, in 80 columns."""
    import textwrap

    width = max(10, *(len(name) for name, _ in rows))
    lines = []
    for name, text in rows:
        first, *others = textwrap.wrap(text, 80 - width - 4)
        lines += [f"  {name:<{width}}  {first}", *(" " * (width + 4) + piece for piece in others)]
    return lines
