PYTHON ?= python3
DEMO := .venv-demo
TEST := .venv

.PHONY: demo test lint clean

demo: $(DEMO)/.ready ## analyse a real chest radiograph with the embedded weights
	$(DEMO)/bin/lungscope analyze --demo --out out/demo --write json,png,html
	@echo "Open out/demo/index.html"

test: $(TEST)/.ready ## run all tests
	./.ci/packages
	$(TEST)/bin/python -m pytest

lint: $(TEST)/.ready ## style, types and import contracts
	$(TEST)/bin/ruff check .
	$(TEST)/bin/mypy
	$(TEST)/bin/lint-imports

$(DEMO)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet --editable '.[demo]'
	@touch $@

# pip and not a faster installer: a torch build that lies on the machine's own disk is then used.
$(TEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python -m pip install --quiet --editable '.[train,dev]'
	@touch $@

clean:
	rm -rf $(DEMO) $(TEST) out
