#!/usr/bin/env bash
# ProPy on QVHighlights-val, evaluated and its best epoch chosen by moment retrieval (VCMR). Training is that of
# scripts/prvr_qvhighlights_val.sh, which holds the settings: no times are used.
subtask_type=VCMR
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/prvr_qvhighlights_val.sh"
