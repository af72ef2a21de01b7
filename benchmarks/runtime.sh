#!/bin/sh
# Measures speed and memory as docs/results/runtime.md has them, one thing at a time, on this machine: single films, whole
# processes, batches, training and parity. Gates of precisions are `lungscope quantize`'s.
#
#   benchmarks/runtime.sh OUT                          about half an hour on two cores; let nothing else run
#   benchmarks/runtime.sh OUT STORE SPLIT FILMS        and parity on a store's test part, and a folder of films
#
# From a clone, with nothing installed by hand. Needs /usr/bin/time (Debian: time) for FILMS.
set -eu
cd "$(dirname "$0")/.."
make .venv/.ready .venv-demo/.ready
.venv-demo/bin/python -m pip install --quiet --editable '.[demo,table]'
out=$1
mkdir -p "$out"

# One film by stage beside eager PyTorch and ONNX Runtime, the processor's peak, short batches.
.venv/bin/lungscope benchmark runtime --repeats 15 --films 40 --out "$out/runtime"
# The same without PyTorch in the environment: whole processes as users start them, six of each film.
.venv-demo/bin/lungscope benchmark runtime --alone --repeats 30 --films 40 --out "$out/base"
# Memory over a long batch, and over films of three kinds in turn.
.venv-demo/bin/python -c '
import sys
from pathlib import Path
from lungscope.cli.analyze import demo_film
from lungscope.evaluation.speed import demo_films
demo_films(demo_film(), Path(sys.argv[1]))' "$out"
.venv-demo/bin/lungscope benchmark batch --film "$out/256.png" --films 5000 --write parquet --out "$out/long"
.venv-demo/bin/lungscope benchmark batch --films 600 --write parquet --out "$out/mixed"
# Training steps of CoAtNet-0 and the ensemble's members beside a plain loop.
.venv/bin/lungscope benchmark runtime --training --repeats 3 --out "$out/training"

if [ $# -gt 1 ]; then
    .venv/bin/lungscope benchmark parity --data "$2" --split "$3" --films 1000 --out "$out/parity.json"
    /usr/bin/time -v .venv-demo/bin/lungscope analyze "$4" --out "$out/films" --write parquet 2> "$out/films.txt"
    grep -E "Elapsed|Maximum resident" "$out/films.txt"
fi
