"""From the fake-quantised graph to fxquant operators that name their kernels."""
