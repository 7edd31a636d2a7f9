# The environment of `make`, from locks/, and this clone in it.
#   docker build -t lddyn .                                    PyTorch with CUDA, several GB
#   docker build -t lddyn --build-arg TORCH_INDEX=URL .        PyTorch of another index, such as its CPU builds
#   docker run --rm -p 127.0.0.1:8888:8888 lddyn               Jupyter, at the address with a token that it prints
#   docker run --rm -v lddyn-runs:/home/reader/lddyn/runs lddyn make book SCALE=smoke
FROM python:3.11-slim
# git names the commit of a run; Chromium prints the PDF and tests the pages
RUN apt-get update && apt-get install -y --no-install-recommends chromium git make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home reader
USER reader
RUN mkdir -p /home/reader/lddyn/runs
WORKDIR /home/reader/lddyn
# The environment lies beside the clone, over which a dev container mounts another; `make` finds it there, too.
ENV VENV=/home/reader/venv MAKEFLAGS="VENV=/home/reader/venv"
ENV PATH=$VENV/bin:$PATH
COPY --chown=reader . .
ARG TORCH_INDEX=
# a build of PyTorch that is already there is kept (see locks/renew.py)
RUN python3 -m venv $VENV && if [ -n "$TORCH_INDEX" ]; then \
    pip install --no-deps --index-url "$TORCH_INDEX" "$(grep -o '^torch==[^ ]*' locks/constraints.txt)"; fi
RUN make env
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser"]
