#!/usr/bin/env bash
# Every test and every measurement that needs a GPU, in under 8 minutes: bash benchmarks/gpu.sh [DIR]
#
# Needs python3 with torch, triton, safetensors, einops and pytest, one NVIDIA GPU and no network; nothing is installed.
# DIR (build/gpu) gets tests.txt, kernels_gpu.md and kernels_gpu.json, also where a limit cuts it short.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
mkdir -p "$out"

# Stands for an installation.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/heredity"
ln -s "$PWD/kernels" "$site/heredity/kernels"
export PYTHONPATH=$site PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv,noheader
python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'

# Without tests/conftest.py, which needs what is not needed here. Warnings of other versions of packages are no failures.
# Most of their time is compiling, so several at once where pytest-xdist is at hand.
parallel=$(python3 -c 'import xdist' 2>/dev/null && echo "-n 4")
timeout 220 python3 -m pytest -q $parallel -W default -p no:cacheprovider --confcutdir tests/kernels \
    tests/kernels/test_*_gpu.py tests/kernels/test_*_compiles.py 2>&1 | tee "$out/tests.txt"
tests=$?
timeout 240 python3 benchmarks/kernels_gpu.py --seconds 200 --json "$out/kernels_gpu.json" \
    | tee "$out/kernels_gpu.md"
measured=$?
echo "tests: $tests, measurements: $measured (0 is good, 124 out of time)"
exit $((tests || measured))
