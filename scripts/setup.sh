# Sourced by the other scripts: afterwards `python` has giantdet and its dependencies, and runs on the CPU
# if there is no GPU. Uses the active environment if it is complete, otherwise makes .venv.
# GIANTDET_PYTHON names the Python to make .venv with (default: the newest python3 on the PATH).
# GIANTDET_OLDEST=1 makes and uses .venv-oldest instead: the oldest Python and the oldest versions of the
# dependencies that pyproject.toml allows.

_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_venv="$_root/.venv${GIANTDET_OLDEST:+-oldest}"
_pythons="python3.13 python3.12 python3.11 python3 python"
[ -z "${GIANTDET_OLDEST:-}" ] || _pythons="python3.11 python3.12"

_say() { echo "setup: $*" >&2; }

# Succeeds if this Python has giantdet from this checkout, its dependencies and the test tools.
_complete() {
    (cd / && "$1" - "$_root") >/dev/null 2>&1 <<'PY'
import importlib.util as util, os, sys
names = ("torch torchvision timm deepspeed pycocotools einops safetensors pydantic PIL tqdm matplotlib "
         "pytest pytest_timeout ruff mypy jsonschema torchmetrics hotcoco mkdocs material "
         "tensorboard wandb supervision onnx onnxruntime onnxscript").split()
found = util.find_spec("giantdet")
here = found is not None and found.origin is not None
here = here and os.path.realpath(found.origin).startswith(os.path.realpath(sys.argv[1]) + os.sep)
sys.exit(not (here and all(util.find_spec(name) for name in names)))
PY
}

_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

_find_python() {
    local candidate
    for candidate in ${GIANTDET_PYTHON:-$_pythons}; do
        if _new_enough "$candidate"; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

# Prints the lower bounds of the dependencies as pip's constraints: torch>=2.10 becomes torch==2.10.
_oldest() { sed -n 's/^    "\([a-z-]*\)>=\([0-9.]*\)",$/\1==\2/p' "$_root/pyproject.toml"; }

_setup() {
    local active base
    active="$(command -v python || true)"
    if [ -z "${GIANTDET_OLDEST:-}" ] && [ -n "$active" ] && _complete "$active"; then
        _say "using $active"
    else
        if [ ! -x "$_venv/bin/python" ]; then
            if ! base="$(_find_python)"; then
                _say "error: giantdet needs Python 3.11 or newer, found $(python3 --version 2>&1 || echo none);" \
                    "install one, or name it: GIANTDET_PYTHON=/path/to/python3.11"
                return 1
            fi
            _say "making ${_venv##*/} with $base ($("$base" --version 2>&1))"
            if ! "$base" -m venv "$_venv"; then
                rm -rf "$_venv"
                _say "error: $base cannot make virtual environments; install its venv module"
                return 1
            fi
        fi
        # shellcheck disable=SC1091
        . "$_venv/bin/activate"
        if ! _complete "$_venv/bin/python"; then
            _say "installing giantdet and its dependencies into ${_venv##*/} (PyTorch is large: this takes minutes)"
            # --no-compile: Python compiles what it imports; most of these gigabytes never are.
            if ! (cd "$_root" && python -m pip install --disable-pip-version-check --no-compile -q -e ".[dev]" \
                -c <([ -z "${GIANTDET_OLDEST:-}" ] || _oldest)); then
                _say "error: pip could not install giantdet; its message is above"
                return 1
            fi
        fi
        _say "using $_venv"
    fi

    # An environment that forbids bytecode, as containers often do, makes every process compile torch, timm and
    # DeepSpeed again, which takes seconds. Bytecode goes to a separate folder instead.
    if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then
        unset PYTHONDONTWRITEBYTECODE
        export PYTHONPYCACHEPREFIX="${PYTHONPYCACHEPREFIX:-$_root/runs/bytecode}"
    fi
    # Without a GPU DeepSpeed uses the CPU only if told to.
    if [ -z "${DS_ACCELERATOR:-}" ] && [[ "$(nvidia-smi -L 2>/dev/null || true)" != *GPU* ]]; then
        export DS_ACCELERATOR=cpu
        _say "no NVIDIA GPU: running on the CPU"
    fi
    if ! command -v "${CXX:-c++}" >/dev/null && ! command -v g++ >/dev/null; then
        _say "error: no C++ compiler (c++, g++ or \$CXX); DeepSpeed compiles the Adam of GPUs and of offload"
        return 1
    fi
    # Not the shared default: a run that is killed while compiling leaves a lock on which other runs hang.
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$_root/runs/torch_extensions${GIANTDET_OLDEST:+_oldest}}"
    mkdir -p "$TORCH_EXTENSIONS_DIR"
}

_setup || { return 1 2>/dev/null || exit 1; }
