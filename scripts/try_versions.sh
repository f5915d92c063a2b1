#!/usr/bin/env bash
# Tries Pythons and versions other than those of `make setup` (what passed stands in docs/install.md):
#   scripts/try_versions.sh resolve                          do the pins exist for every Python, on x86-64 and aarch64?
#   scripts/try_versions.sh python3.12                       fast tests with the pins on another Python
#   scripts/try_versions.sh python3.11 torch==2.6.0 peft==0.18.0      with these, and the newest of everything else
#   scripts/try_versions.sh python3.13 newest                with the newest of everything
#   PYTEST_ADDOPTS=tests/models scripts/try_versions.sh ...  only some of the tests
# Downloads from the package registry into a temporary folder (up to 8 GB with CUDA), which is removed in the end.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# = 0 ]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
  exit 2
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

resolve() {
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet uv
  local failed=0 python machine extra
  for python in 3.11 3.12 3.13; do
    for machine in x86_64 aarch64; do
      for extra in all compare; do
        # promise (of tensorflow-datasets) is the only one without a wheel.
        "$folder/venv/bin/uv" pip compile pyproject.toml --extra $extra --constraint constraints.txt --quiet \
          --python-version $python --python-platform $machine-manylinux_2_28 --only-binary :all: --no-binary promise \
          --output-file "$folder/resolved.txt" && echo "Python $python, $machine, extra $extra: resolved" || failed=1
      done
    done
  done
  return $failed
}

if [ "$1" = resolve ]; then
  resolve
  exit
fi
python=$1
shift
if [ $# = 0 ]; then
  cp constraints.txt "$folder/constraints.txt"
else
  { printf '%s\n' "${@#newest}"; grep -E '^(hf_libero|robosuite|bddl)==' constraints.txt; } >"$folder/constraints.txt"
fi
CONSTRAINTS=$folder/constraints.txt bash scripts/setup.sh "$python" "$folder/venv"
"$folder/venv/bin/python" -m pip freeze | grep -E '^(torch|transformers|peft|numpy|pydantic|accelerate)==' | xargs
"$folder/venv/bin/python" -m pytest -n 2 --dist loadfile -m "not slow"
