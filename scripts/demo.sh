#!/usr/bin/env bash
# From images to a score in about two minutes on two CPU cores, without a download: the three programs on
# scikit-learn's 1,797 handwritten digits, the checkpoint copied from folder to folder as a user would.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
step() { printf '\n$ %s\n' "$*"; "$@"; }

step python -u run_compound_scaling.py --dataset digits --image-size 16 --grid 1 1 --phi 1 --epochs 8 --batch-size 64
step cp model_compound_scaling/saved_models/best_model.pt model_quantization/trained_fp_models/digits_micronet.pt
step python -u run_quantization.py --model-dict digits_micronet.pt --batch-size 64 --epochs 6 --retrain-epochs 4 \
    --ini-c-divrs 0.45 --lambda-max-divrs 0.15 --plot-ternarization
step cp model_quantization/saved_models/Ternary_best_acc.pt model_scoring/trained_t_models/digits_ternary.pt
step python -u run_scoring.py --t-model digits_ternary.pt --eval --halfprecision --add-bits 16 \
    --before model_quantization/trained_fp_models/digits_micronet.pt
printf '\nPlots: '
ls model_quantization/saved_models/digits_micronet_*/*.png
