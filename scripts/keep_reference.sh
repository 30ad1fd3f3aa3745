#!/usr/bin/env bash
# Copies the present results to the given folder and renews the README's tables.
set -euo pipefail
folder=$1
mkdir -p "$folder"
rm -rf "$folder/runs"
cp -r results/runs "$folder/runs"
cp results/certificate.json "$folder/"
for section in ablation families; do
    cp "results/$section.json" "results/$section.csv" "paper/$section.tex" \
        "paper/figures/$section.png" "$folder/"
done
python scripts/update_readme.py --readme README.md --reference "$folder" --benchmarks bench/results
