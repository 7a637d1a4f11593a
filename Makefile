.PHONY: check lowest slow bench fmt

# files in the order of conftest.py, the costly ones first: none is left for the end
# a test that hangs is named, and the others go on
SPREAD = -n auto --dist loadfile --no-loadscope-reorder --timeout 900
FAST = tests/test_private_doors.py $(addprefix tests/,request files weights decision reporting) \
	$(addprefix tests/search/test_,acquisition.py kriging.py methods.py surrogate.py) \
	$(addprefix tests/,evaluation registry) tests/workflows/test_job.py \
	tests/workflows/test_run.py::test_the_soup_is_a_new_version_with_its_lineage \
	tests/workflows/test_run.py::test_the_search_run_tells_the_story

check:
	ruff check .
	ruff format --check .
	mypy
	pytest $(SPREAD)

# some four minutes of tests, a main job among them, with the lowest versions that we allow
lowest: .venv-lowest/installed
	.venv-lowest/bin/pytest $(SPREAD) $(FAST)

.venv-lowest/installed: constraints-lowest.txt pyproject.toml
	rm -rf .venv-lowest
	python3 -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet -c constraints-lowest.txt -e '.[dev]'
	touch $@

slow:
	pytest -m slow

bench:
	for script in merge evaluator measure search gate scale; do python benchmarks/$$script.py; done

fmt:
	ruff check --fix .
	ruff format .
