# What a GPU node needs: Python 3.11, the tested packages (torch brings CUDA and NCCL), the libraries of InfiniBand,
# a compiler for Triton. The driver is the node's own (NVIDIA Container Toolkit).
#   docker build -t open-lamda .
#   docker run --gpus all --ipc=host -v /data:/data open-lamda lamda doctor --config configs/lamda_2b.yaml
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        gcc libc6-dev libibverbs1 ibverbs-providers librdmacm1 openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

COPY . /opt/open-lamda
WORKDIR /opt/open-lamda
RUN pip install --no-cache-dir --constraint constraints.txt .

# A failure (2) ends the build; a warning (1) does not, for there is no GPU here.
RUN lamda doctor --config configs/tiny.yaml --run.dir /tmp/doctor --wandb.mode disabled || [ $? -eq 1 ]

WORKDIR /data
