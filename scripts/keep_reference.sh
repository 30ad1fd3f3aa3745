#!/usr/bin/env bash
# Copies the present results to the given folder, renders them there and renews the README's tables.
set -euo pipefail
folder=$1
mkdir -p "$folder"
rm -rf "$folder/runs"
cp -r results/runs "$folder/runs"
cp results/certificate.json "$folder/"
for section in ablation families; do
    cp "results/$section.json" "results/$section.csv" "$folder/"
done
scripts/render_reference.sh "$folder"
