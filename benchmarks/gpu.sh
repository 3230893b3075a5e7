#!/usr/bin/env bash
# Everything that docs/performance.md reports from a GPU, in one go: about ten minutes on an H200. Without one it says so.
#
#   benchmarks/gpu.sh [PYTHON]          the interpreter of an installation with CUDA; `python` where none is named
#   pip install liger-kernel 'torchao>=0.18,<0.19'
#                                       before it: Liger's loss in the same run, and products in float8
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${1:-python}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "not measured: there is no CUDA device here"
  exit 0
fi
date -u +%Y-%m-%d
"$python" - <<'PYTHON'
import torch, triton
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)
PYTHON

part() { echo; echo "== $*"; timeout 280 "$python" "$@" || echo "not measured: it failed, or took more than 280 s"; }

part -m pytest -q -p no:cacheprovider -k "not whole_loss and not no_tokens" tests/runtime/fused_cases.py \
  tests/runtime/test_distillation_loss.py
part benchmarks/kd_loss.py --device cuda --tokens 8192 --hidden 4096 --teacher-hidden 5120 --dtype bfloat16 \
  --repetitions 1 --kl 1 0.02 0.001
part benchmarks/train_step.py --device cuda --shape 3b-to-1b --compile --repetitions 1
part benchmarks/train_step.py --device cuda --shape 8b-to-4b --compile --recompute --alone
part benchmarks/train_step.py --device cuda --shape 12b-to-8b --recompute --alone --weights bfloat16 --states bfloat16
part benchmarks/train_step.py --device cuda --shape 8b-to-4b --compile --recompute --alone --float8 student teacher
part benchmarks/train_step.py --device cuda --shape 12b-to-8b --recompute --alone --weights bfloat16 --states int8
part benchmarks/train_step.py --device cuda --shape 12b-to-8b --compile --recompute --alone --weights bfloat16 \
  --states int8 --float8 student teacher
