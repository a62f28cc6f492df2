"""Every verb is declared once, here: its words, arguments and help.  CLI, GDB, WinDbg and the shell are generated from it."""

from __future__ import annotations

import argparse
import importlib
from functools import cache
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from vtdbg.errors import UnknownName, UsageError
from vtdbg.names import near_names
from vtdbg.report import Report

KINDS = ("address", "int", "text", "field", "path", "flag", "choice", "register", "exit")
"""What a word stands for.  `exit`: an address, or the numbers or the name of an exit."""


class Arg(NamedTuple):
    """A positional argument.  `kind` drives parsing and completion; `nargs` is '' (one), '?', '*' or '+'."""

    name: str
    kind: str
    help: str
    nargs: str = ""
    choices: Tuple[str, ...] = ()


class Opt(NamedTuple):
    """An option.  A `flag` takes no value; `many` collects repeated ones."""

    flag: str
    kind: str
    help: str
    choices: Tuple[str, ...] = ()
    default: Any = None
    many: bool = False
    metavar: str = ""

    @property
    def dest(self) -> str:
        return self.flag.lstrip("-").replace("-", "_")


class Verb(NamedTuple):
    """`words` like ("ept", "walk").  `live` verbs need a debugger; `changes` ones write to the target and ask first."""

    words: Tuple[str, ...]
    summary: str
    arguments: Tuple[Arg, ...]
    options: Tuple[Opt, ...]
    run: Callable[..., Report]
    description: str = ""
    live: bool = False

    @property
    def name(self) -> str:
        return " ".join(self.words)


# The modules of a group are imported only when one of its verbs is used, so that `--help` and completion of others stay fast.
MODULES: Mapping[str, Tuple[str, ...]] = {
    "vmcs": ("vmcs_list", "vmcs", "checks", "live", "record_diff", "infer"),
    "vmcb": ("vmcb", "checks", "record_diff"),
    "ept": ("ept", "maps"),
    "npt": ("npt", "maps"),
    "gva": ("gva",),
    "exit": ("exit", "trace"),
    "gdt": ("descriptors",),
    "ldt": ("descriptors",),
    "idt": ("descriptors",),
    "tss": ("descriptors",),
    "msrbitmap": ("bitmaps",),
    "iobitmap": ("bitmaps",),
    "page": ("pages",),
    "caps": ("caps",),
    "decode": ("decode",),
    "source": ("source",),
    "report": ("report",),
    "phys": ("phys",),
    "msr": ("decode", "live"),
    "cpuid": ("live",),
    "sgdt": ("live",),
    "where": ("where",),
    "kvm": ("kvm",),
    "windbg": ("windbg",),
}

GROUPS: Mapping[str, str] = {
    "vmcs": "VMCS: find, dump, get, check",
    "vmcb": "VMCB: find, dump, get, check",
    "ept": "EPT: where a guest-physical address goes",
    "npt": "NPT: the same for AMD",
    "gva": "guest-virtual addresses through both dimensions",
    "exit": "VM exits: what they mean and what to do",
    "gdt": "global descriptor table, with the access rights as VMWRITE wants them",
    "ldt": "local descriptor table",
    "idt": "interrupt descriptor table",
    "tss": "task-state segment, with the I/O permission bitmap",
    "msrbitmap": "which MSR accesses exit",
    "iobitmap": "which port accesses exit",
    "page": "the other pages and lists that a VMCS points to",
    "caps": "capability MSRs: what a processor allows",
    "decode": "any register, field, entry or MSR by name and value",
    "source": "what the dump or the target is",
    "report": "one HTML page of all of it, with pictures",
    "phys": "physical memory, the machine's or a guest's, in the formats of GDB's x",
    "msr": "MSRs by name or index; of a live processor by an injected RDMSR",
    "cpuid": "CPUID of a live processor, by an injected instruction",
    "sgdt": "descriptor-table registers of a live processor, by injected instructions",
    "where": "processors of a live target: host or guest, and whose",
    "kvm": "KVM's VMs and vCPUs by the kernel's own symbols",
    "windbg": "set up the commands in WinDbg",
}

_VERBS: Dict[Tuple[str, ...], Verb] = {}


def verb(
    name: str, summary: str, *parameters: "Arg | Opt", description: str = "", live: bool = False
) -> Callable[[Callable[..., Report]], Callable[..., Report]]:
    """Declares the decorated function as a verb; it is called with the Session and one keyword an argument."""
    arguments = tuple(item for item in parameters if isinstance(item, Arg))
    options = tuple(item for item in parameters if isinstance(item, Opt))

    def declare(function: Callable[..., Report]) -> Callable[..., Report]:
        words = tuple(name.split())
        _VERBS[words] = Verb(words, summary, arguments, options, function, description or (function.__doc__ or "").strip(), live)
        return function

    return declare


def verbs_of(group: str) -> List[Verb]:
    """The verbs of a group, in the order of their declaration."""
    if group not in GROUPS:
        raise UnknownName("command", group, _commands_like(group) or ("help",))
    for module in MODULES[group]:
        importlib.import_module(f"vtdbg.commands.{module}")
    return [found for words, found in _VERBS.items() if words[0] == group]


