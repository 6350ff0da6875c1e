"""Long-context generation of piano music with Perceiver AR.

Names are loaded when they are first used (see `__init__.pyi`), so importing the package starts no device and
`music-ar --help` does not wait for JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
