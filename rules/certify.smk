"""The losslessness certificate of every configuration that a table needs, in one job."""


rule certify:
    input:
        script="scripts/certify.py",
        sources=imported_sources("scripts/certify.py"),
        trained_by=TRAINING,
        texts=PROMPT_FILES,
        pair=PAIR_FILES,
    output:
        CERTIFICATE,
    log:
        "results/logs/certify.log",
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
        spec=certificate_spec,
        packed=packed_certificate_spec,
    # Descriptor 3 is the terminal, past the log: see dynatree.progress.
    shell:
        "exec 3>&1; "
        "python {input.script} --spec {params.packed} --threads {threads} "
        "--busy {resources.busy} --out {output} 2>&1 | tee {log}"
