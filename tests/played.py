"""What a person plays, as the page sends it: time in seconds, kind, and pitch and velocity or pedal."""

PHRASE = [
    [0.5, "pedal", 127],
    [0.5123, "on", 60, 80],
    [0.7, "on", 64, 70],
    [0.9, "off", 60],
    [1.2, "off", 64],
    [1.5, "pedal", 0],
]
