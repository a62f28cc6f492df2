"""The process with the processor: reads pickled requests on standard input, answers on standard output.

Started by `client.py` with LD_PRELOAD and PYTHONPATH set.  Every batch of cases runs in a fork of the pristine processor; a case that leaves
the processor inside a guest ends its fork, and the next case gets a new one.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import struct
import sys
import traceback
from typing import Any, BinaryIO, Dict, List, Optional

from processor import Processor, log_text

PATIENCE = 120.0
"""Seconds for one case: it takes a millisecond on an idle machine, and a guest that waits is noticed by the shim."""


def send(stream: BinaryIO, message: Any) -> None:
    data = pickle.dumps(message, protocol=4)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    header = stream.read(8)
    if len(header) < 8:
        return None
    (length,) = struct.unpack("<Q", header)
    return pickle.loads(stream.read(length))


def run_in_child(processor: Processor, cases: List[Dict[str, Any]], sink: int) -> None:
    with os.fdopen(sink, "wb") as stream:
        for case in cases:
            try:
                result, go_on = processor.case(case)
            except Exception:   # noqa: BLE001 - whatever goes wrong in the child has to reach the test
                result, go_on = {"error": traceback.format_exc()}, False
            send(stream, result)
            if not go_on:
                break


def read_exactly(source: int, size: int) -> Optional[bytes]:
    data = b""
    while len(data) < size:
        if not select.select([source], [], [], PATIENCE)[0]:
            return None
        more = os.read(source, size - len(data))
        if not more:
            return None
        data += more
    return data


def run_batch(processor: Processor, cases: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    results: List[Dict[str, Any]] = []
    while len(results) < len(cases):
        source, sink = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(source)
            run_in_child(processor, cases[len(results):], sink)
            os._exit(0)
        os.close(sink)
        before = len(results)
        while len(results) < len(cases):
            header = read_exactly(source, 8)
            body = read_exactly(source, struct.unpack("<Q", header)[0]) if header else None
            if body is None:
                break
            results.append(pickle.loads(body))
        os.close(source)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if len(results) == before:
            kind = "crash" if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL else "hang"
            results.append({"kind": kind, "number": 0, "qualification": 0, "log": log_text(), "events": [], "fields": {}, "memory": {}})
    return results


def main() -> None:
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)   # Bochs and the wheel print where they like
    processor = Processor()
    send(answers, {"revision": processor.revision, "layout": processor.layout, "msrs": processor.msrs, "cpuid": processor.cpuid,
                   "physical_address_width": processor.physical_address_width, "memory": processor.pristine})
    while (cases := receive(requests)) is not None:
        send(answers, run_batch(processor, cases))
    sys.stdout.flush()
    os._exit(0)     # the wheel's destructors crash


main()
