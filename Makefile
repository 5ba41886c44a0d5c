# make demo    set up .venv and run the main job
# make test    set up .venv and run the tests
# make lint    ruff, and mypy on a regular install
# make lanes   the tests that need another torch or a vendor's package, each in an environment of its own
#
# PYTHON=python3.12 chooses another interpreter (3.10 to 3.12). PIP_FLAGS is handed to pip: where pip would take the
# CUDA build of torch, PIP_FLAGS="--extra-index-url URL" with the index of CPU builds saves several GB.

PYTHON ?= python3
PIP_FLAGS ?=
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test lint lanes print-lanes lane-xla lane-ipex lane-tpu_aot lane-triton lane-xpu lane-transformers lane-slow lane-triton-slow clean

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifeq ($(filter 3.10 3.11 3.12,$(VERSION)),)
$(error $(PYTHON) is Python '$(VERSION)'; opreg needs 3.10, 3.11 or 3.12: make PYTHON=python3.12)
endif
# The interpreter's version is in the stamp's name, so that another PYTHON builds the environment anew.
STAMP := installed-$(VERSION)

# $(call environment,folder,dependency group): a virtual environment with opreg (editable) and the pinned group.
define environment
	@echo "== setting up $(1) (Python $(VERSION), dependency group '$(2)' of pyproject.toml)"
	@if [ -x $(1)/bin/python ] && $(1)/bin/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(VERSION)")'; \
	then echo "   found $(1)"; else $(PYTHON) -m venv --clear $(1); fi
	$(1)/bin/python -m pip install -q --disable-pip-version-check pip==25.3
	$(1)/bin/python -m pip install -q $(PIP_FLAGS) -e . --group $(2)
endef

# Two processes, a file to one of them: half the time on two cores.
SPREAD := -n 2 --dist loadfile

demo: .venv/$(STAMP)
	.venv/bin/python examples/05_serve_qwen3_next.py

test: .venv/$(STAMP)
	.venv/bin/pytest $(SPREAD)

lint: .venv/lint-$(STAMP)
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	# mypy does not follow the editable install's folder mapping, so it reads a regular one. `build` is removed first:
	# setuptools would pack what an earlier build left there.
	rm -rf build
	.venv/bin/python -m pip install -q --no-deps --no-build-isolation --target build/typed .
	cd build/typed && MYPYPATH=. ../../.venv/bin/python -m mypy --config-file ../../pyproject.toml -p opreg

# `make lane-slow`, the wider matrix, is run by hand: it takes longer than all lanes together.
# Every folder of tests/lanes is a lane with an environment `.venv-NAME` and a dependency group `lane-NAME`.
LANES := lane-transformers $(patsubst tests/lanes/%/,lane-%,$(sort $(wildcard tests/lanes/*/)))
lanes: $(LANES)

print-lanes:
	@echo $(LANES)

# The same tests on the other torch versions: all but those of the package and of the command as a process.
SAME := tests --ignore=tests/test_packaging.py --ignore=tests/test_plugins.py --ignore=tests/test_readme.py

# `opreg check` of paged attention beside a lane's packages (Triton, Intel's, JAX with libtpu): a minute in each.
RPA_OPS := ragged_paged_attention ragged_paged_attention_update kv_cache_update
define check_rpa
set -e; for op in $(RPA_OPS); do .venv-$(1)/bin/opreg check opreg::$$op; done
endef

lane-transformers: .venv/$(STAMP)
	.venv/bin/pytest tests/kernels/test_gdn_transformers.py tests/kernels/test_gdn_rule_models.py $(wildcard tests/test_examples_serving.py)

lane-slow: .venv/$(STAMP)
	.venv/bin/pytest $(SPREAD) -m slow

# The whole matrix in the interpreter and for the compiler: about an hour.
lane-triton-slow: .venv-triton/$(STAMP)
	TRITON_INTERPRET=1 .venv-triton/bin/pytest -m slow tests/lanes/triton

lane-triton: .venv-triton/$(STAMP)
	TRITON_INTERPRET=1 .venv-triton/bin/pytest tests/lanes/triton
	$(call check_rpa,triton)

# Wheels of Intel's kernels are downloaded (280 MB, once) and read; nothing of them is loaded.
lane-xpu: .venv-xpu/$(STAMP)
	.venv-xpu/bin/pytest tests/lanes/xpu
	$(call check_rpa,xpu)

lane-tpu_aot: .venv-tpu_aot/$(STAMP)
	TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu .venv-tpu_aot/bin/pytest tests/lanes/tpu_aot
	$(call check_rpa,tpu_aot)

lane-ipex: .venv-ipex/$(STAMP)
	.venv-ipex/bin/pytest $(SPREAD) $(SAME)
	.venv-ipex/bin/pytest tests/lanes/ipex

# The Pallas kernels' own tests need the interpreter of jax 0.10 (races, waits); this lane's torch_xla brings 0.7.1.
lane-xla: .venv-xla/$(STAMP)
	PJRT_DEVICE=CPU .venv-xla/bin/pytest $(SPREAD) $(SAME) --ignore-glob='tests/kernels/test_pallas_*'
	PJRT_DEVICE=CPU .venv-xla/bin/pytest tests/lanes/xla

.venv/$(STAMP): pyproject.toml
	$(call environment,.venv,test)
	touch $@

.venv/lint-$(STAMP): .venv/$(STAMP)
	.venv/bin/python -m pip install -q $(PIP_FLAGS) --group lint
	touch $@

.venv-xla/$(STAMP): pyproject.toml
	$(call environment,.venv-xla,lane-xla)
	.venv-xla/bin/python -m pip install -q --no-deps --group lane-xla-without-dependencies
	# Beside the environment: were it inside, torch_xla and jax would look for a TPU in every process.
	.venv-xla/bin/python -m pip install -q --no-deps --upgrade --target .venv-xla/libtpu --group lane-xla-libtpu
	touch $@

.venv-tpu_aot/$(STAMP): pyproject.toml
	$(call environment,.venv-tpu_aot,lane-tpu_aot)
	# Beside the environment: torch_tpu loads itself wherever torch is imported, and there is no TPU here.
	.venv-tpu_aot/bin/python -m pip install -q --no-deps --upgrade --target .venv-tpu_aot/torch_tpu --group lane-tpu_aot-torch_tpu
	touch $@

.venv-%/$(STAMP): pyproject.toml
	$(call environment,.venv-$*,lane-$*)
	touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info
