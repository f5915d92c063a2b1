#!/usr/bin/env bash
# Builds a virtual environment with the versions of constraints.txt; `make setup` and `make setup-compare` call it.
#   scripts/setup.sh PYTHON FOLDER [EXTRA]     EXTRA: only add that extra to an environment that is there
#   CONSTRAINTS=file                           other versions (scripts/try_versions.sh)
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 folder=$2 extra=${3:-}
log=$folder/setup.log
constraints=${CONSTRAINTS:-constraints.txt}
SIMULATOR="hf-libero robosuite bddl"

# The one place that says which Pythons are supported.
read -r oldest beyond < <(sed -n 's/^requires-python = ">=3\.\([0-9]*\),<3\.\([0-9]*\)"/\1 \2/p' pyproject.toml)

say() { printf '  %-34s %4d s %5d MB\n' "$1" "$((SECONDS - $2))" "$(du -sm "$folder" | cut -f1)"; }

fail() {
  echo "setup: $1" >&2
  exit 1
}

supported() { "$1" -c "import sys; sys.exit(not (3, $oldest) <= sys.version_info < (3, $beyond))" 2>/dev/null; }

check_python() {
  supported "$python" && return
  local found="" version minor
  version=$("$python" -c 'import sys; print("is Python " + sys.version.split()[0])' 2>/dev/null || echo "is not here")
  for ((minor = beyond - 1; minor >= oldest; minor--)); do
    supported "python3.$minor" && found=python3.$minor && break
  done
  fail "prismo needs Python 3.$oldest to 3.$((beyond - 1)), but $python $version. $(
    if [ "$found" ]; then echo "Type: make setup PYTHON=$found"; else
      echo "Install one (python.org, conda, pyenv, your system's packages), then: make setup PYTHON=/path/to/python3"
    fi
  )"
}

# Run pip with its talk in the log; its error on the screen if it fails.
install() {
  local title=$1 start=$SECONDS
  shift
  if ! "$folder/bin/python" -m pip install --constraint "$constraints" "$@" >>"$log" 2>&1; then
    grep -E '^(ERROR|error)' "$log" | tail -3 >&2 || tail -5 "$log" >&2
    fail "pip could not install $title; its whole output is in $log"
  fi
  say "$title" "$start"
}

if [ "$extra" ]; then
  echo "Adding the extra '$extra' to $folder"
  install "$extra" --editable ".[$extra]"
  exit
fi

check_python
torch=$(grep '^torch==' "$constraints" || echo torch)
echo "Setting up $folder with $("$python" --version), once: a few minutes, 3 GB (8 GB where torch comes with CUDA)."
version() { "$1" -c 'import sys; print(sys.version_info[:2])' 2>/dev/null; }
clear=$([ "$(version "$python")" = "$(version "$folder/bin/python")" ] || echo --clear) # of another Python: anew
# shellcheck disable=SC2086  # nothing or one option
"$python" -m venv $clear "$folder" >/dev/null 2>&1 ||
  fail "$python cannot make a virtual environment; on Debian or Ubuntu type: sudo apt-get install python3-venv"
install pip --upgrade pip
# torch goes first and alone, the simulator without its dependency lists: see constraints.txt.
install "$torch" "$torch"
install "prismo, its extras and tools" --editable ".[all]"
# shellcheck disable=SC2086  # a list of words
install "LIBERO simulator" --no-deps $SIMULATOR
echo "Ready after $SECONDS s. Next: make demo, make test, or . $folder/bin/activate"
