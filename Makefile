# make demo and make test do all set-up by themselves; make help lists the rest.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
CPU_WHEELS ?= https://download.pytorch.org/whl/cpu
WORKERS ?= 2

py := $(VENV)/bin/python
pip := $(py) -m pip install --quiet --disable-pip-version-check
clang_sources = $(wildcard $(foreach folder,common v*_* bench bench/*,\
  $(foreach kind,h cuh cu cpp,$(folder)/*.$(kind))))
sources := pyproject.toml CMakeLists.txt $(wildcard cmake/* common/* common/flash/*.py \
  common/flash/*/*.py v*_*/*.py v*_*/*.c* v*_*/*.h)

.PHONY: demo test lint format kernels evidence clean help
help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(VENV)/installed  ## the three generations against the exact reference, on the same inputs
	$(VENV)/bin/flash demo

test: $(VENV)/installed  ## all tests; on a machine with a GPU the kernels too
	OMP_NUM_THREADS=1 $(py) -m pytest -n $(WORKERS) --timeout 600

lint: $(VENV)/linters  ## ruff, mypy and clang-format, nothing excluded
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(py) -m mypy
	$(if $(clang_sources),$(VENV)/bin/clang-format --dry-run --Werror $(clang_sources))

format: $(VENV)/linters  ## rewrite everything in the house format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(clang_sources)

kernels: $(VENV)/compilers  ## compile a sample of every version's kernels without a GPU and inspect it
	PYTHONPATH=.:cmake $(py) .ci/check_kernels.py build/kernels

evidence: $(VENV)/installed  ## on a GPU: its tests and benches, recorded in bench/results
	$(pip) '.[bench]'
	$(py) -m bench.gpu_check

# A torch that $(PYTHON) already has is kept. Without one and without a GPU the CPU build will do.
$(VENV)/torch:
	if $(PYTHON) -c 'import torch' 2>/dev/null; \
	  then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	$(py) -c 'import torch' 2>/dev/null || command -v nvidia-smi >/dev/null || \
	  $(pip) --no-deps --retries 0 --index-url $(CPU_WHEELS) $(TORCH) 2>/dev/null || true
	$(py) -c 'import torch' 2>/dev/null && $(py) -m pip check >/dev/null || $(pip) $(TORCH)
	touch $@

$(VENV)/tools: $(VENV)/torch cmake/toolchain.py
	$(pip) 'scikit-build-core>=0.11' 'pybind11>=3' cmake ninja
	needed="$$($(py) cmake/toolchain.py --requirements)"; \
	  test -z "$$needed" || $(pip) --no-deps $$needed
	touch $@

$(VENV)/installed: $(VENV)/tools $(sources)
	@$(py) cmake/toolchain.py
	$(pip) --no-build-isolation '.[test]'
	touch $@

$(VENV)/linters: $(VENV)/installed
	$(pip) --no-build-isolation '.[dev]'
	touch $@

$(VENV)/compilers: $(VENV)/tools
	FLASH_ARCHS=90a $(py) cmake/toolchain.py
	$(pip) --no-deps $$(FLASH_ARCHS=90a $(py) cmake/toolchain.py --requirements) \
	  nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37
	touch $@

clean:  ## remove what make and CMake have made
	rm -rf build $(VENV)
