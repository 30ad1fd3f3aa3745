"""From results to the paper: aggregation, table, figure, PDF."""


# Its own parameters name every specification, so that it is stale by itself when a measurement of
# a changed configuration has failed, and an old table can never pass for a current one.
rule aggregate:
    input:
        script="scripts/aggregate.py",
        sources=imported_sources("scripts/aggregate.py"),
        measured_by=["scripts/measure.py", *imported_sources("scripts/measure.py")],
        trained_by=TRAINING,
        runs=RUNS,
    output:
        json="results/ablation.json",
        csv="results/ablation.csv",
    log:
        "results/logs/aggregate.log",
    conda:
        "../envs/dynatree.yaml"
    params:
        study=STUDY.canonical(),
        source_digest=source_digest(PACKAGE / "measure.py"),
    shell:
        "python {input.script} --config {params.study:q} --source-digest {params.source_digest} "
        "--results results/runs --json {output.json} --csv {output.csv} 2>&1 | tee {log}"


rule ablation_table:
    input:
        script="scripts/render_table.py",
        sources=imported_sources("scripts/render_table.py"),
        template="paper/templates/ablation.tex.j2",
        ablation=rules.aggregate.output.json,
        aggregated_from=rules.aggregate.input,
    output:
        "paper/ablation.tex",
    log:
        "results/logs/ablation_table.log",
    conda:
        "../envs/dynatree.yaml"
    params:
        study=STUDY.canonical(),
    shell:
        "python {input.script} --ablation {input.ablation} --template {input.template} "
        "--out {output} 2>&1 | tee {log}"


rule ablation_figure:
    input:
        script="scripts/draw_figure.py",
        sources=imported_sources("scripts/draw_figure.py"),
        ablation=rules.aggregate.output.json,
        aggregated_from=rules.aggregate.input,
    output:
        pdf="paper/figures/ablation.pdf",
        png="paper/figures/ablation.png",
    log:
        "results/logs/ablation_figure.log",
    conda:
        "../envs/dynatree.yaml"
    params:
        study=STUDY.canonical(),
    shell:
        "python {input.script} --ablation {input.ablation} --pdf {output.pdf} --png {output.png} "
        "2>&1 | tee {log}"


rule paper:
    input:
        main="paper/main.tex",
        table=rules.ablation_table.output,
        figure=rules.ablation_figure.output.pdf,
    output:
        "paper/main.pdf",
    log:
        "results/logs/paper.log",
    conda:
        "../envs/dynatree.yaml"
    shell:
        "scripts/build_pdf.sh {input.main} 2>&1 | tee {log}"
