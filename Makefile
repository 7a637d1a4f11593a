.PHONY: check slow bench fmt

check:
	ruff check .
	ruff format --check .
	mypy
	pytest -n auto --dist loadfile

slow:
	pytest -m slow

bench:
	for script in merge evaluator measure search; do python benchmarks/$$script.py; done

fmt:
	ruff check --fix .
	ruff format .
