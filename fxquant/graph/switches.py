"""Switches of modules that pipelines turn between calls: a compiled model stays as it was."""

from __future__ import annotations

import logging

from torch import nn

log = logging.getLogger(__name__)

# By class and attribute: who turns it, looking for modules of that very class, and what to do.
_SWITCHES = {
    ("GatedSelfAttentionDense", "enabled"): "GLIGEN's pipelines turn it off after a part of the "
    "steps, without any effect on a compiled model: pass gligen_scheduled_sampling_beta=1.0, or "
    "put a second model, compiled after pipe.enable_fuser(False), in its place at that step",
}


def warn_of_switches(model: nn.Module) -> None:
    """Say which attributes that something turns while it serves are fixed from now on."""
    for (kind, name), advice in _SWITCHES.items():
        found = [m for m in model.modules() if type(m).__name__ == kind]
        if found:
            log.warning(
                "%r of %d %s in this %s is %s for good. %s",
                name, len(found), kind, type(model).__name__, getattr(found[0], name), advice,
            )  # fmt: skip
