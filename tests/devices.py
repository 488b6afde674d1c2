"""Devices whose memory is not the host's: a GPU, or a process that stands in for one.

``make test`` asks for nothing of this. With ``LLAMASTATE_TEST_GPU_LAYERS=99`` the tests put tiny models, and so their
caches, on the device that llama.cpp finds. Where there is none, llama.cpp's RPC backend is one: for the rest of
llama.cpp it is a GPU, no pointer reaches its buffers, and it computes with the very code of the host, so that what is
expected to the bit still is. ``LLAMASTATE_TEST_RPC=/path/libggml-rpc.so`` starts one for each process of the tests,
``/path/libggml-rpc.so:2`` two. The library is built with ``-DGGML_RPC=ON`` from the very llama.cpp in use.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llamastate import _native
from llamastate._native import handles

#: Layers that the tests put on a device; 0 for none.
GPU_LAYERS = int(os.environ.get("LLAMASTATE_TEST_GPU_LAYERS", "0"))

# Ends when its standard input does.
_SERVER = """
import ctypes, os, sys, threading
base, rpc = (ctypes.CDLL(path) for path in sys.argv[1:3])
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
base.ggml_backend_dev_by_type.restype = ctypes.c_void_p
devices = (ctypes.c_void_p * 1)(base.ggml_backend_dev_by_type(0))
rpc.ggml_backend_rpc_start_server.argtypes = (
    ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p)
rpc.ggml_backend_rpc_start_server(sys.argv[3].encode(), None, 1, 1, devices)
"""
#: Ends with this process.
_servers: list[subprocess.Popen[bytes]] = []


def _ggml() -> Any:
    return ctypes.CDLL(str(_native.library.parent / _native.library.name.replace("libllama", "libggml")))


def gpus() -> int:
    """How many devices llama.cpp would put layers on."""
    return len(handles.gpu_alignments())


def prepare() -> None:
    """Register the stand-ins that ``LLAMASTATE_TEST_RPC`` asks for, once a process."""
    named = os.environ.get("LLAMASTATE_TEST_RPC")
    if named and not _servers:
        # A server forgets the graph it was sent when a buffer is freed, and the process ends when the graph is to be
        # computed again.
        os.environ["LLAMA_GRAPH_REUSE_DISABLE"] = "1"
        library, _, count = named.partition(":")
        for _ in range(int(count or 1)):
            _register(Path(library))


def _register(library: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    endpoint = f"127.0.0.1:{port}"
    ggml, rpc = _ggml(), ctypes.CDLL(str(library))
    command = [sys.executable, "-c", _SERVER, ggml._name, str(library), endpoint]
    _servers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL))
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    ggml.ggml_backend_register.argtypes = (ctypes.c_void_p,)
    ggml.ggml_backend_register(rpc.ggml_backend_rpc_add_server(endpoint.encode()))


prepare()
