"""The experiment that times forms on a GPU has a case for every kernel."""

import os

import jax

from experiments import accelerator_forms
from tokenvit_jax.kernels.forms import FORMS


def test_every_kernel_has_a_case():
    kernels = {operator for operator, forms in FORMS.items() if "cuda" in forms}
    cases = list(accelerator_forms.kernel_cases())
    covered = {operator for case in cases for operator in case.covers}
    assert kernels <= covered
    assert len({case.name for case in cases}) == len(cases)


def test_kernels_are_off_in_a_context(monkeypatch):
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(True))
    with accelerator_forms.with_kernels(False):
        assert os.environ["TOKENVIT_JAX_KERNELS"] == "off"
    assert "TOKENVIT_JAX_KERNELS" not in os.environ
    assert len(cleared) == 2  # what was traced before, and what was traced inside


def test_cases_compute():
    """Traces two cases; the shapes are too large to run here."""
    for case in accelerator_forms.kernel_cases():
        if case.name.startswith(("K-Means", "add and")):
            shape = jax.eval_shape(lambda case=case: case.fn(*case.inputs())).shape
            assert shape[0] == 128
