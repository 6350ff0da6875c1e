"""From MIDI files to training batches.

    manifest.py       manifest.json of a prepared folder: schema, reading, checks
    splits.py         assignment of files to splits and of compositions to folds
    maestro.py        MIDI files in a zip or folder; the official MAESTRO archive, checked against its table
    prepare.py        MIDI files -> token shards and manifest
    dataset.py        prepared folder -> the pieces of a split, their folds and augmented copies
    windows.py        pieces -> training windows
    loader.py         windows -> shuffled, resumable batches
    augmentation/     transforms.py: transposition, time stretch, velocity shift
                      mode_and_rubato.py: augmented copies of whole pieces; augmentation labels

A module imports only modules above it and the augmentation. Only `loader.py`, which uses grain, imports JAX.
"""
