# make demo   the main job on the embedded data: scenes -> shards -> training -> retrieval, a table and a picture
# make demo-all  adds context alone and motion alone, a diagnosis and a report (half an hour)
# make test   the test suite; make soak runs the full counts of faults and kills
# make bench CLIPS=…  what is claimed about speed, half an hour, on a folder of videos; make lint  style and types
# make gpu SHARDS=… MANIFEST=…  what is claimed about GPUs, within 25 minutes of one; without one, a dry run
# The first of them sets up .venv with pinned versions. PYTHON chooses the interpreter (3.10 or later).

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
WORKERS ?= $(shell env -u OMP_NUM_THREADS nproc)
OUT ?= demo_out
SCENES := --shards $(OUT)/shards --manifest $(OUT)/scenes/manifest.csv

.PHONY: demo demo-all scenes test soak bench gpu lint clean

$(VENV)/ready: requirements.txt setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

scenes: $(VENV)/ready
	$(PY) -m preprocess synthetic --out $(OUT)/scenes --workers $(WORKERS)
	$(PY) -m preprocess run $(OUT)/scenes/manifest.csv --videos $(OUT)/scenes --out $(OUT)/shards --workers $(WORKERS) \
		--residuals --width 176 --height 144 --frame-width 112 --frame-height 92
	$(PY) -m preprocess inspect $(OUT)/shards --sample 2 --out $(OUT)/shards.png

demo: scenes
	$(PY) -m train scenes $(SCENES) --out $(OUT)/joint
	$(PY) -m eval compare $(OUT)/joint $(SCENES) --picture $(OUT)/demo.png

demo-all: demo
	$(PY) -m train scenes-context $(SCENES) --out $(OUT)/context
	$(PY) -m train scenes-motion $(SCENES) --out $(OUT)/motion
	$(PY) -m eval compare $(OUT)/joint $(OUT)/context $(OUT)/motion $(SCENES) --picture $(OUT)/demo.png
	$(PY) -m eval diagnose $(OUT)/joint $(SCENES) --picture $(OUT)/diagnosis.png
	$(PY) -m eval report --runs $(OUT) --gallery $(OUT)/joint $(OUT)/context $(OUT)/motion $(SCENES) --out $(OUT)/report.html

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not soak" --numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile

soak: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -m soak --timeout 3600

bench: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.stage1 $(if $(CLIPS),--clips $(CLIPS))
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.residuals $(if $(CLIPS),--videos $(CLIPS))
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.flow
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.motion_loss
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.loader $(if $(CLIPS),--videos $(CLIPS))
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.train_step
	$(PY) -m benchmarks.busy

gpu: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.gpu $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(SHARDS),--shards $(SHARDS) --manifest $(MANIFEST))

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(OUT) gpu_out build *.egg-info .pytest_cache .mypy_cache .ruff_cache
