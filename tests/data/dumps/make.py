#!/usr/bin/env python3
"""Make the sample dumps of this folder: a paused QEMU machine whose memory and registers are set from here, dumped by QEMU in every
format that it writes; makedumpfile converts; python-snappy and zstandard compress what neither of the two can here.  See make.sh and README.md.
"""
import hashlib
import json
import lzma
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import snappy
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support import dumps

PAGE = 4096
RAM = 8 << 20
BLOB_AT = 0x100000
CR3, PDPT, PD, PT = 0x100000, 0x101000, 0x102000, 0x103000
REGISTERS = {                                   # number in QEMU's gdbstub -> value, of processor 0
    0: 0x1111111122222222, 1: 0x3333333344444444, 7: 0x2FF8, 15: 0xF0F0F0F0F0F0F0F0, 16: 0x7654321, 17: 0x246,
    24: 0xFFFF800000001000, 25: 0xFFFF800000002000, 26: 0xFFFFFFFF81234000,
    30: 0x6F0, 29: CR3, 32: 0x500, 27: 0x80050033,
}


VIRTUAL = 0xFFFFFFFF80000000                    # where the page tables map physical 0
RELEASE = "6.1.0-sample"
VMCOREINFO = f"""\
OSRELEASE={RELEASE}
PAGESIZE=4096
SYMBOL(init_uts_ns)={VIRTUAL + 0x132000:x}
SYMBOL(_stext)={VIRTUAL:x}
SYMBOL(init_top_pgt)={VIRTUAL + CR3:x}
SYMBOL(swapper_pg_dir)={VIRTUAL + CR3:x}
SYMBOL(mem_section)={VIRTUAL + 0x134000:x}
LENGTH(mem_section)=2048
SIZE(mem_section)=16
OFFSET(mem_section.section_mem_map)=0
SIZE(page)=64
OFFSET(page.flags)=0
OFFSET(page._refcount)=52
OFFSET(page.mapping)=24
OFFSET(page.lru)=8
OFFSET(page._mapcount)=48
OFFSET(page.private)=40
OFFSET(page.compound_head)=8
NUMBER(SECTION_SIZE_BITS)=27
NUMBER(MAX_PHYSMEM_BITS)=46
NUMBER(KERNEL_IMAGE_SIZE)=1073741824
NUMBER(phys_base)=0
NUMBER(pgtable_l5_enabled)=0
KERNELOFFSET=0
CRASHTIME=1700000000
"""


def with_vmcoreinfo(core):
    """QEMU's ELF core again, with a VMCOREINFO note and its program headers where makedumpfile looks for them (right behind the header)."""
    start, count = struct.unpack_from("<Q", core, 32)[0], struct.unpack_from("<H", core, 56)[0]
    rows = [struct.unpack_from("<IIQQQQQQ", core, start + 56 * i) for i in range(count)]
    info = VMCOREINFO.encode()
    notes = core[rows[0][2]:rows[0][2] + rows[0][5]] + struct.pack("<III", 11, len(info), 0) + b"VMCOREINFO\0\0" + info + bytes(-len(info) % 4)
    at = 64 + 56 * count
    table, body = struct.pack("<IIQQQQQQ", 4, 0, at, 0, 0, len(notes), len(notes), 0), b""
    data_at = (at + len(notes) + 4095) & -4096
    for _, _, offset, _, address, size, _, _ in rows[1:]:
        table += struct.pack("<IIQQQQQQ", 1, 7, data_at + len(body), 0xFFFF888000000000 + address, address, size, size, 0)
        body += core[offset:offset + size]
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, count, 0, 0, 0)
    return (header + table + notes).ljust(data_at, b"\0") + body


