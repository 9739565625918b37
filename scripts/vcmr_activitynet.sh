#!/usr/bin/env bash
# ProPy on ActivityNet, evaluated and its best epoch chosen by moment retrieval (VCMR). Training is that of
# scripts/prvr_activitynet.sh, which holds the settings: no times are used.
subtask_type=VCMR
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/prvr_activitynet.sh"
