"""From the captured graph to the canonical float graph."""
