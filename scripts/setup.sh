#!/usr/bin/env bash
# Make .venv with the pinned requirements; called by every other script, quick when all is there.
#   bash scripts/setup.sh          what the program needs
#   bash scripts/setup.sh --search and what searching one's own videos needs
#   bash scripts/setup.sh --dev    and what the tests need, of everything
# PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

files=(requirements.txt)
case "${1:-}" in
  --search) files+=(requirements-search.txt) ;;
  --dev) files+=(requirements-search.txt requirements-milvus.txt requirements-dev.txt) ;;
esac

# a stamp in .venv holds the requirements that were installed last
installed() {
  [ -x .venv/bin/python ] && for file in "${files[@]}"; do
    cmp -s "$file" ".venv/installed-$file" || return 1
  done
}
installed && exit 0

# two scripts started at once: the second waits here, then finds everything in place
if command -v flock >/dev/null; then
  exec 9>.venv.lock
  status=0
  flock -n 9 || status=$?
  if [ "$status" = 1 ]; then
    echo "setup: waiting for another setup.sh to finish ..." >&2
    flock 9
  elif [ "$status" != 0 ]; then
    echo "setup: this file system has no locks: start no second setup.sh meanwhile" >&2
  fi
  installed && exit 0
fi

# the version is asked of a program that runs: a name on PATH may be a launcher with nothing behind
suitable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
    >/dev/null 2>&1
}

if ! { [ -x .venv/bin/python ] && suitable .venv/bin/python; }; then
  python=
  for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.11 python3.10 python3 python; do
    suitable "$candidate" && { python=$candidate; break; }
  done
  if [ -z "$python" ]; then
    echo "setup: no Python 3.10, 3.11 or 3.12 with the venv module was found on PATH." >&2
    echo "Install one (on Debian: apt install python3 python3-venv) or name it:" >&2
    echo "    PYTHON=/path/to/python3.11 bash scripts/setup.sh" >&2
    exit 1
  fi
  echo "setup: making .venv with $("$python" --version)" >&2
  "$python" -m venv --clear .venv
fi

echo "setup: installing ${files[*]} into .venv (the first time about 5 GB, some minutes)" >&2
requirements=()
for file in "${files[@]}"; do requirements+=(-r "$file"); done
.venv/bin/python -m pip install --quiet --disable-pip-version-check "${requirements[@]}"
for file in "${files[@]}"; do cp "$file" ".venv/installed-$file"; done
echo "setup: done" >&2
