"""Capability MSRs out of what people have: JSON, `rdmsr` sessions, WinDbg, vmxcap, a VirtualBox log, /proc/cpuinfo, cpuid -r; and the presets.

What was not understood is kept with its line; two different values of one MSR are both named.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

from vtdbg import bits
from vtdbg.bits import BitField
from vtdbg.errors import FormatError, UnknownName, VtdbgError
from vtdbg.names import near_names
from vtdbg.numbers import parse_number
from vtdbg.plain_text import decode
from vtdbg.record import name_key
from vtdbg.vmx.capabilities import WORD_SOURCES, MsrKey, VmxCapabilities, msr_index, msr_name
from vtdbg.x86 import msrs

MAX_TEXT = 64 << 20
MAX_LINE = 4096
"""Bytes of a file that are worth reading: logs are smaller."""

SHOWN_LINES = 5

_VALUE = r"(0[xX][0-9a-fA-F`]+|[0-9a-fA-F]{1,8}[`:][0-9a-fA-F]{8}|[0-9a-fA-F]+)h?\b"
_NAMED = re.compile(r"\b((?:MSR_)?(?:IA32_|VMX_|VM_CR\b|VM_HSAVE_PA\b|EFER\b)[A-Z0-9_]*)(?:\s+MSR)?\s*(?:[\[(]\s*(?:0x)?[0-9a-fA-F]+h?\s*[\])])?\s*"
                    r"(?:[:=]|->|\s)\s*(?:edx:eax\s*[:=]\s*)?" + _VALUE)
_INDEXED = re.compile(r"^(?:cpu\s*\d+\s*:?\s*)?(?:(?:rd)?msr\s*)?[\[(]?\s*(0[xX][0-9a-fA-F]{1,8}|[0-9a-fA-F]{2,8})h?\s*[\])]?\s*"
                      r"([:=]|->|\s)\s*(?:edx:eax\s*[:=]\s*)?" + _VALUE + r"\s*(?:[#;(].*)?$", re.IGNORECASE)
_COMMAND = re.compile(r"(?:^|[\s>$#])rdmsr\s+(.*)$", re.IGNORECASE)
_BARE = re.compile(r"^(0[xX])?[0-9a-fA-F]{1,16}$")
_CPUID = re.compile(r"(0[xX][0-9a-fA-F]{1,8})[\s:/.]+(0[xX][0-9a-fA-F]+):?\s+eax=(0[xX][0-9a-fA-F]+)\s+ebx=(0[xX][0-9a-fA-F]+)\s+"
                    r"ecx=(0[xX][0-9a-fA-F]+)\s+edx=(0[xX][0-9a-fA-F]+)", re.IGNORECASE)
_SIZES = re.compile(r"address sizes\s*:\s*(\d+) bits physical, (\d+) bits virtual")
_VMXCAP_HEX = re.compile(r"^Hex:\s*(0[xX][0-9a-fA-F]+)$")
_VMXCAP_HEADINGS = {
    "basic vmx information": 0x480,
    "miscellaneous data": 0x485,
    "vpid and ept capabilities": 0x48C,
    "ept and vpid capabilities": 0x48C,
    "vm functions": 0x491,
}
_VMXCAP_WORDS = {
    "pin-based controls": "pin",
    "primary processor-based controls": "proc",
    "secondary processor-based controls": "sec",
    "tertiary processor-based controls": "tert",
    "vm-exit controls": "exit",
    "vm-entry controls": "entry",
}
_VMXCAP_CONTROL = re.compile(r"^(\S.*?)\s+(yes|no|forced|default)$")
_VMXCAP_NAMES: Mapping[str, Mapping[str, str]] = {
    "proc": {"Activate secondary control": "SEC_CONTROLS"},
    "sec": {"APIC register emulation": "APIC_REGISTER_VIRT", "Conceal non-root operation from PT": "PT_CONCEAL_VMX",
            "Mode-based execute control (XS/XU)": "MODE_BASED_EPT_EXEC", "Sub-page write permissions": "SUB_PAGE_WRITE",
            "GPA translation for PT": "PT_USE_GPA", "TSC scaling": "TSC_SCALING", "User wait and pause": "USR_WAIT_PAUSE",
            "ENCLV exiting": "ENCLV_EXITING"},
    "tert": {"Enable IPI virtualization": "IPI_VIRT"},
    "exit": {"Conceal VM exits from PT": "PT_CONCEAL_PIP"},
    "entry": {"Conceal VM entries from PT": "PT_CONCEAL_PIP"},
}
"""vmxcap's names (QEMU 0c49c91, scripts/kvm/vmxcap) where they are not the manual's."""


class _Reader:
    """One pass over the lines of a text."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.values: Dict[int, int] = {}
        self.lines: Dict[int, int] = {}
        self.cpuid: Dict[Tuple[int, int], Tuple[int, int, int, int]] = {}
        self.widths: Tuple[Optional[int], Optional[int]] = (None, None)
        self.warnings: List[str] = []
        self.strange: List[Tuple[int, str]] = []
        self._pending: Optional[Tuple[int, int]] = None
        self._heading: Optional[int] = None
        self._word: Optional[str] = None
        self.partial: Dict[int, Tuple[int, int]] = {}

    def put(self, index: int, value: int, line: int) -> None:
        if value >> 64:
            raise FormatError(self.source, f"line {line}: {value:#x} does not fit in the 64 bits of {msr_name(index)}")
        before = self.values.setdefault(index, value)
        first = self.lines.setdefault(index, line)
        if before != value:
            self.warnings.append(f"{msr_name(index)} is {before:#x} in line {first} and {value:#x} in line {line}: the first is used")

    def line(self, number: int, line: str) -> None:
        # No tool writes longer lines; what is no text at all can be one.
        text = line[:MAX_LINE].strip()
        if not text or (text.startswith("#") and not _COMMAND.search(text)):
            return
        if not _BARE.match(text):
            self._pending = None
        if not (self._cpu(text) or self._vmxcap(number, text) or self._command(text) or self._value(number, text)):
            self.strange.append((number, text))

    def _cpu(self, text: str) -> bool:
        cpuid = _CPUID.search(text)
        if cpuid:
            leaf, subleaf, *registers = (int(part, 16) for part in cpuid.groups())
            self.cpuid.setdefault((leaf, subleaf), (registers[0], registers[1], registers[2], registers[3]))
            return True
        sizes = _SIZES.search(text)
        if sizes:
            self.widths = int(sizes.group(1)), int(sizes.group(2))
        return sizes is not None

    def _vmxcap(self, number: int, text: str) -> bool:
        lower = text.lower()
        if lower in _VMXCAP_HEADINGS or lower in _VMXCAP_WORDS:
            self._heading, self._word = _VMXCAP_HEADINGS.get(lower), _VMXCAP_WORDS.get(lower)
            return True
        found = _VMXCAP_HEX.match(text)
        if found and self._heading is not None:
            self.put(self._heading, int(found.group(1), 16), number)
            return True
        if self._heading is not None:
            # The lines under a Hex line say its bits again.
            return bool(re.match(r"^\S.*\s(yes|no|\d+)$", text))
        control = _VMXCAP_CONTROL.match(text)
        row = _vmxcap_control(self._word, control.group(1)) if self._word and control else None
        if row is None or self._word is None or control is None:
            return False
        self._put_control(self._word, row, control.group(2))
        return True

    def _put_control(self, word: str, row: BitField, says: str) -> None:
        """yes: may be 0 or 1.  no: must be 0.  forced: must be 1.  default: must be 1 by the plain MSR, may be 0 by the TRUE one."""
        source = WORD_SOURCES[word]
        for index in (source.msr, source.true_msr):
            if index is None:
                continue
            must = row.mask if says == "forced" or (says == "default" and index == source.msr) else 0
            may = 0 if says == "no" else row.mask
            value, known = self.partial.get(index, (0, 0))
            if source.halves:
                self.partial[index] = value | must | may << 32, known | row.mask | row.mask << 32
            else:
                self.partial[index] = value | may, known | row.mask

    def _command(self, text: str) -> bool:
        """`rdmsr -a 0x480`: the values follow on lines of their own.  msr-tools reads a bare index as decimal, WinDbg as hexadecimal."""
        command = _COMMAND.search(text)
        if command is None:
            return False
        base, index = 16, None
        windbg = text.startswith(("kd>", "lkd>", "0: kd>"))
        words = iter(command.group(1).split())
        for word in words:
            if word in ("-p", "--processor", "-f", "--bitfield"):
                next(words, None)
            elif word.startswith("-"):
                base = {"d": 10, "u": 10, "o": 8}.get(word[-1:], 16)
            elif re.fullmatch(r"0[xX][0-9a-fA-F]{1,8}", word) or (windbg and re.fullmatch(r"[0-9a-fA-F]{1,8}", word)):
                index = int(word, 16)
            elif re.fullmatch(r"[0-9]{1,10}", word):
                index = int(word)
        self._pending = None if index is None else (index, base)
        return index is not None

    def _value(self, number: int, text: str) -> bool:
        if self._pending is not None and _BARE.match(text):
            index, base = self._pending
            try:
                self.put(index, int(text, 16 if text[:2] in ("0x", "0X") else base), number)
            except ValueError:
                return False
            return True
        named = _NAMED.search(text)
        if named:
            known = msrs.indexes(named.group(1))
            if known:
                self.put(known[0], _hexadecimal(named.group(2)), number)
            return bool(known)
        indexed = _INDEXED.match(text)
        if indexed:
            index, value = int(indexed.group(1), 16), indexed.group(3)
            # "480 12" alone could be anything: without the word MSR, a bracket or 0x it needs a separator and an index that exists.
            marked = text[:1] in "[(" or "msr" in text.lower() or indexed.group(1)[:2] in ("0x", "0X")
            if marked or (indexed.group(2).strip() and index in msrs.msrs()):
                self.put(index, _hexadecimal(value), number)
                return True
        return False

    def capabilities(self) -> VmxCapabilities:
        if not self.values and not self.partial and not self.cpuid and self.widths == (None, None):
            first = f"; line {self.strange[0][0]} is {self.strange[0][1][:60]!a}" if self.strange else ""
            raise FormatError(self.source, "no MSR value in it: expected lines like 'IA32_VMX_BASIC = 0x...', '0x480 0x...' or rdmsr output, "
                              f"or JSON{first}")
        return VmxCapabilities(self.values, physical_address_width=self.widths[0], linear_address_width=self.widths[1], cpuid=self.cpuid,
                               origin=self.source, warnings=(*self.warnings, *self._not_understood()), partial=self.partial)

    def _not_understood(self) -> List[str]:
        shown = [f"line {number} was not understood: {text[:80]!a}" for number, text in self.strange[:SHOWN_LINES]]
        more = len(self.strange) - len(shown)
        return [*shown, f"{more} more lines were not understood"] if more else shown


