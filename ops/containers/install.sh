#!/bin/sh
# The steps of both images, on any base with Debian's or Ubuntu's packages and their Python 3.11 or newer:
#   install.sh system        what pip does not bring
#   install.sh dependencies  beside pyproject.toml and constraints.txt, which has all versions
#   install.sh pgm-scale     beside the source
# CUDA and NCCL are wheels that torch asks for; a node gives its driver. Of a base the wheels need libc, libstdc++ and
# zlib, which are in every one, and no compiler: one with CUDA is needed only for NVIDIA's Apex or the like.
set -eu

VENV=/opt/pgm-scale
EXTRAS="${EXTRAS:-evaluation,images,serve}"

case "$1" in
  system)
    # NCCL opens libibverbs and its drivers by name: without them it takes sockets over InfiniBand.
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      ca-certificates ibverbs-providers libibverbs1 python3 python3-venv
    rm -rf /var/lib/apt/lists/*
    ;;
  dependencies)
    # Before the source is there: setuptools makes a package of no files, with all that the real one needs.
    python3 -m venv "$VENV"
    "$VENV/bin/pip" install --no-cache-dir -c constraints.txt ".[$EXTRAS]"
    ;;
  pgm-scale)
    "$VENV/bin/pip" install --no-cache-dir --no-deps --force-reinstall -c constraints.txt .
    "$VENV/bin/pgm-scale" --help > /dev/null
    ;;
  *)
    echo "install.sh: system, dependencies or pgm-scale, not '$1'" >&2
    exit 2
    ;;
esac
