#!/usr/bin/env bash
# Everything that must hold: format, lint, types, tests. Arguments go to pytest.
#   scripts/test.sh                      all of it
#   scripts/test.sh tests/config -k auto one corner
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh

# One thread a process: the tests start several, and small tensors gain nothing from more.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

echo "ruff check" && python -m ruff check .
echo "ruff format" && python -m ruff format --check .
echo "mypy" && python -m mypy
if [ $# != 0 ]; then
    echo "pytest $*" && exec python -m pytest "$@"
fi
# Beside one another, but no two launches of several ranks: those would wait for each other's share of the cores.
echo "pytest, tests/distributed beside all others"
log="$(mktemp)"
trap 'rm -f "$log"' EXIT
python -m pytest tests/distributed --durations=15 >"$log" 2>&1 &
others=0 distributed=0
python -m pytest --ignore=tests/distributed --durations=15 || others=$?
wait $! || distributed=$?
cat "$log"
exit $((others || distributed))
