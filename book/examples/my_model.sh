#!/usr/bin/env bash
# Path (a): another model. SFT, then DPO from where SFT ended, then the curves and the scorecard of both.
#   MODEL=EleutherAI/pythia-70m-deduped bash book/examples/my_model.sh --set device cuda
set -euo pipefail
MODEL=${MODEL:-builtin}
PYTHON=${PYTHON:-.venv/bin/python}

sft=$($PYTHON -m lddyn train --set model "$MODEL" --set method sft "$@" | tail -n 1)
dpo=$($PYTHON -m lddyn train --set model "$MODEL" --set method dpo --set start "$sft/model" "$@" | tail -n 1)
$PYTHON -m lddyn report "$sft"
$PYTHON -m lddyn report "$dpo"
