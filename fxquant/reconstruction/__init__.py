"""Reconstruction units; losses and the optimiser loop build on them."""
