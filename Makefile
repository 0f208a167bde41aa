# Two commands: `make demo` and `make test`. Both set up .venv first where that is missing.
# `make lowest` tests with the lowest versions that setup.cfg names, in an environment of its own.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
LOWEST := .venv-lowest/bin
LOWEST_TESTS := $(addprefix tests/test_,volume.py labels.py io_nifti.py io_nifti_write.py io_itk.py io_dicom_series.py \
	io_dicom_pydicom_files.py io_dicom_seg.py io_rtstruct.py report_dicom_sr.py report_pictures.py model_plan.py model_runtime.py \
	model_segmenter.py train_watch.py train_case_files.py cli.py::test_train_segment_evaluate cli.py::test_wrong_use_ends_with_2)

.PHONY: demo test lowest check setup clean

demo: .venv/ready
	$(BIN)/medseg demo demo_out

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=worksteal $(if $(REALDATA),--realdata=$(REALDATA))

# Warnings of old libraries are no errors.
lowest: .venv-lowest/ready
	OMP_NUM_THREADS=1 $(LOWEST)/python -m pytest -W ignore -p no:cacheprovider $(LOWEST_TESTS)

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: .venv/ready

.venv/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[demo,dev]"
	touch .venv/ready

.venv-lowest/ready: setup.cfg pyproject.toml .ci/constraints.py
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST)/python .ci/constraints.py > .venv-lowest/constraints.txt
	$(LOWEST)/python -m pip install --quiet "$(TORCH)"
	$(LOWEST)/python -m pip install --quiet --constraint .venv-lowest/constraints.txt \
		--editable ".[demo,openvino,onnx,swin,codecs,cluster,tensorboard]" pytest hypothesis
	touch .venv-lowest/ready

clean:
	rm -rf .venv .venv-lowest demo_out