def blob():
    """512 KiB for physical 1 MiB: page tables that map the same pages at several addresses, noise, text, zeros."""
    pages = [bytearray(PAGE) for _ in range(128)]

    def entry(table, index, value):
        struct.pack_into("<Q", pages[table - BLOB_AT >> 12], index * 8, value)

    for pml4_index in (0, 256, 511):
        entry(CR3, pml4_index, PDPT | 7)
    entry(PDPT, 0, PD | 7)
    entry(PDPT, 510, PD | 7)
    entry(PD, 0, 0x000000 | 0x87)               # 2 MiB: 0 to 2 MiB
    entry(PD, 1, PT | 7)
    entry(PD, 2, 0x400000 | 0x87)
    entry(PD, 3, 0xFEE00000 | 0x87)             # no memory there
    for i in range(16):
        entry(PT, i, 0x110000 + (i * 7 % 16) * PAGE | 3)      # the same 16 pages again, out of order
    entry(PT, 20, 0x110000 | 3)
    entry(PT, 21, 0x7FFFFF000 | 3)              # no memory there
    for i in range(16, 20):
        pages[i][:] = b"".join(hashlib.sha256(b"%d %d" % (i, n)).digest() for n in range(PAGE // 32))
    for i in range(20, 32):
        pages[i][:] = (b"page %d of the sample; " % i * 200)[:PAGE]
    # What makedumpfile looks at before it copies: the kernel's release, and one present section of (empty) page structures.
    pages[50][4:4 + 6 * 65] = b"".join(text.encode().ljust(65, b"\0") for text in ("Linux", "sample", RELEASE, "#1", "x86_64", "(none)"))
    struct.pack_into("<Q", pages[52], 0, VIRTUAL + 0x138000)
    struct.pack_into("<Q", pages[56], 0, 0xFFFFFF8000400000 | 3)
    pages[40][17] = 1                           # one byte in a page of zeros
    pages[127][-8:] = b"the end."
    return b"".join(pages)


class Lines:
    """Newline-separated JSON over a socket: QMP."""

    def __init__(self, path):
        self.socket = connect(path)
        self.file = self.socket.makefile("rwb")
        self.file.readline()
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        self.file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]


def connect(path):
    for _ in range(100):
        try:
            s = socket.socket(socket.AF_UNIX)
            s.connect(str(path))
            return s
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"nobody listens on {path}")


def set_registers(path, values, width):
    """GDB's remote protocol, packet P: register by number."""
    s = connect(path)

    def send(body):
        s.sendall(b"$%s#%02x" % (body, sum(body) & 255))
        answer = b""
        while b"#" not in answer or len(answer) < answer.index(b"#") + 3:
            answer += s.recv(4096)
        s.sendall(b"+")
        return answer

    for body in (b"qSupported:xmlRegisters=i386", b"qXfer:features:read:target.xml:0,ffb", b"Hg1"):
        send(body)
    for number, value in values.items():
        size = 4 if number == 17 else width
        answer = send(b"P%x=%s" % (number, value.to_bytes(size, "little").hex().encode()))
        if b"OK" not in answer:
            raise RuntimeError(f"register {number}: {answer}")
    s.close()


def dump_32_bit(out, work):
    """A processor without long mode: because its BIOS ends at 4 GiB, QEMU makes 64-bit headers of an i386, with 32-bit NT_PRSTATUS notes."""
    qemu = subprocess.Popen([
        "qemu-system-i386", "-M", "pc", "-accel", "tcg", "-cpu", "pentium3", "-m", "4M", "-S", "-nodefaults", "-display", "none",
        "-bios", str(work / "bios"), "-qmp", f"unix:{work}/qmp32,server=on,wait=off", "-chardev", f"socket,path={work}/gdb32,server=on,wait=off,id=g",
        "-gdb", "chardev:g", "-device", f"loader,file={work}/blob,addr={BLOB_AT:#x},force-raw=on"])
    try:
        qmp = Lines(work / "qmp32")
        set_registers(work / "gdb32", {0: 0x11223344, 3: 0x55667788, 7: 0x99AABBCC, 8: 0x00101234}, 4)
        qmp("dump-guest-memory", protocol=f"file:{work}/qemu32.elf", paging=False)
        qmp("dump-guest-memory", protocol=f"file:{work}/qemu32-zlib.flat", paging=False, format="kdump-zlib")
        qmp("pmemsave", val=0, size=4 << 20, filename=str(work / "qemu32.raw"))
        texts = [qmp("human-monitor-command", **{"command-line": "info registers"})]
        (out / "truth32.json").write_text(json.dumps({"info_registers": texts}, indent=1) + "\n")
        qmp("quit")
    finally:
        qemu.kill()
        qemu.wait()
    return {name: work / name for name in ("qemu32.elf", "qemu32-zlib.flat", "qemu32.raw")}


