#!/usr/bin/env bash
# Copies the present results to the given folder, renders them there and renews the README's tables.
set -euo pipefail
folder=$1
rm -rf "$folder/runs" "$folder/experiments"
mkdir -p "$folder/experiments"
# Not all that were ever measured here.
for run in $(python -c 'from dynatree.config import load_config
config = load_config()
points = (point.run for name in config.paper.experiments for point in config.points(name))
print(*(f"{config.pair}/{name}.json" for name in dict.fromkeys((*config.measured, *points))))'); do
    mkdir -p "$folder/runs/${run%/*}"
    cp "results/runs/$run" "$folder/runs/$run"
done
cp results/certificate.json "$folder/"
for section in $(python -c 'from dynatree.config import load_config; print(*load_config().sections)'); do
    cp "results/$section.json" "results/$section.csv" "$folder/"
done
for name in $(python -c 'from dynatree.config import load_config; print(*load_config().paper.experiments)'); do
    cp "results/experiments/$name.json" "results/experiments/$name.csv" "$folder/experiments/"
done
scripts/render_reference.sh "$folder"
