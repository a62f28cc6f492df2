"""The public names: what scripts rely on, loaded when first used, each documented and typed."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import vtdbg

# The calls that outside scripts make, from the design; their meaning must not change.
NAMES = ("open", "memory_from_segments", "Vmcs", "VmxCapabilities", "check_vm_entry", "predict_vm_entry", "ept_walk", "npt_walk", "translate",
         "explain_vm_exit", "Vmcb", "check_vmrun", "scan")


@pytest.mark.parametrize("name", vtdbg.__all__)
def test_every_public_name_loads_and_says_what_it_is(name: str) -> None:
    value = getattr(vtdbg, name)
    assert name in dir(vtdbg)
    if callable(value):
        assert inspect.getdoc(value)


@pytest.mark.parametrize("name", [name for name in NAMES if not isinstance(getattr(vtdbg, name), type)])
def test_public_functions_are_typed(name: str) -> None:
    signature = inspect.signature(getattr(vtdbg, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())


def test_no_public_name_is_a_module_too() -> None:
    """`import vtdbg.scan` anywhere would put the module in the place of the function."""
    modules = {path.stem for path in Path(vtdbg.__file__).parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert modules.isdisjoint(set(vtdbg.__all__) - {"__version__"})


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'opem'"):
        _ = vtdbg.opem  # type: ignore[attr-defined]


def test_a_script_as_in_the_design(intel_plain: Path) -> None:
    """Every call of the public API once, with the arguments that the design names."""
    page = bytes(4096)
    memory = vtdbg.memory_from_segments([(0x1000, page), (0x200000, b"abc")])
    assert memory.read(0x200001, 2) == b"bc"
    with pytest.raises(vtdbg.MemoryUnavailable) as missing:
        memory.read(0x1FFF, 2)
    assert missing.value.address == 0x2000

    machine = vtdbg.open(intel_plain)
    found = {item.address: item for item in vtdbg.scan(machine)}
    assert {0x6826000, 0x6BD9000} <= set(found)
    vmcs = vtdbg.Vmcs.from_page(machine.memory.read_page(0x6826000), layout=None)
    assert vmcs["GUEST_RIP"] == vmcs[0x681E] == vmcs.get("GUEST_RIP") and "GUEST_RIP" in vmcs
    assert dict(vmcs.items())["GUEST_RIP"] == vmcs["GUEST_RIP"]
    assert vtdbg.Vmcs.from_values({0x681E: 0x1000})["GUEST_RIP"] == 0x1000
    with pytest.raises(KeyError, match="HOST_RIP"):
        vtdbg.Vmcs.from_values({0x681E: 0x1000})["HOST_RIP"]
    text = vtdbg.Vmcs.from_text((Path(__file__).parent / "data/intel/kvm-bochs27.serial.log").read_text())
    failed = vtdbg.Vmcs.from_page(machine.memory.read_page(0x6BD9000))
    assert text["GUEST_CS_AR_BYTES"] == failed["GUEST_CS_AR_BYTES"]

    caps = vtdbg.VmxCapabilities.load("bochs-2.7-skylake-x")
    failing = [finding for finding in vtdbg.check_vm_entry(failed, caps, memory=machine.memory) if finding.verdict == "fail"]
    assert [finding.id for finding in failing] == ["guest.cs.type"]
    assert failing[0].area == "guest" and "GUEST_CS_AR_BYTES" in failing[0].fields and failing[0].see and failing[0].message
    assert vtdbg.predict_vm_entry(failed, caps, memory=machine.memory) == ("entry-failure", 33, 0)

    walk = vtdbg.ept_walk(machine.memory, vmcs["EPT_POINTER"], 0x1000, access="r", caps=caps)
    assert walk.outcome == "mapped" and walk.hpa == 0x1E3D000 and walk.page_size == 4096 and len(walk.steps) == 4
    both = vtdbg.translate(machine, 0x10000, cr3=vmcs["GUEST_CR3"], eptp=vmcs["EPT_POINTER"])
    assert both.outcome == "mapped" and both.gpa == 0x10000
    explained = vtdbg.explain_vm_exit(48, 0x182)
    assert explained.name == "EPT_VIOLATION"
    machine.memory.close()  # type: ignore[attr-defined]
