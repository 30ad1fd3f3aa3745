#!/usr/bin/env bash
# Copies the present results to the given folder and renews the README's tables.
set -euo pipefail
folder=$1
mkdir -p "$folder"
rm -rf "$folder/runs"
cp -r results/runs "$folder/runs"
cp results/certificate.json results/ablation.json results/ablation.csv paper/ablation.tex paper/figures/ablation.png "$folder/"
python scripts/update_readme.py --readme README.md --reference "$folder" --benchmarks bench/results
