"""The compiled model and its summary."""
