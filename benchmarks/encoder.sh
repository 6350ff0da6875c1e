#!/bin/sh
# Measure a piece encoder: make its index, then everything that docs/guides/what-is-it-like.md has figures of.
#
#     sh benchmarks/encoder.sh data/maestro runs/encoder/model out
#
# Lines of JSON and the report go to the folder `out`. Writes passages.safetensors beside the encoder.
set -eu
data=$1 encoder=$2 out=$3
mkdir -p "$out"
python -m app.cli similar --build --data "$data" --encoder "$encoder"
python benchmarks/retrieval.py "$data" --encoder "$encoder" --hop 10 15 30 | tee "$out/retrieval.jsonl"
python benchmarks/composer_probe.py "$data" --encoder "$encoder" | tee "$out/composer_probe.txt"
python benchmarks/ranking.py "$data" --encoder "$encoder" --prompts 64 --variations 4 | tee "$out/ranking.txt"
python -m app.cli evaluate --data "$data" --report "$out/report" --encoder "$encoder" --max-pieces 2 --pieces 64 --seconds 120
