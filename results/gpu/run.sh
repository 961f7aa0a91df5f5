#!/usr/bin/env bash
# All the work on a GPU, unattended, from the repository's root or anywhere:
#
#   results/gpu/run.sh                  everything, at most 25 minutes
#   results/gpu/run.sh smoke record     only these steps
#
# Steps, with the time that each takes at most:
#
#   smoke    2 min  versions, and every kernel once: right, captured, algorithms
#   tests    3 min  pytest -m gpu, where pytest is
#   record   7 min  the profile's kernels, the most important first
#   sparse   4 min  2:4 beside dense for M = 1 to 8192 -> sparse.csv
#   models   6 min  whole models, dense and compressed, with random weights
#   finish   1 min  writes the profile of what there is
#   summary  1 min  held-out errors -> holdout.csv, and prints them
#
# Every step resumes: run it again and it goes on behind what is on disk. Results lie in
# results/gpu. Nothing is installed and nothing of the card is set; it needs Python 3.11
# with torch >= 2.11, transformers, pyarrow, pyyaml, jaxtyping, typer and rich, but no
# Optuna, Ray or pydantic of ours. PYTHON names another interpreter.
#
# On a machine that is lent for 15 minutes in all and 10 a call, two calls do:
#
#   RECORD_MINUTES=4.5 results/gpu/run.sh smoke record finish                 ~7.5 min
#   SPARSE_MINUTES=1 MODELS_MINUTES=2.5 results/gpu/run.sh sparse models finish summary
#
# Where $OUT names a folder, what was made is also packed into $OUT/gpu.tar.gz after
# every step; unpack it in the repository's root before the next call.
set -uo pipefail
cd "$(dirname "$0")/../.."

PYTHON="${PYTHON:-python3}"
RECORD_MINUTES="${RECORD_MINUTES:-6.5}"
SPARSE_MINUTES="${SPARSE_MINUTES:-3.5}"
MODELS_MINUTES="${MODELS_MINUTES:-5.5}"
DEVICE="${DEVICE:-cuda}"  # cpu tries the script itself; smoke and sparse need a GPU
PROFILES="${PROFILES:-results/gpu/profiles}"
export PROFILES
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

say() { printf '\n== %s  %s\n' "$(date -u +%H:%M:%S)" "$*"; }

# within SECONDS COMMAND...: the command, ended when its time is up.
within() {
  local seconds="$1"
  shift
  timeout --kill-after=10 "$seconds" "$@"
}

seconds_of() { awk -v minutes="$1" 'BEGIN { printf "%d", 60 * minutes }'; }

begun() { compgen -G "$PROFILES/*.work/points.jsonl" > /dev/null; }

# part NAME MINUTES: a part of the profile. An error that stays until the process ends
# (a lost GPU) stops it; another process goes on behind that point, with what is left.
part() {
  local end left resume try
  end=$((SECONDS + $(seconds_of "$2")))
  for try in 1 2 3 4; do
    left=$((end - SECONDS))
    [ "$left" -gt 15 ] || return 0
    resume=()
    if begun; then resume=(--resume); fi
    within $((left + 60)) "$PYTHON" -m autoprune profile --device "$DEVICE" \
      --out "$PROFILES" --part "$1" "${resume[@]}" \
      --minutes "$(awk -v s="$left" 'BEGIN { printf "%.3f", s / 60 }')" && return 0
    say "try $try of $1 did not end well; going on"
  done
  return 1
}

run_tests() {
  if ! "$PYTHON" -c 'import pytest' 2> /dev/null; then
    echo "no pytest here: left out"
    return 0
  fi
  # Without the repository's own settings, which ask for plugins that may not be here.
  within 180 "$PYTHON" -m pytest -c /dev/null --rootdir=. --import-mode=importlib \
    -p no:cacheprovider -q -m gpu tests/latency
}

pack() {
  if [ -n "${OUT:-}" ] && [ -d "${OUT:-}" ]; then
    tar czf "$OUT/gpu.tar.gz" results/gpu
  fi
}

step() {
  case "$1" in
    smoke) within 120 "$PYTHON" results/gpu/steps.py smoke ;;
    tests) run_tests ;;
    record) part kernels "$RECORD_MINUTES" ;;
    sparse)
      within $(($(seconds_of "$SPARSE_MINUTES") + 45)) \
        "$PYTHON" results/gpu/steps.py sparse --minutes "$SPARSE_MINUTES"
      ;;
    models) part models "$MODELS_MINUTES" ;;
    finish)
      within 60 "$PYTHON" -m autoprune profile --device "$DEVICE" --out "$PROFILES" \
        --part finish
      ;;
    summary) within 60 "$PYTHON" results/gpu/steps.py summary ;;
    *)
      echo "unknown step '$1'. Known: smoke tests record sparse models finish summary" >&2
      return 2
      ;;
  esac
}

STEPS=("$@")
[ "${#STEPS[@]}" -gt 0 ] || STEPS=(smoke tests record sparse models finish summary)
FAILED=()
mkdir -p "$PROFILES"
for name in "${STEPS[@]}"; do
  say "$name"
  step "$name" || FAILED+=("$name")
  pack
done
say "done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
if [ "${#FAILED[@]}" -gt 0 ]; then
  echo "not well ended: ${FAILED[*]}" >&2
  exit 1
fi