@cache
def _vmxcap_names(word: str) -> Dict[str, BitField]:
    table = bits.table(word)
    names = {name_key(row.name): row for row in table.fields if row.ident}
    names.update((name_key(name), table[ident]) for name, ident in _VMXCAP_NAMES.get(word, {}).items())
    return names


def _vmxcap_control(word: str, name: str) -> Optional[BitField]:
    return _vmxcap_names(word).get(name_key(name))


def _hexadecimal(text: str) -> int:
    return int(text.replace("`", "").replace(":", ""), 16)


def parse(text: str, source: str = "text") -> VmxCapabilities:
    """Capability MSRs (and CPUID leaves, address widths) out of a text.

    JSON: {"0x480": "0x...", "IA32_VMX_MISC": 123, "physical_address_width": 46}, the MSRs at the top or under "msrs".  Lines: a name or an index
    and a hexadecimal value; `rdmsr` commands followed by their output; vmxcap (its Hex lines are whole MSRs, its controls single bits);
    `cpuid -r`; /proc/cpuinfo's address sizes.
    Raises FormatError naming the line or key for an impossible value, or where nothing at all was found.
    """
    if text.lstrip()[:1] == "{":
        return _from_json(text, source)
    reader = _Reader(source)
    for number, line in enumerate(text.splitlines(), 1):
        reader.line(number, line)
    return reader.capabilities()


