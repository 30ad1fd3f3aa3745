"""From results to the paper: aggregation, texts, figures, manifest, PDF."""

ROOFLINES = sorted(
    f"paper/figures/{machine}/roofline-{record}.pdf"
    for machine, record in zip(
        *glob_wildcards("bench/results/{machine}/roofline-{record}.json")
    )
)


# Its own parameters name every specification, so that it is stale by itself when a measurement of
# a changed configuration has failed, and an old table can never pass for a current one.
rule aggregate:
    input:
        script="scripts/aggregate.py",
        sources=imported_sources("scripts/aggregate.py"),
        measured_by=MEASURING,
        certified_by=CERTIFYING,
        trained_by=TRAINING,
        runs=lambda wildcards: section_runs(wildcards.section),
    output:
        json="results/{section}.json",
        csv=report(
            "results/{section}.csv",
            caption="captions/table.rst",
            category="Tables",
            labels={"section": "{section}"},
        ),
    log:
        "results/logs/aggregate/{section}.log",
    conda:
        "../envs/dynatree.yaml"
    params:
        study=section_study,
        packed=packed_section_study,
        source_digest=MEASURED_BY,
        certificate=CERTIFICATE,
        certifying_digest=CERTIFIED_BY,
        runs=RUNS,
        missing="mark" if MARKED else "refuse",
    shell:
        "python {input.script} --config {params.packed} --source-digest {params.source_digest} "
        "--certificate {params.certificate} --certifying-digest {params.certifying_digest} "
        "--results {params.runs} --missing {params.missing} --json {output.json} "
        "--csv {output.csv} 2>&1 | tee {log}"


rule section_text:
    input:
        script="scripts/render_table.py",
        sources=imported_sources("scripts/render_table.py"),
        template="paper/templates/ablation.tex.j2",
        ablation="results/{section}.json",
        aggregated_by=AGGREGATING,
        runs=lambda wildcards: section_runs(wildcards.section),
    output:
        "paper/{section}.tex",
    log:
        "results/logs/section_text/{section}.log",
    conda:
        "../envs/dynatree.yaml"
    params:
        study=section_study,
    shell:
        "python {input.script} --ablation {input.ablation} --template {input.template} "
        "--out {output} 2>&1 | tee {log}"


rule section_figure:
    input:
        script="scripts/draw_figure.py",
        sources=imported_sources("scripts/draw_figure.py"),
        ablation="results/{section}.json",
        aggregated_by=AGGREGATING,
        runs=lambda wildcards: section_runs(wildcards.section),
    output:
        pdf="paper/figures/{section}.pdf",
        png=report(
            "paper/figures/{section}.png",
            caption="captions/bars.rst",
            category="Figures",
            labels={"section": "{section}", "figure": "throughput"},
        ),
    log:
        "results/logs/section_figure/{section}.log",
    conda:
        "../envs/dynatree.yaml"
    params:
        study=section_study,
        results=RUNS,
    shell:
        "python {input.script} --kind bars --ablation {input.ablation} "
        "--results {params.results} --pdf {output.pdf} --png {output.png} 2>&1 | tee {log}"


rule section_detail:
    input:
        script="scripts/draw_figure.py",
        sources=imported_sources("scripts/draw_figure.py"),
        ablation="results/{section}.json",
        aggregated_by=AGGREGATING,
        runs=lambda wildcards: section_runs(wildcards.section),
    output:
        pdf="paper/figures/{section}_{kind}.pdf",
        png=report(
            "paper/figures/{section}_{kind}.png",
            caption="captions/detail.rst",
            category="Figures",
            labels={"section": "{section}", "figure": "{kind}"},
        ),
    log:
        "results/logs/section_detail/{section}_{kind}.log",
    wildcard_constraints:
        kind="waterfall|rounds|acceptance",
    conda:
        "../envs/dynatree.yaml"
    params:
        study=section_study,
        results=RUNS,
    shell:
        "python {input.script} --kind {wildcards.kind} --ablation {input.ablation} "
        "--results {params.results} --pdf {output.pdf} --png {output.png} 2>&1 | tee {log}"


# A record of bench/roofline.py is committed, not made here.
rule roofline_figure:
    input:
        script="scripts/draw_roofline.py",
        sources=imported_sources("scripts/draw_roofline.py"),
        record="bench/results/{machine}/roofline-{record}.json",
    output:
        pdf="paper/figures/{machine}/roofline-{record}.pdf",
        png=report(
            "paper/figures/{machine}/roofline-{record}.png",
            caption="captions/roofline.rst",
            category="Figures",
            labels={"section": "{machine}", "figure": "roofline {record}"},
        ),
    log:
        "results/logs/roofline_figure/{machine}/{record}.log",
    conda:
        "../envs/dynatree.yaml"
    shell:
        "python {input.script} --record {input.record} --pdf {output.pdf} --png {output.png} "
        "2>&1 | tee {log}"


