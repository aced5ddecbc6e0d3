# make demo   the whole main job on the shipped images, in a virtual environment of its own
# make test   ruff and pytest
# make cpp    the tests of libaliked with kernels for every architecture, not two of them
# make readme-tables   the tables and plots of README.md and docs/, drawn again from results/
PYTHON ?= python3
VENV ?= .venv
MODEL ?= aliked-t16-homography
FRAMES ?= assets/sequence_640x480
ONNX = converted_model/$(MODEL)-top1k.onnx
RUN = $(VENV)/bin/python

.PHONY: demo readme-tables test cpp lint clean

$(VENV)/.installed: requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

# The engine is TensorRT for RTX's, which builds without a GPU; not every platform has a wheel of it.
demo: $(VENV)/.installed
	$(RUN) convert_pytorch_to_onnx.py $(FRAMES) --model $(MODEL) --top_k 1000 --model_output $(ONNX)
	$(RUN) demo_pair.py $(FRAMES) --model $(MODEL) --top_k 1000 --output demo/matches
	rm -f demo/timings.jsonl
	$(RUN) measure_timings.py $(FRAMES) --model $(MODEL) --top_k 1000 \
	    --model_path $(ONNX) --output demo/timings.jsonl
	@if $(RUN) -c "import tensorrt_rtx" 2> /dev/null; then \
	    $(RUN) convert_onnx_to_trt.py --model_onnx_path $(ONNX); \
	else echo "no engine: TensorRT for RTX is not installed, as this platform has no wheel of it"; fi

readme-tables: $(VENV)/.installed
	$(RUN) draw_report.py results/*.jsonl results/tensorrt/h100-fp16.jsonl \
	    results/tensorrt/h100-large.jsonl results/tensorrt/h100-others.jsonl \
	    results/tensorrt/h100-float32.jsonl results/tensorrt/h200-fp16.jsonl \
	    results/tensorrt/h200-more.jsonl results/tensorrt/h200-others.jsonl \
	    results/tensorrt/h200-large.jsonl results/tensorrt/h200-float32.jsonl \
	    results/tensorrt/h200-k2000.jsonl results/fused/h200-timings.jsonl \
	    results/evaluation/*.jsonl \
	    --other_run results/other_run/*.jsonl --output results/report \
	    --docs docs/results.md docs/evaluation.md --readme README.md
	$(RUN) draw_report.py results/lightglue/h100-fp16.jsonl results/lightglue/h200.jsonl \
	    --output results/lightglue/report \
	    --docs docs/matching.md

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# A process a core, each with one thread: tests are small, and threads of several processes in the
# way of each other cost more than they give.
test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 8 --dist worksteal

cpp: $(VENV)/.installed-dev
	ALIKED_ARCHITECTURES=all $(RUN) -m pytest -q tests/fused/test_cpp.py

clean:
	rm -rf $(VENV) demo
