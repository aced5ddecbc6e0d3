# make demo   the whole main job on the shipped images, in a virtual environment of its own
# make test   ruff and pytest
# make readme-tables   the README's tables and plots, drawn again from results/
PYTHON ?= python3
VENV ?= .venv
MODEL ?= aliked-t16-homography
FRAMES ?= assets/sequence_640x480
RUN = $(VENV)/bin/python

.PHONY: demo readme-tables test lint clean

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(VENV)/.installed
	$(RUN) convert_pytorch_to_onnx.py $(FRAMES) --model $(MODEL) --top_k 1000 \
	    --model_output converted_model/$(MODEL)-top1k.onnx
	$(RUN) demo_pair.py $(FRAMES) --model $(MODEL) --top_k 1000 --output demo/matches
	rm -f demo/timings.jsonl
	$(RUN) measure_timings.py $(FRAMES) --model $(MODEL) --top_k 1000 \
	    --model_path converted_model/$(MODEL)-top1k.onnx --output demo/timings.jsonl

readme-tables: $(VENV)/.installed
	$(RUN) draw_report.py results/*.jsonl results/evaluation/*.jsonl \
	    --other_run results/other_run/*.jsonl --output results/report --readme README.md

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

test: lint
	$(RUN) -m pytest -q

clean:
	rm -rf $(VENV) demo
