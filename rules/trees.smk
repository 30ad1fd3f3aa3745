"""Recorded draft trees, one job per configuration, and the page that shows them."""


rule record_trees:
    input:
        script="scripts/record_trees.py",
        sources=imported_sources("scripts/record_trees.py"),
        trained_by=TRAINING,
        pair=PAIR_FILES,
        texts=PROMPT_FILES,
    output:
        "results/trees/{pair}/{name}.json",
    log:
        "results/logs/record_trees/{pair}/{name}.log",
    conda:
        "../envs/dynatree.yaml"
    threads: JOB_THREADS
    resources:
        gpu=1,
        busy=STUDY.devices.busy,
        gpu_model=JOB.gpu_model,
        mem_mb=JOB.memory_mb,
        runtime=JOB.minutes,
    params:
        spec=trees_spec,
    # Descriptor 3 is the terminal, past the log: see dynatree.progress.
    shell:
        "exec 3>&1; "
        "python {input.script} --spec {params.spec:q} --threads {threads} "
        "--busy {resources.busy} --out {output} 2>&1 | tee {log}"


# Repeats all specifications, as the aggregation does: an old page can never pass for a current one.
rule tree_page:
    input:
        script="scripts/render_trees.py",
        sources=imported_sources("scripts/render_trees.py"),
        template="paper/templates/trees.html.j2",
        style="paper/templates/trees.css",
        code="paper/templates/trees.js",
        recorded_by=RECORDING,
        trained_by=TRAINING,
        records=TREES,
    output:
        "results/trees.html",
    log:
        "results/logs/tree_page.log",
    conda:
        "../envs/dynatree.yaml"
    params:
        specs=all_trees_specs,
        source_digest=source_digest(PACKAGE / "observe.py"),
    shell:
        "python {input.script} --specs {params.specs:q} --source-digest {params.source_digest} "
        "--records results/trees --template {input.template} --out {output} 2>&1 | tee {log}"
