"""Graph rewrites, one a file. Their order is text, in pipelines.py."""
