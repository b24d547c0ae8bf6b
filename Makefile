# make pretrain           install, then train the tiny LaMDA on the Python standard library (4 minutes on two cores)
# make test               install, then run the whole test suite
# make test-long          longer suites: runs killed at random on real text (needs LAMDA_TEST_DATA)
# make serve-test         the HTTP server under the official client; its page and reports in Chromium (else skipped)
# make serve-attack       30 clients, a third of them hostile, on the HTTP server for ten minutes (or SECONDS=60 HOSTILE=1000)
# make faults             fault-injection tests: every failure mode once, on two ranks (about 10 minutes)
# make faults-full        the same as often as docs/reliability.md says (about 40 minutes)
# make cluster            jobs on SLURM and on two hosts, set up on this machine (needs root and Debian, else skipped)
# make flax-test          JAX on meshes and over processes, compared with PyTorch, killed, resumed (about 3 minutes)
# make transformers-test  transformers' common tests on LaMDA, from TRANSFORMERS_CHECKOUT (docs/huggingface.md)
# make package-test       build the package, install it into an empty environment, train with it (about 5 minutes);
#                         DIST=FOLDER keeps the wheel and the source archive
# make gpu-kit            build/gpu-kit: all that `lamda prove-gpu` needs on a machine without a network (docs/performance.md)
# make gpu-rehearsal      every part of `lamda prove-gpu` on the CPU at toy size (90 s of one core)
# make docs               build the documentation into build/site and check its links (make docs-test runs its commands)
# make lint               ruff, import-linter, mypy

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/tiny.yaml

.PHONY: pretrain test serve-test serve-attack test-long faults faults-full cluster flax-test transformers-test package-test gpu-kit gpu-rehearsal docs docs-test lint clean

pretrain: $(VENV)/.installed
	$(BIN)/lamda pretrain --config $(CONFIG)

# Keep the collected order: reordered by number of tests, files with few long tests would run last, on one worker.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

serve-test: $(VENV)/.installed-dev
	if [ "$$(id -u)" = 0 ] && command -v apt-get && ! command -v chromium; then \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends chromium; \
	fi
	$(BIN)/python -m pytest -rs tests/serve tests/browser

serve-attack: $(VENV)/.installed-dev
	$(BIN)/python -m tests.serve.attack --seconds $(or $(SECONDS),600) $(if $(HOSTILE),--hostile $(HOSTILE))

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/long

faults: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/faults

faults-full: $(VENV)/.installed-dev
	LAMDA_FAULTS=full $(BIN)/python -m pytest tests/faults tests/long

cluster: $(VENV)/.installed-dev
	if [ "$$(id -u)" = 0 ] && command -v apt-get && ! (command -v slurmctld && command -v pdsh && command -v sshd); then \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends \
	        slurm-wlm munge pdsh openssh-server iproute2; \
	fi
	$(BIN)/python -m pytest -rs tests/slurm

flax-test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/devices

transformers-test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -o addopts=-rs tests/interop/transformers_common.py

package-test: $(VENV)/.installed-dev
	LAMDA_DIST=$(abspath $(DIST)) $(BIN)/python -m pytest tests/package

# For CPython 3.12 and x86-64, beside a torch with its triton and numpy. pyarrow, datasets and wandb are left out: large,
# and a local text needs none of them.
KIT := build/gpu-kit
KIT_PACKAGES := annotated-types einops hjson jinja2 markdown-it-py markupsafe mdurl msgpack ninja orjson packaging psutil \
    py-cpuinfo pydantic pydantic-core pygments pyyaml rich safetensors sentencepiece tqdm typing-extensions \
    typing-inspection zstandard
gpu-kit: $(VENV)/.installed
	rm -rf $(KIT) && mkdir -p $(KIT)/wheels
	$(BIN)/pip download --quiet --no-deps --constraint constraints.txt --dest $(KIT)/wheels --only-binary :all: \
	    --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
	    --platform manylinux2014_x86_64 $(KIT_PACKAGES)
	DS_BUILD_OPS=0 $(BIN)/pip wheel --quiet --no-deps --constraint constraints.txt --wheel-dir $(KIT)/wheels deepspeed .
	$(BIN)/python -c 'from lamda.data.standard_library import write_corpus; write_corpus("$(KIT)/text")'
	$(BIN)/lamda tokenizer train --config configs/lamda_110m.yaml --data.files '$(KIT)/text/train/*.jsonl.zst' \
	    --run.dir $(KIT)/run
	mv $(KIT)/run/tokenizer.model $(KIT)/text && rm -r $(KIT)/run
	cp scripts/prove-gpu.sh $(KIT)
	du -sh $(KIT)

gpu-rehearsal: $(VENV)/.installed-dev
	rm -rf build/gpu-rehearsal
	$(BIN)/lamda prove-gpu --rehearse --to build/gpu-rehearsal

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

docs-test: $(VENV)/.installed-docs
	$(BIN)/python -m pytest -rs tests/docs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[plot]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(VENV)/.installed $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) .cache build *.egg-info
