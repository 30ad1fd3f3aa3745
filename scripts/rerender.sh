#!/usr/bin/env bash
# Makes tables, figures, report and, where there is TeX, the PDF from the results in the given folder.
set -euo pipefail
folder=$1
targets=(rendered)
if command -v latexmk >/dev/null; then
    targets+=(paper/main.pdf)
else
    echo "note: latexmk is not installed, so there is no PDF; apt-get install latexmk texlive-latex-base texlive-latex-recommended" >&2
fi
snakemake --cores all --config "results=$folder" -- "${targets[@]}"
snakemake --cores all --config "results=$folder" --report results/report.html -- "${targets[@]}"