def _from_json(text: str, source: str) -> VmxCapabilities:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(source, f"not JSON: {error}") from None
    given = data.get("msrs", data)
    if not isinstance(given, dict):
        raise FormatError(source, '"msrs" has to be an object of MSR and value')
    values: Dict[MsrKey, int] = {}
    warnings: List[str] = []
    for key, value in given.items():
        if key in _JSON_KEYS or value is None:
            continue
        try:
            index = msr_index(key)
        except UnknownName as error:
            warnings.append(f"key {key!a} was not understood: {error}")
            continue
        values[index] = _json_number(source, key, value)
    if not values:
        raise FormatError(source, 'no MSR value in it: expected {"0x480": "0x...", ...}')
    widths = [_json_width(source, data, key) for key in ("physical_address_width", "linear_address_width")]
    capabilities = VmxCapabilities.from_msrs(values, widths[0], widths[1], _json_cpuid(source, data.get("cpuid", {})), source)
    capabilities.warnings = tuple(warnings)
    return capabilities


_JSON_KEYS = frozenset({"physical_address_width", "linear_address_width", "cpuid", "title", "provenance", "notes", "msrs"})


def _json_number(source: str, key: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str):
        try:
            number = parse_number(value)
        except VtdbgError as error:
            raise FormatError(source, f"{key}: {error}") from None
    else:
        raise FormatError(source, f"{key}: {value!a} is not a number")
    if number < 0 or number >> 64:
        raise FormatError(source, f"{key}: {number:#x} does not fit in 64 bits")
    return number


