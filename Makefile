# Everything a newcomer needs: `make demo` and `make test`. PYTHON chooses the interpreter (3.11 or 3.12).

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
EMOJI ?= corpora/emoji_zh

.PHONY: install demo test test-slow lint emoji clean

install: $(VENV)/installed

# Peers that parity tests compare with pin old versions of what they do not need here: no dependencies.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "1/4 making $(VENV) with $(PYTHON)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "2/4 updating pip in $(VENV)"
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	@echo "3/4 installing cnclip and its packages (PyTorch among them: some gigabytes, several minutes)"
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev,emoji,onnx]"
	@echo "4/4 installing the peers that tests compare with"
	$(BIN)/python -m pip install --quiet --no-deps cn_clip==1.6.0 open_clip_torch==3.3.0 multilingual-clip==1.0.10
	touch $@
	@echo "done: run $(BIN)/cnclip, or \`make demo\`"

demo: install
	$(BIN)/cnclip run pipeline/recipes/demo.toml

# Two files at once, each whole in one process: tests of a file share what they have made. tests/conftest.py gives the
# order; by the number of their tests the longest files would come last.
test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy cnclip pipeline data_prep training eval

emoji: install
	test -f $(EMOJI)/README.md || $(BIN)/python -m data_prep.corpora.build_emoji $(EMOJI)
	$(BIN)/cnclip run pipeline/recipes/emoji_zh.toml --set corpus.folder=$(EMOJI)

clean:
	rm -rf $(VENV) build *.egg-info
