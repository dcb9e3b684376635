#!/usr/bin/env bash
# Check format, lint, types and tests. Arguments go to pytest.
#   scripts/test.sh                       everything
#   scripts/test.sh tests/config -k auto  some of the tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh

# One thread per process: the tests start several processes, and small tensors gain nothing from more threads.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

echo "ruff check" && python -m ruff check .
echo "ruff format" && python -m ruff format --check .
echo "mypy" && python -m mypy
# Two at a time: one process launches ranks, one launch after the other, the other runs all other files.
echo "pytest" && python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25 "$@"
