"""Our code as the nodes get it: a package of its own name, source and bytecode."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import marshal
import sys

from ..._wire import node, payloads, spool
from .shell import NODE_PACKAGE


@functools.cache
def node_code() -> dict[str, bytes]:
    """The files of the package, by their paths relative to a directory on `sys.path`.

    Bytecode is for a Python like this one, and spares each job some milliseconds; any other compiles
    the source.
    """
    sources = {
        "__init__": "",
        "payloads": inspect.getsource(payloads),
        "spool": inspect.getsource(spool),
        "node": inspect.getsource(node),
    }
    files = {}
    for module, source in sources.items():
        *parents, name = module.split(".")
        directory = "/".join((NODE_PACKAGE, *parents))
        files[f"{directory}/{name}.py"] = source.encode()
        tag = sys.implementation.cache_tag
        files[f"{directory}/__pycache__/{name}.{tag}.pyc"] = _bytecode(source.encode(), module)
    return files


_UNCHECKED_HASH = 1


def _bytecode(source: bytes, module: str) -> bytes:
    """A .pyc that isn't checked against its source (PEP 552)."""
    code = compile(source, f"<{NODE_PACKAGE}.{module}>", "exec", dont_inherit=True)
    flags = _UNCHECKED_HASH.to_bytes(4, "little")
    checksum = importlib.util.source_hash(source)
    return importlib.util.MAGIC_NUMBER + flags + checksum + marshal.dumps(code)
