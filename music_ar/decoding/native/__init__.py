"""stub until the engine is merged"""
