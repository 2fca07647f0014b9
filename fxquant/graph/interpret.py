"""Running a graph node by node, with somebody watching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule, Interpreter, Node

See = Callable[[Node, Any, dict[Node, Any]], None]


class Watched(Interpreter):
    """Calls `see(node, value, env)` after every node; `env` still holds the node's inputs."""

    def __init__(self, gm: GraphModule, see: See):
        super().__init__(gm)
        self.see = see

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.see(n, value, self.env)
        return value
