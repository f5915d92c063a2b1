#!/usr/bin/env bash
# Makes sure that MuJoCo can render without a screen (EGL or OSMesa). Installs Mesa where it may, else says how.
set -euo pipefail

packages="libegl1 libegl-mesa0 libgl1-mesa-dri libosmesa6"

# Read once into a variable: with pipefail, `ldconfig | grep -q` may fail because grep closes the pipe early.
libraries=$(ldconfig -p 2>/dev/null || true)
case "$libraries" in
  *libEGL.so*|*libOSMesa.so*) exit 0 ;;
esac

if [ "$(uname -s)" != Linux ]; then
  echo "The LIBERO simulator renders through EGL or OSMesa, which this script installs on Linux only." >&2
  exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "No EGL or OSMesa library found: installing $packages"
  apt-get update -qq
  # shellcheck disable=SC2086  # a list of words
  apt-get install -y -qq --no-install-recommends $packages >/dev/null
else
  echo "No EGL or OSMesa library found, so the simulator cannot render. Type:" >&2
  echo "  sudo apt-get install --no-install-recommends $packages" >&2
  exit 1
fi
