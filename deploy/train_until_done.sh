#!/bin/sh
# Train until the model is there: `music-ar train`, resumed if the folder of the run holds a checkpoint. For supervisors
# that start again what has failed.
#
#     train_until_done.sh FOLDER --data data/maestro --minutes 60
#
# SIGTERM makes `music-ar train` save a checkpoint and exit with code 0. That is not the end of the run, so here the code
# is 75 then ("try again").
folder=$1 stopped=
shift
[ -e "$folder/model/config.json" ] && exit 0
set -- --output "$folder" "$@"
for checkpoint in "$folder"/training/[0-9]*; do
    case ${checkpoint##*/} in
    *[!0-9]*) ;; # none, or half-written
    *) set -- "$@" --resume && break ;;
    esac
done
# A shell that is a container's first process hands on no signal by itself.
trap 'stopped=yes; kill -TERM $! 2>/dev/null || exit 75' TERM
music-ar train "$@" &
wait $!
code=$?
while kill -0 $! 2>/dev/null; do # the signal ended `wait`, and the run goes on to its checkpoint
    wait $!
    code=$?
done
[ -e "$folder/model/config.json" ] && exit "$code"
[ "$code" -eq 0 ] || [ -n "$stopped" ] && exit 75
exit "$code"
