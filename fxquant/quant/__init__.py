"""Specs, uniform quantisation, observers, fake-quant, the activation table."""