def _commands_like(word: str) -> Tuple[str, ...]:
    """Groups spelled nearly so, and whole commands for a verb that was written first (`dump`, `walk ept`)."""
    wanted = word.lower()
    return near_names(word, GROUPS, 2) + tuple(found.name for found in all_verbs() if len(found.words) > 1 and found.words[1] == wanted)


def all_verbs() -> List[Verb]:
    return [found for group in GROUPS for found in verbs_of(group)]


def find_verb(words: Sequence[str]) -> Tuple[Verb, List[str]]:
    """The verb that the words begin with, and the words after it."""
    if not words:
        raise UsageError(f"no command: one of {', '.join(GROUPS)}")
    # Most of the cost of a short command is imports: the modules behind the one that has the verb are not needed.
    for module in MODULES.get(words[0], ()) if len(words) > 1 else ():
        importlib.import_module(f"vtdbg.commands.{module}")
        exact = _VERBS.get((words[0], words[1]))
        if exact is not None:
            return exact, list(words[2:])
    if words[0] not in GROUPS and len(words) > 1 and words[1] in GROUPS:
        swapped = f"{words[1]} {words[0]}"
        if any(found.name == swapped for found in verbs_of(words[1])):
            raise UnknownName("command", " ".join(words[:2]), (swapped,))
    verbs = {found.words: found for found in verbs_of(words[0])}
    for length in (2, 1):
        found = verbs.get(tuple(words[:length]))
        if found:
            return found, list(words[length:])
    known = [words_[1] for words_ in verbs if len(words_) > 1]
    if len(words) == 1 or words[1].startswith("-"):
        raise UsageError(f"{words[0]}: which one? {', '.join(known)}")
    # `msr 0x480`, `source mem.elf`: what the verb is about, without the verb.
    forgotten = {"msr": (f"msr show {words[1]}", f"msr read {words[1]}"), "source": (f"source info -s {words[1]}",)}
    raise UnknownName(f"{words[0]} command", words[1], near_names(words[1], known) or forgotten.get(words[0]) or tuple(known))


COMMON_OPTIONS: Tuple[Opt, ...] = (
    Opt("--source", "path", "dump file, or gdb:HOST:PORT", metavar="SOURCE"),
    Opt("--format", "text", "format of the dump (default: recognised by content)"),
    Opt("--layout", "text", "VMCS page layout: a name from `vmcs layouts`, or a layout file", metavar="NAME|FILE"),
    Opt("--caps", "text", "capability MSRs: a file, or the name of a processor preset", metavar="FILE|PRESET"),
    Opt("--host-paging", "choice", "SVM: the host's paging mode, the format of nested page tables (default: the live host's, else 4-level)",
        choices=("4-level", "5-level", "PAE", "32-bit")),
    Opt("--inside", "address", "look into the guest of the VMCS or VMCB at this address (again: into a guest of that guest)", many=True,
        metavar="ADDRESS"),
    Opt("--scan", "text", "what a search for control blocks reads: a part of the memory (A-B, A+SIZE), or all of it however slow the connection",
        metavar="RANGE|all"),
    Opt("--symbols", "path", "gdb:HOST:PORT: a file of symbols for that gdb, such as `kvm symbols` makes (again: more)", many=True, metavar="FILE"),
    Opt("--thread", "int", "gdb:HOST:PORT: look from this processor (`where` lists them)"),
    Opt("--no-fast", "flag", "live target: read its RAM through the stub only"),
    Opt("--json", "flag", "print JSON"),
    Opt("--python", "flag", "print the Python that does the same"),
    Opt("--color", "choice", "when to colour", choices=("auto", "always", "never"), default="auto"),
    Opt("--width", "int", "columns of the text (default: the terminal's, else 80)"),
)


class _HelpFormatter(argparse.HelpFormatter):
    """Descriptions are docstrings: paragraphs stay apart, each flowed to the width."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        import inspect
        import textwrap

        return "\n\n".join(textwrap.fill(" ".join(part.split()), width, initial_indent=indent, subsequent_indent=indent)
                           for part in inspect.cleandoc(text).split("\n\n"))


class ArgumentParser(argparse.ArgumentParser):
    """argparse that raises UsageError instead of ending the process: a debugger must survive a typo."""

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see `{self.prog} --help`")


@cache
def parser_for(found: Verb, program: str = "vtdbg") -> ArgumentParser:
    """The verb's command line as an argparse parser, common options included."""
    parser = _own_parser(found, program)
    add_common_options(parser)
    return parser