# Numbers, sentences and tables that speak of all sections.
rule paper_text:
    input:
        script="scripts/render_paper.py",
        sources=imported_sources("scripts/render_paper.py"),
        template="paper/templates/{text}.tex.j2",
        ablations=expand("results/{section}.json", section=SECTIONS),
        experiments=expand(
            "results/experiments/{experiment}.json", experiment=PAPER_EXPERIMENTS
        ),
        aggregated_by=[*AGGREGATING, *AGGREGATING_EXPERIMENT],
        runs=lambda wildcards: ALL_RUNS,
    output:
        "paper/{text}.tex",
    log:
        "results/logs/paper_text/{text}.log",
    conda:
        "../envs/dynatree.yaml"
    params:
        study=whole_study,
        sections=SECTIONS,
        experiments=PAPER_EXPERIMENTS,
        runs=RUNS,
    shell:
        "python {input.script} --results results --runs {params.runs} --sections {params.sections} "
        "--experiments {params.experiments} "
        "--template {input.template} --out {output} 2>&1 | tee {log}"


# Where each value comes from. It renders everything again and refuses what is not the same.
rule manifest:
    input:
        script="scripts/write_manifest.py",
        sources=imported_sources("scripts/write_manifest.py"),
        templates=expand(
            "paper/templates/{text}.tex.j2", text=["ablation", "experiment", *TEXTS]
        ),
        ablations=expand("results/{section}.json", section=SECTIONS),
        experiments=expand(
            "results/experiments/{experiment}.json", experiment=PAPER_EXPERIMENTS
        ),
        aggregated_by=[*AGGREGATING, *AGGREGATING_EXPERIMENT],
        runs=lambda wildcards: ALL_RUNS,
        sections=expand("paper/{section}.tex", section=SECTIONS),
        texts=expand("paper/{text}.tex", text=TEXTS),
        figures=expand(
            "paper/figures/{section}.{kind}", kind=["pdf", "png"], section=SECTIONS
        ),
        experiment_texts=expand(
            "paper/experiments/{experiment}.tex", experiment=PAPER_EXPERIMENTS
        ),
        experiment_figures=expand(
            "paper/figures/experiments/{experiment}.{kind}",
            kind=["pdf", "png"],
            experiment=PAPER_EXPERIMENTS,
        ),
    output:
        "paper/manifest.json",
    log:
        "results/logs/manifest.log",
    conda:
        "../envs/dynatree.yaml"
    params:
        study=whole_study,
        sections=SECTIONS,
        experiments=PAPER_EXPERIMENTS,
        runs=RUNS,
    shell:
        "python {input.script} --results results --runs {params.runs} --sections {params.sections} "
        "--experiments {params.experiments} "
        "--templates paper/templates --paper paper --figures paper/figures --out {output} "
        "2>&1 | tee {log}"


# All tables and figures of all sections and of the paper's experiments; needs no TeX.
rule rendered:
    input:
        expand("paper/{section}.tex", section=SECTIONS),
        [figure for section in SECTIONS for figure in section_figures(section)],
        expand("paper/experiments/{experiment}.tex", experiment=PAPER_EXPERIMENTS),
        expand(
            "paper/figures/experiments/{experiment}.{kind}",
            kind=["pdf", "png"],
            experiment=PAPER_EXPERIMENTS,
        ),
        ROOFLINES,


rule paper:
    input:
        script="scripts/build_pdf.sh",
        main="paper/main.tex",
        references="paper/references.bib",
        sections=expand("paper/{section}.tex", section=SECTIONS),
        texts=expand("paper/{text}.tex", text=TEXTS),
        figures=expand("paper/figures/{section}.pdf", section=SECTIONS),
        experiment_texts=expand(
            "paper/experiments/{experiment}.tex", experiment=PAPER_EXPERIMENTS
        ),
        experiment_figures=expand(
            "paper/figures/experiments/{experiment}.pdf", experiment=PAPER_EXPERIMENTS
        ),
        manifest="paper/manifest.json",
    output:
        "paper/main.pdf",
    log:
        "results/logs/paper.log",
    conda:
        "../envs/dynatree.yaml"
    shell:
        "{input.script} {input.main} 2>&1 | tee {log}"
