"""stub until the engine is merged"""


def load() -> None:
    """Stub"""
    return
