# The environment of the jobs: docker build --tag dynatree .
FROM python:3.12-slim

# g++ for the kernel and torch.compile on a CPU, git for the commit in each result, rsync for
# Snakemake's storage.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git rsync \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/dynatree
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt \
    '.[gpu,datasets,slurm,kubernetes]'

# Kubernetes runs jobs in /workdir, where a job finds the sources that were submitted. They go before
# those installed above, so that code changes need no new image.
ENV PYTHONPATH=/workdir/src
WORKDIR /workdir
