#!/usr/bin/env bash
# Makes sure that MuJoCo can draw without a screen; ends with 1 and a sentence where nothing can be done.
#   scripts/install_gl.sh PYTHON          something draws: EGL (a GPU, or Mesa in software) or OSMesa
#   scripts/install_gl.sh PYTHON both     EGL and, where it can be had, the fallback OSMesa, for the tests of both
# Only root on Debian or Ubuntu installs anything. PYTHON is one that has prismo and MuJoCo.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 wanted=${2:-any}

# Drawing decides, not the names of libraries: they may lack their driver, or lie where only LD_LIBRARY_PATH leads.
draws() { env ${1:+MUJOCO_GL=$1} "$python" -c 'from prismo.sim.gl import choose_backend as c; c()' 2>/dev/null; }

enough() { if [ "$wanted" = both ]; then draws egl && draws osmesa; else draws; fi; }

enough && exit
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  hint=$("$python" -c 'from prismo.sim.gl import INSTALL_HINT; print(INSTALL_HINT)')
  packages=${hint##*--no-install-recommends}
  [ "$wanted" = any ] || packages="$packages libosmesa6" # newer distributions have none
  echo "Installing what is missing of$packages"
  options="-qq -o Acquire::Retries=0 -o Acquire::http::Timeout=20"
  # shellcheck disable=SC2086  # lists of words
  {
    apt-get $options update || true
    for package in $packages; do apt-get $options install -y --no-install-recommends "$package" || true; done
  } >/dev/null 2>&1 </dev/null
fi
exec "$python" -c '
from prismo.sim.gl import GLUnavailableError, choose_backend
try:
    choose_backend()
except GLUnavailableError as error:
    raise SystemExit(str(error)) from None
'
