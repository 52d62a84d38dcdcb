"""Declarations shared by Python, C++ and Triton: an entry that only one of them has is an error."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive.backends import plans
from fused_adaptive.core import declarations
from fused_adaptive.core import library as native_library
from fused_adaptive.engine.checkpoint import specs
from fused_adaptive.optimizers.adam import AdamWBackbone
from fused_adaptive.optimizers.sgd import SGDBackbone

from ..common.cases import CASES, parameters

needs_library = pytest.mark.skipif(bool(native_library.why_not()), reason=native_library.why_not())


@needs_library
def test_the_library_has_the_declarations_of_the_package():
    assert declarations.difference(torch.ops.fused_adaptive.declarations()) == ""


def added(table: str) -> str:
    return declarations.text().replace(f"{table} ", f"{table} another ", 1)


@pytest.mark.parametrize("table", [line.split()[0] for line in declarations.text().splitlines()])
def test_an_entry_that_only_one_side_has_is_named(table):
    assert declarations.difference(added(table)) == (
        f"its {table} differ from the package's (only there: ['another'], only here: [])"
    )
    assert declarations.difference("") == "its tables differ from the package's"


@needs_library
def test_a_library_with_other_declarations_is_not_used(monkeypatch):
    own = declarations.text()
    monkeypatch.setattr(declarations, "text", lambda: own.replace(" lr_scale", ""))
    monkeypatch.setattr(native_library, "_reason", None)
    reason = native_library.why_not()
    assert "its hyper differ from the package's (only there: ['lr_scale'], only here: [])" in reason
    assert "rebuild it" in reason


def test_another_order_of_entries_is_a_difference():
    assert declarations.difference(declarations.text().replace("lr weight_decay", "weight_decay lr")) != ""


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_state_entry_matches_its_declaration(case, dtype):
    optimizer = case.build(parameters(dtype, [(3,)]), backend="reference")
    group, backbone = optimizer.param_groups[0], optimizer.backbone
    for name, spec in specs(backbone, group, dtype).items():
        role = declarations.ROLES[declarations.role_of(backbone.name, name)]
        made = spec.dtype_for(optimizer.param_groups[0]["params"][0])
        own = torch.float64 if dtype == torch.float64 else torch.float32
        declared = {"state": own, "step": torch.float32}.get(role.dtype) or getattr(torch, role.dtype)
        assert (made, not spec.scalar) == (declared, role.shaped), name


@pytest.mark.parametrize(("amsgrad", "nesterov", "momentum"), [*product([False, True], [False, True], [0.0, 0.9])])
def test_the_structure_follows_the_options_of_the_backbone(amsgrad, nesterov, momentum):
    group = {"momentum": momentum, "nesterov": nesterov and momentum > 0, "amsgrad": amsgrad}
    for backbone in (SGDBackbone(), AdamWBackbone()):
        structure = declarations.STRUCTURES[plans.structure(backbone.name, group)]
        spec = backbone.state_spec(group)
        names = [name for name in declarations.STATE_NAMES[backbone.name] if name in spec]
        assert len(names) == structure.states
        assert [spec[name].optional for name in names] == [structure.is_lazy] * structure.states
        assert backbone.direction_in_state(group) != structure.stores_direction


def test_tritons_tables_are_complete():
    pytest.importorskip("triton")
    from fused_adaptive.backends.triton import fields, tables

    assert list(tables.STRUCTURES) == list(declarations.STRUCTURES)
    assert {name: i for i, name in enumerate(declarations.ROLES)} == tables.COLUMNS
    constants = {
        name: value.value for name, value in vars(fields).items() if name.isupper() and hasattr(value, "value")
    }
    assert [constants[name.upper()] for name in declarations.Hyper._fields] == list(
        range(len(declarations.Hyper._fields))
    )
    assert constants["NUMEL"] == len(declarations.ROLES)
    assert constants["TRAITS"] < constants["TENSOR_FIELDS"]


def test_kernels_have_only_declared_policies():
    assert [policy.__name__ for policy in plans.POLICIES if policy is not fa.FixedLR] == list(declarations.POLICIES)
