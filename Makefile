# Every target makes the virtual environment that it needs.
PYTHON ?= python3
REQUIREMENTS ?= requirements.txt
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(basename $(notdir $(REQUIREMENTS)))

.PHONY: demo test lint clean

demo: $(INSTALLED)  ## Train on handwritten digits, then draw the classes 3, 7, 0, 8 and 5
	$(BIN)/python train.py --config=configs/digits.py --workdir=runs/digits
	$(BIN)/python sample.py --workdir=runs/digits --classes=3,7,0,8,5 --num_images=25 \
		--guidance=2 --out=runs/digits/demo

test: $(INSTALLED)  ## Run the tests
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

lint: $(INSTALLED)  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## Remove the virtual environment and the demo's run
	rm -rf $(VENV) runs/digits

$(INSTALLED): $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old; set PYTHON to Python 3.11 or later"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement $(REQUIREMENTS)
	touch $@
