# Shortcuts for developers. Every target is one command that also works without make.
.DEFAULT_GOAL := help
.PHONY: help environment lint format lock test test-slow clean

help: ## Show this list
	@sed -nE 's/^([a-z-]+): ## /make \1\t/p' Makefile | expand -t 20

environment: ## Create .venv with what training, the tests and the linters need
	./setup_env.sh --dev

lint: ## Check formatting, types, spelling and shell scripts; change nothing
	.ci/lint

format: ## Format the files, then check them
	.ci/lint --fix

lock: ## Write requirements/ with the hashes of all packages
	.ci/lock

test: ## Run the linters and the test suite
	./run_tests.sh

test-slow: ## Run the tests that take minutes or need root
	./run_tests.sh -m slow

clean: ## Delete caches and build products, but not .venv, data and results
	rm -rf build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
