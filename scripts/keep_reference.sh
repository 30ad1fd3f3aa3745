#!/usr/bin/env bash
# Copies the present results to the given folder, renders them there and renews the README's tables.
set -euo pipefail
folder=$1
rm -rf "$folder/runs" "$folder/experiments"
mkdir -p "$folder/experiments"
# Not all that were ever measured here.
pair=$(python -c 'from dynatree.config import load_config; print(load_config().pair)')
mkdir -p "$folder/runs/$pair"
for name in $(python -c 'from dynatree.config import load_config; print(*load_config().shown)'); do
    cp "results/runs/$pair/$name.json" "$folder/runs/$pair/"
done
cp results/certificate.json "$folder/"
for section in $(python -c 'from dynatree.config import load_config; print(*load_config().sections)'); do
    cp "results/$section.json" "results/$section.csv" "$folder/"
done
for name in $(python -c 'from dynatree.config import load_config; print(*load_config().paper.experiments)'); do
    cp "results/experiments/$name.json" "results/experiments/$name.csv" "$folder/experiments/"
done
scripts/render_reference.sh "$folder"
