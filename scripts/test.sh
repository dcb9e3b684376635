#!/usr/bin/env bash
# Check format, lint, types, documentation and tests. Arguments go to pytest.
#   scripts/test.sh                       everything
#   scripts/test.sh tests/config -k auto  some of the tests
#   GIANTDET_OLDEST=1 scripts/test.sh     only the tests, with the oldest supported versions, in .venv-oldest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh

# One thread per process: the tests start several processes, and small tensors gain nothing from more threads.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [ -z "${GIANTDET_OLDEST:-}" ]; then
    echo "ruff check" && python -m ruff check .
    echo "ruff format" && python -m ruff format --check .
    echo "mypy" && python -m mypy
    echo "mkdocs" && NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet
fi
# One process launches ranks, one launch after the other, and waits for them half of the time; the others run all
# other files.
echo "pytest" && python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=25 "$@"
