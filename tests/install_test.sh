#!/usr/bin/env bash
# Installs the build into a new prefix, then configures, builds and runs the example project against it.
#   install_test.sh BUILD_FOLDER EXAMPLES_FOLDER WRITE_TINY_MODEL CXX_COMPILER
set -euo pipefail
build=$1 examples=$2 write_tiny_model=$3 compiler=$4
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cmake --install "$build" --prefix "$work/prefix" >"$work/install.log"
"$work/prefix/bin/krait" --version
cmake -S "$examples" -B "$work/build" -G Ninja -DCMAKE_PREFIX_PATH="$work/prefix" -DCMAKE_CXX_COMPILER="$compiler" \
  -DCMAKE_BUILD_TYPE=Debug >"$work/configure.log" || { cat "$work/configure.log"; exit 1; }
cmake --build "$work/build"
"$write_tiny_model" "$work/model"
cd "$work"
build/generate model "To be" | tee output
grep -q 'The kept state gave the same text again.' output