def main():
    out, work = Path(sys.argv[1]), Path(sys.argv[2])
    (work / "blob").write_bytes(blob())
    (work / "bios").write_bytes(bytes(65536))
    qemu = subprocess.Popen([
        "qemu-system-x86_64", "-M", "pc", "-accel", "tcg", "-cpu", "qemu64", "-smp", "2", "-m", f"{RAM}B", "-S", "-nodefaults", "-display", "none",
        "-bios", str(work / "bios"), "-qmp", f"unix:{work}/qmp,server=on,wait=off", "-chardev", f"socket,path={work}/gdb,server=on,wait=off,id=g",
        "-gdb", "chardev:g", "-device", f"loader,file={work}/blob,addr={BLOB_AT:#x},force-raw=on"])
    try:
        qmp = Lines(work / "qmp")
        set_registers(work / "gdb", REGISTERS, 8)
        print("formats of this QEMU:", qmp("query-dump-guest-memory-capability")["formats"])
        made = {}

        def dump(name, **arguments):
            path = work / name
            try:
                qmp("dump-guest-memory", protocol=f"file:{path}", **arguments)
                made[name] = path
            except RuntimeError as error:
                print(name, error)

        dump("qemu.elf", paging=False)
        dump("qemu-paging.elf", paging=True)
        for kind in ("zlib", "lzo", "snappy"):
            dump(f"qemu-{kind}.flat", paging=False, format=f"kdump-{kind}")
        qmp("pmemsave", val=0, size=RAM, filename=str(work / "qemu.raw"))
        made["qemu.raw"] = work / "qemu.raw"
        texts = []
        for cpu in range(2):
            texts.append(qmp("human-monitor-command", **{"command-line": "info registers", "cpu-index": cpu}))
        truth = {"qemu": qmp("query-version")["qemu"], "ram_bytes": RAM, "info_registers": texts,
                 "info_mtree": qmp("human-monitor-command", **{"command-line": "info mtree -f"})}
        (out / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")
        qmp("quit")
    finally:
        qemu.kill()
        qemu.wait()
    plain = work / "qemu-zlib.kdump"
    with open(made["qemu-zlib.flat"], "rb") as flat:
        subprocess.run(["makedumpfile", "-R", str(plain)], stdin=flat, check=True, stdout=subprocess.DEVNULL)
    made[plain.name] = plain
    (work / "vmcore").write_bytes(with_vmcoreinfo((work / "qemu.elf").read_bytes()))
    for name, options in (("makedumpfile-lzo.kdump", ["-l", "-d", "0"]), ("makedumpfile-nozeros.elf", ["-E", "-d", "1"]),
                          ("makedumpfile-lzo.flat", ["-F", "-l", "-d", "1"])):
        made[name] = work / name
        if "-F" in options:
            with open(work / name, "wb") as out_file:
                subprocess.run(["makedumpfile", "--message-level", "0", *options, str(work / "vmcore")], stdout=out_file, check=True)
        else:
            subprocess.run(["makedumpfile", "--message-level", "0", *options, str(work / "vmcore"), str(work / name)], check=True)
    made.update(dump_32_bit(out, work))
    ram = made["qemu.raw"].read_bytes()
    segments = [(0, ram[:0xA0000]), (0xC0000, ram[0xC0000:])]
    regions, image = dumps.vmware_image(segments)
    for name, content in {
        "snappy.kdump": dumps.kdump(segments, "snappy", compress=snappy.compress),
        "zstd.kdump": dumps.kdump(segments, "zstd", compress=zstandard.ZstdCompressor().compress),
        "snappy.avml": dumps.avml(segments, snappy.compress),
        "ranges.lime": dumps.lime(segments),
        "inside.vmsn": dumps.vmware_state(regions, image),
        "bitmap.dmp": dumps.windows64(segments, "bitmap", cr3=CR3, rip=REGISTERS[16], rax=REGISTERS[0]),
        "ranges.dmp": dumps.windows64([(PAGE, ram[PAGE:0xA0000]), segments[1]], "ranges", cr3=CR3, rip=REGISTERS[16], rax=REGISTERS[0]),
    }.items():
        made[name] = work / name
        made[name].write_bytes(content)
    for name, path in made.items():
        (out / f"{name}.xz").write_bytes(lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME))
        print(f"{name:20} {path.stat().st_size:9} bytes, {(out / (name + '.xz')).stat().st_size} compressed")


if __name__ == "__main__":
    main()
