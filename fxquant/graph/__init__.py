"""Capture, node helpers, the pass runner, stage checks, dump and diff."""
