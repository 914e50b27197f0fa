# make demo         train on faces drawn by the program: no data needed, a few minutes on two CPU cores
# make test         run the tests but those of CUDA, a process with one thread on each core
# make lint         run the linter
# make bench        measure the figures of benchmarks/README.md on this machine
# make bench-gpu    run the CUDA tests and benchmarks on an NVIDIA GPU
# make clean        remove the installed packages and the cache of decoded images; results stay

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench bench-gpu clean

demo: .venv/.installed
	$(BIN)/python main.py --dataset toy --version demo --overwrite true --batch_size 16 --g_lr 4e-4 --d_lr 2e-4 \
		--total_step 400 --sample_step 50 --attn_step 200 --use_tensorboard true

test: .venv/.installed-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not cuda"

lint: .venv/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/.installed
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/loop.py

# The "-": whatever fails, the rest is measured.
bench-gpu: .venv/.installed-tests
	-$(BIN)/python -m pytest tests/test_cuda.py
	-$(BIN)/python benchmarks/step.py --device cuda --json benchmarks/gpu.json
	-$(BIN)/python benchmarks/loop.py --device cuda
	-$(BIN)/python benchmarks/data.py --device cuda
	-$(BIN)/python benchmarks/step.py --device cuda --rounds 3 --only "ours bf16 graph" \
		--imsize 32,64,128,256 --batch_size 64,256
	-$(BIN)/python benchmarks/step.py --device cuda --rounds 3 --model paper --imsize 64,128 --batch_size 64,256

clean:
	rm -rf .venv cache

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.installed-tests: tests/requirements.txt requirements-export.txt .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -r tests/requirements.txt
	touch $@
