"""Experiments: the runs of all points of a grid, aggregated into one file; its text and figure."""


rule aggregate_experiment:
    input:
        script="scripts/aggregate_experiment.py",
        sources=imported_sources("scripts/aggregate_experiment.py"),
        measured_by=MEASURING,
        trained_by=TRAINING,
        texts=experiment_texts,
        runs=experiment_runs,
    output:
        json="results/experiments/{experiment}.json",
        csv=report(
            "results/experiments/{experiment}.csv",
            caption="captions/experiment_table.rst",
            category="Tables",
            labels={"section": "{experiment}"},
        ),
    log:
        "results/logs/aggregate_experiment/{experiment}.log",
    conda:
        "../envs/dynatree.yaml"
    params:
        study=experiment_study,
        packed=packed_experiment_study,
        source_digest=MEASURED_BY,
        runs=RUNS,
    shell:
        "python {input.script} --config {params.packed} --experiment {wildcards.experiment} "
        "--source-digest {params.source_digest} --results {params.runs} --json {output.json} "
        "--csv {output.csv} 2>&1 | tee {log}"


rule experiment_text:
    input:
        script="scripts/render_experiment.py",
        sources=imported_sources("scripts/render_experiment.py"),
        template="paper/templates/experiment.tex.j2",
        experiment="results/experiments/{experiment}.json",
        aggregated_by=AGGREGATING_EXPERIMENT,
        runs=experiment_runs,
    output:
        "paper/experiments/{experiment}.tex",
    log:
        "results/logs/experiment_text/{experiment}.log",
    conda:
        "../envs/dynatree.yaml"
    params:
        study=experiment_study,
    shell:
        "python {input.script} --experiment {input.experiment} --template {input.template} "
        "--out {output} 2>&1 | tee {log}"


rule experiment_figure:
    input:
        script="scripts/draw_experiment.py",
        sources=imported_sources("scripts/draw_experiment.py"),
        experiment="results/experiments/{experiment}.json",
        aggregated_by=AGGREGATING_EXPERIMENT,
        runs=experiment_runs,
    output:
        pdf="paper/figures/experiments/{experiment}.pdf",
        png=report(
            "paper/figures/experiments/{experiment}.png",
            caption="captions/experiment.rst",
            category="Figures",
            labels={"section": "{experiment}", "figure": "experiment"},
        ),
    log:
        "results/logs/experiment_figure/{experiment}.log",
    conda:
        "../envs/dynatree.yaml"
    params:
        study=experiment_study,
    shell:
        "python {input.script} --experiment {input.experiment} --pdf {output.pdf} "
        "--png {output.png} 2>&1 | tee {log}"