def _own_parser(found: Verb, program: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"{program} {found.name}".strip(),
        description=found.description or found.summary,
        add_help=False,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    for argument in found.arguments:
        extra: Dict[str, Any] = {"nargs": argument.nargs} if argument.nargs else {}
        if argument.choices:
            extra["choices"] = argument.choices
        parser.add_argument(argument.name, help=argument.help, metavar=argument.name.upper(), **extra)
    section = parser.add_argument_group("options")
    for option in found.options:
        _add_option(section, option)
    return parser


def add_common_options(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """The options that every verb has, and -h; `without` some flags."""
    section = parser.add_argument_group("common options")
    for option in COMMON_OPTIONS:
        if option.flag not in without:
            _add_option(section, option)
    section.add_argument("-h", "--help", action="store_true", dest="help", help="this text")


def _add_option(section: Any, option: Opt) -> None:
    flags = [option.flag] + (["-s"] if option.flag == "--source" else [])
    if option.kind == "flag":
        section.add_argument(*flags, action="store_true", help=option.help)
        return
    extra: Dict[str, Any] = {"choices": option.choices} if option.choices else {"metavar": option.metavar or option.kind.upper()}
    section.add_argument(*flags, help=option.help, default=option.default, action="append" if option.many else "store", **extra)


def parse(found: Verb, words: Sequence[str], convert: Callable[[str, str], Any], program: str = "vtdbg") -> Dict[str, Any]:
    """The verb's arguments by name, converted by `convert(kind, text)`; common options included.  Raises UsageError."""
    given, surplus = parser_for(found, program).parse_known_args(list(words))
    if surplus:
        raise UsageError(_surplus(found, surplus, program))
    space = vars(given)
    kinds = {argument.name: argument.kind for argument in found.arguments}
    kinds.update({option.dest: option.kind for option in found.options + COMMON_OPTIONS})
    return {name: _converted(kinds.get(name, "text"), value, convert) for name, value in space.items()}


def _surplus(found: Verb, words: Sequence[str], program: str) -> str:
    """What to do with words that the verb has no place for."""
    flags = [option.flag for option in found.options + COMMON_OPTIONS]
    first = words[0]
    if first.startswith("--"):
        near = near_names(first, flags)
        hint = f"did you mean {', '.join(near)}?" if near else ""
    elif first.startswith("sample:") or "/" in first or "." in first:
        hint = f"a memory image is named with -s {first}" + (f", a log with --text {first}" if "--text" in flags else "")
    else:
        addresses = [flag for flag in ("--vmcs", "--vmcb", "--at") if flag in flags] if first[:2].lower() == "0x" else []
        hint = f"an address goes behind {' or '.join(addresses)}" if addresses else ""
    return f"unrecognized arguments: {' '.join(words)}; {hint + '; ' if hint else ''}see `{program} {found.name} --help`".replace("`  ", "` ")


def _converted(kind: str, value: Any, convert: Callable[[str, str], Any]) -> Any:
    if isinstance(value, list):
        return [_converted(kind, item, convert) for item in value]
    return convert(kind, value) if isinstance(value, str) else value


def usage(found: Verb, program: str = "vtdbg") -> str:
    """The help of a verb.  The common options are named once below: in the first lines they would bury its own."""
    parser = _own_parser(found, program)
    own = parser.format_usage().partition(" ")[2].rstrip()
    add_common_options(parser)
    last = own.rpartition("\n")[2]
    gap = " " if len(last) + len(" [common options]") < 72 else "\n" + " " * (len(parser.prog) + 8)
    parser.usage = f"{own}{gap}[common options]".replace("%", "%%")
    return parser.format_help()


def complete(words: Sequence[str], prefix: str, sources: Optional[Mapping[str, Callable[[], Sequence[str]]]] = None) -> List[str]:
    """What can stand after `words` when `prefix` is typed: verbs, options, field names, choices."""
    if not words:
        return sorted(group for group in GROUPS if group.startswith(prefix))
    if words[0] not in GROUPS:
        return []
    verbs = verbs_of(words[0])
    if len(words) == 1 and not any(len(found.words) == 1 for found in verbs):
        return sorted(found.words[1] for found in verbs if found.words[1].startswith(prefix))
    try:
        found, rest = find_verb(words)
    except (UnknownName, UsageError):
        return []
    if prefix.startswith("-"):
        return sorted(option.flag for option in found.options + COMMON_OPTIONS if option.flag.startswith(prefix))
    candidates: List[str] = []
    # A word behind an option that takes one is its value.
    valued = {option.flag: option for option in found.options + COMMON_OPTIONS if option.kind != "flag"}
    behind = [valued.get("--source" if word == "-s" else word) for word in rest]
    wanted: "Optional[Arg | Opt]" = behind[-1] if behind else None
    if wanted is None and found.arguments:
        values = [number + 1 for number, option in enumerate(behind) if option is not None]
        position = len([word for number, word in enumerate(rest) if number not in values and not word.startswith("-")])
        wanted = found.arguments[min(position, len(found.arguments) - 1)]
    if wanted is not None:
        candidates += wanted.choices
        kind = "address" if wanted.kind == "exit" else wanted.kind
        if sources and kind in sources:
            candidates += sources[kind]()
    return sorted(item for item in candidates if item.lower().startswith(prefix.lower()))
