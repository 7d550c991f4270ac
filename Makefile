# Everything a newcomer needs: `make demo` and `make test`. PYTHON chooses the interpreter (3.11 or 3.12).

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
EMOJI ?= corpora/emoji_zh
PICTURES ?= corpora/pictures

.PHONY: install gpu demo test test-slow test-float8 lint emoji pictures clean

install: $(VENV)/installed

# Peers that parity tests compare with pin old versions of what they do not need here: no dependencies.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "1/5 making $(VENV) with $(PYTHON)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "2/5 updating pip in $(VENV)"
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	@echo "3/5 installing cnclip and its packages (PyTorch among them: some gigabytes, several minutes)"
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev,emoji,onnx]"
	@echo "4/5 installing the peers that tests compare with"
	$(BIN)/python -m pip install --quiet --no-deps cn_clip==1.6.0 open_clip_torch==3.3.0 multilingual-clip==1.0.10
	@echo "5/5 checking that torchvision and transformers load"
	$(BIN)/python -m training.model.torchvision_site
	touch $@
	@echo "done: run $(BIN)/cnclip, or \`make demo\`"

# faiss-cpu and faiss-gpu-cu12 are one module: together they do not load, and removing one takes files of the other.
gpu: install
	@echo "1/3 removing faiss-cpu"
	$(BIN)/python -m pip uninstall --quiet --yes faiss-cpu
	@echo "2/3 installing faiss-gpu-cu12 and NVIDIA's libraries for it (about 700 MB)"
	$(BIN)/python -m pip install "faiss-gpu-cu12>=1.14,<2"
	@echo "3/3 putting back its own files"
	$(BIN)/python -m pip install --quiet --force-reinstall --no-deps "faiss-gpu-cu12>=1.14,<2"

demo: install
	$(BIN)/cnclip run pipeline/recipes/demo.toml

# Two files at once, each whole in one process: tests of a file share what they have made. tests/conftest.py gives the
# order; by the number of their tests the longest files would come last. They start hundreds of processes: without
# bytecode, which a shell's PYTHONDONTWRITEBYTECODE forbids to write, each would compile all modules anew.
test test-slow: export PYTHONDONTWRITEBYTECODE =
test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist loadfile --no-loadscope-reorder

# transformers imports torchao wherever it is installed, in every process: here it has a folder of its own.
test-float8: install
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --target $(VENV)/float8 --upgrade torchao
	PYTHONPATH=$(VENV)/float8 $(BIN)/python -m pytest -m "slow or not slow" tests/training/engine/test_float8.py

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy cnclip pipeline data_prep training eval

emoji: install
	test -f $(EMOJI)/README.md || $(BIN)/python -m data_prep.corpora.build_emoji $(EMOJI)
	$(BIN)/cnclip run pipeline/recipes/emoji_zh.toml --set corpus.folder=$(EMOJI)

pictures: install
	test -f $(PICTURES)/README.md || $(BIN)/python -m data_prep.corpora.build_pictures $(PICTURES)
	@echo "built: $(PICTURES); train on it with \`$(BIN)/cnclip run pictures --set corpus.folder=$(PICTURES)\`"

clean:
	rm -rf $(VENV) build *.egg-info
