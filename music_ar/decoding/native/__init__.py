"""The engine that decodes on CPUs: a small shared library in C++, called from NumPy without JAX. See `decoder`."""
