# make demo    trains on faces drawn by the program itself: no data needed, some minutes on two CPU cores
# make test    the linter's and the whole test suite's environment, and the suite
# make lint    the linter

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/.installed
	$(BIN)/python main.py --dataset toy --version demo --batch_size 16 --total_step 400 \
		--sample_step 50 --attn_step 200 --use_tensorboard true

test: .venv/.installed-tests
	$(BIN)/python -m pytest

lint: .venv/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv cache samples attn models logs

.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.installed-tests: tests/requirements.txt .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -r tests/requirements.txt
	touch $@
