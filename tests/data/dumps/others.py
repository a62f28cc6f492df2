#!/usr/bin/env python3
"""others.py FOLDER: what other programs read from the sample dumps, into others.json; each run adds the readers that it can import.

For each file: the reader, the number of 4 KiB pages that it reads below 8 MiB and above 0xffff0000, and the SHA-256 over (address as 8 bytes,
page) of each of them in order of address.
"""
import hashlib
import json
import lzma
import struct
import sys
import tempfile
from pathlib import Path

HERE = Path(sys.argv[1])
ADDRESSES = [*range(0, 8 << 20, 4096), *range(0xFFFF0000, 1 << 32, 4096)]


def libkdumpfile(path):
    import kdumpfile
    dump = kdumpfile.kdumpfile(path)
    return (lambda at: bytes(dump.read(kdumpfile.KDUMP_MACHPHYSADDR, at, 4096))), kdumpfile.exceptions.NoDataException


def volatility(kind):
    def open_layer(path):
        from volatility3.framework import contexts, exceptions
        from volatility3.framework.layers import avml, crash, lime, physical, vmware
        context = contexts.Context()
        context.config["file.location"] = "file://" + path
        context.add_layer(physical.FileLayer(context, "file", "file"))
        context.config["layer.base_layer"] = "file"
        classes = {"lime": lime.LimeLayer, "avml": avml.AVMLLayer, "dmp": crash.WindowsCrashDump64Layer, "vmware": vmware.VmwareLayer}
        layer = classes[kind](context, "layer", "layer")
        return (lambda at: layer.read(at, 4096)), exceptions.InvalidAddressException
    return open_layer


def kdmp_parser(path):
    import kdmp_parser
    dump = kdmp_parser.KernelDumpParser(path)

    def read(at):
        if at not in dump.pages:
            raise KeyError(at)
        return bytes(dump.pages[at])
    return read, KeyError


READERS = {
    "libkdumpfile": (libkdumpfile, ["qemu.elf", "qemu-zlib.kdump", "makedumpfile-lzo.kdump", "snappy.kdump", "zstd.kdump"]),
    "volatility3 lime": (volatility("lime"), ["ranges.lime"]),
    "volatility3 avml": (volatility("avml"), ["snappy.avml"]),
    "volatility3 crash": (volatility("dmp"), ["bitmap.dmp"]),
    "kdmp-parser": (kdmp_parser, ["bitmap.dmp", "ranges.dmp"]),
}


def main():
    out = HERE / "others.json"
    found = json.loads(out.read_text()) if out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (opener, files) in READERS.items():
            for file in files:
                path = Path(folder) / file
                path.write_bytes(lzma.decompress((HERE / (file + ".xz")).read_bytes()))
                try:
                    read, unreadable = opener(str(path))
                except ImportError:
                    continue
                digest, pages = hashlib.sha256(), 0
                for at in ADDRESSES:
                    try:
                        page = read(at)
                    except unreadable:
                        continue
                    pages += 1
                    digest.update(struct.pack("<Q", at) + page)
                found.setdefault(file, {})[name] = {"pages": pages, "sha256": digest.hexdigest()}
                print(name, file, pages)
    out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
