.PHONY: check slow bench fmt

check:
	ruff check .
	ruff format --check .
	mypy
	pytest

slow:
	pytest -m slow

bench:
	for script in benchmarks/*.py; do python $$script; done

fmt:
	ruff check --fix .
	ruff format .
