#!/usr/bin/env bash
# Downloads the packages that bench/gpu.sh needs and the GPU machine lacks, for Python 3.12 there.
set -euo pipefail
cd "$(dirname "$0")/.."

platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
# One version of each, the ones that CI tests with: two would stop the installation.
rm -rf .whl
grep -E '^(annotated-types|pydantic|pydantic_core|typing-inspection|typing_extensions)==' constraints.txt |
    xargs python3 -m pip download --quiet --no-deps --only-binary=:all: \
        --python-version 3.12 --implementation cp "${platforms[@]}" --dest .whl
ls .whl
