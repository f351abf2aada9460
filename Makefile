# Every target makes the virtual environment that it needs.
PYTHON ?= python3
REQUIREMENTS ?= requirements.txt
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(basename $(notdir $(REQUIREMENTS)))

WHEEL := build/wheel
CIFAR_WEIGHTS := docs/cifar10_tiny.safetensors
CIFAR_RUN := runs/cifar10_tiny_demo

.PHONY: demo demo-cifar test lint docs wheel clean

demo: $(INSTALLED)  ## Train on handwritten digits, then draw the classes 3, 7, 0, 8 and 5
	$(BIN)/python train.py --config=configs/digits.py --workdir=runs/digits
	$(BIN)/python sample.py --workdir=runs/digits --classes=3,7,0,8,5 --num_images=25 \
		--guidance=2 --out=runs/digits/demo

demo-cifar: $(CIFAR_WEIGHTS) $(INSTALLED)  ## Draw CIFAR-10's ten classes with the weights in docs/
	test -d $(CIFAR_RUN) || $(BIN)/python -m flowdcn_jax.tools.convert_checkpoint \
		--source=$(CIFAR_WEIGHTS) --config=configs/cifar10_tiny.py --workdir=$(CIFAR_RUN)
	$(BIN)/python sample.py --workdir=$(CIFAR_RUN) --batch_size=30 \
		--out=$(CIFAR_RUN)/demo

test: $(INSTALLED)  ## Run the tests
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

lint: $(INSTALLED)  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(INSTALLED)  ## Build the site in build/site; a broken link or a public name left out is an error
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

wheel: $(INSTALLED)  ## Build the wheel, install it afresh and train two steps from another folder
	rm -rf $(WHEEL)
	$(BIN)/python -m build --wheel --outdir=$(WHEEL) .
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/python -m pip install --quiet --no-compile $(WHEEL)/*.whl
	mkdir $(WHEEL)/elsewhere
	cd $(WHEEL)/elsewhere && ../venv/bin/flowdcn train --config=digits --workdir=run \
		--config.train.num_steps=2 --config.optimizer.warmup_steps=0 \
		--config.model.width=32 --config.model.depth=1 --config.log.sample_every_steps=2 --config.sampling.num_images=4
	cd $(WHEEL)/elsewhere && ../venv/bin/flowdcn sample --workdir=run --num_images=4 --num_steps=2

clean:  ## Remove the virtual environment, what was built and the demos' runs
	rm -rf $(VENV) build runs/digits $(CIFAR_RUN)

$(CIFAR_WEIGHTS):
	@echo "error: there is no $@; docs/cifar10_tiny.md says how to train it"; exit 1

$(INSTALLED): $(REQUIREMENTS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old; set PYTHON to Python 3.11 or later"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement $(REQUIREMENTS)
	touch $@