def _json_width(source: str, data: Mapping[str, Any], key: str) -> Optional[int]:
    return None if data.get(key) is None else _json_number(source, key, data[key])


def _json_cpuid(source: str, data: Any) -> Dict[Tuple[int, int], Tuple[int, int, int, int]]:
    """{"0x80000008": [eax, ebx, ecx, edx], "7.0": {"eax": ..., ...}}."""
    if not isinstance(data, dict):
        raise FormatError(source, 'cpuid: expected {"leaf": [eax, ebx, ecx, edx], ...}')
    leaves: Dict[Tuple[int, int], Tuple[int, int, int, int]] = {}
    for key, registers in data.items():
        leaf, _, subleaf = key.partition(".")
        where = f"cpuid {key}"
        if isinstance(registers, dict):
            registers = [registers.get(name, registers.get(name.upper())) for name in ("eax", "ebx", "ecx", "edx")]
        if not isinstance(registers, list) or len(registers) != 4:
            raise FormatError(source, f"{where}: expected [eax, ebx, ecx, edx]")
        eax, ebx, ecx, edx = (_json_number(source, where, value) for value in registers)
        leaves[_json_number(source, where, leaf), _json_number(source, where, subleaf or "0")] = (eax, ebx, ecx, edx)
    return leaves


def parse_file(path: Union[str, Path]) -> VmxCapabilities:
    """`parse` of a file's text; FormatError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TEXT)
    except (OSError, ValueError) as error:
        raise FormatError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse(decode(data), str(path))


@cache
def _preset_texts() -> Dict[str, str]:
    folder = resources.files("vtdbg").joinpath("data").joinpath("presets")
    texts = {entry.name[:-5]: entry.read_text("utf-8") for entry in folder.iterdir() if entry.name.endswith(".json")}
    return dict(sorted(texts.items()))


def preset_names() -> List[str]:
    """Names of the processors that ship with vtdbg."""
    return list(_preset_texts())


def preset_title(name: str) -> str:
    """What the preset is and where its values are from: "Intel Core i7-6700K (Skylake): values read on ..."."""
    data = json.loads(_preset_text(name))
    return f"{data['title']}: {data['provenance']}"


def _preset_text(name: str) -> str:
    text = _preset_texts().get(name.lower())
    if text is None:
        raise UnknownName("processor preset", name, near_names(name, preset_names()) or tuple(preset_names()))
    return text


def preset(name: str) -> VmxCapabilities:
    """A processor that ships with vtdbg; its origin says whose values they are."""
    capabilities = _from_json(_preset_text(name), f"preset {name.lower()}")
    capabilities.origin = f"preset {name.lower()} ({preset_title(name)})"
    capabilities.warnings = tuple(json.loads(_preset_text(name))["notes"])
    return capabilities


def load(name: str) -> VmxCapabilities:
    """A preset's name or a file: the preset wins, "./NAME" is always a file.

    Raises UnknownName where it is neither, FormatError for a file without MSR values.
    """
    if name.lower() in _preset_texts():
        return preset(name)
    if os.path.exists(name):
        return parse_file(name)
    raise UnknownName("processor preset or file of MSR values", name, near_names(name, preset_names()) or tuple(preset_names()))
