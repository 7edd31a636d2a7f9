#!/usr/bin/env bash
# Path (c): pairs of your own. A chat model writes the rephrasings, then chapter 3's training and chapter 5's.
#   CHAT=local:Qwen/Qwen2.5-1.5B-Instruct bash book/examples/my_data.sh my_pairs.jsonl
# or with an endpoint:
#   export LDDYN_API_URL=http://127.0.0.1:8000/v1 LDDYN_API_MODEL=... LDDYN_API_KEY=...
#   CHAT=endpoint bash book/examples/my_data.sh my_pairs.jsonl
set -euo pipefail
PAIRS=$1
shift
PYTHON=${PYTHON:-.venv/bin/python}

$PYTHON -m lddyn rephrase "$PAIRS" "${PAIRS%.jsonl}.all.jsonl" --chat "$CHAT"
PYTHON=$PYTHON bash "$(dirname "$0")/my_model.sh" --set data "${PAIRS%.jsonl}.all.jsonl" "$@"
