#!/usr/bin/env bash
# ProPy on Charades, evaluated and its best epoch chosen by moment retrieval (VCMR). Training is that of
# scripts/prvr_charades.sh, which holds the settings: no times are used.
subtask_type=VCMR
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/prvr_charades.sh"
