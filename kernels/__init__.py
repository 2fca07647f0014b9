"""Kernels: what the lowered graph runs.

``ops`` declares the ``fxquant::`` operators, ``dispatch`` lists who implements them, ``reference``
is the pure-torch truth, and the folders beside it hold the faster implementations.
"""
