.PHONY: check slow bench fmt

check:
	ruff check .
	ruff format --check .
	mypy
	pytest

slow:
	pytest -m slow

bench:
	for script in merge evaluator measure search; do python benchmarks/$$script.py; done

fmt:
	ruff check --fix .
	ruff format .
