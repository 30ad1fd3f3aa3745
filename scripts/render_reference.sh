#!/usr/bin/env bash
# Renders the results in the given folder, once more or for the first time, and the README's tables.
set -euo pipefail
folder=$1
read -ra sections <<<"$(python -c 'from dynatree.config import load_config; print(*load_config().sections)')"
experiments=()
for name in $(python -c 'from dynatree.config import load_config; print(*load_config().paper.experiments)'); do
    if [ -f "$folder/experiments/$name.json" ]; then
        experiments+=("$name")
    fi
done
for section in "${sections[@]}"; do
    python scripts/render_table.py --ablation "$folder/$section.json" \
        --template paper/templates/ablation.tex.j2 --out "$folder/$section.tex"
    python scripts/draw_figure.py --kind bars --results "$folder/runs" --ablation "$folder/$section.json" \
        --pdf "$folder/$section.pdf" --png "$folder/$section.png"
    rm "$folder/$section.pdf"
done
for name in "${experiments[@]}"; do
    file=$folder/experiments/$name
    python scripts/render_experiment.py --experiment "$file.json" \
        --template paper/templates/experiment.tex.j2 --out "$file.tex"
    python scripts/draw_experiment.py --experiment "$file.json" --pdf "$file.pdf" --png "$file.png"
    rm "$file.pdf"
done
for text in $(python -c 'from dynatree.config import TEXTS; print(*TEXTS)'); do
    python scripts/render_paper.py --results "$folder" --runs "$folder/runs" --sections "${sections[@]}" \
        --experiments "${experiments[@]}" --template "paper/templates/$text.tex.j2" --out "$folder/$text.tex"
done
python scripts/write_manifest.py --results "$folder" --runs "$folder/runs" --sections "${sections[@]}" \
    --experiments "${experiments[@]}" --templates paper/templates --paper "$folder" --figures "$folder" --out "$folder/manifest.json"
python scripts/update_readme.py --readme README.md --reference "$folder" --benchmarks bench/results \
    --pages docs/scale.md
