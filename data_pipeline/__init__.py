"""From MIDI files to training batches: read, tokenise, augment, load.

    maestro.py   the official archive, checked against its own table
    prepare.py   MIDI files -> token shards and manifest.json
    augment.py   transposition and time stretch of event tokens
    loader.py    shards -> shuffled, weighted, resumable batches

Nothing here imports JAX at the top except what grain itself brings into `loader.py`.
"""
