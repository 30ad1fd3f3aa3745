#!/usr/bin/env bash
# Builds a PDF beside its .tex file; says which Debian packages are missing when TeX is.
set -euo pipefail
if ! command -v latexmk >/dev/null; then
    echo "error: latexmk is not installed; apt-get install latexmk texlive-latex-base texlive-latex-recommended" >&2
    exit 1
fi
latexmk -cd -pdf -halt-on-error -interaction=nonstopmode -silent "$1"
