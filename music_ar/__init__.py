"""Long-context generation of piano music with Perceiver AR.

Names are loaded on first use (see `__init__.pyi`), so importing the package initializes no device and `music-ar --help`
does not wait for JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
