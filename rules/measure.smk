"""One job per configuration; `gpu=1` keeps two measurements from disturbing each other."""


rule measure:
    input:
        script="scripts/measure.py",
        sources=imported_sources("scripts/measure.py"),
        trained_by=TRAINING,
        texts=run_texts,
        pair=PAIR_FILES,
    output:
        "results/runs/{pair}/{name}.json",
    log:
        "results/logs/measure/{pair}/{name}.log",
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
        spec=run_spec,
    # Descriptor 3 is the terminal, past the log: see dynatree.progress.
    shell:
        "exec 3>&1; "
        "python {input.script} --spec {params.spec:q} --threads {threads} "
        "--busy {resources.busy} --out {output} 2>&1 | tee {log}"
