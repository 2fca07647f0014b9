"""Learns how each weight rounds and how large each activation step is, unit by unit."""
