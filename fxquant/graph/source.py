"""The line of the user's model that a node was captured from."""

from __future__ import annotations

import re
from pathlib import Path

from torch.fx import Node

_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)\n\s*(?P<code>.*)'
)

_NOT_THE_MODELS = {"torch", "fxquant"}


def source_line(node: Node) -> str:
    """`unet.py:12 in forward: h[:, 0] = 0`, the innermost line of the model; '' if unknown."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    own = [frame for frame in frames if not _NOT_THE_MODELS & {*Path(frame["file"]).parts}]
    if not own:
        return ""
    frame = own[-1]
    return f"{Path(frame['file']).name}:{frame['line']} in {frame['name']}: {frame['code']}"
